"""OverlapGossip when ranks die or stop: the others go on, mass is kept, and the ranks meet again. Real processes."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from lost_ranks import Warnings, all_pids, run_ranks_that_are_left
from overlap_runs import weight_under_way
from topologies import Star

from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo


def make_run(rank, **options):
    """Give each rank its own values, without learning: the exact mean is known."""
    model = torch.nn.Linear(50, 400, bias=False).double()
    model.register_buffer("statistic", torch.tensor(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = OverlapGossip(model, optimizer, **options).start()
    with torch.no_grad():
        model.weight.fill_(float(rank))
        model.statistic.fill_(float(rank))
    return model, optimizer, sync


def take_steps(model, optimizer, sync, num, seconds=0.0):
    for _ in range(num):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        sync.step()
        time.sleep(seconds)


def total(number, group=None):
    """Return the sum over the ranks."""
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor, group=group)
    return tensor.item()


# Death


def _outlive(rank, lost, how, options):
    survivors = [other for other in range(dist.get_world_size()) if other not in lost]
    group = dist.new_group(survivors)
    lines, pids = Warnings(), all_pids()
    run = model, _, sync = make_run(rank, timeout_seconds=10.0, **options)
    first_mass = total(sync.push_sum_weight + weight_under_way(sync))
    take_steps(*run, 5)
    if rank in lost:
        if how == "exits":
            os._exit(0)
        time.sleep(60.0)
    mass_before = None
    if how == "killed while stopped":
        time.sleep(0.3)  # for the messages of the lost rank to arrive
        total(0.0, group)
        sync._peers.update()
        sync._merge()
        mass_before = total(sync.push_sum_weight + weight_under_way(sync, survivors), group)
        if rank == survivors[0]:
            for victim in lost:
                os.kill(pids[victim], signal.SIGSTOP)
        total(0.0, group)
        threading.Timer(0.5, lambda: [os.kill(pids[v], signal.SIGKILL) for v in lost]).start()
    take_steps(*run, 20)
    masses = []
    for _ in range(3):
        total(0.0, group)
        masses.append(total(sync.push_sum_weight + weight_under_way(sync), group))
        total(0.0, group)
        take_steps(*run, 15)
    before = model.weight.detach().clone()
    alive = sync.alive
    with pytest.raises(PeerError, match="consensus distance"):
        sync.consensus_distance()
    sync.sync()
    mass_after_sync = total(sync.push_sum_weight + weight_under_way(sync), group)
    take_steps(*run, 2)
    sync.stop()
    return {
        "first mass": first_mass,
        "masses": masses,
        "mass before": mass_before,
        "moved": (model.weight - before).abs().max().item(),
        "weight": model.weight.detach(),
        "statistic": model.statistic.item(),
        "alive": alive,
        "mass after sync": mass_after_sync,
        "died": lines.having("has died"),
        "means": lines.having("takes the mean of"),
    }


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "num_ranks, lost, how, options",
    [
        (3, [0], "killed while stopped", {}),
        (4, [0, 2], "exits", {"deterministic": True}),
        (4, [1], "exits", {"topology": Star(4)}),
        (2, [0], "killed while stopped", {"wire_dtype": "bfloat16"}),
    ],
)
def test_the_others_go_on_without_the_dead_and_keep_their_mass(tmp_path, num_ranks, lost, how, options):
    results = run_ranks_that_are_left(_outlive, num_ranks, tmp_path, lost, how, options, lost=lost)
    survivors = sorted(results)
    for rank, result in results.items():
        assert result["first mass"] == num_ranks
        # One warning per loss on each rank, that names it.
        assert sorted(line.split()[1] for line in result["died"]) == [str(victim) for victim in lost]
        assert result["alive"] == survivors
        assert result["masses"] == pytest.approx([result["masses"][0]] * 3, abs=1e-12)
        assert 0.1 < result["masses"][0] < num_ranks
        if how != "exits":
            # All that was sent to the lost one while it stood still came back.
            assert result["masses"][0] == pytest.approx(result["mass before"], abs=1e-12)
        # The mean of those that are left was there by mixing, and `sync` has only brought the last digits.
        assert result["moved"] < (1e-5 if "topology" not in options else 1e-2)
        assert torch.equal(result["weight"], results[survivors[0]]["weight"])
        assert result["statistic"] == pytest.approx(sum(survivors) / len(survivors))
        assert result["mass after sync"] == pytest.approx(len(survivors), abs=1e-12)
        assert len(result["means"]) == (2 if rank == survivors[0] else 0)


def _lose_under_slow_momentum(rank):
    model = torch.nn.Linear(5, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    base = OverlapGossip(model, optimizer, timeout_seconds=5.0)
    began, ranks = time.monotonic(), None
    try:
        with SlowMo(model, optimizer, base=base, sync_every=6) as sync:
            for step in range(20):
                if rank == 1 and step == 3:
                    os._exit(0)
                model(torch.ones(2, 5).double()).square().mean().backward()
                optimizer.step()
                sync.step()
    except PeerError as error:
        ranks = error.ranks
    return ranks, sync.steps, time.monotonic() - began


@pytest.mark.distributed
def test_an_outer_step_of_slowmo_without_all_ranks_names_who_is_missing(tmp_path):
    results = run_ranks_that_are_left(_lose_under_slow_momentum, 3, tmp_path, lost=[1])
    for ranks, steps, seconds in results.values():
        assert (ranks, steps) == ((1,), 6)
        assert seconds < 5.0


# Stops


def leave_alone(rank, stopped):
    """Returns when the others need nothing of `stopped` any more: it may still be in a collective of all."""
    group = dist.new_group([other for other in range(3) if other != stopped])
    dist.barrier()
    if rank != stopped:
        dist.barrier(group)


def _stop_and_go_on(rank, options):
    lines, pids = Warnings(), all_pids()
    run = model, _, sync = make_run(rank, timeout_seconds=1.2, **options)
    take_steps(*run, 5)
    leave_alone(rank, stopped=2)
    steps_beside = None
    if rank == 0:
        os.kill(pids[2], signal.SIGSTOP)
        take_steps(*run, 40, 0.005)
        steps_beside = sync.alive
        os.kill(pids[2], signal.SIGCONT)
        take_steps(*run, 40, 0.03)
    else:
        take_steps(*run, 40, 0.005)
        take_steps(*run, 40, 0.03)
    alive = sync.alive
    mass = total(sync.push_sum_weight + weight_under_way(sync))
    dist.barrier()
    sync.stop()
    return (
        steps_beside,
        alive,
        mass,
        model.weight.detach(),
        model.statistic.item(),
        lines.having("is silent for"),
        lines.having("takes it back"),
        lines.lines,
    )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"deterministic": True, "staleness_bound": 2}, {"topology": Star(3)}])
def test_a_stopped_rank_is_passed_over_and_taken_back_and_no_mass_is_lost(options):
    results = run_ranks(_stop_and_go_on, 3, options)
    assert results[0][0] == [0, 1]
    for rank, (_, alive, mass, weight, statistic, silent, heard, lines) in enumerate(results):
        assert alive == [0, 1, 2], lines
        assert mass == pytest.approx(3.0, abs=1e-12)
        # The exact mean of what all began with: nobody's share was lost or counted twice.
        torch.testing.assert_close(weight, torch.full_like(weight, 1.0), rtol=0, atol=1e-12)
        assert statistic == 1.0
        assert len(silent) == len(heard), lines
        if rank == 0 or (rank == 1 and "topology" not in options):  # who waits for it
            assert [line.split()[1] for line in silent] == ["2"], lines
