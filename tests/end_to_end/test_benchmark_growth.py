"""scripts/benchmark_growth.py: its sweep with made-up times, and one point in real processes."""

import json
import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "mask_ratio": 0.25}
TINY |= {"image_size": 32, "focal_views": 2, "batch_size": 4, "threads": 1, "cpu": True}
FLAGS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_growth

    return benchmark_growth


def made_up(args, point, precision) -> dict:
    """Times that grow as the tokens, with a fixed part of a second, half of it in bf16."""
    seconds = (1.0 if precision == "fp32" else 0.5) + point.batch * args.cost(point)
    return {"seconds": [seconds, 2 * seconds, 4 * seconds], "peak_mib": 100.0 + point.batch}


def measured_once(args, axis) -> dict:
    found = {point: made_up(args, point, "fp32") for point in args.points(axis)}
    return {point: {**entry, "peak_mib": [entry["peak_mib"]]} for point, entry in found.items()}


def test_tables_picture_and_json_hold_every_axis(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "sweep", lambda args, sweep=script.sweep: sweep(args, made_up))
    output = tmp_path / "new" / "growth.json"
    axes = "--batch 2 8 --views 0 2 --size 16 32 64 --ranks 1 2 --precision fp32 bf16 --rounds 2".split()
    monkeypatch.setattr(sys, "argv", ["benchmark_growth.py", *FLAGS, *axes, "--output", str(output)])
    script.main()
    from benchmark_report import cell

    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 10_000
    values = {axis: [row["value"] for row in found["fp32"]] for axis, found in results["axes"].items()}
    assert values == {"batch": [2, 4, 8], "views": [0, 2], "size": [16, 32, 64], "ranks": [1, 2]}
    args = script.GrowthArguments(**TINY)
    for axis, found in results["axes"].items():
        for precision, rows in found.items():
            for row in rows:
                point = script.Point(**{**vars(args.base), axis: row["value"]})
                middle = 2 * made_up(args, point, precision)["seconds"][0]
                assert row["images_per_second"]["median"] == pytest.approx(point.batch * point.ranks / middle)
                assert len(row["seconds"]) == 6 and row["peak_mib"] == 100.0 + point.batch
                assert cell(row["images_per_second"]) in printed and f"{row['peak_mib']:.0f}" in printed
    assert all(row["expected"] is None for axis in ("batch", "ranks") for row in results["axes"][axis]["fp32"])
    rows = {row["value"]: row for row in results["axes"]["size"]["fp32"]}
    at_base = rows[32]["images_per_second"]["median"]
    assert rows[32]["expected"] == pytest.approx(at_base)
    assert rows[64]["expected"] == pytest.approx(at_base * rows[32]["tokens"] / rows[64]["tokens"])
    assert printed.count("by tokens") == 4 and "by ranks" not in printed


def test_ranks_of_gpus_are_expected_to_be_as_fast_as_one_alone(script):
    args = script.GrowthArguments(**TINY, axes=["ranks"], ranks=[1, 2, 4])
    rows = script.summarize_axis(args, "ranks", measured_once(args, "ranks"), gpu=True)
    alone = rows[0]["images_per_second"]["median"]
    assert [row["expected"] for row in rows] == pytest.approx([alone, 2 * alone, 4 * alone])


def test_tokens_are_counted_with_a_third_for_the_target(script):
    args = script.GrowthArguments(**TINY)
    # 16 patches, of which the anchor keeps 12; two focal views of 16 pixels with 4; each with the [CLS]
    assert args.focal_size(32) == 16 and args.focal_size(224) == 96
    assert args.cost(args.base) == pytest.approx(13 + 2 * 5 + 17 / 3)
    assert args.cost(script.Point(4, 0, 64, 1)) == pytest.approx(49 + 65 / 3)


def test_points_take_turns_there_and_back_and_a_shared_one_is_measured_once(script, capsys):
    args = script.GrowthArguments(**TINY, axes=["batch", "views"], batch=[2], views=[0], rounds=3)
    seen = []

    def run(args, point, precision):
        seen.append((point.batch, point.views))
        return made_up(args, point, precision)

    measured = script.sweep(args, run)
    there = [(2, 2), (4, 2), (4, 0)]
    assert seen == [*there, *there[::-1], *there]
    assert all(len(entry["seconds"]) == 9 for entry in measured["fp32"].values())


@pytest.mark.distributed
def test_a_point_is_measured_by_processes_of_its_own(script):
    args = script.GrowthArguments(**TINY, steps=3, warmup_steps=1)
    found = script.run_point(args, script.Point(batch=2, views=1, size=16, ranks=2), "bf16")
    assert len(found["seconds"]) == 3 and all(0 < value < 60 for value in found["seconds"])
    assert math.isfinite(found["peak_mib"]) and found["peak_mib"] >= found["imports_mib"] > 50


def test_a_point_in_this_process_has_the_arguments_of_its_flags(script, monkeypatch, tmp_path):
    import growth_point

    given = []
    monkeypatch.setattr(
        growth_point, "measure", lambda args, precision: given.append((args, precision)) or {"hf_msn": [1.0]}
    )

    class Done:
        returncode = 0

    def run(command, **kwargs):
        monkeypatch.setattr(sys, "argv", command[1:])
        growth_point.main()
        return Done()

    monkeypatch.setattr(script.subprocess, "run", run)
    args = script.GrowthArguments(**TINY, anchor_views=2, steps=6)
    assert script.run_point(args, script.Point(batch=8, views=3, size=64, ranks=1), "bf16")["seconds"] == [1.0]
    ((step, precision),) = given
    assert precision == "bf16" and step.cpu and not step.plain
    shape = (step.batch_size, step.focal_views, step.image_size, step.focal_size, step.anchor_views, step.steps)
    assert shape == (8, 3, 64, 24, 2, 6)
    assert (step.hidden_size, step.patch_size, step.mask_ratio, step.threads) == (32, 8, 0.25, 1)


def test_a_point_that_fails_says_why(script, monkeypatch):
    class Failed:
        returncode, stderr = 3, "out of memory"

    monkeypatch.setattr(script.subprocess, "run", lambda command, **kwargs: Failed())
    with pytest.raises(RuntimeError, match=r"Point\(batch=2, .*in fp32 failed, exit code 3:\nout of memory"):
        script.run_point(script.GrowthArguments(**TINY), script.Point(2, 0, 16, 1), "fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ["depth"]}, "`axes` is of batch, views, size, ranks, but is"),
        ({"precision": ["fp8"]}, "`precision` is of fp32, bf16, but is"),
        ({"rounds": 0}, "`rounds` must be >= 1, but is 0"),
        ({"batch": [1, 2]}, "`batch` must be >= 2, but is"),
        ({"size": [64, 100]}, "`size` must be multiples of the patch size, 16, but is"),
        ({"ranks": []}, "`ranks` must be >= 1, but is"),
    ],
)
def test_bad_arguments_are_errors(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.GrowthArguments(**arguments)
