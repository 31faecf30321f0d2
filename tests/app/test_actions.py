"""The buttons of the app, without the page around them."""

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hf_msn.app.actions import Actions
from hf_msn.app.few_labels import FewLabels, Images

ENCODER = Path(__file__).parents[2] / "spaces" / "low_shot" / "digits_encoder"
NOTHING = Images()


@pytest.fixture(scope="module")
def actions():
    return Actions(FewLabels(str(ENCODER)))


def grays(folder: Path, *levels: int) -> list[str]:
    for level in levels:
        Image.new("RGB", (9, 9), (level,) * 3).save(folder / f"{level}.png")
    return [str(folder / f"{level}.png") for level in levels]


@pytest.fixture
def labelled(actions, tmp_path):
    """Three dark and three light images, added one class after the other."""
    dark, *_ = actions.add(grays(tmp_path, 10, 30, 50), "dark", NOTHING, NOTHING)
    both, *_ = actions.add(grays(tmp_path, 200, 220, 240), "light", dark, NOTHING)
    return both


def test_images_are_added_classified_and_measured(actions, labelled, tmp_path):
    assert labelled.classes == ("dark",) * 3 + ("light",) * 3
    now, unknown, messages, shown, answers, mapped, accuracy = actions.classify(grays(tmp_path, 20, 230), labelled)
    assert now is labelled and unknown.names == ("20.png", "230.png") and "<li" not in messages
    assert shown.index("dark") < shown.index("light")
    first, second = answers.split("<article")[1:]
    assert first.index("dark") < first.index("light") and second.index("light") < second.index("dark")
    assert "6 labelled and 2 new" in mapped and "± 0.0 with 1" in accuracy


def test_a_class_without_a_name_is_refused_and_its_files_stay_in_the_field(actions, tmp_path):
    paths = grays(tmp_path, 1, 2)
    labelled, _, messages, *_, kept = actions.add(paths, " ", NOTHING, NOTHING)
    assert len(labelled) == 0 and kept == paths and "class" in messages


def test_a_broken_image_is_named_and_the_others_are_added(actions, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    labelled, _, messages, *_, kept = actions.add(
        [*grays(tmp_path, 1), str(tmp_path / "broken.png")], "a", NOTHING, NOTHING
    )
    assert labelled.names == ("1.png",) and "broken.png" in messages and kept is None
    labelled, _, messages, *_ = actions.add(None, "a", labelled, NOTHING)
    assert len(labelled) == 1 and "No images" in messages


def test_one_class_or_all_are_removed(actions, labelled):
    left, *_ = actions.remove("  light ", labelled, NOTHING)
    assert set(left.classes) == {"dark"}
    same, _, messages, *_ = actions.remove("nothing", labelled, NOTHING)
    assert len(same) == 6 and "nothing" in messages
    nothing, unknown, *_, kept = actions.clear()
    assert len(nothing) == len(unknown) == 0 and kept is None


@pytest.mark.slow
def test_the_example_has_50_labelled_digits_and_20_others(actions):
    labelled, unknown, _, _, answers, *_ = actions.example()
    assert len(labelled) == 50 and len(labelled.class_names) == 10 and len(unknown) == 20
    assert answers.count("<article") == 20


def test_export_writes_into_the_temporary_folder_of_the_app(actions, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    (tmp_path / "served").mkdir()
    path, _ = actions.export(labelled)
    assert (tmp_path / "served") in Path(path).parents
    assert "model.safetensors" in zipfile.ZipFile(path).namelist()
    path, messages = actions.export(actions.remove("light", labelled, NOTHING)[0])
    assert path is None and "class" in messages
