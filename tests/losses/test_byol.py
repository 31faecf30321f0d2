import pytest
import torch
from loss_inputs import cosine, normal

from hf_msn import byol_loss

IMAGES, DIM = 3, 4


def loop_byol(predictions, targets, num_crops, normalize):
    """The sum over both targets of the mean distance of the views that predict them, image by image."""
    total = 0.0
    for image in range(IMAGES):
        rows = [predictions[view * IMAGES + image] for view in range(2 + num_crops)]
        second, first = targets[image].detach(), targets[IMAGES + image].detach()  # swapped
        for target, other in ((second, rows[0]), (first, rows[1])):
            for row in (other, *rows[2:]):
                distance = 2 - 2 * cosine(row, target) if normalize else sum((a - b) ** 2 for a, b in zip(row, target))
                total = total + distance / (1 + num_crops)
    return total / IMAGES


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_crops", [0, 1, 3])
def test_loss_and_gradient_equal_the_loop(num_crops, normalize):
    predictions = normal((2 + num_crops) * IMAGES, DIM).requires_grad_()
    targets = normal(2 * IMAGES, DIM, seed=1).requires_grad_()
    loss = byol_loss(predictions, targets, normalize=normalize)
    expected = loop_byol(predictions, targets, num_crops, normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, none = torch.autograd.grad(loss, (predictions, targets), allow_unused=True)
    assert none is None
    torch.testing.assert_close(found, torch.autograd.grad(expected, predictions)[0], rtol=1e-10, atol=1e-13)


def test_equal_directions_cost_nothing_and_opposite_ones_8():
    rows = normal(2 * IMAGES, DIM)
    assert byol_loss(5 * rows, rows).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(-rows, rows).item() == pytest.approx(8)


@pytest.mark.parametrize(
    "predictions, targets", [((6, 4), (6, 3)), ((5, 4), (4, 4)), ((2, 4), (4, 4)), ((0, 4), (0, 4))]
)
def test_shapes_that_do_not_fit_are_refused(predictions, targets):
    with pytest.raises(ValueError, match=str(predictions[0])):
        byol_loss(normal(*predictions), normal(*targets))
