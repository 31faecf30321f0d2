"""The demo with a recipe of a few steps: the same code and files, a model that has learnt next to nothing."""

import importlib
import io
import json
import multiprocessing
from concurrent.futures import Executor, Future
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from launch import PRELOADED
from PIL import Image
from transformers import AutoConfig, AutoModel, logging

from hf_msn import MSNForPreTraining, load_images
from hf_msn.data.splits import low_shot_indices

pytestmark = pytest.mark.slow  # a whole demo, twice
PICTURES = ("low_shot.png", "training.png", "neighbours.png", "embedding.png")
TINY = (
    "--max_steps 6 --logging_steps 2 --hidden_size 24 --intermediate_size 24 --num_hidden_layers 1 --warmup_epochs 0 "
    "--paws_max_steps 4 --supervised_epochs 2 --num_splits 2"
).split()


@pytest.fixture(scope="module")
def demo():
    """The script as a module."""
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module("demo")
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """The folder that a short demo made, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    context = multiprocessing.get_context("forkserver")  # the demo's two processes import nothing again
    context.set_forkserver_preload(PRELOADED)
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.demo_labels.multiprocessing, "get_context", lambda method: context)
        patch.setattr(demo.figures, "TSNE", partial(demo.figures.TSNE, max_iter=250))  # a quarter of the time
        demo.main(["--output_dir", str(folder), *TINY])
    return folder, printed.getvalue()


def test_low_shot_json_holds_mean_and_deviation_in_per_cent_for_all_three(finished):
    scores = json.loads((finished[0] / "low_shot.json").read_text())
    assert set(scores) == {"pixels", "untrained", "msn", "paws", "supervised"}
    for name, by_count in scores.items():
        assert list(by_count) == (["5"] if name in ("paws", "supervised") else ["1", "2", "5", "10"])
        for entry in by_count.values():
            assert set(entry) == {"mean", "std"}
            assert 8 < entry["mean"] < 100 and 0 < entry["std"] < 15


def test_paws_and_the_supervised_encoder_are_trained_with_the_labels_of_the_other_features(finished):
    labels = load_images("digits")["label"]
    for split in range(2):
        saved = json.loads((finished[0] / f"paws-{split}" / "labelled_images.json").read_text())
        assert saved["rows"] == low_shot_indices(labels, images_per_class=5, seed=split).tolist()
        assert len(saved["rows"]) == 50


def test_raw_pixels_score_what_they_score_without_this_package(finished):
    # scikit-learn's own arrays, its own solver and splits of its own: the same within the noise of five splits
    pixels = json.loads((finished[0] / "low_shot.json").read_text())["pixels"]
    assert [pixels[count]["mean"] for count in ("1", "2", "5", "10")] == pytest.approx([63, 75, 87, 91], abs=5)


def test_pictures_are_not_blank_and_the_exported_model_has_the_weights_of_the_target_encoder(finished):
    folder, _ = finished
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] >= 1000 and pixels.std() > 5, name
    assert AutoConfig.from_pretrained(folder / "model").model_type == "vit_msn"
    exported = AutoModel.from_pretrained(folder / "model").state_dict()
    target = MSNForPreTraining.from_pretrained(folder / "pretraining").target_encoder.state_dict()
    assert exported.keys() == target.keys()
    assert all((exported[name] == target[name]).all() for name in target)


def test_output_has_the_table_of_the_json_and_no_noise(finished):
    folder, printed = finished
    scores = json.loads((folder / "low_shot.json").read_text())
    lines = printed.splitlines()
    for name, shown in (("msn", "MSN"), ("pixels", "raw pixels"), ("untrained", "untrained encoder")):
        (row,) = [line for line in lines if line.startswith(shown)]
        assert row.split()[-3:] == [f"{scores[name]['10']['mean']:.1f}", "±", f"{scores[name]['10']['std']:.1f}"]
    assert "step     6" in printed
    assert not any("Warning" in line or "it/s" in line or line.startswith("{") for line in lines)


class InTurn(Executor):
    """Train on the splits in this process, one after another."""

    def __init__(self, processes, mp_context):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_second_demo_gives_the_same_numbers_and_replaces_the_first(demo, finished, monkeypatch):
    folder, _ = finished
    first = (folder / "low_shot.json").read_text()
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    monkeypatch.setattr(demo.demo_labels, "ProcessPoolExecutor", InTurn)
    demo.main(["--output_dir", str(folder), *TINY])
    assert (folder / "low_shot.json").read_text() == first
    assert not (folder / "low_shot.png").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["demo", ".demo.replaced"])  # the second is left by a kill
def test_interrupted_demo_leaves_the_earlier_results_and_nothing_of_its_own(demo, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "low_shot.json").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), demo.made_anew(tmp_path / "demo") as unfinished:
        (unfinished / "low_shot.json").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (tmp_path / "demo" / "low_shot.json").read_text() == "earlier"


def test_folder_of_something_else_is_not_replaced(demo, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"), demo.made_anew(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
