import pytest
import torch
from loss_inputs import class_rows, cosine, golden, golden_array, normal

from hf_msn.losses.simclr import nt_xent_loss
from hf_msn.losses.suncet import suncet_loss

NUM_CLASSES, DIM = 3, 4


def labels(num: int, smoothing: float = 0.0) -> torch.Tensor:
    return class_rows(num, NUM_CLASSES, smoothing)


def loop_suncet(projections, soft_labels, temperature):
    total = 0.0
    for i, row in enumerate(projections):
        exponentials = {
            j: (cosine(row, projections[j]) / temperature).exp() for j in range(len(projections)) if j != i
        }
        for c in range(soft_labels.shape[1]):
            p = sum(value * soft_labels[j][c] for j, value in exponentials.items()) / sum(exponentials.values())
            total = total - soft_labels[i][c] * p.log()
    return total / len(projections)


@pytest.mark.parametrize("case", golden("suncet_loss"), ids=lambda case: f"seed {case['seed']}")
def test_suncet_equals_the_golden_numbers(case):
    num, classes = case["classes"] * case["images_per_class"], case["classes"]
    projections = golden_array(case["input_seed"], num, case["dim"])
    loss = suncet_loss(projections, torch.eye(classes)[torch.arange(num) % classes], temperature=case["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert projections.grad.norm().item() == pytest.approx(case["grad"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_suncet_equals_the_loop(temperature, smoothing):
    projections = normal(9, DIM).requires_grad_()
    loss = suncet_loss(projections, labels(9, smoothing), temperature=temperature)
    expected = loop_suncet(projections, labels(9, smoothing), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, projections)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_a_low_temperature_gives_the_loss_of_float64_logarithms(temperature):
    projections = normal(9, DIM).float().requires_grad_()
    exact = projections.detach().double().requires_grad_()
    unit = torch.nn.functional.normalize(exact)
    logits = (unit @ unit.T / temperature).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    log_weights = torch.log_softmax(logits, dim=1)
    same = (labels(9) @ labels(9).T > 0) & ~torch.eye(9, dtype=torch.bool)
    expected = -torch.logsumexp(log_weights.masked_fill(~same, -torch.inf), dim=1).mean()
    loss = suncet_loss(projections, labels(9).float(), temperature=temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient, reference = torch.autograd.grad(loss, projections)[0], torch.autograd.grad(expected, exact)[0]
    assert (gradient - reference).norm() <= 1e-2 * reference.norm()
    assert nt_xent_loss(projections[:8], temperature=temperature).isfinite()


def test_an_image_that_is_the_only_one_of_its_class_is_an_error():
    with pytest.raises(ValueError, match="1 of 4 labelled images are the only one of their class"):
        suncet_loss(normal(4, DIM), labels(4)[[0, 0, 1, 0]])


def test_suncet_needs_a_row_of_labels_for_each_image():
    with pytest.raises(ValueError, match=r"projections \(N, D\) and labels \(N, C\)"):
        suncet_loss(normal(4, DIM), labels(3))
