"""FSDP2 inside of a replica and few exchanges between replicas: as replicas of whole models."""

import io
from functools import partial

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_msn import DiLoCo, Gossip, LocalSGD, NoLoCo, SlowMo, StreamingDiLoCo

WHOLE = StateDictOptions(full_state_dict=True)
ADAM = partial(torch.optim.Adam, lr=0.1)
METHODS = {
    "local_sgd": (LocalSGD, {"base_buffers": "average"}),
    "slowmo": (SlowMo, {"slow_momentum": 0.6, "slow_lr": 0.9, "base_buffers": "reset"}),
    "slowmo sharded": (SlowMo, {"shard_state": True, "sync_start_step": 1}),
    "diloco": (DiLoCo, {"outer_optimizer": ADAM}),
    "streaming": (StreamingDiLoCo, {"fragments": "size", "num_fragments": 2, "delay": 1}),
}
ROUNDED = ("bfloat16", "int8")


def make_model():
    """Dimensions that two shards divide unevenly, and with one row: the second shard of it is empty."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)
    model = nn.Sequential(*layers).double()
    model.register_buffer("count", torch.tensor(dist.get_rank()))
    replica = float(dist.get_rank() // 2)
    model.frozen = nn.Parameter(torch.full((3,), replica).double(), requires_grad=False)
    return model


def shard(model, mesh):
    ignored = {model[0].bias}
    for module in (model[0], model[3], model):
        fully_shard(module, mesh=mesh["shard"], ignored_params=ignored)
    assert not hasattr(model[0].bias, "to_local")  # each rank has it whole
    return model


def batch(rank, step):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)


def train(model, optimizer, sync, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
        sync.step()


def whole(model):
    return {name: value.clone() for name, value in get_model_state_dict(model, options=WHOLE).items()}


def run(method, settings, mesh, is_sharded):
    """Return weights, the consensus distance before the consensus, and the weights after it."""
    model = make_model()
    groups = {"group": mesh["replicate"].get_group()}
    if is_sharded:
        shard(model, mesh)
    else:
        groups["inner_group"] = mesh["shard"].get_group()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with method(model, optimizer, sync_every=3, **settings, **groups) as sync:
        train(model, optimizer, sync, range(8))
        distance, before = sync.consensus_distance(), whole(model)
        with torch.no_grad():
            model(batch(0, 0))  # FSDP2 keeps the whole parameters of the root
        sync.sync()
        after = model(batch(0, 0)).detach()
        sent = sync.bytes_sent
    return before, distance, whole(model), after, sent


def resume(method, settings, mesh):
    """Return the weights of a run, and of one that goes on from a state inside of a period."""
    group, results = mesh["replicate"].get_group(), []
    saved = io.BytesIO()
    for is_resumed in (False, True):
        model = shard(make_model(), mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sync = method(model, optimizer, sync_every=3, group=group, **settings)
        if is_resumed:
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            sync.load_state_dict(state["sync"])
        with sync:
            if not is_resumed:
                train(model, optimizer, sync, range(4))
                parts = {"model": model, "optimizer": optimizer, "sync": sync}
                torch.save({name: part.state_dict() for name, part in parts.items()}, saved)
            train(model, optimizer, sync, range(4, 8))
        results.append(whole(model))
    return results


def refusals(mesh):
    pairs, group = mesh["shard"].get_group(), mesh["replicate"].get_group()
    replica = shard(make_model(), mesh)
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])][dist.get_rank() in (1, 2)]
    hybrid = fully_shard(make_model(), mesh=mesh)
    parallel = make_model()
    weight = dist.tensor.distribute_tensor(parallel[0].weight.detach(), mesh["shard"], [dist.tensor.Shard(0)])
    parallel[0].weight = nn.Parameter(weight)
    found = {}
    for name, make in {
        "group": lambda optimizer: SlowMo(replica, optimizer),
        "shards as group": lambda optimizer: LocalSGD(replica, optimizer, group=pairs),
        "crossed": lambda optimizer: DiLoCo(replica, optimizer, group=crossed).start(),
        "inner_group": lambda optimizer: SlowMo(replica, optimizer, group=group, inner_group=group),
        "gossip": lambda optimizer: Gossip(replica, optimizer, group=group),
        "noloco": lambda optimizer: NoLoCo(replica, optimizer, group=group),
        "hybrid": lambda optimizer: SlowMo(hybrid, torch.optim.SGD(hybrid.parameters(), lr=0.1), group=group),
        "parallel": lambda optimizer: SlowMo(parallel, torch.optim.SGD(parallel.parameters(), lr=0.1), group=group),
    }.items():
        try:
            make(torch.optim.SGD(replica.parameters(), lr=0.1))
        except (TypeError, ValueError) as error:
            found[name] = type(error), str(error)
    return found


def _on_ranks(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    runs = {
        name: [run(method, settings, mesh, is_sharded) for is_sharded in (False, True)]
        for name, (method, settings) in METHODS.items()
    }
    method, settings = METHODS["slowmo"]
    rounded = {wire: run(method, settings | {"wire_dtype": wire}, mesh, True) for wire in ROUNDED}
    rounded[None] = runs["slowmo"][1]
    resumed = [resume(method, settings, mesh)]
    method, settings = METHODS["streaming"]
    resumed.append(resume(method, settings | {"wire_dtype": "int4"}, mesh))
    return runs, rounded, resumed, refusals(mesh)


@pytest.fixture(scope="module")
def results():
    return run_ranks(_on_ranks, 4, timeout=300)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_sharded_replicas_train_as_whole_ones(results, name):
    for runs, *_ in results:
        expected, found = runs[name]
        for one, other in zip(expected[:4], found[:4]):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert found[1] > 1e-3  # the replicas are apart
        assert found[4] < expected[4]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("wire", ROUNDED)
def test_wire_formats_round_the_own_shards(results, wire):
    for _, rounded, *_ in results:
        (exact, _, _, _, most), (found, _, _, _, sent) = rounded[None], rounded[wire]
        assert wire != "bfloat16" or 0 < sent < most  # blocks of 128 numbers are more than this model
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0.02)
        assert not torch.equal(found["0.weight"], exact["0.weight"])


@pytest.mark.distributed
@pytest.mark.slow
def test_a_sharded_run_resumes_inside_of_a_period_to_the_bit(results):
    for _, _, resumed, _ in results:
        for first, second in resumed:
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.slow
def test_meshes_that_do_not_match_and_other_shardings_are_refused(results):
    for *_, found in results:
        kinds = {name: kind for name, (kind, _) in found.items()}
        assert kinds == {
            **dict.fromkeys(("group", "shards as group", "crossed", "inner_group", "hybrid"), ValueError),
            **dict.fromkeys(("gossip", "noloco", "parallel"), TypeError),
        }
        assert "shard 1 of 2" in found["crossed"][1]
        assert "Replicate()" in found["hybrid"][1]
        assert "FSDP2" in found["gossip"][1]
    assert "[0, 1]" in results[0][3]["group"][1]
