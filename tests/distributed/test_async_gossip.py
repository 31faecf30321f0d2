"""Asynchronous gossip between real ranks: what is conserved, who waits for whom, and ranks that lag, die or stop."""

import io
import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from lost_ranks import run_ranks_that_are_left
from torch import nn

from hf_msn import AsyncGossip, ExponentialTopology, PeerError, RingTopology
from hf_msn.distributed.mixing.step_rates import StepRates
from hf_msn.distributed.topology import BipartiteExponentialTopology, CompleteTopology, RandomOnePeerTopology
from hf_msn.distributed.topology_two_sides import TwoSidesTopology, check_topology, two_sides

METHODS = ["ad_psgd", "push_sum"]


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def targets(rank, model=None):
    generator = torch.Generator().manual_seed(100 + rank)
    model = model or make_model()
    return [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in model.parameters()]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def jump_to(model, optimizer, values):
    """One step of SGD that ends at `values`; those after it stay where they are."""
    for p, value in zip(model.parameters(), values):
        p.grad = p.detach() - value
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0


def step_of(optimizer, sync, seconds=0.0):
    optimizer.step()
    sync.step()
    time.sleep(seconds)


class Records(logging.Handler):
    """What was warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("hf_msn.distributed").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


class Accounts(AsyncGossip):
    """Notes weight and the mailbox's accounts at the end of each meeting."""

    def _settle(self):
        mailbox = self._mailbox
        self.account = self.weight, list(mailbox.weight_posted), list(mailbox.weight_collected)
        super()._settle()


# What is conserved


