"""What two ranks that train with little communication push, record and publish, as a user starts them."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load, load_file

from hf_msn.evaluation.backbones import checkpoint_weights_sha256

ROOT = Path(__file__).parents[2]
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
LAUNCH += f"--dynamo_backend no --main_process_port 0 {ROOT / 'scripts' / 'pretrain.py'} "
TINY = (
    "--dataset digits --image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --hidden_size 16 "
    "--num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --per_device_train_batch_size 16 --max_steps 4 --save_steps 2 "
    "--warmup_epochs 0 --use_cpu true --disable_tqdm true --report_to none "
)
PUSH = "--push_to_hub true --hub_strategy every_save --hub_always_push true --hub_model_id alice/run "
PUSHED = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "run.json"}
SYNC = {
    "slowmo": "--sync slowmo --sync_every 3 --slow_momentum 0.6",
    "codistillation": "--sync codistillation --codistillation_exchange checkpoints --codistillation_exchange_every 2 "
    "--codistillation_alpha 0.5 --codistillation_falling_weight_decay true --final_weight_decay none",
}
RECORD = {
    "slowmo": {
        **{"method": "SlowMo", "sync_every": 3, "sync_start_step": 0, "base_buffers": "maintain", "average": True},
        **{"slow_momentum": 0.6, "slow_lr": 1.0, "shard_state": False},
    },
    "codistillation": {
        **{"method": "Codistillation", "replicas": 2, "ranks_per_replica": 1, "exchange": "checkpoints"},
        **{"same_batch": False, "initialization": "own", "publish": "first", "exchange_every": 2, "transfer_steps": 0},
        **{"alpha": 0.5, "ramp_steps": 0, "burn_in_steps": 0, "distance": "kl", "temperature": 1.0},
        **{"weight_decay_schedule": "falling"},
    },
}
PAPERS = {"slowmo": ["1910.00643"], "codistillation": ["2010.02838"]}
ROW = {"slowmo": "SlowMo: sync\\_every 3", "codistillation": "Codistillation: replicas 2, ranks\\_per\\_replica 1"}


def start(arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments.split(), "--output_dir", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said[-4000:]


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["slowmo", "codistillation"])
def test_two_ranks_push_what_one_reader_needs_and_train_as_without(method, tmp_path, monkeypatch):
    with HubServer() as hub:
        processes = [
            start(LAUNCH + TINY + PUSH + SYNC[method], tmp_path / "run", hub.environment(tmp_path)),
            start(LAUNCH + TINY + SYNC[method], tmp_path / "plain", {"HF_HUB_OFFLINE": "1"}),
        ]
        for process in processes:
            end(process)
        run, repo = tmp_path / "run", hub.repos["alice/run"]
        weights, plain = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "plain"))
        assert all(torch.equal(value, plain[name]) for name, value in weights.items())

        messages = [f"Training in progress, checkpoint-{step}" for step in (2, 4)]
        assert repo.messages[1:] == [*messages, "Model save"]
        commits = list(repo.commits.values())[1:]
        for files, saved in zip(commits, ("checkpoint-2", "checkpoint-4", ".")):
            others = {"codistillation.json"} if (method, saved) == ("codistillation", ".") else set()
            assert set(files) - {".gitattributes"} == PUSHED | others  # no sync_state_*.pt
            assert files["model.safetensors"] == (run / saved / "model.safetensors").read_bytes()
        second = torch.load(run / "checkpoint-4" / "sync_state_1.pt", weights_only=False)["model"]
        pushed = load(commits[1]["model.safetensors"])
        # of replicas the first, and of local steps the consensus, which every rank has
        assert (second is not None) == (method == "codistillation")
        assert second is None or not all(torch.equal(second[name], value) for name, value in pushed.items())

        record = json.loads(commits[-1]["run.json"])
        assert record["sync"] == RECORD[method]
        assert record["hardware"]["ranks"] == record["batch"]["ranks"] == 2
        assert record["batch"]["images_per_update"] == {"slowmo": 32, "codistillation": 16}[method]
        card = commits[-1]["README.md"].decode()
        assert f"| communication | {ROW[method]}" in card and ", 2 ranks" in card
        assert re.findall(r"arXiv:([\d.]+\d)", card.split("## Citation")[1]) == ["2204.07141", *PAPERS[method]]
        assert ("replica 0 of 2 (counted from 0) is published" in card) == (method == "codistillation")

        hub.use_in_this_process(monkeypatch, tmp_path)
        publish = f"publish.py --repo_id alice/encoder --without_results true --checkpoint {run}"
        monkeypatch.setattr(sys, "argv", publish.split())
        runpy.run_path(str(ROOT / "scripts" / "publish.py"), run_name="__main__")
        files = hub.files("alice/encoder")
        assert set(files) - {"codistillation.json"} == PUSHED
        assert json.loads(files["run.json"])["sync"] == RECORD[method]
        assert checkpoint_weights_sha256(run) in files["README.md"].decode()
        for secret in (str(tmp_path), str(ROOT)):
            assert secret.encode() not in hub.sent_bytes()
