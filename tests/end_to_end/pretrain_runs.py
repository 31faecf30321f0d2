"""scripts/*.py in this process, which saves the imports, and colour images to run them on."""

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from hf_msn.cli.main import main

ROOT = Path(__file__).parents[2]
COLORS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
PER_CLASS = {"train": 8, "test": 3}
VIT = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --patch_size 8".split()
COMMON = (
    "--projection_hidden_dim 16 --projection_dim 8 --warmup_steps 1 --logging_steps 1 --use_cpu true --report_to none "
    "--disable_tqdm true --per_device_train_batch_size 6 --learning_rate 1e-3"
).split()


def run(script: str, *arguments) -> None:
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = argv


def pretrain(output_dir, *arguments) -> dict[str, list]:
    """Train, and return the log by name."""
    run("pretrain", "--output_dir", output_dir, *COMMON, *arguments)
    return read_log(output_dir)


def command_on_rank(rank, *arguments) -> str:
    """Return what `hf-msn` prints on this rank of `run_ranks`, which ends the process group."""
    with redirect_stdout(io.StringIO()) as printed, patch("torch.distributed.destroy_process_group"):
        main([*arguments])
    return printed.getvalue()


def pretrain_on_rank(rank, output_dir, *arguments) -> None:
    """Run `hf-msn pretrain` on this rank of `run_ranks`, which ends the process group."""
    with patch.object(Accelerator, "end_training"):
        main(["pretrain", "--output_dir", str(output_dir), *arguments])


def read_log(output_dir) -> dict[str, list]:
    logged: dict[str, list] = {}
    for entry in json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"]:
        for name, value in entry.items():
            # Times differ, and `train_loss` is a mean over the last start.
            if not any(word in name for word in ("second", "runtime", "train_loss")):
                logged.setdefault(name, []).append(value)
    return logged


def assert_same_run(found, wanted) -> None:
    weights = [load_file(Path(folder, "model.safetensors")) for folder in (found, wanted)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())
    assert read_log(found) == read_log(wanted)


def write_color_images(folder: Path) -> None:
    """Write train/ and test/ with a folder of images per class."""
    rng = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(color) + rng.integers(-30, 30, (48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{name}_{split}_{index}.png")
