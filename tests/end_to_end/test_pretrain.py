"""scripts/pretrain.py through `accelerate launch`, on one and two ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from hf_msn import MSNForPreTraining

ROOT = Path(__file__).parents[2]
TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --projection_hidden_dim 32 "
    "--projection_dim 16 --num_prototypes 16 --warmup_epochs 1 --logging_steps 1 --use_cpu true --disable_tqdm true"
).split()
DIGITS = "--image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --per_device_train_batch_size 16".split()


def pretrain(output_dir, *arguments, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    # accelerate starts several processes on one machine only with --multi_gpu, also where all of them use the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu" if ranks == 1 else "--multi_gpu"]
    command += ["--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "scripts" / "pretrain.py"), "--output_dir", str(output_dir), *TINY, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.distributed
def test_two_ranks_resume_bit_exactly_with_accumulation(tmp_path):
    settings = [*DIGITS, *"--max_steps 4 --save_steps 2 --gradient_accumulation_steps 2".split()]
    pretrain(tmp_path / "whole", *settings, ranks=2)
    assert (tmp_path / "whole" / "checkpoint-2" / "rng_state_1.pth").is_file()  # there were two
    # the files of a run that was killed after its second step
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    pretrain(tmp_path / "parts", *settings, "--resume_from_checkpoint", "true", ranks=2)

    whole, parts = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert all(parts[name].equal(value) for name, value in whole.items())
    logs = [json.loads((tmp_path / folder / "trainer_state.json").read_text()) for folder in ("whole", "parts")]
    steps = [{entry["step"]: entry.get("loss") for entry in log["log_history"] if "loss" in entry} for log in logs]
    assert steps[0] == steps[1] and sorted(steps[0]) == [1, 2, 3, 4]

    # One rank goes on where two stopped, and says so.
    shutil.rmtree(tmp_path / "parts")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    alone = pretrain(tmp_path / "parts", *settings, "--resume_from_checkpoint", "true")
    assert "was saved by 2 ranks and goes on with 1" in alone.stdout + alone.stderr
    assert json.loads((tmp_path / "parts" / "trainer_state.json").read_text())["global_step"] == 4


def color_images(folder: Path, rng: np.random.Generator) -> None:
    """Two classes of 64-pixel colour images, red and blue noise, in train/ and test/."""
    for split, count in (("train", 12), ("test", 6)):
        for label, channel in (("blue", 2), ("red", 0)):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (64, 80, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / label / f"{label}_{index}.png")


def test_a_folder_of_colour_images_with_a_broken_one(tmp_path):
    color_images(tmp_path / "images", np.random.default_rng(0))
    broken = tmp_path / "images" / "train" / "red" / "red_3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    settings = (
        f"--dataset {tmp_path / 'images'} --image_size 64 --patch_size 16 --focal_size 32 --focal_views 2 "
        "--per_device_train_batch_size 6 --num_train_epochs 2 --save_strategy epoch --low_shot_every_epochs 2 "
        "--low_shot_images_per_class 1 2 --low_shot_test_split test"
    ).split()
    done = pretrain(tmp_path / "run", *settings)
    printed = done.stdout + done.stderr
    assert "red_3.png" in printed and "Traceback" not in printed

    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    measured = [entry for entry in log if "eval_low_shot/2_per_class/top1" in entry]
    assert [entry["epoch"] for entry in measured] == [2.0]
    assert 0 <= measured[0]["eval_low_shot/2_per_class/top1"] <= 100
    assert MSNForPreTraining.from_pretrained(tmp_path / "run").config.image_size == 64
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.crop_size["height"] == 64

    fatal = pretrain(tmp_path / "fatal", *settings, "--on_broken_image", "raise", check=False)
    assert fatal.returncode != 0 and "red_3.png" in fatal.stderr


def test_wrong_use_fails_before_any_training(tmp_path):
    for arguments, message in (
        (["--mask_rati", "0.1"], "'mask_ratio'"),
        (["--dataset", str(tmp_path / "absent")], "absent"),
        ([*DIGITS, "--per_device_train_batch_size", "2000"], "has 1437 images, but one batch takes 2000"),
        ([*DIGITS, "--focal_size", "5"], "`focal_size` of the views is 5"),
    ):
        done = pretrain(tmp_path / "run", *arguments, check=False)
        assert done.returncode != 0 and message in done.stderr, (arguments, done.stderr[-2000:])
        assert not list((tmp_path / "run").glob("checkpoint-*"))
