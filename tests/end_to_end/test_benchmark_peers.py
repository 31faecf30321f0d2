"""scripts/benchmark_peers.py: with our own step as the peer, and with those libraries that are installed."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 8 --image_size 32 --focal_size 16 "
    "--num_prototypes 16 --batch_size 4 --steps 3 --warmup_steps 1 --threads 1 --images 3 --jpeg_size 64 48 --cpu"
).split()
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_peers

    return benchmark_peers


@pytest.fixture
def shape(script):
    return script.Shape(32, 2, 2, 8, 0.25, 16, 32, 16, 1, 2, 4)


@pytest.fixture
def twin(script, monkeypatch):
    """A library that has our own step, but no focal views, and our own views."""
    import peer_sides
    import peer_views

    def side(shape, device):
        if shape.focal_views:
            raise peer_sides.UnsupportedViewsError("it has none")
        return replace(peer_sides.our_side(shape, device), name="twin", differs=["nothing"])

    module = ModuleType("peers_twin")
    side.__module__ = "peers_twin"
    module.SIDES = [side]
    module.VIEWS = [lambda shape: replace(peer_views.our_views(shape), name="twin", differs=["nothing"])]
    monkeypatch.setitem(sys.modules, "peers_twin", module)
    monkeypatch.setitem(script.PEERS, "twin", ("peers_twin", "pip install twin"))
    monkeypatch.setitem(script.PEERS, "absent", ("peers_absent", "pip install absent"))
    return module


def test_tables_and_json_hold_ours_the_peer_and_what_is_absent(script, twin, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "peers.json"
    flags = [*TINY, "--focal_views", "2", "0", "--peers", "twin", "absent", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_peers.py", *flags])
    script.main()
    from benchmark_report import cell

    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 1000

    assert list(results["steps"]["2"]["work"]) == ["hf_msn"]
    assert results["steps"]["2"]["refusals"] == ["twin: not at 2 focal views (it has none)"]
    assert "twin: not at 2 focal views (it has none)" in printed
    entry = results["steps"]["0"]
    assert entry["work"]["twin"] == entry["work"]["hf_msn"]  # the same seed, weights, views and masks
    for precision in ("fp32", "bf16"):
        ours, theirs = (entry["precision"][precision][name] for name in ("hf_msn", "twin"))
        assert len(ours["seconds"]) == len(theirs["seconds"]) == 3 and ours["ratio"] is None
        assert theirs["images_per_second"]["median"] == sorted(4 / value for value in theirs["seconds"])[1]
        rounds = sorted(b / a for a, b in zip(ours["seconds"], theirs["seconds"]))
        assert theirs["ratio"]["median"] == rounds[1] and theirs["ratio"]["range"] == [rounds[0], rounds[2]]
        assert cell(theirs["ratio"]) in printed and cell(ours["images_per_second"]) in printed
    assert len(results["views"]["rates"]["twin"]["seconds"]) == 3
    assert cell(results["views"]["rates"]["twin"]["ratio"]) in printed
    assert results["absent"]["absent"].endswith("pip install absent")
    assert "absent: not installed (No module named 'peers_absent'): pip install absent" in printed
    assert "twin, step and twin, views\n- nothing" in printed


def test_without_any_peer_ours_is_measured_alone(script, twin, monkeypatch, capsys):
    flags = [*TINY, "--focal_views", "2", "--peers", "absent", "--precision", "fp32", "--images", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmark_peers.py", *flags])
    script.main()
    printed = capsys.readouterr().out
    assert "| hf_msn |" in printed and "pip install absent" in printed and "Views of an image" not in printed


def test_the_work_of_our_step_is_counted(script, shape):
    side = script.our_side(shape, CPU)
    views = script.random_views(shape, 0)
    target = side.model.target_encoder
    before = [parameter.clone() for parameter in target.parameters()]
    work = side.work(views, 4)
    # 16 patches of the target, of which the anchor keeps 12; a focal view has 4; each with the [CLS]
    assert work["tokens"] == {17: 1.0, 13: 1.0, 5: 2.0}
    trained = sum(parameter.numel() for group in side.optimizer.param_groups for parameter in group["params"])
    assert work["parameters"] == trained and work["prototypes"] == 16 and math.isfinite(work["loss"])
    # the projection head alone: 3 products a row of (32 -> 2048 -> 2048 -> 256), forward and twice backward
    head = 2 * (32 * 2048 + 2048 * 2048 + 2048 * 256)
    assert work["gflop"] * 1e9 > (3 * 3 + 1) * head
    assert any(not torch.equal(old, new) for old, new in zip(before, target.parameters()))  # the average moved


def test_a_step_is_forward_backward_clipping_adamw_and_average(script, shape):
    torch.manual_seed(0)
    ours = script.our_side(shape, CPU)
    torch.manual_seed(0)
    slow = script.our_side(shape, CPU)
    views = script.random_views(shape, 0)
    loss = ours.step(views, "fp32")

    expected = slow.loss(views)
    expected.backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in slow.clipped))
    scale = min(1.0, 3.0 / (norm + 1e-6))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    clipped = {id(parameter) for parameter in slow.clipped}
    for group, other in zip(slow.optimizer.param_groups, ours.optimizer.param_groups):
        for before, after in zip(group["params"], other["params"]):
            gradient = before.grad * scale if id(before) in clipped else before.grad
            # the first step of Adam, whose moments are the gradient and its square
            moved = before * (1 - group["lr"] * group["weight_decay"])
            moved = moved - group["lr"] * gradient / (gradient.abs() + group["eps"])
            torch.testing.assert_close(after, moved, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": 8}, "prototypes: 16 of hf_msn, 8 of other"),
        ({"tokens": {17: 2.0, 5: 2.0}}, "tokens: .* of other"),
        ({"parameters": 104}, "parameters: 100 of hf_msn, 104 of other"),
        ({"loss": math.inf}, "The loss of other is inf"),
    ],
)
def test_unequal_work_is_refused(script, change, message):
    ours = {"loss": 1.0, "prototypes": 16, "parameters": 100, "tokens": {17: 1.0, 13: 1.0, 5: 2.0}}
    script.check_equal_work(ours, {**ours, "loss": 2.0, "parameters": 102}, "other", other_tokens=False)
    with pytest.raises(RuntimeError, match=message):
        script.check_equal_work(ours, {**ours, **change}, "other", other_tokens=False)
    if "tokens" in change:
        script.check_equal_work(ours, {**ours, **change}, "other", other_tokens=True)


def test_views_of_other_shapes_are_refused(script, shape):
    from peer_views import Views, made_up_jpegs, measure_views, our_views

    jpegs = made_up_jpegs(2, 64, 48)
    seconds = measure_views([our_views(shape)], jpegs, shape)
    assert len(seconds["hf_msn"]) == 2
    missing = Views("other", lambda jpeg: our_views(shape).make(jpeg)[:-1])
    with pytest.raises(RuntimeError, match="The views of other must be float32"):
        measure_views([our_views(shape), missing], jpegs, shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": ["fp8"]}, "`precision` is of fp32 and bf16, but has"),
        ({"peers": ["solo"]}, "`peers` is of lightly and stable_pretraining, but has"),
        ({"steps": 0}, "`steps` must be >= 1, but is 0"),
        ({"focal_views": [-1]}, "`focal_views` is one or more numbers >= 0"),
        ({"jpeg_size": [500]}, "`jpeg_size` is width and height"),
    ],
)
def test_bad_arguments_are_errors(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.PeerArguments(**arguments)


def copy_weights(ours, theirs) -> None:
    """Ours to lightly's modules around timm's; it has no biases before batch normalisation, which cancels them."""
    from plain_step import _plain_weights

    weights, renamed = ours.model.state_dict(), {"prototypes": ours.prototypes}
    for prefix, encoder, head in (
        ("", "encoder.", "projection_head."),
        ("target_", "target_encoder.", "target_projection_head."),
    ):
        for name, tensor in _plain_weights(weights, encoder, head).items():
            name = name.replace("encoder.", "encoder.vit.").replace("patch_embed.", "patch_embed.proj.")
            name = name.replace("attention.", "attn.").replace("fc", "mlp.fc").replace("head.", "head.layers.")
            if name != "prototypes":
                renamed[prefix + name] = tensor
    missing, extra = theirs.model.load_state_dict(renamed, strict=False)
    assert {name.removeprefix("target_") for name in missing} == {"encoder.mask_token"}
    assert {name.removeprefix("target_") for name in extra} == {"head.layers.0.bias", "head.layers.3.bias"}


def test_lightly_has_our_loss_from_our_weights(script, shape):
    pytest.importorskip(
        "lightly", reason="the comparison with lightly, which nothing else needs: pip install lightly timm"
    )
    import peers_lightly

    shape = replace(shape, mask_ratio=0.0, focal_views=0)
    ours, theirs = script.our_side(shape, CPU), peers_lightly.timm_side(shape, CPU)
    batch = script.random_views(shape, 0)
    copy_weights(ours, theirs)
    assert theirs.loss(theirs.prepare(batch)).item() == pytest.approx(ours.loss(batch).item(), rel=1e-4)


@pytest.mark.parametrize("peer", ["lightly", "stable_pretraining"])
def test_installed_libraries_do_equal_work(script, shape, peer):
    sides, _, absent = script.load_peers([peer])
    if absent:
        pytest.skip(absent[peer])
    for focal_views in (2, 0):
        given = replace(shape, focal_views=focal_views)
        batch = script.random_views(given, 0)
        built, refusals = script.build_sides([script.our_side, *sides], given, CPU)
        assert len(built) + len(refusals) == 1 + len(sides)
        ours = built[0].work(batch, 4)
        for side in built[1:]:
            script.check_equal_work(ours, side.work(side.prepare(batch), 4), side.name, side.other_tokens)
