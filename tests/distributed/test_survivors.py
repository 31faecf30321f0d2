"""SlowMo, LocalSGD and DiLoCo that go on without lost ranks, against float64 loops over the ranks that are left."""

import os
import signal
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from gossip_reference import make_model, take_step, values
from launch import run_ranks
from lost_ranks import Warnings, all_pids, run_ranks_that_are_left
from states import same
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.comm import flat as flat_buffers
from hf_msn.distributed.comm.agreement import DONE, HERE
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.diloco import DiLoCo
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.slowmo import SlowMo

RATES = (0.1, 0.2)
METHODS = {
    "slowmo": (SlowMo, {"slow_momentum": 0.6, "base_buffers": "average"}),
    "diloco": (DiLoCo, {}),
    "slowmo int8": (SlowMo, {"slow_momentum": 0.6, "base_buffers": "average", "wire_dtype": "int8"}),
    "local_sgd": (LocalSGD, {}),
}
NUM_STEPS, PERIOD, NUM_RANKS = 11, 2, 4
IN_AN_OUTER_STEP, BETWEEN = 4, 6  # the step in whose outer step rank 2 dies, and the first one without rank 0
STATES = ("anchors", "momenta", "outer_optimizers")


def make_run(method, seed=0, **settings):
    model = make_model(seed)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1, momentum=0.9)
    method, own = METHODS[method]
    settings = {"sync_every": PERIOD, "timeout_seconds": 10.0, "on_lost_rank": "continue", **own, **settings}
    return model, optimizer, method(model, optimizer, **settings)


def die_in_the_second_bucket(sync):
    exchange, calls = sync._exchange, []
    mean_ = exchange.mean_

    def mean_or_die(tensors):
        calls.append(tensors)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        mean_(tensors)

    exchange.mean_ = mean_or_die


def no_store():
    raise RuntimeError("the store was on rank 0")


def _outlive(rank):
    flat_buffers.BUCKET_BYTES = 8  # a bucket for each parameter
    lines = Warnings()
    runs = {name: make_run(name, seed=rank) for name in METHODS}  # made equal when entering
    for _, _, sync in runs.values():
        sync.start()
    dist.distributed_c10d._get_default_store = no_store
    seen = {name: [] for name in METHODS}
    for step in range(1, NUM_STEPS + 1):
        if (step, rank) == (BETWEEN, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if (step, rank) == (IN_AN_OUTER_STEP, 2):
            die_in_the_second_bucket(runs["slowmo"][2])
        for name, (model, optimizer, sync) in runs.items():
            take_step(model, optimizer, RATES, rank, step)
            sync.step()
            seen[name].append(values(model))
    results = {}
    for name, (model, _, sync) in runs.items():
        distance, absent = sync.consensus_distance(), sync.absent_ranks
        sync.stop()
        state = {key: value for key, value in sync.state_dict().items() if key in STATES}
        results[name] = [*seen[name], values(model)], state, distance, absent, sync.absent_ranks
    return results, lines.having("goes on with the others")


def by_hand(name):
    """Return x of every rank after each step and at the end, and the consensus distance before it."""
    runs = [make_run(name, on_lost_rank="raise")[:2] for _ in range(NUM_RANKS)]
    x = [list(model.parameters()) for model, _ in runs]
    x0, v = values(runs[0][0]), [torch.zeros_like(p) for p in x[0]]
    alive, seen = [0, 1, 2, 3], [[] for _ in runs]

    def mean(i):
        return sum(x[rank][i] for rank in alive) / len(alive)

    @torch.no_grad()
    def outer_step():
        for i in range(2):
            delta = x0[i] - mean(i)
            if name == "diloco":
                v[i] = 0.9 * v[i] + delta
                x0[i] = x0[i] - 0.7 * (delta + 0.9 * v[i])
            elif name == "local_sgd":
                x0[i] = mean(i)
            else:
                v[i] = 0.6 * v[i] + delta
                x0[i] = x0[i] - v[i]
            for rank in alive:
                x[rank][i].copy_(x0[i])
            if name.startswith("slowmo"):
                buffers = [runs[rank][1].state[x[rank][i]]["momentum_buffer"] for rank in alive]
                average = sum(buffers) / len(alive)
                for buffer in buffers:
                    buffer.copy_(average)

    for step in range(1, NUM_STEPS + 1):
        alive = [rank for rank in alive if (step, rank) != (BETWEEN, 0)]
        for rank in alive:
            take_step(*runs[rank], RATES, rank, step)
        alive = [rank for rank in alive if (step, rank) != (IN_AN_OUTER_STEP, 2)]
        if step % PERIOD == 0:
            outer_step()
        for rank in alive:
            seen[rank].append(values(runs[rank][0]))
    squares = [sum(((x[rank][i] - mean(i)) ** 2).sum() for i in range(2)) for rank in alive]
    outer_step()  # when leaving
    for rank in alive:
        seen[rank].append(values(runs[rank][0]))
    return seen, (sum(squares) / len(alive)).sqrt().item()


@pytest.mark.slow
@pytest.mark.distributed
def test_outer_steps_go_on_without_a_rank_killed_inside_of_one_and_rank_0_killed_between(tmp_path):
    results = run_ranks_that_are_left(_outlive, NUM_RANKS, tmp_path, lost=[0, 2], timeout=90.0)
    for name in METHODS:
        expected, distance = by_hand(name)
        tolerance = 0.05 if "int8" in name else 1e-12
        for rank, (result, warnings) in results.items():
            found, state, own_distance, *absent = result[name]
            torch.testing.assert_close(found, expected[rank], rtol=tolerance, atol=tolerance)
            assert own_distance == pytest.approx(distance, rel=max(tolerance, 1e-9))
            assert absent == [[0, 2], [0, 2]]
            assert same(state, results[1][0][name][1]) and (name == "local_sgd" or state["anchors"])
            assert same(found[-1], results[1][0][name][0][-1])
            assert len(warnings) == len(METHODS) * 2  # one of each object for each lost rank


def _stop_and_leave(rank):
    pids, results = all_pids(), {}
    model, optimizer, sync = make_run("slowmo")
    try:
        with sync:
            for step in range(2 if rank == 1 else 3):
                take_step(model, optimizer, RATES, rank, step)
                if step < 2:
                    sync.step()
            if rank != 1:
                take_step(model, optimizer, RATES, rank, 3)
                sync.step()
                sync.step()
    except PeerError as error:
        results["other event"] = error.ranks
    dist.barrier()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match="`find_unused_parameters` is True"):
        SlowMo(wrapped, optimizer, timeout_seconds=3.0, on_lost_rank="continue")
    model, optimizer, sync = make_run("diloco", timeout_seconds=3.0)
    began = time.monotonic()
    try:
        with sync:
            for step in range(6):
                if (step, rank) == (3, 2):
                    os.kill(pids[2], signal.SIGSTOP)
                take_step(model, optimizer, RATES, rank, step)
                sync.step()
                if (step, rank) == (3, 0):
                    results["seconds"] = time.monotonic() - began
                    os.kill(pids[2], signal.SIGCONT)
    except PeerError as error:
        results["error"] = str(error)
    return {**results, "absent": sync.absent_ranks, "values": values(model)}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank_is_lost_and_told_so_and_an_early_end_is_an_error_on_all():
    results = run_ranks(_stop_and_leave, 3, timeout=60.0)
    assert [result["other event"] for result in results] == [(1,), (0, 2), (1,)]
    assert 2.9 < results[0]["seconds"] < 8.0
    assert [result["absent"] for result in results] == [[2], [2], []]
    assert same(results[0]["values"], results[1]["values"])
    assert "goes on without Rank 2" in results[2]["error"]


