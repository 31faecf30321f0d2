"""`hf-msn pretrain --sync` on two ranks: one is killed inside a period, and torchrun starts the run again."""

import json
import os
import subprocess
import sys
import time

import pytest
from launch import run_ranks
from pretrain_runs import ROOT, pretrain_on_rank
from safetensors.torch import load_file

from hf_msn.cli import pretrain

# scripts/pretrain.py, in which rank 1 is killed once, inside a period and between two checkpoints.
KILLED_ONCE = """
import os, signal, sys
from hf_msn.cli.main import main
from hf_msn.distributed.slowmo import SlowMo

step = SlowMo.step

def step_or_die(sync):
    step(sync)
    if (sync.steps, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (7, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)

SlowMo.step = step_or_die
main(["pretrain", *sys.argv[1:]])
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1".split()
ARGUMENTS = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --warmup_epochs 0 --logging_steps 1 --use_cpu true --disable_tqdm true "
    "--image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --per_device_train_batch_size 16 --max_steps 20 "
    "--save_steps 5 --report_to none --sync slowmo --sync_every 12 --slow_momentum 0.6 --sync_timeout_seconds 60"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.14 restarts with addresses of the dead ranks


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_restarts_a_run_with_a_killed_rank_which_goes_on_bit_for_bit(tmp_path):
    whole, parts, script = tmp_path / "whole", tmp_path / "parts", tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    arguments = ["--output_dir", str(parts), "--resume_from_checkpoint", "auto", *ARGUMENTS]
    command = [sys.executable, *TORCHRUN, str(script), *arguments]
    run = subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr and f"Resuming from '{parts / 'checkpoint-5'}'" in run.stderr
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
