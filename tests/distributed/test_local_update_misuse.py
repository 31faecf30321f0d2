"""Wrong use of local training, and lost ranks."""

import os
import signal
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from local_runs import backward, error_of, make_model, parameters, sgd
from lost_ranks import run_ranks_that_are_left
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.async_gossip import AsyncGossip
from hf_msn.distributed.comm.exchange import Exchange, PeerError
from hf_msn.distributed.diloco import DiLoCo
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.noloco import NoLoCo
from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.streaming_diloco import StreamingDiLoCo
from hf_msn.distributed.topology import RingTopology


def test_every_call_of_step_counts():
    model = make_model()
    sync = SlowMo(model, sgd(model), sync_every=3)
    with sync:
        for _ in range(7):
            sync.step()
        assert (sync.steps, sync.local_steps) == (7, 1)
    assert (sync.steps, sync.local_steps) == (7, 0)  # leaving ends the period


@pytest.mark.parametrize("method", [LocalSGD, SlowMo, Gossip, OverlapGossip, AsyncGossip])
def test_a_state_of_another_version_is_refused_by_the_entry_that_it_lacks(method):
    model = make_model()
    with method(model, sgd(model)) as sync:
        state = sync.state_dict()
    for name in state.keys() - {"base"}:  # SlowMo's base, if there is one, has a state of its own
        other = make_model()
        with pytest.raises(ValueError, match=f"no '{name}'"):
            method(other, sgd(other)).load_state_dict({key: state[key] for key in state if key != name})


def test_an_error_leaves_without_an_outer_step_and_frees_the_model():
    model = make_model()
    optimizer = sgd(model)
    with pytest.raises(KeyError), SlowMo(model, optimizer, sync_every=3) as sync:
        sync.step()
        with torch.no_grad():
            model[0].weight.add_(1)
        moved = parameters(model)
        raise KeyError
    assert torch.equal(parameters(model), moved)
    assert (sync.local_steps, len(optimizer._optimizer_step_pre_hooks)) == (1, 0)
    with SlowMo(model, optimizer):
        pass


def test_after_an_error_a_period_begins_anew_for_the_base_too():
    model = make_model()
    optimizer = sgd(model)
    base = LocalSGD(model, optimizer, sync_every=3)
    sync = SlowMo(model, optimizer, sync_every=4, base=base)
    with pytest.raises(KeyError), sync:
        sync.step()
        raise KeyError
    with sync:
        sync.step()
        assert (sync.local_steps, base.local_steps) == (1, 1)


@pytest.mark.parametrize(
    "method, options",
    [
        (LocalSGD, {"sync_every": 1}),
        (Gossip, {}),
        (Gossip, {"push_sum": False}),
        (Gossip, {"consensus_target": 1.0}),
        (OverlapGossip, {}),
        (AsyncGossip, {"method": "push_sum"}),
    ],
)
def test_one_rank_trains_as_without_the_method_and_is_warned(method, options):
    models = [make_model(), make_model()]
    optimizers = [sgd(model) for model in models]
    with (
        pytest.warns(UserWarning, match="one rank only") as caught,
        method(models[0], optimizers[0], **options) as sync,
    ):
        for step in range(3):
            for model, optimizer in zip(models, optimizers):
                backward(model, optimizer, 0, step)
                optimizer.step()
            sync.step()
        assert (sync.steps, sync.bytes_sent, sync.consensus_distance()) == (3, 0, 0.0)
        sync.sync()
        sync.state_dict()
    assert len(caught) == 1
    assert torch.equal(parameters(models[0]), parameters(models[1]))


@pytest.mark.parametrize("base", [None, Gossip, OverlapGossip])
def test_slow_momentum_acts_on_one_rank_without_a_warning(base):
    model = make_model()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SlowMo(model, optimizer, base=base and base(model, optimizer), sync_every=2) as sync:
            sync.step()


