"""Two ranks that train with little communication push, record and publish, by the commands."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from hub_server import HubServer
from launch import run_ranks
from pretrain_runs import ROOT, pretrain_on_rank
from safetensors.torch import load

from hf_msn.evaluation.backbones import checkpoint_weights_sha256

TINY = (
    "--dataset digits --image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 --hidden_size 16 "
    "--num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --projection_hidden_dim 16 "
    "--projection_dim 8 --num_prototypes 8 --per_device_train_batch_size 16 --max_steps 4 --save_steps 2 "
    "--warmup_epochs 0 --use_cpu true --disable_tqdm true --report_to none"
)
PUSH = "--push_to_hub true --hub_strategy checkpoint --hub_always_push true --hub_model_id"
RESUME = {f"last-checkpoint/{name}" for rank in (0, 1) for name in (f"rng_state_{rank}.pth", f"sync_state_{rank}.pt")}
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


def _pretrain(rank, url, folder, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        HubServer.use_in_this_process(SimpleNamespace(url=url), patch, folder)
        pretrain_on_rank(rank, folder / "run", *arguments)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["slowmo", "codistillation"])
def test_two_ranks_push_a_model_of_one_reader_and_the_files_of_both_for_a_resume(method, tmp_path, monkeypatch):
    with HubServer() as hub:
        folder = tmp_path / "run"
        arguments = f"{TINY} {PUSH} alice/run {SYNC[method]}".split()
        run_ranks(_pretrain, 2, hub.url, tmp_path, *arguments, timeout=120.0)
        repo = hub.repos["alice/run"]
        assert len(hub.asked("POST", "repos/create")) == 1
        messages = [f"Training in progress, checkpoint-{step}" for step in (2, 4)]
        assert repo.messages[1:] == [*messages, "Model save"]
        commits = list(repo.commits.values())[1:]
        for files, saved in zip(commits, ("checkpoint-2", "checkpoint-4", ".")):
            others = {"codistillation.json"} if (method, saved) == ("codistillation", ".") else set()
            assert {path for path in files if "/" not in path} - {".gitattributes"} == PUSHED | others
            assert set(files) >= RESUME
            assert files["model.safetensors"] == (folder / saved / "model.safetensors").read_bytes()
        second = torch.load(folder / "checkpoint-4" / "sync_state_1.pt", weights_only=False)["model"]
        pushed = load(commits[1]["model.safetensors"])
        # of replicas the first, and of local steps the consensus, which every rank has
        assert (second is not None) == (method == "codistillation")
        assert second is None or not all(torch.equal(second[name], value) for name, value in pushed.items())

        record = json.loads(commits[-1]["run.json"])
        assert record["sync"] == RECORD[method] and record["recipe"]["dataset"] == "digits"
        assert record["hardware"]["ranks"] == record["batch"]["ranks"] == 2
        assert record["batch"]["images_per_update"] == {"slowmo": 32, "codistillation": 16}[method]
        card = commits[-1]["README.md"].decode()
        assert f"| communication | {ROW[method]}" in card and ", 2 ranks" in card
        assert re.findall(r"arXiv:([\d.]+\d)", card.split("## Citation")[1]) == ["2204.07141", *PAPERS[method]]
        assert ("replica 0 of 2 (counted from 0) is published" in card) == (method == "codistillation")

        hub.use_in_this_process(monkeypatch, tmp_path)
        publish = f"publish.py --repo_id alice/encoder --without_results true --checkpoint {folder}"
        monkeypatch.setattr(sys, "argv", publish.split())
        runpy.run_path(str(ROOT / "scripts" / "publish.py"), run_name="__main__")
        files = hub.files("alice/encoder")
        assert set(files) - {"codistillation.json"} == PUSHED
        assert json.loads(files["run.json"])["sync"] == RECORD[method]
        assert checkpoint_weights_sha256(folder) in files["README.md"].decode()
        for secret in (str(tmp_path), str(ROOT)):
            assert secret.encode() not in hub.sent_bytes()
