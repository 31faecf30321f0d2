import pytest
import torch
from loss_inputs import cosine, golden, golden_array, normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_msn.losses.simclr import nt_xent_loss

NUM_CLASSES, DIM = 3, 4


def loop_nt_xent(projections, temperature, full_gradient):
    total = 0.0
    compared = projections if full_gradient else projections.detach()
    for i, row in enumerate(projections):
        pair = (i + len(projections) // 2) % len(projections)
        exponentials = {j: (cosine(row, compared[j]) / temperature).exp() for j in range(len(projections)) if j != i}
        total = total - (exponentials[pair] / sum(exponentials.values())).log()
    return total / len(projections)


@pytest.mark.parametrize("case", golden("nt_xent_loss"), ids=lambda case: f"seed {case['seed']}")
def test_nt_xent_equals_the_golden_numbers(case):
    projections = golden_array(case["input_seed"], 2 * case["batch"], case["dim"])
    loss = nt_xent_loss(projections, temperature=case["temperature"], full_gradient=False)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert projections.grad.norm().item() == pytest.approx(case["grad"], rel=1e-5)


@pytest.mark.parametrize("full_gradient", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("tile_size", [None, 1, 2, 4, 100])
def test_nt_xent_equals_the_loop(temperature, full_gradient, tile_size):
    projections = normal(6, DIM).requires_grad_()
    settings = {"temperature": temperature, "full_gradient": full_gradient, "tile_size": tile_size}
    loss = nt_xent_loss(projections, **settings)
    expected = loop_nt_xent(projections, temperature, full_gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, projections)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_the_full_gradient_is_the_default_and_about_twice_that_of_the_authors():
    projections = normal(64, 16).requires_grad_()
    full, default, authors = (
        torch.autograd.grad(nt_xent_loss(projections, **settings), projections)[0].flatten()
        for settings in ({"full_gradient": True}, {}, {"full_gradient": False})
    )
    assert torch.equal(default, full)
    assert torch.cosine_similarity(full, authors, dim=0) > 0.98
    assert authors.norm() / full.norm() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rows", [0, 5])
def test_nt_xent_needs_two_views_an_image(rows):
    with pytest.raises(ValueError, match=r"\(2\*B, D\)"):
        nt_xent_loss(normal(rows, DIM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_tiles_change_neither_loss_nor_gradient(dtype, temperature):
    results = []
    for tile_size in (None, 48):
        projections = normal(200, 16).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = nt_xent_loss(projections, temperature=temperature, tile_size=tile_size)
            (3 * loss).backward()
        assert loss.dtype == torch.float32
        results.append((loss.detach(), projections.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    difference = (results[1][1] - results[0][1]).float().norm() / results[0][1].float().norm()
    assert difference < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # a rounding of the gradient itself


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


@pytest.mark.parametrize(("tile_size", "largest"), [(None, 64 * 64), (16, 64 * DIM), (32, 32 * 32)])
def test_with_tiles_no_matrix_of_all_similarities_is_made(tile_size, largest):
    projections = normal(64, DIM).requires_grad_()
    with LargestTensor() as seen:
        nt_xent_loss(projections, tile_size=tile_size).backward()
    assert seen.largest == largest


@pytest.mark.parametrize("tile_size", [0, 2.5])
def test_a_tile_below_one_view_is_an_error(tile_size):
    with pytest.raises(ValueError, match=f"`tile_size`.*{tile_size}"):
        nt_xent_loss(normal(4, DIM), tile_size=tile_size)
