"""Asynchronous gossip when ranks die, stop, or are resumed."""

import io
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from async_runs import METHODS, Accounts, flat, jump_to, make_model, step_of, targets
from launch import run_ranks
from lost_ranks import Warnings, all_pids, run_ranks_that_are_left
from torch import nn

from hf_msn import AsyncGossip, PeerError


def fail_in_the_last_collective(sync, dies):
    """The collectives fail once frozen parameters and buffers are averaged, the dying rank's share among them."""
    exchange, calls = sync._exchange_in_place, []

    def fail(operation, tensors):
        calls.append(len(tensors))
        if len(calls) < 3:
            exchange(operation, tensors)
        elif dies:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise PeerError("broadcast")

    sync._exchange_in_place = fail


def _outlive(rank, method, lost, when):
    records = Warnings()
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    sync = Accounts(model, optimizer, method=method, rate_correction=False, timeout_seconds=8.0).start()
    with torch.no_grad():
        model[0].bias.fill_(rank)
        model[1].running_mean.fill_(rank)
        model[1].num_batches_tracked.fill_(rank)
    jump_to(model, optimizer, targets(rank))
    sync.step()
    for step in range(60):
        if rank == lost and step == 20 and when == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        step_of(optimizer, sync, 0.005)
    if rank == lost and when == "before a sync":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "in the collectives":
        fail_in_the_last_collective(sync, dies=rank == lost)
    sync.sync()
    brought, account = sync.brought, sync.account
    mean = flat(p for p in model.parameters() if p.requires_grad)
    after = sync.consensus_distance()
    at_sync = flat(model.parameters()), model[1].running_mean[0].item(), model[1].num_batches_tracked.item()
    living = [place for place in range(dist.get_world_size()) if place != lost]
    offset = [0.5, -0.5, 0.0][living.index(rank)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:  # as an optimizer would
            p.add_(offset)
    distance = sync.consensus_distance() / sum(p.numel() for p in trainable) ** 0.5
    for _ in range(20):
        step_of(optimizer, sync, 0.002)
    sync.stop()
    end = flat(model.parameters())
    return (brought, mean), at_sync, end, account, records.lines, model[0].bias[0].item(), (distance, after)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "method, num_ranks, lost, when",
    [
        ("ad_psgd", 4, 0, "between steps"),
        ("push_sum", 4, 0, "between steps"),
        ("push_sum", 3, 1, "before a sync"),
        ("ad_psgd", 3, 2, "in the collectives"),
    ],
)
def test_the_others_go_on_without_a_rank_that_dies(tmp_path, method, num_ranks, lost, when):
    results = run_ranks_that_are_left(_outlive, num_ranks, tmp_path, method, lost, when, lost=[lost])
    living = sorted(results)
    assert living == [rank for rank in range(num_ranks) if rank != lost]
    first = results[living[0]]
    torch.testing.assert_close(first[2], first[1][0], rtol=0, atol=1e-12)
    for rank in living:
        _, (at_sync, running_mean, num_batches), at_end, _, texts, bias, (distance, after) = results[rank]
        assert torch.equal(at_sync, first[1][0])
        assert torch.equal(at_end, first[2])
        assert after < 1e-12
        assert distance == pytest.approx((0.5 / len(living)) ** 0.5, abs=1e-9)
        assert running_mean == pytest.approx(sum(living) / len(living))
        assert bias == pytest.approx(sum(living) / len(living))
        assert num_batches == living[0]
        assert len([text for text in texts if f"Rank {lost} has died" in text]) == 1, texts
    if method == "push_sum":
        accounts = [results[rank][3] for rank in living]
        weight = sum(account[0] for account in accounts)
        gone = sum(posted[lost] - collected[lost] for _, posted, collected in accounts)
        assert weight + gone == pytest.approx(len(living), abs=1e-12)
    else:
        brought = sum(results[rank][0][0] for rank in living) / len(living)
        torch.testing.assert_close(first[0][1], brought, rtol=0, atol=1e-12)


