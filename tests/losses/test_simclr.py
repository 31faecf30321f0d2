import pytest
import torch
from loss_inputs import cosine, golden, golden_array, normal

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
def test_nt_xent_equals_the_loop(temperature, full_gradient):
    projections = normal(6, DIM).requires_grad_()
    loss = nt_xent_loss(projections, temperature=temperature, full_gradient=full_gradient)
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
