"""Gossip against loops over mixing matrices in float64; real ranks over gloo."""

import copy
import io
import json
import math
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from gossip_reference import (
    NUM_STEPS,
    WITH_ZEROS,
    Lopsided,
    distance,
    flat,
    gradient,
    make_model,
    make_optimizer,
    make_sync,
    reference,
    take_step,
    train,
)
from launch import run_ranks
from topologies import Star
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed import (
    CompleteTopology,
    ExponentialTopology,
    Gossip,
    PeerError,
    RandomOnePeerTopology,
    RingTopology,
    Topology,
    local_update,
)
from hf_msn.distributed.messages.exchange import Exchange
from hf_msn.distributed.mixing.consensus_control import sampled_distance

PLAIN = {"momentum": 0.0, "quasi_global_momentum": 0.9}
CASES = {
    "sgp": {},
    "sgp, more peers later": {"topology": lambda n: ExponentialTopology(n, {0: 1, 3: min(2, n - 1)})},
    "sgp, irregular": {"topology": Lopsided},
    "sgp, all to one and one to all": {"topology": Star},
    "sgp, every third step": {"sync_every": 3},
    "sgp, irregular, every third step": {"topology": Lopsided, "sync_every": 3, "rates": WITH_ZEROS},
    "sgp, sync": {"topology": Lopsided, "sync_after": 4},
    "sgp, zeros": {"rates": WITH_ZEROS},
    "d-psgd": {"push_sum": False},
    "d-psgd, ring": {"push_sum": False, "topology": RingTopology, "rates": WITH_ZEROS},
    "d-psgd, every third step": {"push_sum": False, "sync_every": 3},
    "bfloat16": {"wire_dtype": "bfloat16"},
    "bfloat16, irregular": {"wire_dtype": "bfloat16", "topology": Star},
    "bfloat16, d-psgd": {"wire_dtype": "bfloat16", "push_sum": False},
    "qgm": {**PLAIN},
    "qgm, pair and zeros": {**PLAIN, "quasi_global_momentum": (0.5, 0.8), "rates": WITH_ZEROS},
    "qgm, irregular": {**PLAIN, "topology": Lopsided},
    "qgm, d-psgd, every third step": {**PLAIN, "push_sum": False, "sync_every": 3},
    "extra rounds": {"consensus_target": 0.05, "max_extra_rounds": 3, "consensus_until_step": 6},
    "extra rounds, irregular": {"consensus_target": 0.05, "topology": Lopsided},
    "extra rounds, d-psgd": {"consensus_target": 0.1, "push_sum": False},
}


def _train_all_cases(rank, n):
    results = {name: train(rank, case, n) for name, case in CASES.items()}
    local_update._BUCKET_BYTES = 1  # a bucket for each tensor
    small = {name: train(rank, CASES[name], n) for name in ("sgp", "sgp, irregular", "d-psgd", "qgm")}
    return results, small


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_variant_follows_its_equations_on_every_rank_at_every_step(n):
    results, small = zip(*run_ranks(_train_all_cases, n, n))
    for name, case in CASES.items():
        expected, _ = reference(n, case)
        for rank in range(n):
            torch.testing.assert_close(
                results[rank][name], expected[rank], rtol=1e-9, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}"
            )
            torch.testing.assert_close(small[rank].get(name, expected[rank]), expected[rank], rtol=1e-9, atol=1e-11)
        assert all(torch.equal(r[name][NUM_STEPS], results[0][name][NUM_STEPS]) for r in results), name


# Mixing alone: no gradients, unequal parameters.


class Numbers(nn.Module):
    """A vector of parameters, float64 by default."""

    def __init__(self, size=5, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=dtype))


def start_unequal(rank, n, *, size=5, dtype=torch.float64, seed=0, **options):
    """A started Gossip whose ranks hold different numbers; model, sync, and the numbers of all ranks."""
    model = Numbers(size, dtype)
    sync = Gossip(model, torch.optim.SGD(model.parameters(), lr=0.0), **options).start()
    values = torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        model.x.copy_(values[rank])
    return model, sync, values