def _tell_late(tell, audience, kind, numbers, payload=None):
    time.sleep(1.0 if (kind, numbers[1]) == (HERE, 1) else 0.0)  # rank 1 knows by now that rank 2 has died
    tell(audience, kind, numbers, payload)


def _tell_rank_0_and_die(tell, audience, kind, numbers, payload=None):
    if kind != DONE:
        return tell(audience, kind, numbers, payload)
    tell([0], kind, (*numbers[:2], 0.0))
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def _fail_and_die_before_all_are_told(rank):
    model, optimizer, sync = make_run("diloco")
    with sync:
        for step in range(1, 5):
            take_step(model, optimizer, RATES, rank, step)
            if step == 2 and rank != 1:
                peers = sync._survivors._peers
                peers.tell = partial(_tell_late if rank == 0 else _tell_rank_0_and_die, peers.tell)
            sync.step()
    return values(model), sync.absent_ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_which_one_has_heard_of_a_failure_and_another_not_end_the_step_alike(tmp_path):
    run = _fail_and_die_before_all_are_told
    results = run_ranks_that_are_left(run, 3, tmp_path, lost=[2], timeout=40.0)
    assert results.keys() == {0, 1} and same(results[0], results[1]) and results[0][1] == [2]


def _die_while_entering(rank, place):
    _, _, sync = make_run("diloco", timeout_seconds=2.0)
    if rank == 2:
        setattr(sync._survivors, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(PeerError) as error:
        sync.start()
    return error.value.ranks, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("place", ["connect", "repeat"])
def test_a_rank_that_dies_while_entering_ends_it_on_the_others(tmp_path, place):
    results = run_ranks_that_are_left(_die_while_entering, 3, tmp_path, place, lost=[2], timeout=30.0)
    assert {ranks for ranks, _ in results.values()} == {(2,)}
    assert all(seconds < 6.0 for _, seconds in results.values())


@pytest.mark.parametrize(
    "method, settings, offending",
    [
        ("diloco", {"on_lost_rank": "ignore"}, "'ignore'"),
        ("diloco", {"timeout_seconds": None}, "None"),
        ("local_sgd", {"sync_start_step": 3}, "3"),
        ("slowmo", {"shard_state": True}, "True"),
    ],
)
def test_what_cannot_go_on_without_a_rank_is_refused(method, settings, offending):
    with pytest.raises(ValueError, match="`on_lost_rank.*" + offending):
        make_run(method, **settings)


def test_a_base_of_slowmo_cannot_go_on_without_a_rank():
    model, optimizer, base = make_run("local_sgd")
    with pytest.raises(ValueError, match="`base` LocalSGD"):
        SlowMo(model, optimizer, base=base)
