"""Gossip against loops over mixing matrices in float64; real ranks over gloo."""

import warnings

import pytest
import torch
from gossip_reference import (
    NUM_STEPS,
    QUASI_GLOBAL,
    WITH_ZEROS,
    Lopsided,
    flat,
    gradient,
    make_model,
    make_optimizer,
    reference,
    resume,
    take_step,
    train,
)
from launch import run_ranks
from local_runs import error_of, groups_of
from states import same
from topologies import Star
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.comm import flat as flat_buffers
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.topology import ExponentialTopology, RandomOnePeerTopology, RingTopology, Topology

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
    "qgm": {**QUASI_GLOBAL},
    "qgm, pair and zeros": {**QUASI_GLOBAL, "quasi_global_momentum": (0.5, 0.8), "rates": WITH_ZEROS},
    "qgm, irregular": {**QUASI_GLOBAL, "topology": Lopsided},
    "qgm, d-psgd, every third step": {**QUASI_GLOBAL, "push_sum": False, "sync_every": 3},
    "extra rounds": {"consensus_target": 0.05, "max_extra_rounds": 3, "consensus_until_step": 6},
    "extra rounds, irregular": {"consensus_target": 0.05, "topology": Lopsided},
    "extra rounds, d-psgd": {"consensus_target": 0.1, "push_sum": False},
}


def _train_all_cases(rank, n):
    results = {name: train(rank, case, n) for name, case in CASES.items()}
    flat_buffers.BUCKET_BYTES = 1  # a bucket for each tensor
    small = {name: train(rank, CASES[name], n) for name in ("sgp", "sgp, irregular", "d-psgd", "qgm")}
    return results, small


@pytest.mark.distributed
@pytest.mark.slow
def test_every_variant_follows_its_equations_on_every_rank_at_every_step():
    n = 4
    results, small = zip(*run_ranks(_train_all_cases, n, n))
    for name, case in CASES.items():
        expected, _ = reference(n, case)
        for rank in range(n):
            torch.testing.assert_close(
                results[rank][name], expected[rank], rtol=1e-9, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}"
            )
            torch.testing.assert_close(small[rank].get(name, expected[rank]), expected[rank], rtol=1e-9, atol=1e-11)
        assert all(torch.equal(r[name][NUM_STEPS], results[0][name][NUM_STEPS]) for r in results), name


def _hierarchical(rank):
    groups, results = groups_of(rank), []
    cases = ({}, {"topology": Star(2)}, {"quasi_global_momentum": 0.9, "topology": Star(2), "consensus_target": 0.3})
    for wrap, options in ((wrap, options) for wrap in (False, True) for options in cases):
        model = make_model(rank)
        optimizer = make_optimizer(model, 0.0)
        given = DistributedDataParallel(model, process_group=groups["inner_group"]) if wrap else model
        with Gossip(given, optimizer, **groups, **options) as sync:
            seen = [flat(model)]
            for step in range(NUM_STEPS):
                take_step(given, optimizer, (0.1, 0.2), rank, step)
                sync.step()
                seen.append(flat(model))
        results.append((torch.stack(seen), flat(model)))
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_of_an_inner_group_stay_equal_to_the_bit_and_gossip_between_groups():
    results = run_ranks(_hierarchical, 4)
    rates = torch.tensor([0.1] * 6 + [0.2] * 2, dtype=torch.float64)
    for case in range(6):
        a, b, c, d = (result[case][0] for result in results)
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert all(torch.equal(result[case][1], results[0][case][1]) for result in results)
        assert torch.allclose(a, c) == (case % 3 == 0)
    # Two nodes with one peer each, which average exactly: the mean of all gradients at equal parameters.
    for case in (0, 3):
        z = results[0][case][0][0]
        for step in range(NUM_STEPS):
            z = z - rates * sum(gradient(z, rank, step) for rank in range(4)) / 4
            torch.testing.assert_close(results[3][case][0][step + 1], z, rtol=1e-9, atol=1e-11)


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


RESUMED = [
    {"sync_every": 3},
    {"topology": Star, "sync_every": 3},
    {**QUASI_GLOBAL, "topology": Lopsided, "consensus_target": 0.05},
    {"push_sum": False, "wire_dtype": "bfloat16"},
]


def _resume_all(rank, n):
    return [resume(rank, case, n) for case in RESUMED]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_in_the_middle_of_a_period():
    results = run_ranks(_resume_all, 4, 4)
    for result in results:
        for case, (ends, saved) in enumerate(result):
            straight, *resumed = ends
            assert saved["sync"]["local_steps"] == [1, 1, 0, 0][case]
            assert all(same(straight, other) for other in resumed), case
    states = [result[1][1]["sync"] for result in results]
    assert len({state["push_sum_weight"] for state in states}) > 1
    assert not torch.equal(*(result[1][1]["model"]["weight"] for result in results[:2]))


def test_a_state_of_another_method_or_model_is_refused():
    model, larger = make_model(), nn.Linear(5, 2)
    optimizer, other = make_optimizer(model, 0.0), torch.optim.SGD(larger.parameters(), lr=0.1)
    sync = Gossip(model, optimizer, quasi_global_momentum=0.9).start()
    state = sync.state_dict()
    with pytest.raises(ValueError, match="quasi_global_momentum"):
        Gossip(larger, other).load_state_dict(state)
    with pytest.raises(ValueError, match="here 12 numbers, but holds 8"):
        Gossip(larger, other, quasi_global_momentum=0.9).load_state_dict(state)


class Unsure(Topology):
    """No period; regular at the first steps only."""

    def _out_peers(self, rank, step):
        return [1 - rank] if step < 3 or rank == 0 else []


def test_quasi_global_momentum_needs_plain_sgd():
    model = make_model()
    for optimizer, words in (
        (make_optimizer(model, 0.9), "momentum=0.9"),
        (torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), "maximize=True"),
        (torch.optim.Adam(model.parameters()), "Adam"),
    ):
        with pytest.raises(ValueError, match=words):
            Gossip(model, optimizer, quasi_global_momentum=0.9)


def _refusals_on_ranks(rank):
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
        assert "Star(world_size=2) sum to [1.5, 0.5] at step 0" in irregular
        assert "seed=0" in seeds
        assert "seed=1" in seeds
        assert "ExponentialTopology(world_size=2, peers_per_step=1)" in kinds
        assert function is None
        assert late[:3] == [None] * 3
        assert "at step 3" in late[3]