def _gossip_without_learning(rank, options):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = Accounts(model, optimizer, timeout_seconds=20.0, **options).start()
    for _ in range(options.get("sync_start_step", 0)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        step_of(optimizer, sync)
    jump_to(model, optimizer, targets(rank))
    before = sync.consensus_distance()
    pauses = random.Random(rank)
    for _ in range(40 + 7 * rank):
        sync.step()
        time.sleep(0.004 * pauses.random())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    after = sync.consensus_distance()
    sync.sync()
    at_sync = flat(model.parameters()), sync.consensus_distance(), sync.steps
    for _ in range(5):
        step_of(optimizer, sync, 0.002)
    sync.stop()
    return before, after, *at_sync, flat(model.parameters()), sync.account, sync.bytes_sent


@pytest.mark.distributed
@pytest.mark.parametrize(
    "num_ranks, options",
    [
        (2, {"method": "ad_psgd"}),
        (3, {"method": "ad_psgd", "rate_correction": False}),
        (4, {"method": "ad_psgd", "topology": BipartiteExponentialTopology(4), "seed": 3}),
        (4, {"method": "ad_psgd", "wire_dtype": "bfloat16"}),
        (2, {"method": "push_sum"}),
        (3, {"method": "push_sum", "topology": RingTopology(3)}),
        (4, {"method": "push_sum", "rate_correction": False}),
        (3, {"method": "push_sum", "wire_dtype": "bfloat16"}),
        (3, {"method": "ad_psgd", "sync_every": 3, "sync_start_step": 2}),
        (3, {"method": "push_sum", "sync_every": 2, "sync_start_step": 2}),
    ],
)
def test_the_mean_is_conserved_and_reached(num_ranks, options):
    results = run_ranks(_gossip_without_learning, num_ranks, options)
    mean = sum(flat(targets(rank)) for rank in range(num_ranks)) / num_ranks
    for rank, (before, after, at_sync, distance, steps, at_end, _, bytes_sent) in enumerate(results):
        assert before > 1.0
        assert after < before / (20 if options.get("wire_dtype") else 50)
        assert distance < 1e-12
        assert steps == 40 + 7 * rank + options.get("sync_start_step", 0)
        torch.testing.assert_close(at_sync, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(at_end, mean, rtol=0, atol=1e-10)
        assert bytes_sent > 0
    accounts = [result[6] for result in results]
    assert sum(weight for weight, _, _ in accounts) == pytest.approx(num_ranks, abs=1e-12)
    for sender in range(num_ranks):  # nothing is under way at a meeting
        for receiver in range(num_ranks):
            assert accounts[sender][1][receiver] == pytest.approx(accounts[receiver][2][sender], abs=1e-12)
    assert (sum(accounts[0][1]) > 0) == (options["method"] == "push_sum")


def _watch_every_step(rank, method, seconds):
    model = nn.Linear(400, 100, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method, rate_correction=False).start()
    optimizer.param_groups[0]["lr"] = 1.0
    mixed, num_merged, ends = 0, 0, time.monotonic() + seconds
    while time.monotonic() < ends:
        model.weight.grad = torch.full_like(model.weight, 0.1 * (rank - 1))
        optimizer.step()
        mixed += not bool((model.weight == model.weight[0, 0]).all())
        before = model.weight[0, 0].item()
        sync.step()
        mixed += not bool((model.weight == model.weight[0, 0]).all())
        num_merged += model.weight[0, 0].item() != before
    sync.stop()
    return mixed, num_merged, model.weight[0, 0].item()


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_never_half_written(method):
    results = run_ranks(_watch_every_step, 3, method, 1.5)
    for mixed, num_merged, value in results:
        assert mixed == 0
        assert num_merged > 20
        assert value == results[0][2]


# Ranks of different speeds


def _train_beside_a_straggler(rank, method):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method).start()
    dist.barrier()
    ends = []
    for _ in range(20 if rank == 1 else 40):
        step_of(optimizer, sync, 0.1 if rank == 1 else 0.005)
        ends.append(time.monotonic())
    waited = sync.seconds_waiting
    sync.stop()
    return sync.steps, ends, waited, sync.seconds_waiting - waited


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_nobody_waits_for_a_straggler_before_the_end(method):
    results = run_ranks(_train_beside_a_straggler, 3, method)
    assert [steps for steps, *_ in results] == [40, 20, 40]
    halfway = results[1][1][9]
    for place in (0, 2):
        _, ends, waited, waited_at_the_end = results[place]
        assert ends[-1] < halfway
        assert waited < 0.5
        assert waited_at_the_end > 0.5


def _train_quadratics(rank, method, rate_correction, seconds):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.04)
    sync = AsyncGossip(model, optimizer, method=method, rate_correction=rate_correction, timeout_seconds=20.0).start()
    dist.barrier()
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        optimizer.zero_grad()
        (0.5 * (model.weight - (3.0 if rank == 2 else 0.0)).square()).sum().backward()
        step_of(optimizer, sync, 0.03 if rank == 2 else 0.01)
    steps = sync.steps / (time.monotonic() - started)
    scale = sync.scale
    sync.sync()
    result = model.weight.item()
    sync.stop()
    return steps, result, scale


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_rate_correction_removes_the_pull_of_fast_ranks(method):
    # f_i = (z - c_i)^2 / 2 with c = 0, 0, 3: the optimum is 1; each rank pulls as often as it steps.
    results = run_ranks(_train_quadratics, 3, method, False, 2.0)
    rates = [rate for rate, _, _ in results]
    assert rates[0] > 2 * rates[2]
    biased = rates[2] * 3.0 / sum(rates)
    assert results[0][1] == pytest.approx(biased, abs=0.12)
    assert biased < 0.65
    results = run_ranks(_train_quadratics, 3, method, True, 3.0)
    rates = [rate for rate, _, _ in results]
    for rate, result, scale in results:
        assert result == pytest.approx(1.0, abs=0.15)
        assert scale == pytest.approx(sum(rates) / 3 / rate, rel=0.2)


def _train_unlike_quadratics(rank, method):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sync = AsyncGossip(model, optimizer, method=method).start()
    dist.barrier()
    started = time.monotonic()
    while time.monotonic() < started + 2.0:
        optimizer.zero_grad()
        (0.5 * (rank + 1) * (model.weight - rank).square()).sum().backward()
        step_of(optimizer, sync, 0.004)
    distance = sync.consensus_distance()
    sync.stop()
    return model.weight.item(), distance


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_quadratics_with_different_curvature_come_to_the_common_optimum(method):
    optimum = sum((r + 1) * r for r in range(4)) / sum(r + 1 for r in range(4))
    for value, distance in run_ranks(_train_unlike_quadratics, 4, method):
        assert value == pytest.approx(optimum, abs=0.2)
        assert distance < 0.5


