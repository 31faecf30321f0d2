"""scripts/benchmarks/data.py, and that its plain pipeline makes the views that ours makes."""

import json

import data
import numpy as np
import pytest

from hf_msn import MultiViewTransform, decode_image

TINY = (
    "--images 4 --repeats 2 --batch_size 2 --image_size 32 --focal_size 16 --focal_views 2 --rows 50 10000000 "
    "--batches 5"
).split()


@pytest.fixture(autouse=True)
def small_photographs(monkeypatch):
    monkeypatch.setattr(data, "SIZES", [(120, 90), (90, 120)])


@pytest.mark.slow
def test_tables_and_json_have_the_same_numbers(run, tmp_path):
    output = tmp_path / "new" / "data.json"
    printed = run(data, *TINY, "--output", output)
    results = json.loads(output.read_text())
    assert output.with_suffix(".png").is_file()
    plain = results["seconds_per_image"]["torchvision + Pillow"]
    for name, seconds in results["seconds_per_image"].items():
        rate, ratio = results["images_per_second"][name], results["ratio_to_plain"][name]
        assert rate["median"] == pytest.approx(sum(1 / value for value in seconds) / 2)
        assert ratio["median"] == pytest.approx(sum(a / b for a, b in zip(plain, seconds)) / 2)
        row = next(line for line in printed.splitlines() if line.startswith(f"| {name} "))
        assert f"{rate['median']:.2f} (" in row and f"{ratio['median']:.2f} (" in row
    pixels = 2 * 32 * 32 + 2 * 16 * 16
    assert results["bytes_per_image"] == {
        "finished views": 4 * 3 * pixels,
        "crops and parameters": 3 * pixels + 4 * 12 * 4,
    }
    assert [entry["rows"] for entry in results["streamed"]] == [50, 10_000_000]
    assert all(entry["resident_mib"]["last batch"] > 0 for entry in results["streamed"])
    assert "| 10,000,000 " in printed


@pytest.mark.slow
def test_pipelines_that_do_other_work_are_not_compared():
    args = data.DataArguments(images=2, batch_size=2, image_size=16, focal_size=8, focal_views=2)
    pipelines = data.Pipelines(args, data.photographs(2))
    pipelines.check_same_work([0, 1])
    pipelines.plain = data.PlainPipeline(MultiViewTransform(image_size=16, focal_size=8, focal_views=3))
    with pytest.raises(RuntimeError, match="different work"):
        pipelines.check_same_work([0, 1])


def test_made_up_photographs_have_the_spectrum_of_photographs():
    image = decode_image({"bytes": data.photograph(1, (256, 256)), "path": None})
    spectrum = np.abs(np.fft.fft2(np.asarray(image).mean(axis=2)))[1:64, 0]
    slope = np.polyfit(np.log(np.arange(1, 64)), np.log(spectrum), 1)[0]
    assert -1.5 < slope < -0.5
