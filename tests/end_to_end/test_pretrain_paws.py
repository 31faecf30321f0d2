"""scripts/pretrain.py with PAWS and SimCLR + SuNCEt: colour images, labels that must not leak, misuse."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from pretrain_runs import COLORS, PER_CLASS, VIT, assert_same_run, pretrain, read_log, run, write_color_images
from transformers import AutoModelForPreTraining

from hf_msn import PAWSForPreTraining, SuNCEtForPreTraining, load_images

RESNET = [
    *("--timm_model", "resnetv2_18", "--small_image_stem", "true"),
    *("--timm_options", '{"layers": [1, 1], "channels": [8, 8], "stem_chs": 8}'),
]
VIEWS = "--image_size 32 --focal_size 16 --focal_views 1".split()
SUNCET = ["--method", "suncet", "--image_size", "32", *VIT, "--support_views_per_image", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    write_color_images(folder)
    return folder


ROWS = [1, 2, 9, 10, 17, 18]  # two of each class, as the folder sorts them


@pytest.mark.slow
@pytest.mark.parametrize(("method", "labels"), [("paws", 5), ("suncet", 2)])
def test_colour_images_with_few_labels_to_a_measured_model(folder, tmp_path, method, labels):
    arguments = ["--dataset", folder, "--max_steps", 3, "--low_shot_every_epochs", 1, "--low_shot_test_split", "test"]
    if method == "suncet":
        arguments += SUNCET
    else:
        arguments += ["--method", "paws", *VIEWS, *RESNET, "--prediction_head", "true", "--label_smoothing", 0.1]
        arguments += ["--use_lars", "true", "--final_weight_decay", "none"]
    arguments += ["--low_shot_probe", "soft_nearest_neighbor", "--low_shot_features", "projection"]
    arguments += ["--labelled_images_per_class", labels, "--global_support_images_per_class", 2]
    logged = pretrain(tmp_path / "run", *arguments)

    assert len(logged["loss"]) == 3 and np.isfinite(logged["loss"]).all()
    (top1,) = logged["eval_low_shot/labelled/top1"]
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "run")
    assert type(model) is (PAWSForPreTraining if method == "paws" else SuNCEtForPreTraining)
    saved = json.loads((tmp_path / "run" / "labelled_images.json").read_text())
    assert saved["labels"] == [number for number in range(3) for _ in range(labels)]
    assert saved["class_names"] == list(COLORS)
    output = tmp_path / "measured.json"
    measured = ["--model", tmp_path / "run", "--dataset", folder, "--probe", "soft_nearest_neighbor"]
    measured += ["--features", "projection", "--images_per_class", labels, "--num_splits", 1, "--output", output]
    run("evaluate_low_shot", *measured)
    again = json.loads(output.read_text())["metrics"][f"low_shot/{labels}_per_class/top1"]
    least = 60 if labels == 5 else 0  # nearly the same images on another draw: colours are easy
    assert least <= again <= 100 and least <= top1 <= 100


def test_a_list_file_names_the_labelled_images(folder, tmp_path):
    names = [f"{name}_train_{index}.png" for name in COLORS for index in (1, 2)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    arguments = ["--method", "paws", *VIEWS, *VIT, "--labelled_list_file", tmp_path / "list.txt"]
    pretrain(tmp_path / "run", "--dataset", folder, *arguments, "--max_steps", 1)
    assert json.loads((tmp_path / "run" / "labelled_images.json").read_text())["rows"] == ROWS


def write_dataset(path: Path, folder: Path, kind: str, change) -> Path:
    """Write the images of the folder with `change(row, label)` as labels of the training rows."""
    for split in PER_CLASS:
        images = load_images(str(folder), split=split)
        labels = list(images["label"])
        if split == "train":
            labels = [change(row, label) for row, label in enumerate(labels)]
        columns = {"image": [{"bytes": Path(image["path"]).read_bytes(), "path": None} for image in images["image"]]}
        features = {"image": datasets.Image()}
        if change is not no_label or split == "test":
            columns["label"], features["label"] = labels, datasets.Value("int64")
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        path.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            made.to_parquet(path / f"{split}-00000-of-00001.parquet")
        else:
            made.save_to_disk(path / split)
    if kind == "saved":
        (path / "dataset_dict.json").write_text(json.dumps({"splits": list(PER_CLASS)}))
    return path


def no_label(row, label):
    return None


def true_label(row, label):
    return label


def other_label(row, label):
    """Another label than the true one, or none in either of its forms, except for the labelled rows."""
    return label if row in ROWS else [(label + 1) % 7, None, -1][row % 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind, method", [("parquet", "paws"), ("saved", "suncet")])
def test_labels_of_other_rows_do_not_change_a_bit(folder, tmp_path, kind, method):
    np.savetxt(tmp_path / "rows.txt", ROWS, fmt="%d")
    arguments = ["--labelled_rows_file", tmp_path / "rows.txt", "--max_steps", 2, "--low_shot_every_epochs", 1]
    arguments += ["--low_shot_test_split", "test", "--global_support_images_per_class", 2]
    arguments += ["--method", "paws", *VIEWS, *VIT] if method == "paws" else SUNCET
    for name, change in {"true": true_label, "other": other_label}.items():
        data = write_dataset(tmp_path / f"{name} data", folder, kind, change)
        logged = pretrain(tmp_path / name, "--dataset", data, *arguments)
        assert len(logged["loss"]) == 2 and len(logged["eval_low_shot/labelled/top1"]) == 1
    assert_same_run(tmp_path / "other", tmp_path / "true")
    # The comparison can fail: another label of a labelled row is another run.
    if kind == "parquet":
        data = write_dataset(tmp_path / "wrong data", folder, kind, lambda row, label: 0 if row == 9 else label)
        pretrain(tmp_path / "wrong", "--dataset", data, *arguments)
        assert read_log(tmp_path / "wrong")["loss"] != read_log(tmp_path / "true")["loss"]


@pytest.mark.slow
def test_a_data_set_without_labels_learns_from_a_second_one(folder, tmp_path):
    few = write_dataset(tmp_path / "few", folder, "saved", true_label)
    arguments = ["--method", "paws", *VIEWS, *VIT, "--labelled_dataset", few, "--labelled_split", "test"]
    arguments += ["--max_steps", 2, "--global_support_images_per_class", 2, "--low_shot_every_epochs", 1]
    arguments += ["--low_shot_test_dataset", few, "--low_shot_test_split", "test"]
    for name, change in (("unlabelled", no_label), ("labelled", other_label)):
        data = write_dataset(tmp_path / f"{name} data", folder, "saved", change)
        pretrain(tmp_path / name, "--dataset", data, *arguments)
    assert_same_run(tmp_path / "unlabelled", tmp_path / "labelled")
    assert read_log(tmp_path / "unlabelled")["eval_low_shot/labelled/top1"] == [100.0]  # tested on the supports here
    saved = json.loads((tmp_path / "unlabelled" / "labelled_images.json").read_text())
    assert saved["rows"] == list(range(9)) and saved["labels"] == [0] * 3 + [1] * 3 + [2] * 3