# Ranks that die or stop


def _outlive(rank, method, lost, when):
    records = Records()
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    sync = Accounts(model, optimizer, method=method, rate_correction=False, timeout_seconds=8.0).start()
    values = [value for value, p in zip(targets(rank), model.parameters()) if p.requires_grad]
    with torch.no_grad():
        model[0].bias.fill_(rank)
        model[1].running_mean.fill_(rank)
        model[1].num_batches_tracked.fill_(rank)
    for p, value in zip([p for p in model.parameters() if p.requires_grad], values):
        p.grad = p.detach() - value
    optimizer.param_groups[0]["lr"] = 1.0
    step_of(optimizer, sync)
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(60):
        if rank == lost and step == 20 and when == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        step_of(optimizer, sync, 0.005)
    if rank == lost and when == "before a meeting":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == lost:
        sync._average_in_place = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    before = flat(model.parameters())
    sync.sync()
    after = sync.consensus_distance()
    at_sync = flat(model.parameters()), model[1].running_mean[0].item(), model[1].num_batches_tracked.item()
    account = sync.account
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
    return before, at_sync, end, account, records.texts, model[0].bias[0].item(), (distance, after)


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "num_ranks, lost, when", [(4, 0, "between steps"), (3, 1, "before a meeting"), (3, 2, "in the collectives")]
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
        changed = sum(results[rank][0] for rank in living) / len(living)
        torch.testing.assert_close(first[1][0], changed, rtol=0, atol=1e-10)


def wait_for(path):
    deadline = time.monotonic() + 30.0
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _pass_over(rank, folder, method):
    records = Records()
    pids = [None] * 3
    dist.all_gather_object(pids, os.getpid())
    model = nn.Linear(1000, 700).double()  # more than a connection holds: messages wait here
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method, timeout_seconds=1.5).start()
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
        before = sync.steps
        while not sync._mailbox.silent:
            step_of(optimizer, sync, 0.01)
        seen = [sorted(sync._mailbox.silent), sync.steps - before]
        with pytest.raises(PeerError, match=r"rank 2 was silent for 1\.5 s") as failure:
            sync.sync()
        seen.append(failure.value.ranks)
        Path(folder, f"failed {rank}").touch()
        wait_for(Path(folder, f"failed {1 - rank}"))
        if rank == 0:
            os.kill(pids[2], signal.SIGCONT)
        while sync._mailbox.silent:
            step_of(optimizer, sync, 0.01)
        Path(folder, "go on").touch()
    sync.sync()
    at_sync = flat(model.parameters())
    for _ in range(20):
        step_of(optimizer, sync, 0.002)
    sync.stop()
    return seen, at_sync, flat(model.parameters()), records.texts


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_rank_is_passed_over_and_taken_back_with_all_it_has(tmp_path, method):
    results = run_ranks(_pass_over, 3, tmp_path, method)
    mean = sum(flat(targets(rank, nn.Linear(1000, 700))) for rank in range(3)) / 3
    for rank, (seen, at_sync, at_end, texts) in enumerate(results):
        torch.testing.assert_close(at_sync, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(at_end, mean, rtol=0, atol=1e-10)
        if rank != 2:
            assert seen[0] == [2]
            assert seen[1] > 20
            assert seen[2] == (2,)
            assert any("Nothing was heard from rank 2 for 1.5 s" in text for text in texts)
            assert any("Rank 2 is heard again" in text for text in texts)


# States, one rank, and what is refused


def _resume(rank, method):
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
    with pytest.raises(RuntimeError, match=r"Call `sync\(\)` on all ranks"):
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
        ends.append((same, sync.steps, sync.rounds, flat(model.parameters()), flat(states[0].values())[:0]))
        sync.stop()
        ends[-1] += (flat(p for name, p in states[0].items() if "running" not in name and "num" not in name),)
    return ends


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_state_after_sync_is_all_there_is_and_none_is_given_in_between(method):
    for rank, ends in enumerate(run_ranks(_resume, 2, method)):
        for same, steps, rounds, values, _, saved in ends:
            assert same
            assert steps == rounds == 15 + rank
            torch.testing.assert_close(values, saved, rtol=0, atol=1e-12)


def test_one_rank_is_left_as_it_is_with_a_warning():
    model, other = make_model(), make_model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    sync = AsyncGossip(model, optimizer, method="push_sum")
    with pytest.warns(UserWarning, match="one rank only"):
        sync.start()
    for m, o in ((model, optimizer), (other, plain)):
        m(torch.ones(4, 3).double()).sum().backward()
        o.step()
    sync.step()
    assert sync.consensus_distance() == 0.0
    sync.stop()
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    assert sync.steps == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "sgp"}, "`method`.*'ad_psgd' or 'push_sum'.*'sgp'"),
        ({"seed": -1}, "`seed`.*>= 0.*-1"),
        ({"sync_every": 0}, "`sync_every`.*>= 1.*0"),
        ({"timeout_seconds": None}, "`timeout_seconds`.*> 0.*None"),
        ({"timeout_seconds": 0.0}, "`timeout_seconds`.*> 0.*0.0"),
        ({"wire_dtype": "float16"}, "`wire_dtype`.*'float16'"),
        ({"base_buffers": "average"}, "`base_buffers`.*'maintain'.*'average'"),
        ({"inner_group": object()}, "`inner_group`.*equal to the bit"),
        ({"topology": RingTopology(4)}, "for the 1 ranks of the group.*RingTopology"),
        ({"topology": 4}, "for the 1 ranks of the group.*4"),
    ],
)
def test_settings_outside_their_rules_are_refused_with_value_and_rule(options, words):
    model = make_model()
    with pytest.raises(ValueError, match=words):
        AsyncGossip(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    "topology, words",
    [
        (ExponentialTopology(4), "must be symmetric"),
        (RingTopology(4, directed=True), "must be symmetric"),
        (RingTopology(5), "must be bipartite.*ranks 2 and 3"),
        (CompleteTopology(3), "must be bipartite.*ranks 1 and 2"),
        (RandomOnePeerTopology(4, directed=False), "must be bipartite"),
    ],
)
def test_a_topology_without_two_sides_that_exchange_is_refused_for_pairs(topology, words):
    with pytest.raises(ValueError, match=words):
        check_topology(topology, topology.world_size, must_pair=True)
    check_topology(topology, topology.world_size, must_pair=False)


