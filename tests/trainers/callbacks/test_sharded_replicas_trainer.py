"""SlowMo on a Trainer whose model accelerate's FSDP2 shards inside each replica: as on one with whole replicas."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from launch import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments

from hf_msn import GossipCallback, SlowMoCallback


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x, labels):
        prediction = self.layers(x).squeeze(-1)
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


def rows(count):
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).double()
    return [{"x": x, "labels": x.sum()} for x in inputs]


def make_trainer(folder, state_dict_type=None, config=None):
    """Return a trainer; with a type of checkpoint one with FSDP2, which accelerate does not turn on on a CPU."""
    args = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=4,
        max_steps=9,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=2,
        learning_rate=0.05,
        report_to="none",
        disable_tqdm=True,
        parallelism_config=config,
    )
    if state_dict_type is not None:
        assert args.device.type == "cpu"  # it makes the state anew
        state = Accelerator(cpu=True).state
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.parallelism_config = config
        settings = {"auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state_dict_type, **settings)
        state.fsdp_plugin = plugin
    return Trainer(Regression(), args, train_dataset=rows(64), eval_dataset=rows(16))


def train(trainer, checkpoint=None, **groups):
    trainer.add_callback(SlowMoCallback(trainer, sync_every=3, slow_momentum=0.6, **groups))
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return torch.cat([value.flatten() for value in weights.values()]), losses


def _on_ranks(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    groups = {"group": mesh["replicate"].get_group(), "inner_group": mesh["shard"].get_group()}
    whole = train(make_trainer(f"{folder}/whole"), **groups)
    sharded, sizes = {}, {"dp_replicate_size": 2, "dp_shard_size": 2}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        for checkpoint in (None, f"{folder}/{kind}/checkpoint-4"):
            trainer = make_trainer(f"{folder}/{kind}", kind, ParallelismConfig(**sizes))
            sharded[kind, checkpoint is None] = train(trainer, checkpoint)
    parts = {parameter.to_local().shape[0] for parameter in trainer.model.parameters()}
    refused = []
    for config, callback in ((sizes, GossipCallback), ({"dp_shard_size": 4}, SlowMoCallback)):
        trainer = make_trainer(f"{folder}/refused", kind, ParallelismConfig(**config))
        with pytest.raises(TypeError) as error:
            callback(trainer)
        refused.append(str(error.value))
    dist.barrier()
    return whole, sharded, parts, refused


@pytest.mark.distributed
@pytest.mark.slow
def test_replicas_that_fsdp2_shards_train_and_resume_as_whole_ones(tmp_path):
    results = run_ranks(_on_ranks, 4, str(tmp_path), timeout=300)
    for (weights, losses), sharded, _, refused in results:
        for found, evaluated in sharded.values():
            torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(evaluated, losses, rtol=1e-5, atol=1e-5)
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            assert torch.equal(sharded[kind, True][0], sharded[kind, False][0])
        assert all("FSDP" in message for message in refused)
    assert [parts for _, _, parts, _ in results] == [{3, 1}, {2, 0}, {3, 1}, {2, 0}]
    saved = load_file(tmp_path / "FULL_STATE_DICT" / "checkpoint-9" / "model.safetensors")
    whole = torch.cat([saved[name].flatten() for name in Regression().state_dict()])
    assert torch.equal(whole, results[0][1]["FULL_STATE_DICT", True][0])
