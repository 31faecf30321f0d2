"""`hf-msn pretrain --sync` on two ranks: one is killed inside a period, and torchrun starts the run again."""

import json
import os
import signal
import time

import pytest
from launch import run_ranks
from pretrain_runs import pretrain_on_rank
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_msn.cli import pretrain
from hf_msn.cli.main import main
from hf_msn.distributed.slowmo import SlowMo

ARGUMENTS = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --warmup_epochs 0 --logging_steps 1 --use_cpu true --disable_tqdm true "
    "--image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --per_device_train_batch_size 16 --max_steps 20 "
    "--save_steps 5 --report_to none --sync slowmo --sync_every 12 --slow_momentum 0.6 --sync_timeout_seconds 60"
).split()


def pretrain_killed_once(*arguments) -> None:
    """Pretrain on one rank; rank 1 of the first try is killed inside a period and between two checkpoints."""
    step = SlowMo.step

    def step_or_die(sync):
        step(sync)
        if (sync.steps, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (7, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    SlowMo.step = step_or_die
    main(["pretrain", *arguments])


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_restarts_a_run_with_a_killed_rank_which_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole, parts, logs = tmp_path / "whole", tmp_path / "parts", tmp_path / "logs"
    run_ranks(pretrain_on_rank, 2, whole, *ARGUMENTS, timeout=120.0)
    monkeypatch.setenv(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"
    )  # torch 2.14 restarts with addresses of the dead ranks
    # The agent of torchrun, with forks of the server of `run_ranks`, which have imported everything.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="killed_once",
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    arguments = ["--output_dir", str(parts), "--resume_from_checkpoint", "auto", *ARGUMENTS]
    elastic_launch(config, pretrain_killed_once)(*arguments)
    shown = {path.parts[-3:-1]: path.read_text() for path in logs.rglob("stderr.log")}
    assert f"Resuming from '{parts / 'checkpoint-5'}'" in shown["attempt_1", "0"]
    assert "Resuming" not in shown["attempt_0", "0"]
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
