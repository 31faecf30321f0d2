"""The loss of PAWS against golden numbers of the reference and a float64 loop written from its equations."""

import pytest
import torch
from loss_inputs import class_rows, cosine, golden, golden_array, normal

from hf_msn.losses.paws import paws_loss

NUM_IMAGES, NUM_CROPS, NUM_SUPPORTS, NUM_CLASSES, DIM = 3, 2, 6, 3, 4


def inputs(dtype=torch.float64, num_crops: int = NUM_CROPS) -> list[torch.Tensor]:
    """Anchors, their supports, targets, their supports: all of them require a gradient."""
    sizes = [(2 + num_crops) * NUM_IMAGES, NUM_SUPPORTS, 2 * NUM_IMAGES, NUM_SUPPORTS]
    return [normal(size, DIM, seed=seed).to(dtype).requires_grad_() for seed, size in enumerate(sizes)]


def labels(smoothing: float = 0.0) -> torch.Tensor:
    return class_rows(NUM_SUPPORTS, NUM_CLASSES, smoothing)


def loop_prediction(query, supports, support_labels, temperature) -> list:
    weights = [(cosine(query, support) / temperature).exp() for support in supports]
    total = sum(weights)
    return [sum(w / total * y[c] for w, y in zip(weights, support_labels)) for c in range(support_labels.shape[1])]


def loop_sharpen(row, temperature) -> list:
    powers = [p ** (1 / temperature) for p in row]
    return [power / sum(powers) for power in powers]


def loop_paws_loss(
    anchors,
    anchor_supports,
    targets,
    target_supports,
    support_labels,
    temperature=0.1,
    sharpen_temperature=0.25,
    me_max_weight=1.0,
):
    supports = target_supports.detach()
    predictions = [loop_prediction(target, supports, support_labels, temperature) for target in targets.detach()]
    swapped = [loop_sharpen(prediction, sharpen_temperature) for prediction in predictions]
    num_images = len(targets) // 2
    cross_entropy, sharpened = 0.0, []
    for row, anchor in enumerate(anchors):
        view, image = divmod(row, num_images)
        if view < 2:
            target = swapped[row]
        else:
            target = [(a + b) / 2 for a, b in zip(swapped[image], swapped[num_images + image])]
        target = [0.0 if t < 1e-4 else t for t in target]
        prediction = loop_prediction(anchor, anchor_supports, support_labels, temperature)
        cross_entropy = cross_entropy - sum(t * p.log() for t, p in zip(target, prediction)) / len(anchors)
        sharpened.append(loop_sharpen(prediction, sharpen_temperature))
    mean = [sum(row[c] for row in sharpened) / len(anchors) for c in range(support_labels.shape[1])]
    me_max = sum(p * p.log() for p in mean)
    target_rows = torch.stack([torch.stack(row) for row in swapped])
    return cross_entropy + me_max_weight * me_max, cross_entropy, me_max, target_rows.where(target_rows >= 1e-4, 0.0)


@pytest.mark.parametrize("case", golden("paws_loss"), ids=lambda case: f"{case['multicrop']} crops")
def test_values_and_gradients_equal_the_golden_numbers(case):
    seeds, dim = case["input_seeds"], case["dim"]
    num_supports = case["classes"] * case["images_per_class"]
    anchors = golden_array(seeds["anchors"], (2 + case["multicrop"]) * case["batch"], dim)
    anchor_supports = golden_array(seeds["anchor_supports"], num_supports, dim)
    targets = golden_array(seeds["targets"], 2 * case["batch"], dim)
    target_supports = golden_array(seeds["target_supports"], num_supports, dim)
    output = paws_loss(
        anchors,
        anchor_supports,
        targets,
        target_supports,
        torch.eye(case["classes"])[torch.arange(num_supports) % case["classes"]],
        num_small_crops=case["multicrop"],
        temperature=case["temperature"],
        sharpen_temperature=case["sharpen"],
    )
    output.loss.backward()
    assert output.cross_entropy.item() == pytest.approx(case["loss"], rel=1e-5)
    assert output.me_max.item() == pytest.approx(case["me_max"], rel=1e-5)
    assert output.loss.item() == pytest.approx(case["loss"] + case["me_max"], rel=1e-5)
    assert anchors.grad.norm().item() == pytest.approx(case["grad_anchor"], rel=1e-5)
    assert anchor_supports.grad.norm().item() == pytest.approx(case["grad_support"], rel=1e-5)
    scale = case["grad_anchor"]
    assert anchors.grad[0, :4].tolist() == pytest.approx(case["grad_anchor_0"], rel=1e-5, abs=1e-6 * scale)
    assert targets.grad is None and target_supports.grad is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_crops", [0, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "sharpen_temperature": 0.7},
        {"temperature": 0.05, "sharpen_temperature": 1.0},
        {"me_max_weight": 0.0},
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_loop(settings, num_crops, smoothing):
    tensors = inputs(num_crops=num_crops)
    output = paws_loss(*tensors, labels(smoothing), num_small_crops=num_crops, **settings)
    expected = loop_paws_loss(*tensors, labels(smoothing), **settings)
    found = (output.loss, output.cross_entropy, output.me_max, output.target_probabilities)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-13)
    gradients = torch.autograd.grad(output.loss, tensors[:2])
    for gradient, reference in zip(gradients, torch.autograd.grad(expected[0], tensors[:2])):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.02, 0.004, 0.001])