def numerator(model, sync):
    numerators = sync.state_dict()["numerators"]
    return model.x.detach().clone() if numerators is None else numerators[0]


def _mix_alone(rank, n):
    results = {}
    for name, make in (("star", Star), ("lopsided", Lopsided), ("exponential", ExponentialTopology)):
        model, sync, values = start_unequal(rank, n, topology=make(n))
        x, w, z = [], [], []
        for step in range(40):
            if step % 5 != rank:  # a gradient scaler skips the step on some ranks
                sync.optimizer.step()
            sync.step()
            x.append(numerator(model, sync))
            w.append(sync.push_sum_weight)
            z.append(model.x.detach().clone())
        has_numerators = sync.state_dict()["numerators"] is not None
        sync.sync()
        results[name] = (
            torch.stack(x),
            torch.tensor(w, dtype=torch.float64),
            torch.stack(z),
            has_numerators,
            model.x.detach().clone(),
        )
    return results, values


@pytest.mark.distributed
@pytest.mark.parametrize("n", [4, 5])
def test_mass_is_conserved_and_the_quotient_is_the_mean_under_every_topology(n):
    results, values = zip(*run_ranks(_mix_alone, n, n))
    mean = values[0].mean(0)
    for name in ("star", "lopsided", "exponential"):
        x, w, z = (torch.stack([r[name][i] for r in results]) for i in range(3))
        torch.testing.assert_close(x.sum(0), values[0].sum(0).expand(40, -1), rtol=0, atol=1e-12)
        torch.testing.assert_close(w.sum(0), torch.full((40,), float(n), dtype=w.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(z, x / w[..., None], rtol=1e-14, atol=0)
        torch.testing.assert_close(z[:, -1], mean.expand(n, -1), rtol=0, atol=1e-5)
        irregular = name != "exponential"
        assert [r[name][3] for r in results] == [irregular] * n
        assert bool((w == 1.0).all()) != irregular
        assert (x[:, -1] - mean).abs().max() > 0.1 or not irregular  # without the weights it is not the mean
        for rank in range(n):
            assert torch.equal(results[rank][name][4], results[0][name][4])
            torch.testing.assert_close(results[rank][name][4], mean, rtol=0, atol=1e-14)


def _rounds(rank, n, num_rounds):
    results = []
    topologies = [ExponentialTopology(n), CompleteTopology(n), RandomOnePeerTopology(n, seed=3), RingTopology(n)]
    for topology in topologies:
        model, sync, values = start_unequal(rank, n, topology=topology)
        z = []
        for _ in range(num_rounds):
            sync.step()
            z.append(model.x.detach().clone())
        results.append(torch.stack(z))
    return values, results


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 4, 6])
def test_rounds_are_products_of_mixing_matrices_and_contract_by_the_second_singular_value(n):
    outcomes = run_ranks(_rounds, n, n, 6)
    values = outcomes[0][0]
    mean = values.mean(0)
    topologies = [ExponentialTopology(n), CompleteTopology(n), RandomOnePeerTopology(n, seed=3), RingTopology(n)]
    for index, topology in enumerate(topologies):
        product = torch.eye(n, dtype=torch.float64)
        for step in range(6):
            product = topology.mixing_matrix(step) @ product
            z = torch.stack([results[index][step] for _, results in outcomes])
            torch.testing.assert_close(z, product @ values, rtol=0, atol=1e-14)
            left = torch.linalg.svdvals(product)[1]
            assert (z - mean).norm() <= left * (values - mean).norm() + 1e-12
    exact = [
        (torch.stack([results[0][step] for _, results in outcomes]) - mean).abs().max() < 1e-14 for step in range(6)
    ]
    exact_after = {2: 1, 4: 2}.get(n)
    assert exact[(exact_after or 6) - 1] == (exact_after is not None)
    assert not any(exact[: (exact_after or 6) - 1])