def wait_for(path):
    deadline = time.monotonic() + 30.0
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _pass_over(rank, folder, method):
    records = Warnings()
    pids = all_pids()
    model = nn.Linear(1000, 700).double()  # more than a connection holds: messages wait here
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method, timeout_seconds=1.2).start()
    jump_to(model, optimizer, targets(rank, model))
    for _ in range(20):
        sync.step()
        time.sleep(0.01)
        optimizer.step()
    seen = None
    if rank == 2:
        sync.step()
        while not Path(folder, "go on").exists():
            step_of(optimizer, sync, 0.01)
    else:
        if rank == 0:
            os.kill(pids[2], signal.SIGSTOP)
        before = sync.seconds_waiting
        while not sync._peers.silent:
            step_of(optimizer, sync, 0.01)
        seen = [sorted(sync._peers.silent), sync.seconds_waiting - before]
        with pytest.raises(PeerError) as failure:
            sync.sync()
        seen.append(failure.value.ranks)
        Path(folder, f"failed {rank}").touch()
        wait_for(Path(folder, f"failed {1 - rank}"))
        if rank == 0:
            os.kill(pids[2], signal.SIGCONT)
        while sync._peers.silent:
            step_of(optimizer, sync, 0.01)
        Path(folder, "go on").touch()
    sync.sync()
    at_sync = flat(model.parameters())
    for _ in range(20):
        step_of(optimizer, sync, 0.002)
    sync.stop()
    return seen, at_sync, flat(model.parameters()), records.lines


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_rank_is_passed_over_and_taken_back_with_all_it_has(tmp_path, method):
    results = run_ranks(_pass_over, 3, tmp_path, method)
    mean = sum(flat(targets(rank, nn.Linear(1000, 700))) for rank in range(3)) / 3
    for rank, (seen, at_sync, at_end, texts) in enumerate(results):
        torch.testing.assert_close(at_sync, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(at_end, mean, rtol=0, atol=1e-10)
        if rank != 2:
            assert seen[0] == [2]
            assert seen[1] == 0.0  # steps beside it do not wait
            assert seen[2] == (2,)
            assert sum("Rank 2" in text for text in texts) >= 2  # passed over, and taken back


def _resume(rank):
    return [_resume_with(rank, method) for method in METHODS]


def _resume_with(rank, method):
    def run(sync, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            sync.model(torch.full((4, 3), float(rank + 1), dtype=torch.float64)).square().mean().backward()
            step_of(optimizer, sync, 0.002)

    def make(seed):
        model = make_model(seed)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make(0)
    sync = AsyncGossip(model, optimizer, method=method).start()
    run(sync, optimizer, 10 + rank)
    with pytest.raises(RuntimeError, match="sync"):
        sync.state_dict()
    sync.sync()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), sync.state_dict()], file)
    sync.stop()
    ends = []
    for started_first in (False, True):
        file.seek(0)
        states = torch.load(file, weights_only=True)
        model, optimizer = make(5 + rank)
        sync = AsyncGossip(model, optimizer, method=method)
        if started_first:
            sync.start()
        for taken, state in zip((model, optimizer, sync), states):
            taken.load_state_dict(state)
        if not started_first:
            sync.start()
        same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), states[0].values()))
        optimizer.param_groups[0]["lr"] = 0.0
        run(sync, optimizer, 5)
        saved = flat(p for name, p in states[0].items() if "running" not in name and "num" not in name)
        ends.append((same, sync.steps, sync.rounds, flat(model.parameters()), saved))
        sync.stop()
    return ends


@pytest.mark.distributed
def test_a_state_after_sync_is_complete_and_none_is_given_in_between():
    for rank, results in enumerate(run_ranks(_resume, 2)):
        for same, steps, rounds, values, saved in [end for ends in results for end in ends]:
            assert same
            assert steps == rounds == 15 + rank
            torch.testing.assert_close(values, saved, rtol=0, atol=1e-12)
