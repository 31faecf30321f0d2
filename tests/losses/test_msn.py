"""The loss of MSN against golden numbers of the reference and a float64 loop written from its equations."""

import math

import pytest
import torch
from loss_inputs import cosine, golden, golden_array, normal

from hf_msn.losses.msn import msn_loss

NUM_IMAGES, NUM_VIEWS, NUM_PROTOTYPES, DIM = 3, 2, 5, 4


def inputs(dtype=torch.float64, requires_grad: bool = True) -> list[torch.Tensor]:
    """Anchors, targets and prototypes."""
    shapes = [(NUM_VIEWS * NUM_IMAGES, DIM), (NUM_IMAGES, DIM), (NUM_PROTOTYPES, DIM)]
    tensors = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def loop_assignments(embedding, prototypes, temperature):
    exponentials = [(cosine(embedding, prototype) / temperature).exp() for prototype in prototypes]
    return [exponential / sum(exponentials) for exponential in exponentials]


def loop_targets(targets, prototypes, temperature, sharpen_temperature, use_sinkhorn):
    rows = []
    for target in targets.detach():
        powers = [p ** (1 / sharpen_temperature) for p in loop_assignments(target, prototypes.detach(), temperature)]
        rows.append([power / sum(powers) for power in powers])
    for _ in range(3 if use_sinkhorn else 0):
        columns = [sum(row[k] for row in rows) for k in range(len(prototypes))]
        rows = [[q / column for q, column in zip(row, columns)] for row in rows]
        rows = [[q / sum(row) for q in row] for row in rows]
    return rows


def loop_msn_loss(
    anchors,
    targets,
    prototypes,
    temperature=0.1,
    sharpen_temperature=0.25,
    use_sinkhorn=False,
    me_max_weight=1.0,
    entropy_weight=0.0,
):
    target_rows = loop_targets(targets, prototypes, temperature, sharpen_temperature, use_sinkhorn)
    anchor_rows = [loop_assignments(anchor, prototypes, temperature) for anchor in anchors]
    cross_entropy = entropy = 0.0
    for row, anchor in enumerate(anchor_rows):
        target = target_rows[row % len(targets)]  # view-major: all images of the first view, then of the second
        cross_entropy = cross_entropy - sum(t * p.log() for t, p in zip(target, anchor)) / len(anchor_rows)
        entropy = entropy - sum(p * p.log() for p in anchor) / len(anchor_rows)
    mean = [sum(row[k] for row in anchor_rows) / len(anchor_rows) for k in range(len(prototypes))]
    me_max = math.log(len(prototypes)) + sum(p * p.log() for p in mean)
    loss = cross_entropy + me_max_weight * me_max + entropy_weight * entropy
    rows = [torch.stack([torch.stack(list(row)) for row in part]) for part in (anchor_rows, target_rows)]
    return loss, cross_entropy, me_max, entropy, *rows


@pytest.mark.parametrize("case", golden("msn_loss"), ids=lambda case: "sinkhorn" if case["sinkhorn"] else "plain")
def test_values_and_gradients_equal_the_golden_numbers(case):
    anchors, targets, prototypes = (
        golden_array(case["input_seeds"][name], *case["input_shapes"][name])
        for name in ("anchors", "targets", "prototypes")
    )
    output = msn_loss(
        anchors,
        targets,
        prototypes,
        temperature=case["temperature"],
        sharpen_temperature=case["sharpen"],
        use_sinkhorn=case["sinkhorn"],
    )
    output.loss.backward()
    for name in ("cross_entropy", "me_max", "entropy"):
        assert getattr(output, name).item() == pytest.approx(case[name], rel=1e-5)
    assert output.loss.item() == pytest.approx(case["cross_entropy"] + case["me_max"], rel=1e-5)
    assert anchors.grad.norm().item() == pytest.approx(case["grad_anchor"], rel=1e-5)
    assert prototypes.grad.norm().item() == pytest.approx(case["grad_prototypes"], rel=1e-5)
    scale = case["grad_anchor"]
    assert anchors.grad.flatten()[:4].tolist() == pytest.approx(case["grad_anchor_0"], rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_sinkhorn": True},
        {"temperature": 0.5, "sharpen_temperature": 0.7},
        {"temperature": 0.05, "sharpen_temperature": 1.0, "use_sinkhorn": True},
        {"me_max_weight": 5.0},
        {"me_max_weight": 0.0, "entropy_weight": 2.0},
        {"me_max_weight": 0.3, "entropy_weight": 0.7, "use_sinkhorn": True},
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_loop(settings):
    anchors, targets, prototypes = inputs()
    output = msn_loss(anchors, targets, prototypes, **settings)
    expected = loop_msn_loss(anchors, targets, prototypes, **settings)
    for value, reference in zip(output, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-13)
    assert not output.target_probabilities.requires_grad
    gradients = torch.autograd.grad(output.loss, (anchors, prototypes))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected[0], (anchors, prototypes))):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-13)