@pytest.mark.parametrize(
    "method, options",
    [
        (LocalSGD, {"sync_every": 0}),
        (LocalSGD, {"sync_start_step": -1}),
        (LocalSGD, {"base_buffers": "keep"}),
        (LocalSGD, {"timeout_seconds": 0}),
        (LocalSGD, {"group": object()}),
        (LocalSGD, {"wire_dtype": "fp8"}),
        (SlowMo, {"slow_momentum": 1.0}),
        (SlowMo, {"slow_lr": 0.0}),
        (SlowMo, {"shard_state": True, "average": False}),
        (SlowMo, {"shard_state": True, "wire_dtype": "bfloat16"}),
        (Gossip, {"topology": RingTopology(3)}),
        (Gossip, {"topology": "ring"}),
        (Gossip, {"wire_dtype": "float16"}),
        (Gossip, {"consensus_target": 0.0}),
        (Gossip, {"consensus_target": float("nan")}),
        (Gossip, {"max_extra_rounds": 0}),
        (Gossip, {"consensus_until_step": 0, "consensus_target": 1.0}),
        (Gossip, {"consensus_until_step": 5}),
        (Gossip, {"quasi_global_momentum": 1.0}),
        (Gossip, {"quasi_global_momentum": (0.5, -0.1)}),
        (Gossip, {"quasi_global_momentum": "0.9"}),
        (OverlapGossip, {"staleness_bound": -1}),
        (OverlapGossip, {"staleness_bound": 1.0}),
        (OverlapGossip, {"base_buffers": "reset"}),
        (OverlapGossip, {"timeout_seconds": None}),
        (OverlapGossip, {"inner_group": object()}),
        (AsyncGossip, {"method": "sgp"}),
        (AsyncGossip, {"seed": -1}),
        (AsyncGossip, {"timeout_seconds": None}),
        (AsyncGossip, {"base_buffers": "average"}),
        (AsyncGossip, {"inner_group": object()}),
        (AsyncGossip, {"topology": RingTopology(4)}),
    ],
)
def test_settings_outside_of_their_rules_are_refused(method, options):
    model, name = make_model(), next(iter(options))
    with pytest.raises(ValueError, match=f"`{name}"):
        method(model, sgd(model), **options)


def test_a_second_sync_object_is_refused():
    model = make_model()
    optimizer = sgd(model)
    with SlowMo(model, optimizer):
        with pytest.raises(ValueError, match="A model"):
            SlowMo(model, sgd(model)).start()
        with pytest.raises(ValueError, match="An optimizer"):
            SlowMo(make_model(), optimizer).start()


def test_use_before_entering_and_unfreezing_inside_are_refused():
    model = make_model()
    model[0].requires_grad_(False)
    sync = SlowMo(model, sgd(model), sync_every=1)
    for method in (sync.step, sync.sync, sync.consensus_distance):
        with pytest.raises(RuntimeError, match=r"start\(\)"):
            method()
    sync.start()
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="unfrozen"):
        sync.step()


def test_deepspeed_and_other_models_and_optimizers_are_refused():
    class DeepSpeedEngine(nn.Linear):
        pass

    model = nn.Sequential(DeepSpeedEngine(1, 1))
    with pytest.raises(TypeError, match="DeepSpeed"):
        SlowMo(model, sgd(model))
    with pytest.raises(TypeError, match="object"):
        SlowMo(make_model(), object())
    with pytest.raises(TypeError, match=r"`model`.*list"):
        SlowMo([make_model()], sgd(model))


