"""`accelerate launch scripts/pretrain.py --sync` on two ranks, killed inside a period and resumed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launch import run_ranks
from pretrain_runs import ROOT, pretrain_on_rank
from safetensors.torch import load_file

from hf_msn.cli import pretrain

LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    f"--dynamo_backend no --main_process_port 0 {ROOT / 'scripts' / 'pretrain.py'}"
).split()
ARGUMENTS = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --warmup_epochs 0 --logging_steps 1 --use_cpu true --disable_tqdm true "
    "--image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --per_device_train_batch_size 16 --max_steps 20 "
    "--save_steps 5 --report_to none --sync slowmo --sync_every 12 --slow_momentum 0.6 --sync_timeout_seconds 60"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def launch_and_kill_after(checkpoint) -> None:
    command = [sys.executable, *LAUNCH, "--output_dir", str(checkpoint.parent), *ARGUMENTS]
    run = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    try:
        while not checkpoint.exists() and time.monotonic() < deadline:
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself, with an error
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_of_two_ranks_goes_on_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch_and_kill_after(parts / "checkpoint-5")  # no checkpoint is at the end of a period
    run_ranks(pretrain_on_rank, 2, parts, "--resume_from_checkpoint", "true", *ARGUMENTS, timeout=120.0)
    run_ranks(pretrain_on_rank, 2, whole, *ARGUMENTS, timeout=120.0)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys() and all(second[name].equal(value) for name, value in first.items())
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, parts)]
    steps = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert steps[0] == steps[1] and sorted(steps[0]) == list(range(1, 21))
    assert all("sync_megabytes_sent" in entry for entry in logs[0] if "loss" in entry)


def pretrain_while_rank_1_is_slow(rank, output_dir) -> None:
    summarize_images = pretrain.summarize_images

    def summarize_late(images):
        deadline = time.monotonic() + 3 * rank  # by then rank 0 has written its recipe, if it does not wait
        while time.monotonic() < deadline and not (output_dir / "recipe.yaml").exists():
            time.sleep(0.05)
        return summarize_images(images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "summarize_images", summarize_late)
        pretrain_on_rank(rank, output_dir, *ARGUMENTS, "--max_steps", "1")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_slow_rank_finds_the_folder_of_the_run_empty(tmp_path):
    run_ranks(pretrain_while_rank_1_is_slow, 2, tmp_path / "run", timeout=120.0)
    assert (tmp_path / "run" / "recipe.yaml").is_file()