def test_a_prototype_used_by_no_anchor_has_no_effect_on_value_or_gradient():
    # exp(-2 / 0.01) underflows in float32: the mean assignment of the last prototype is exactly 0.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.02]], requires_grad=True)
    prototypes = torch.tensor([[1.0, 0.0], [1.0, 0.03], [-1.0, 0.0]], requires_grad=True)
    with_unused = msn_loss(embeddings, embeddings.detach(), prototypes, temperature=0.01)
    assert with_unused.anchor_probabilities[:, 2].max().item() == 0.0
    gradients = torch.autograd.grad(with_unused.loss, (embeddings, prototypes))
    without = msn_loss(embeddings, embeddings.detach(), prototypes[:2], temperature=0.01)
    expected = torch.autograd.grad(without.loss, (embeddings, prototypes))
    assert with_unused.loss.item() == pytest.approx(without.loss.item() + math.log(3 / 2), rel=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def extreme_inputs(kind: str) -> list[torch.Tensor]:
    anchors, targets, prototypes = (tensor.float() for tensor in inputs(requires_grad=False))
    if kind == "identical rows":
        anchors[:], targets[:], prototypes[:] = anchors[0], anchors[0], anchors[0]
    elif kind == "opposite rows":
        anchors[:], targets[:], prototypes[:] = anchors[0], -anchors[0], -anchors[0]
        prototypes[0] = anchors[0]
    elif kind == "rows of zeros":
        anchors[0], targets[0], prototypes[0] = 0.0, 0.0, 0.0
    elif kind == "all zeros":
        anchors, targets, prototypes = 0 * anchors, 0 * targets, 0 * prototypes
    elif kind == "huge":
        anchors, targets, prototypes = 1e30 * anchors, 1e30 * targets, 1e15 * prototypes
    elif kind == "tiny":
        anchors, targets, prototypes = 1e-30 * anchors, 1e-30 * targets, 1e-15 * prototypes
    return [anchors, targets, prototypes]


@pytest.mark.parametrize("use_sinkhorn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["ordinary", "identical rows", "opposite rows", "rows of zeros", "all zeros", "huge", "tiny"]
)
def test_everything_is_finite_for_all_temperatures(kind, dtype, use_sinkhorn):
    for temperature in (0.01, 0.05, 0.1, 1.0):
        for sharpen_temperature in (0.05, 0.25, 1.0):
            anchors, targets, prototypes = (tensor.to(dtype).requires_grad_() for tensor in extreme_inputs(kind))
            output = msn_loss(
                anchors,
                targets,
                prototypes,
                temperature=temperature,
                sharpen_temperature=sharpen_temperature,
                use_sinkhorn=use_sinkhorn,
                entropy_weight=1.0,
            )
            output.loss.backward()
            where = f"temperature {temperature}, sharpen_temperature {sharpen_temperature}"
            for name, value in output._asdict().items():
                assert value.isfinite().all(), f"{name} at {where}"
            for name, tensor in (("anchors", anchors), ("prototypes", prototypes)):
                assert tensor.grad.isfinite().all(), f"gradient of {name} at {where}"
            sums = output.target_probabilities.sum(dim=-1)
            torch.testing.assert_close(sums, torch.ones(NUM_IMAGES), rtol=1e-4, atol=0, msg=where)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 4), (3, 4), (5, 4)], r"\(2, 3, 4\), \(3, 4\) and \(5, 4\)"),
        ([(6, 4), (3, 4), (5, 3)], "4, 4 and 3"),
        ([(5, 4), (3, 4), (5, 4)], "5 anchors for 3 targets and 5 prototypes"),
        ([(0, 4), (3, 4), (5, 4)], "0 anchors"),
        ([(6, 4), (0, 4), (5, 4)], "0 targets"),
        ([(6, 4), (3, 4), (0, 4)], "0 prototypes"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(shapes, message):
    with pytest.raises(ValueError, match=message):
        msn_loss(*(torch.ones(shape) for shape in shapes))