def _wire(rank, n):
    results = []
    for options in ({}, {"wire_dtype": "bfloat16"}, {"wire_dtype": "bfloat16", "topology": Star(n)}):
        model, sync, values = start_unequal(rank, n, size=1000, dtype=torch.float32, **options)
        before = sync.bytes_sent
        z = []
        for _ in range(12):
            sync.step()
            z.append(numerator(model, sync).double())
        results.append((torch.stack(z), sync.bytes_sent - before))
    half = start_unequal(rank, n, size=100, dtype=torch.bfloat16, topology=CompleteTopology(n))
    half[1].step()
    return values.double(), results, half[0].x.detach(), half[2]


@pytest.mark.distributed
def test_a_bfloat16_wire_halves_the_bytes_and_keeps_the_mean():
    outcomes = run_ranks(_wire, 3, 3)
    mean = outcomes[0][0].mean(0)
    for case in range(3):
        x = torch.stack([outcome[1][case][0] for outcome in outcomes])
        # Only the sums' own rounding in float32 is left, far below the 2**-8 of the wire.
        torch.testing.assert_close(x.mean(0), mean.expand(12, -1), rtol=0, atol=2e-6)
    apart = [distance([o[1][case][0][-1] for o in outcomes]) / math.sqrt(1000) for case in range(2)]
    assert apart[0] < 1e-3
    assert apart[1] < 5e-3
    assert [outcome[1][0][1] for outcome in outcomes] == [12 * 4000] * 3
    assert [outcome[1][1][1] for outcome in outcomes] == [12 * 2000] * 3
    # Six times to one, six times from one to two; with w.
    assert [outcome[1][2][1] for outcome in outcomes] == [6 * 2 * 2008, 6 * 2008, 6 * 2008]
    # Parameters in bfloat16: the messages' rounding cancels in the mean, only that of the result is left.
    half, values = torch.stack([outcome[2] for outcome in outcomes]).double(), outcomes[0][3].double()
    assert ((half.mean(0) - values.mean(0)).abs() <= 2**-8 * half.abs().amax(0) + 1e-6).all()


def _extra_rounds(rank, n):
    model, sync, values = start_unequal(rank, n, topology=RingTopology(n), consensus_target=0.05, max_extra_rounds=50)
    sync.step()
    small = sync.sampled_distance, sync.consensus_distance(), sync.extra_rounds, sync.rounds
    size = 50_001
    model, sync, values = start_unequal(rank, n, size=size, dtype=torch.float32, consensus_target=1e3)
    estimates = []
    for _ in range(3):
        before = sync.bytes_sent
        sync.step()
        cost = sync.bytes_sent - before - size * 4
        estimates.append(sync.sampled_distance / sync.consensus_distance())
        with torch.no_grad():
            model.x.copy_(values[rank])
    options = {"consensus_target": 1e-9, "max_extra_rounds": 2, "consensus_until_step": 3}
    model, sync, _ = start_unequal(rank, n, topology=RingTopology(n), **options)
    for _ in range(5):
        with torch.no_grad():
            model.x.fill_(rank)
        sync.step()
    return small, estimates, cost, (sync.rounds, sync.extra_rounds)


@pytest.mark.distributed
def test_extra_rounds_bring_the_ranks_under_the_target_by_an_estimate_that_all_share():
    outcomes = run_ranks(_extra_rounds, 4, 4)
    z, needed = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1
    while distance(list(z)) > 0.05:
        z, needed = RingTopology(4).mixing_matrix(0) @ z, needed + 1
    assert needed > 1
    for (estimate, distance_now, extra, rounds), estimates, cost, limited in outcomes:
        assert estimate == pytest.approx(distance_now, rel=1e-9)  # exact, the model is small
        assert estimate <= 0.05
        assert (extra, rounds) == (needed, needed + 1)
        assert estimates == pytest.approx([1.0] * 3, abs=0.06)
        assert len(set(estimates)) == 3  # other coordinates at every step
        assert 0 < cost <= 8 * (4096 + 4)
        assert limited == (5 + 3 * 2, 3 * 2)
    assert all(outcome == outcomes[0] for outcome in outcomes)