def _refusals_on_ranks(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2 + rank))
    errors = [error_of(lambda: SlowMo(model, sgd(model)).start())]
    same = make_model()
    errors.append(error_of(lambda: LocalSGD(same, sgd(same), sync_every=3 + rank).start()))
    hooked = DistributedDataParallel(make_model())
    hooked.register_comm_hook(None, lambda state, bucket: None)
    optimizer = sgd(hooked)
    for base in (None, OverlapGossip(hooked, optimizer)):
        errors.append(error_of(lambda base=base: SlowMo(hooked, optimizer, base=base).start()))
    errors.append(error_of(lambda: OverlapGossip(hooked, optimizer).start()))
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_msn")]
    assert threads == []
    outside = dist.new_group([1])
    if rank == 0:
        errors.append(error_of(lambda: SlowMo(same, sgd(same), group=outside)))
    return errors


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_that_differ_are_refused():
    first, second = run_ranks(_refusals_on_ranks, 2)
    for shapes, settings, *hooks in (first[:5], second[:5]):
        assert "rank 0 has `1.weight (2, 4) torch.float32 in group 0` where rank 1 has `1.weight (3, 4)" in shapes
        assert "rank 0 has `setting sync_every=3` where rank 1 has `setting sync_every=4`" in settings
        assert all("`_refusals_on_ranks.<locals>.<lambda>`" in hook for hook in hooks)
    assert "`group`" in first[5]


def test_cpu_tensors_over_nccl_are_refused(monkeypatch):
    exchange = Exchange()
    exchange.size = 2
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match=r"cuda:nccl.*'cpu'"):
        exchange.check_devices([torch.zeros(1)])
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    exchange.check_devices([torch.zeros(1)])


BESIDE_A_LOST_PEER = {
    "slowmo": lambda *it, **options: SlowMo(*it, sync_every=2, **options),
    "diloco": lambda *it, **options: DiLoCo(*it, sync_every=2, **options),
    "gossip": lambda *it, **options: Gossip(*it, topology=RingTopology(4, directed=True), **options),
    "noloco": lambda *it, **options: NoLoCo(*it, sync_every=1, **options),
    "streaming": lambda *it, **options: StreamingDiLoCo(
        *it, sync_every=2, num_fragments=2, fragments="size", delay=1, **options
    ),
}


def _train_beside_a_lost_peer(rank, name, how, timeout_seconds):
    model = make_model()
    optimizer = sgd(model)
    try:
        with BESIDE_A_LOST_PEER[name](model, optimizer, timeout_seconds=timeout_seconds) as sync:
            for step in range(60):
                started = time.monotonic()
                if step == 5 and rank == 1:
                    if how == "dies":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)
                backward(model, optimizer, rank, step)
                optimizer.step()
                sync.step()
    except PeerError as error:
        return error.ranks, str(error), time.monotonic() - started, sync.steps


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, how, timeout_seconds",
    [
        *(("slowmo", how, seconds) for how, seconds in (("dies", 3.0), ("hangs", 1.5), ("dies", None))),
        ("diloco", "dies", 3.0),
        *(("gossip", how, 2.0) for how in ("dies", "hangs")),
        ("noloco", "dies", 2.0),
        *(("streaming", how, 2.0) for how in ("dies", "hangs")),
    ],
)
def test_a_lost_peer_is_named_within_the_deadline_and_nobody_hangs(tmp_path, name, how, timeout_seconds):
    num_ranks = 3 if name in ("slowmo", "diloco", "streaming") else 4  # on the ring, rank 3 does not hear from rank 1
    reports = run_ranks_that_are_left(
        _train_beside_a_lost_peer, num_ranks, tmp_path, name, how, timeout_seconds, lost=(1,), timeout=40.0
    )
    for rank, (lost, message, seconds, steps) in reports.items():
        assert seconds < (timeout_seconds or 4.0) + 3.5  # asking the store takes at most 2 s
        assert 1 in lost
        assert rank not in lost
        if how == "hangs":
            assert lost[0] == 1  # before the ranks whose connection broke because they gave up on rank 1
        if num_ranks == 3:
            assert 6 <= steps <= (7 if name == "streaming" else 6)  # it waits `delay` steps later
            assert f"[0, 1, 2] failed on rank {rank}" in message
            assert how == "dies" or (lost == (1,) and seconds >= timeout_seconds - 0.1)
