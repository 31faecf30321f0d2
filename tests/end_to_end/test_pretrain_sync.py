"""scripts/pretrain.py --sync through `accelerate launch` on two ranks, killed inside a period and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    *"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split(),
    *"--mixed_precision no --dynamo_backend no --main_process_port 0".split(),
    str(ROOT / "scripts" / "pretrain.py"),
    *"--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16".split(),
    *"--projection_hidden_dim 16 --projection_dim 8 --num_prototypes 8 --warmup_epochs 0 --logging_steps 1".split(),
    *"--use_cpu true --disable_tqdm true --image_size 8 --patch_size 4 --focal_views 1 --focal_size 4".split(),
    *"--per_device_train_batch_size 16 --max_steps 20 --save_steps 5 --report_to none".split(),
    *"--sync slowmo --sync_every 12 --slow_momentum 0.6 --sync_timeout_seconds 60".split(),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def start(output_dir, *arguments) -> subprocess.Popen:
    command = [*COMMAND, "--output_dir", str(output_dir), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def end(process) -> str:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-4000:]
    return out


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_of_two_ranks_goes_on_bit_for_bit(tmp_path):
    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "parts")
    deadline = time.monotonic() + 200
    while not (tmp_path / "parts" / "checkpoint-5").exists() and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1][-4000:]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert "'sync_megabytes_sent'" in end(whole)

    end(start(tmp_path / "parts", "--resume_from_checkpoint", "true"))  # no checkpoint is at the end of a period
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert first.keys() == second.keys() and all(second[name].equal(value) for name, value in first.items())
    logs = [json.loads((tmp_path / folder / "trainer_state.json").read_text()) for folder in ("whole", "parts")]
    steps = [{entry["step"]: entry["loss"] for entry in log["log_history"] if "loss" in entry} for log in logs]
    assert steps[0] == steps[1] and sorted(steps[0]) == list(range(1, 21))