class OneOfTwo(Exchange):
    """Looks at what is exchanged; the other rank has zeros."""

    def mean_(self, tensors):
        self.sample = tensors[0].clone()
        tensors[0].div_(2)


def test_the_samples_of_successive_steps_take_every_coordinate_of_every_tensor_once():
    sizes = [*[1] * 5000, 2, 3, 5000, 4, 2000, 2, 3]
    numbers = torch.arange(1.0, sum(sizes) + 1)
    exchange, taken, squared = OneOfTwo(), [], 0.0
    for step in range(10, 13):  # ceil(12014 / 4096) = 3 of them
        distance = sampled_distance(numbers.split(sizes), exchange, step)
        taken.append(exchange.sample)
        squared += distance**2 * len(exchange.sample) / len(numbers)
    assert torch.equal(torch.cat(taken).sort().values, numbers)
    assert max(map(len, taken)) <= 4096
    assert squared == pytest.approx((numbers.double() / 2).square().sum().item(), rel=1e-6)


# Training


def _quadratic(rank, n):
    """f_i(x) = (x - c_i)^T A_i (x - c_i) / 2: the optimum of the mean is not the mean of the optima."""
    scale = torch.linspace(0.2, 1.0, n, dtype=torch.float64)
    centre = torch.arange(n, dtype=torch.float64) * 2
    optimum = (scale * centre).sum() / scale.sum()
    ends = []
    for options in ({"push_sum": False}, {}, {"topology": Lopsided(n)}):
        model = Numbers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Gossip(model, optimizer, **options) as sync:
            for step in range(300):
                optimizer.param_groups[0]["lr"] = 0.5 / (1 + 0.1 * step)
                optimizer.zero_grad()
                (scale[rank] * (model.x - centre[rank]).square()).sum().div(2).backward()
                optimizer.step()
                sync.step()
            ends.append((model.x[0].item() - optimum.item(), sync.consensus_distance()))
    return ends


@pytest.mark.distributed
def test_heterogeneous_quadratics_converge_to_the_common_optimum():
    for dpsgd, sgp, irregular in run_ranks(_quadratic, 3, 3):
        for error, apart in (dpsgd, sgp, irregular):
            assert abs(error) < 0.15  # their own optima are 2 apart
            assert apart < 0.3
        assert dpsgd[1] > 0


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(rank, case, n):
    """The states after going straight on, and after going on from a save in two ways."""

    def run(model, optimizer, sync, steps):
        for step in steps:
            take_step(model, optimizer, (0.1, 0.2), rank, step)
            sync.step()
        return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}) | {
            "sync": saved_and_loaded(sync.state_dict())
        }

    def make(seed):
        model = make_model(seed).float()
        model.weight.data, model.bias.data = model.weight.data.double(), model.bias.data.double()
        optimizer = make_optimizer(model, case.get("momentum", 0.9))
        return model, optimizer, make_sync(model, optimizer, case, n)

    whole = make(0)
    whole[2].start()
    saved = run(*whole, range(4))
    straight = run(*whole, range(4, NUM_STEPS))
    whole[2].stop()
    ends = [(straight, flat(whole[0]))]
    for started_first in (False, True):
        model, optimizer, sync = make(7 + rank)
        if started_first:
            sync.start()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch takes the tensors themselves
        sync.load_state_dict(saved["sync"])
        if not started_first:
            sync.start()
        ended = run(model, optimizer, sync, range(4, NUM_STEPS))
        sync.stop()
        ends.append((ended, flat(model)))
    return ends, saved


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


RESUMED = [
    {"sync_every": 3},
    {"topology": Star, "sync_every": 3},
    {**PLAIN, "topology": Lopsided, "consensus_target": 0.05},
    {"push_sum": False, "wire_dtype": "bfloat16"},
]