def test_a_low_temperature_neither_underflows_nor_overflows(temperature):
    tensors = inputs(torch.float32)
    output = paws_loss(*tensors, labels().float(), num_small_crops=NUM_CROPS, temperature=temperature)
    gradients = torch.autograd.grad(output.loss, tensors[:2])
    # The same in logarithms, in float64, class by class.
    anchors, supports, targets, target_supports = (tensor.detach().double() for tensor in tensors)
    anchors.requires_grad_()
    supports.requires_grad_()

    def log_predictions(queries, keys):
        cosines = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(keys).T
        log_weights = torch.log_softmax(cosines / temperature, dim=1)
        columns = [torch.logsumexp(log_weights[:, labels()[:, c] > 0], dim=1) for c in range(NUM_CLASSES)]
        return torch.stack(columns, dim=1)

    swapped = torch.softmax(log_predictions(targets, target_supports) / 0.25, dim=1)
    first, second = swapped.chunk(2)
    wanted = torch.cat([first, second, *[(first + second) / 2] * NUM_CROPS])
    wanted = torch.where(wanted < 1e-4, 0.0, wanted)
    predicted = log_predictions(anchors, supports)
    mean = torch.softmax(predicted / 0.25, dim=1).mean(dim=0)
    expected = -(wanted * predicted).sum(dim=1).mean() + torch.special.xlogy(mean, mean).sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (anchors, supports))):
        # At tau = 0.001 the rounding of a float32 cosine alone changes a logarithm by 1e-4.
        assert (gradient - reference).norm() <= 1e-2 * reference.norm()


def test_a_class_without_support_changes_nothing():
    tensors = inputs()
    wider = torch.cat([labels(), torch.zeros(NUM_SUPPORTS, 2, dtype=torch.float64)], dim=1)
    output = paws_loss(*tensors, labels(), num_small_crops=NUM_CROPS)
    same = paws_loss(*tensors, wider, num_small_crops=NUM_CROPS)
    torch.testing.assert_close(same.loss, output.loss, rtol=1e-12, atol=0)
    for gradient, reference in zip(
        torch.autograd.grad(same.loss, tensors[:2]), torch.autograd.grad(output.loss, tensors[:2])
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"anchors": 5}, "there must be 4 anchors and 2 targets an image"),
        ({"num_small_crops": 3}, "there must be 5 anchors and 2 targets an image"),
        ({"num_small_crops": -1}, "`num_small_crops` must be >= 0"),
        ({"labels": 4}, "Each support needs an embedding"),
    ],
    ids=str,
)
def test_wrong_shapes_and_settings_are_named(change, message):
    anchors, supports, targets, target_supports = inputs()
    rows = change.pop("anchors", len(anchors))
    num_labels = change.pop("labels", NUM_SUPPORTS)
    settings = {"num_small_crops": NUM_CROPS, **change}
    with pytest.raises(ValueError, match=message):
        paws_loss(anchors[:rows], supports, targets, target_supports, labels()[:num_labels], **settings)