def test_links_of_two_sides_join_ranks_of_different_sides():
    for n in range(1, 10):
        for topology in (TwoSidesTopology(n), BipartiteExponentialTopology(n)):
            sides, bad = two_sides(topology)
            assert bad is None
            assert sides == {rank: rank % 2 for rank in range(n)}
            check_topology(topology, n, must_pair=isinstance(topology, BipartiteExponentialTopology))
    sides, bad = two_sides(TwoSidesTopology(5).without([1]))
    assert (sides, bad) == ({0: 0, 2: 1, 3: 0, 4: 1}, None)
    assert two_sides(RingTopology(6))[0] == {rank: rank % 2 for rank in range(6)}


def test_rates_are_those_of_the_window_and_do_not_count_pauses():
    rates = StepRates(2, window_seconds=10.0)
    assert rates.scale(0, [0, 1]) == 1.0
    for step in range(200):
        rates.note(0, step, step * 0.1)
        rates.note(1, step, 1000.0 + (step if step < 100 else 50.0 + step / 2))
    assert rates.scale(0, [0, 1]) == pytest.approx((10 + 2) / 2 / 10)
    assert rates.scale(1, [0, 1]) == pytest.approx((10 + 2) / 2 / 2)
    assert rates.scale(1, [1]) == pytest.approx(1.0)
    rates.pause()
    for step in range(199, 210):
        rates.note(0, step, 5000.0 + step * 0.1)
    assert rates.scale(0, [0, 1]) == pytest.approx((10 + 2) / 2 / 10)
    for step in range(210, 300):
        rates.note(0, step, 5021.0 + step * 0.001)
        rates.note(1, step, step)
    assert rates.scale(1, [0, 1]) == 10.0  # no more