def _resume_all(rank, n):
    return [resume(rank, case, n) for case in RESUMED]


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 4])
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_period(n):
    results = run_ranks(_resume_all, n, n)
    for result in results:
        for case, (ends, saved) in enumerate(result):
            straight, *resumed = ends
            assert saved["sync"]["local_steps"] == [1, 1, 0, 0][case]
            assert all(same(straight, other) for other in resumed), case
    states = [result[1][1]["sync"] for result in results]
    assert len({state["push_sum_weight"] for state in states}) > 1
    assert not torch.equal(*(result[1][1]["model"]["weight"] for result in results[:2]))


def _wrapped(rank, n):
    """DDP with accumulation by accelerate, a frozen part, and buffers."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2).requires_grad_(False))
    inner = model.double()
    optimizer = torch.optim.SGD(inner[0].parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    counts, seen = [], []
    with Gossip(model, optimizer, topology=Lopsided(n), timeout_seconds=20.0) as sync:
        begin = flat(inner)
        with torch.no_grad():
            inner[2].weight.fill_(rank)
        for step in range(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(x[step]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            sync.step()
            counts.append((sync.steps, sync.rounds))
            seen.append(flat(inner))
        frozen_inside = inner[2].weight.detach().clone()
        statistics = inner[1].running_mean.clone()
        sync.sync()
    return (
        isinstance(model, DistributedDataParallel),
        counts,
        begin,
        seen,
        frozen_inside,
        inner.state_dict(),
        statistics,
    )


@pytest.mark.distributed
def test_in_ddp_and_accelerate_only_optimizer_steps_count_and_the_rest_waits_for_a_sync():
    results = run_ranks(_wrapped, 3, 3)
    for rank, (is_ddp, counts, begin, seen, frozen, state, _) in enumerate(results):
        assert is_ddp
        assert counts == [(k // 2, k // 2) for k in range(1, 9)]
        assert torch.equal(begin, results[0][2])
        assert torch.equal(seen[0][:8], begin[:8])  # accumulating: nothing moved
        assert not torch.equal(seen[1][:8], begin[:8])
        assert torch.equal(frozen, torch.full_like(frozen, rank))
        assert torch.equal(state["2.weight"], torch.ones(2, 2, dtype=torch.float64))
        assert all(torch.equal(state[name], results[0][5][name]) for name in state)
    assert not torch.equal(results[0][3][-1][:8], results[1][3][-1][:8])
    mean = sum(statistics for *_, statistics in results) / 3
    torch.testing.assert_close(results[0][5]["1.running_mean"], mean)


def _hierarchical(rank, wrap):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))
    outer, inner = mesh.get_group("between"), mesh.get_group("inside")
    results = []
    for options in (
        {},
        {"topology": Star(2)},
        {"quasi_global_momentum": 0.9, "topology": Star(2), "consensus_target": 0.3},
    ):
        torch.manual_seed(rank)
        model = make_model(rank)
        optimizer = make_optimizer(model, 0.0)
        given = DistributedDataParallel(model, process_group=inner) if wrap else model
        with Gossip(given, optimizer, group=outer, inner_group=inner, **options) as sync:
            seen = [flat(model)]
            for step in range(NUM_STEPS):
                take_step(given, optimizer, (0.1, 0.2), rank, step)
                sync.step()
                seen.append(flat(model))
        results.append((torch.stack(seen), flat(model), sync.extra_rounds))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("wrap", [False, True])
def test_ranks_of_an_inner_group_stay_equal_to_the_bit_and_gossip_between_groups(wrap):
    results = run_ranks(_hierarchical, 4, wrap)
    rates = torch.tensor([0.1] * 6 + [0.2] * 2, dtype=torch.float64)
    for case in range(3):
        a, b, c, d = (result[case][0] for result in results)
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert all(torch.equal(result[case][1], results[0][case][1]) for result in results)
        assert torch.allclose(a, c) == (case == 0)
    # Two nodes with one peer each, which average exactly: the mean of all gradients at equal parameters.
    z = results[0][0][0][0]
    for step in range(NUM_STEPS):
        z = z - rates * sum(gradient(z, rank, step) for rank in range(4)) / 4
        torch.testing.assert_close(results[3][0][0][step + 1], z, rtol=1e-9, atol=1e-11)


# One rank


def test_one_process_is_told_that_gossip_does_nothing():
    for options in ({}, {"push_sum": False}, {"consensus_target": 1.0}):
        model = make_model()
        optimizer = make_optimizer(model, 0.0)
        with pytest.warns(UserWarning, match="one rank only") as caught, Gossip(model, optimizer, **options) as sync:
            expected = flat(model)
            for step in range(3):
                expected = expected - 0.1 * gradient(expected, 0, step)
                take_step(model, optimizer, (0.1, 0.1), 0, step)
                sync.step()
            assert (sync.bytes_sent, sync.push_sum_weight, sync.consensus_distance()) == (0, 1.0, 0.0)
        assert len(caught) == 1
        torch.testing.assert_close(flat(model), expected)


@pytest.mark.parametrize("name", ["qgm", "qgm, pair and zeros", "qgm, d-psgd, every third step"])
def test_quasi_global_momentum_acts_on_one_rank_too(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(0, CASES[name], 1)
    expected, _ = reference(1, CASES[name])
    torch.testing.assert_close(result, expected[0], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(result, reference(1, {**CASES[name], "quasi_global_momentum": 0.0})[0][0])


def test_quasi_global_momentum_reaches_a_parameter_that_has_no_gradient_this_time():
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Gossip(model, optimizer, quasi_global_momentum=(0.5, 0.75)) as sync:
        expected, mhat = model.weight.item(), 0.0
        for g in (1.0, None, None):
            model.weight.grad = None if g is None else torch.full((1, 1), g, dtype=torch.float64)
            optimizer.step()
            sync.step()
            m = 0.5 * mhat + (g or 0.0)
            expected, mhat = expected - 0.5 * m, 0.75 * mhat + 0.25 * m
            assert model.weight.item() == pytest.approx(expected, rel=1e-12)
            assert sync.state_dict()["quasi_global_momentum"][0].item() == pytest.approx(mhat, rel=1e-12)


# Refusals


class Unsure(Topology):
    """No period; regular at the first steps only."""

    def _out_peers(self, rank, step):
        return [1 - rank] if step < 3 or rank == 0 else []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"topology": RingTopology(3)}, r"topology.*for the 1 ranks.*RingTopology\(world_size=3.*world_size=1"),
        ({"topology": "ring"}, r"topology.*'ring'"),
        ({"wire_dtype": "float16"}, r"wire_dtype.*'bfloat16'.*'float16'"),
        ({"sync_every": 0}, r"sync_every.*is 0"),
        ({"consensus_target": 0.0}, r"consensus_target.*> 0.*0.0"),
        ({"consensus_target": float("nan")}, r"consensus_target.*nan"),
        ({"consensus_target": 1.0, "max_extra_rounds": 0}, r"max_extra_rounds.*>= 1.*0"),
        ({"consensus_target": 1.0, "consensus_until_step": 0}, r"consensus_until_step.*>= 1.*0"),
        ({"consensus_until_step": 5}, r"consensus_until_step.*5 without it"),
        ({"quasi_global_momentum": 1.0}, r"quasi_global_momentum.*\[0, 1\).*1.0"),
        ({"quasi_global_momentum": (0.5, -0.1)}, r"mu is -0.1"),
        ({"quasi_global_momentum": "0.9"}, r"beta is '0.9'"),
        ({"timeout_seconds": -1}, r"timeout_seconds.*-1"),
    ],
)
def test_settings_outside_their_rules_are_refused_with_value_and_rule(options, words):
    model = make_model()
    with pytest.raises(ValueError, match=words):
        Gossip(model, make_optimizer(model, 0.0), **options)


def test_quasi_global_momentum_needs_plain_sgd():
    model = make_model()
    for optimizer, words in (
        (make_optimizer(model, 0.9), r"has momentum=0.9"),
        (torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), r"has maximize=True"),
        (torch.optim.Adam(model.parameters()), r"is a Adam"),
    ):
        with pytest.raises(ValueError, match=rf"needs torch.optim.SGD with momentum=0.*{words}"):
            Gossip(model, optimizer, quasi_global_momentum=0.9)


def test_a_state_of_another_method_or_model_is_refused():
    model, larger = make_model(), nn.Linear(5, 2)
    optimizer, other = make_optimizer(model, 0.0), torch.optim.SGD(larger.parameters(), lr=0.1)
    sync = Gossip(model, optimizer, quasi_global_momentum=0.9).start()
    state = sync.state_dict()
    with pytest.raises(ValueError, match=r"\(True, False\), but has \(True, True\)"):
        Gossip(larger, other).load_state_dict(state)
    with pytest.raises(ValueError, match="here 12 numbers, but holds 8"):
        Gossip(larger, other, quasi_global_momentum=0.9).load_state_dict(state)


def _refusals_on_ranks(rank):
    def error_of(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        return None

    def make(**options):
        model = make_model()
        return Gossip(model, make_optimizer(model, 0.0), **options)

    late = make(push_sum=False, topology=Unsure(2)).start()
    return [
        error_of(lambda: make(push_sum=False, topology=Star(2))),
        error_of(lambda: make(topology=RandomOnePeerTopology(2, seed=rank)).start()),
        error_of(lambda: make(topology=Star(2) if rank else ExponentialTopology(2)).start()),
        error_of(lambda: make(topology=ExponentialTopology(2, lambda step: 1)).start()),
        [error_of(late.step) for _ in range(4)],
    ]


@pytest.mark.distributed
def test_topologies_that_do_not_fit_the_method_or_differ_between_ranks_are_refused():
    for irregular, seeds, kinds, function, late in run_ranks(_refusals_on_ranks, 2):
        assert "rows of every mixing matrix must sum to 1" in irregular
        assert "Star(world_size=2) sum to [1.5, 0.5] at step 0. Give `push_sum=True`" in irregular
        assert "seed=0" in seeds
        assert "seed=1" in seeds
        assert "ExponentialTopology(world_size=2, peers_per_step=1)" in kinds
        assert function is None
        assert late[:3] == [None] * 3
        assert "at step 3" in late[3]


# Faults


def _train_beside_a_lost_peer(rank, folder, how, timeout_seconds):
    model = make_model()
    optimizer = make_optimizer(model, 0.0)
    lost, n = 2, dist.get_world_size()
    started = time.monotonic()
    try:
        with Gossip(
            model, optimizer, topology=RingTopology(n, directed=True), timeout_seconds=timeout_seconds
        ) as sync:
            for step in range(60):
                if step == 5:
                    started = time.monotonic()
                    if rank == lost:
                        if how == "hangs":
                            while len(list(Path(folder).glob("*.done"))) < n - 1:
                                time.sleep(0.05)
                        os._exit(0)
                take_step(model, optimizer, (0.1, 0.1), rank, step)
                sync.step()
    except PeerError as error:
        report = {"ranks": error.ranks, "message": str(error), "seconds": time.monotonic() - started}
        Path(folder, f"{rank}.json").write_text(json.dumps(report))
        Path(folder, f"{rank}.done").touch()
        # The first rank holds the store: it stays until the others have asked it.
        deadline = time.monotonic() + 10
        while len(list(Path(folder).glob("*.done"))) < n - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(0)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_peer_is_named_within_the_deadline_also_by_those_who_do_not_hear_from_it(tmp_path, how):
    # No rank returns: the lost one cannot, and the others report through the folder.
    with pytest.raises(FileNotFoundError):
        run_ranks(_train_beside_a_lost_peer, 4, str(tmp_path), how, 2.0, timeout=40.0)
    for rank in (0, 1, 3):
        report = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        assert 2 in report["ranks"], report
        assert rank not in report["ranks"]
        assert report["seconds"] < 2.0 + 3.5  # the store is asked for 2 s at most
        if how == "hangs":
            assert report["ranks"][0] == 2  # behind it whose connection broke because it gave up on rank 2
