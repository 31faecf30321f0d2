"""scripts/pretrain.py with PAWS and SimCLR + SuNCEt: colour images, label hygiene, misuse, two ranks."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from hf_msn import PAWSForPreTraining, SuNCEtForPreTraining, load_images

ROOT = Path(__file__).parents[2]
COLORS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
PER_CLASS = {"train": 8, "test": 3}
COMMON = (
    "--projection_hidden_dim 16 --projection_dim 8 --warmup_steps 1 --logging_steps 1 --use_cpu --disable_tqdm true "
    "--report_to none --per_device_train_batch_size 6 --learning_rate 1e-3"
).split()
VIT = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --patch_size 8".split()
RESNET = [
    *("--timm_model", "resnetv2_18", "--small_image_stem"),
    *("--timm_options", '{"layers": [1, 1], "channels": [8, 8], "stem_chs": 8}'),
]
VIEWS = "--image_size 32 --focal_size 16 --focal_views 1".split()
SUNCET = ["--method", "suncet", "--image_size", "32", *VIT, "--support_views_per_image", "2"]


def run(script: str, *arguments) -> None:
    """The script in this process, which saves importing everything again."""
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = argv


def pretrain(output_dir, *arguments) -> dict[str, list]:
    """Trains, and gives what was logged, by name."""
    run("pretrain", "--output_dir", output_dir, *COMMON, *arguments)
    return read_log(output_dir)


def read_log(output_dir) -> dict[str, list]:
    logged: dict[str, list] = {}
    for entry in json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"]:
        for name, value in entry.items():
            # Times differ, and `train_loss` is a mean over what was trained since the last start.
            if not any(word in name for word in ("second", "runtime", "train_loss")):
                logged.setdefault(name, []).append(value)
    return logged


def assert_same_run(found, wanted) -> None:
    weights = [load_file(Path(folder, "model.safetensors")) for folder in (found, wanted)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())
    assert read_log(found) == read_log(wanted)


def color_image(rng: np.random.Generator, color) -> Image.Image:
    pixels = np.clip(np.array(color) + rng.integers(-30, 30, (48, 48, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and test/ with a folder for each class."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                color_image(rng, color).save(folder / split / name / f"{name}_{split}_{index}.png")
    return folder


ROWS = [1, 2, 9, 10, 17, 18]  # two of each class, as the folder sorts them


@pytest.mark.parametrize("labels, method", [(1, "paws"), (2, "paws"), (5, "paws"), (2, "suncet")])
def test_colour_images_with_few_labels_to_a_measured_model(folder, tmp_path, labels, method):
    arguments = ["--dataset", folder, "--max_steps", 3, "--low_shot_every_epochs", 1, "--low_shot_test_split", "test"]
    if method == "suncet":
        arguments += [*SUNCET, "--labelled_images_per_class", labels]
    elif labels == 2:
        names = [f"{name}_train_{index}.png" for name in COLORS for index in (1, 2)]
        (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
        arguments += ["--method", "paws", *VIEWS, *VIT, "--labelled_list_file", tmp_path / "list.txt"]
    else:
        arguments += ["--method", "paws", *VIEWS, *RESNET, "--labelled_images_per_class", labels]
        arguments += ["--prediction_head", "--label_smoothing", 0.1, "--use_lars", "--final_weight_decay", "none"]
    arguments += ["--low_shot_probe", "soft_nearest_neighbor", "--low_shot_features", "projection"]
    logged = pretrain(tmp_path / "run", *arguments, "--global_support_images_per_class", 2)

    assert len(logged["loss"]) == 3 and np.isfinite(logged["loss"]).all()
    (top1,) = logged["eval_low_shot/labelled/top1"]
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "run")
    assert type(model) is (PAWSForPreTraining if method == "paws" else SuNCEtForPreTraining)
    saved = json.loads((tmp_path / "run" / "labelled_images.json").read_text())
    assert saved["labels"] == [number for number in range(3) for _ in range(labels)]
    assert saved["class_names"] == list(COLORS)
    if labels == 2 and method == "paws":
        assert saved["rows"] == ROWS
    output = tmp_path / "measured.json"
    measured = ["--model", tmp_path / "run", "--dataset", folder, "--probe", "soft_nearest_neighbor"]
    measured += ["--features", "projection", "--images_per_class", labels, "--num_splits", 1, "--output", output]
    run("evaluate_low_shot", *measured)
    metrics = json.loads(output.read_text())["metrics"]
    assert 0 <= metrics[f"low_shot/{labels}_per_class/top1"] <= 100 and 0 <= top1 <= 100
    if labels == 5:  # nearly the same images on another draw: colours are easy
        assert metrics["low_shot/5_per_class/top1"] > 60 and top1 > 60


def write_dataset(path: Path, folder: Path, kind: str, change) -> Path:
    """The images of the folder with `change(row, label)` as labels of the training rows."""
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


CHANGES = {
    "true": lambda row, label: label,
    "other": lambda row, label: label if row in ROWS else (label + 1 + row % 5) % 7,
    "none": lambda row, label: label if row in ROWS else None,
    "minus one": lambda row, label: label if row in ROWS else -1,
}


@pytest.mark.parametrize("kind, method", [("parquet", "paws"), ("saved", "paws"), ("saved", "suncet")])
def test_labels_of_other_rows_do_not_change_a_bit(folder, tmp_path, kind, method):
    np.savetxt(tmp_path / "rows.txt", ROWS, fmt="%d")
    arguments = ["--labelled_rows_file", tmp_path / "rows.txt", "--max_steps", 3, "--low_shot_every_epochs", 1]
    arguments += ["--low_shot_test_split", "test", "--global_support_images_per_class", 2]
    arguments += ["--method", "paws", *VIEWS, *VIT] if method == "paws" else SUNCET
    for name in ("true", "other", "none") if kind == "saved" else ("true", "other", "minus one"):
        data = write_dataset(tmp_path / f"{name} data", folder, kind, CHANGES[name])
        logged = pretrain(tmp_path / name, "--dataset", data, *arguments)
        assert len(logged["loss"]) == 3 and len(logged["eval_low_shot/labelled/top1"]) == 1
        assert_same_run(tmp_path / name, tmp_path / "true")
    # What the comparison is there for: another label of a labelled row is another run.
    if kind == "parquet":
        data = write_dataset(tmp_path / "wrong data", folder, kind, lambda row, label: 0 if row == 9 else label)
        pretrain(tmp_path / "wrong", "--dataset", data, *arguments)
        assert read_log(tmp_path / "wrong")["loss"] != read_log(tmp_path / "true")["loss"]


def test_a_data_set_without_labels_learns_from_a_second_one(folder, tmp_path):
    few = write_dataset(tmp_path / "few", folder, "saved", CHANGES["true"])
    arguments = ["--method", "paws", *VIEWS, *VIT, "--labelled_dataset", few, "--labelled_split", "test"]
    arguments += ["--max_steps", 3, "--global_support_images_per_class", 2, "--low_shot_every_epochs", 1]
    arguments += ["--low_shot_test_dataset", few, "--low_shot_test_split", "test"]
    for name, change in (("unlabelled", no_label), ("labelled", CHANGES["other"])):
        data = write_dataset(tmp_path / f"{name} data", folder, "saved", change)
        pretrain(tmp_path / name, "--dataset", data, *arguments)
    assert_same_run(tmp_path / "unlabelled", tmp_path / "labelled")
    assert read_log(tmp_path / "unlabelled")["eval_low_shot/labelled/top1"] == [100.0]  # tested on the supports here
    saved = json.loads((tmp_path / "unlabelled" / "labelled_images.json").read_text())
    assert saved["rows"] == list(range(9)) and saved["labels"] == [0] * 3 + [1] * 3 + [2] * 3


def test_wrong_use_fails_before_any_training(folder, tmp_path):
    def rows(name, *values):
        (tmp_path / name).write_text("\n".join(map(str, values)) + "\n")
        return ["--labelled_rows_file", str(tmp_path / name)]

    paws = ["--method", "paws", *VIEWS, *VIT, "--max_steps", "2", "--save_steps", "1"]
    here = [*paws, "--dataset", folder]
    two = rows("two.txt", *ROWS)
    (tmp_path / "list.txt").write_text("blue_train_1.png\nyellow_train_1.png\n")
    holes = write_dataset(tmp_path / "holes", folder, "saved", lambda row, label: {1: None, 2: -1}.get(row, label))
    named = tmp_path / "named"
    for split in PER_CLASS:
        shutil.copytree(folder / split, named / split)
        (named / split / "red").rename(named / split / "rust")
    for arguments, message in (
        ([*here], "none is given. Give one of"),
        ([*here, *rows("zeros.txt", *[0] * 24)], r"`labelled_rows_file` must be one or more row numbers"),
        ([*here, *rows("nothing.txt")], r"`labelled_rows_file` must be one or more row numbers"),
        ([*here, *rows("far.txt", 1, 24)], "from 0 to 23, but holds 24"),
        ([*here, *rows("minus.txt", 1, -1)], "from 0 to 23, but holds -1"),
        ([*here, "--labelled_list_file", tmp_path / "list.txt"], "yellow_train_1"),
        (
            [*here, *two, "--global_support_classes", 4],
            "`global_support_classes` .* 3, .* but is 4",
        ),
        (
            [*here, *two, "--global_support_images_per_class", 3, "--support_on_small_class", "raise"],
            "= 3 labelled images, but 3 have fewer: 0 has 2",
        ),
        ([*here, "--labelled_images_per_class", 9], "9"),
        ([*paws, "--dataset", holes, *rows("one.txt", 1, 9)], "row 1 has label None"),
        ([*paws, "--dataset", holes, *rows("other.txt", 2, 9)], "row 2 has label -1"),
        ([*here, "--labelled_dataset", named], "rust"),
        ([*here, *two, "--label_smoothing", 1], r"`label_smoothing` must be in \[0, 1\), but is 1"),
        ([*here, *two, "--prediction_head", "--projection_dim", 3], "a quarter of `projection_dim` 3 is 0"),
        ([*here, *two, "--timm_model", "resnet18", "--timm_options", '{"depht": 1}'], "do not fit 'resnet18'"),
        ([*SUNCET, "--dataset", folder, *two, "--focal_views", 1], "`focal_views` is 1. Set it to 0"),
        ([*here, *two, "--anchor_views", 2], "`anchor_views` of the views is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(tmp_path / "run", *arguments)
        assert not list((tmp_path / "run").glob("*")), arguments


@pytest.mark.distributed
def test_two_ranks_resume_bit_exactly_with_accumulation(tmp_path):
    arguments = [*VIT[:-1], "4", "--method", "paws", "--image_size", "8", "--focal_size", "4", "--focal_views", "1"]
    arguments += "--labelled_images_per_class 3 --global_support_images_per_class 2 --support_shard images".split()
    arguments += "--max_steps 4 --save_steps 2 --gradient_accumulation_steps 2 --dataset digits".split()

    def launch(output_dir, *more):
        # accelerate starts several processes on one machine only with --multi_gpu, also where they use the CPU.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()
        command += [str(ROOT / "scripts" / "pretrain.py"), "--output_dir", str(output_dir), *COMMON, *arguments, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    printed = launch(tmp_path / "whole")
    assert (
        printed.count("Support of each step, over all 2 ranks: 10 classes x 2 images x 1 view = 20 images; each") == 1
    )
    assert (tmp_path / "whole" / "checkpoint-2" / "rng_state_1.pth").is_file()
    # the files of a run that was killed after its second step
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    launch(tmp_path / "parts", "--resume_from_checkpoint", "true")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert torch.isfinite(torch.tensor(read_log(tmp_path / "parts")["loss"])).all()
