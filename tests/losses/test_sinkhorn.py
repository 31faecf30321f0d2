import pytest
import torch
from loss_inputs import softmax_rows

from hf_msn.losses.sinkhorn import sinkhorn


def loop_sinkhorn(probabilities, iterations):
    q = [list(row) for row in probabilities.tolist()]
    images, prototypes = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(prototypes):
            column = sum(q[b][k] for b in range(images))
            for b in range(images):
                q[b][k] /= column * prototypes
        for b in range(images):
            row = sum(q[b])
            for k in range(prototypes):
                q[b][k] /= row * images
    return images * torch.tensor(q, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_loop(iterations):
    probabilities = softmax_rows(6, 4)
    torch.testing.assert_close(
        sinkhorn(probabilities, iterations), loop_sinkhorn(probabilities, iterations), rtol=1e-12, atol=0
    )


def test_many_sinkhorn_iterations_give_each_prototype_the_same_mass():
    balanced = sinkhorn(softmax_rows(6, 4), 200)
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((4,), 6 / 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_gives_a_prototype_that_nobody_uses_to_all_images_alike(dtype):
    # All images on prototype 0: the columns of the others are 0 / 0 without a floor, and equal with it.
    probabilities = torch.zeros(4, 3, dtype=dtype)
    probabilities[:, 0] = 1.0
    torch.testing.assert_close(sinkhorn(probabilities, 3), torch.full((4, 3), 1 / 3, dtype=dtype), rtol=1e-5, atol=0)


def test_sinkhorn_takes_an_unused_prototype_as_one_that_all_images_use_alike():
    used, column = softmax_rows(5, 3), torch.full((5, 1), 0.37, dtype=torch.float64)
    # The scale of a column does not matter to Sinkhorn, so that any constant stands for the limit to 0.
    expected = loop_sinkhorn(torch.cat([used, column], dim=1), 3)
    torch.testing.assert_close(sinkhorn(torch.cat([used, 0 * column], dim=1), 3), expected, rtol=1e-10, atol=0)


def test_sinkhorn_gives_no_gradient():
    assert not sinkhorn(softmax_rows(3, 2).requires_grad_()).requires_grad


@pytest.mark.parametrize("iterations", [0, -3])
def test_fewer_than_one_sinkhorn_iteration_is_an_error(iterations):
    with pytest.raises(ValueError, match=f"`iterations`.*{iterations}"):
        sinkhorn(softmax_rows(2, 3), iterations)
