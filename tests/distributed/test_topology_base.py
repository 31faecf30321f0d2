"""What holds for every topology, whole or repaired: stochastic, consistent, connected, contracting."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from topologies import MAKERS, SIZES, STEPS, SYMMETRIC, Star, every_maker, is_strongly_connected, normal, product

from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RepairedTopology,
    RingTopology,
)

KINDS = [BipartiteExponentialTopology, CompleteTopology, ExponentialTopology, RandomOnePeerTopology, RingTopology]


@every_maker
def test_columns_of_the_mixing_matrix_sum_to_1_and_its_entries_are_shares_of_the_peers(make):
    for n, step in itertools.product(SIZES, STEPS):
        topology = make(n)
        matrix = topology.mixing_matrix(step)
        assert matrix.shape == (n, n) and matrix.dtype == torch.float64
        torch.testing.assert_close(matrix.sum(0), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-14)
        expected = torch.zeros(n, n, dtype=torch.float64)
        for sender in range(n):
            peers = topology.out_peers(sender, step)
            for receiver in [sender, *peers]:
                expected[receiver, sender] += 1 / (len(peers) + 1)
        assert torch.equal(matrix, expected)


@every_maker
def test_in_peers_are_those_who_have_the_rank_among_their_out_peers(make):
    for n, step in itertools.product(SIZES, STEPS):
        topology = make(n)
        out = [topology.out_peers(rank, step) for rank in range(n)]
        for rank in range(n):
            assert sorted(topology.in_peers(rank, step)) == [other for other in range(n) if rank in out[other]]
            assert rank not in out[rank] and len(set(out[rank])) == len(out[rank])
            assert all(type(peer) is int and 0 <= peer < n for peer in out[rank])


@every_maker
def test_mixing_matrix_preserves_the_mean(make):
    for n in SIZES:
        topology = make(n)
        assert topology.is_doubly_stochastic
        x = normal(n, 4, seed=n)
        for step in STEPS:
            assert topology.is_doubly_stochastic_at(step)
            torch.testing.assert_close((topology.mixing_matrix(step) @ x).mean(0), x.mean(0), rtol=0, atol=1e-14)


def test_irregular_topology_preserves_total_mass_and_push_sum_finds_the_mean_that_plain_mixing_misses():
    star = Star(5)
    assert not star.is_doubly_stochastic and not star.is_symmetric and not star.is_doubly_stochastic_at(0)
    x, w = normal(5, 3), torch.ones(5, 1, dtype=torch.float64)
    mean = x.mean(0).expand_as(x)
    values, weights = x, w
    for step in range(200):
        values, weights = star.mixing_matrix(step) @ values, star.mixing_matrix(step) @ weights
        torch.testing.assert_close(values.sum(0), x.sum(0), rtol=0, atol=1e-12)
        assert weights.sum().item() == pytest.approx(5, abs=1e-12)
    torch.testing.assert_close(values / weights, mean, rtol=0, atol=1e-12)
    assert (values - mean).abs().max() > 0.1
    assert star.in_peers(0, 0) == [1, 2, 3, 4] and star.in_peers(0, 1) == [] and star.in_peers(3, 1) == [0]


@every_maker
def test_peers_repeat_after_the_period_and_not_before(make):
    for n in SIZES:
        topology = make(n)
        if topology.period is None:
            continue
        period = topology.period
        rounds = [[topology.out_peers(rank, step) for rank in range(n)] for step in range(3 * period)]
        assert rounds[:period] == rounds[period : 2 * period] == rounds[2 * period :]
        assert not any(rounds[k:] == rounds[:-k] for k in range(1, period))


def test_random_and_changing_topologies_have_no_period():
    assert RandomOnePeerTopology(6).period is None
    assert ExponentialTopology(6, {0: 1, 9: 2}).period is None
    assert ExponentialTopology(6, lambda step: 1).period is None
    assert ExponentialTopology(6, {0: 2}).period == ExponentialTopology(6, 2).period == 2


@every_maker
def test_every_rank_reaches_every_rank_over_a_period(make):
    for n in [*SIZES, 17, 24, 31, 33, 50]:
        topology = make(n)
        assert is_strongly_connected(topology, topology.period or 30), topology


@every_maker
def test_contraction_over_a_period_is_bounded_by_the_second_singular_value(make):
    for n in SIZES[1:]:
        topology = make(n)
        steps = topology.period or 4 * math.ceil(math.log2(n))
        centring = torch.eye(n, dtype=torch.float64) - 1 / n
        # The distance from the mean can shrink no less than by the largest stretch of product - mean.
        sigma = torch.linalg.matrix_norm(product(topology, steps) @ centring, ord=2).item()
        assert (1 - topology.spectral_gap()) ** steps == pytest.approx(sigma, rel=1e-6, abs=1e-14)
        for seed in range(5):
            x = normal(n, seed=seed)
            before, after = (x - x.mean()).norm(), (product(topology, steps) @ x - x.mean()).norm()
            assert after <= sigma * before + 1e-14
        worst = torch.linalg.svd(product(topology, steps) @ centring).Vh[0]  # the bound is reached: none is better
        assert (product(topology, steps) @ worst - worst.mean()).norm().item() == pytest.approx(sigma, abs=1e-13)
        assert 0 < topology.spectral_gap() <= 1


@every_maker
def test_symmetry_is_claimed_where_it_is_and_only_there(make):
    for n in SIZES[2:]:
        topology = make(n)
        assert topology.is_symmetric == (
            make in [MAKERS[name] for name in SYMMETRIC] or is_symmetric_by_size(topology)
        )
        for step in STEPS if topology.is_symmetric else ():
            matrix = topology.mixing_matrix(step)
            assert torch.equal(matrix, matrix.T) and topology.is_symmetric_at(step)


def is_symmetric_by_size(topology):
    """n - 1 peers make the exponential graph complete: everybody exchanges with everybody."""
    return isinstance(topology, ExponentialTopology) and topology.peers_per_step == topology.world_size - 1


def test_two_ranks_exchange_in_every_topology():
    for name, make in MAKERS.items():
        topology = make(2)
        assert [topology.out_peers(rank, 5) for rank in (0, 1)] == [[1], [0]], name
        assert topology.spectral_gap() == 1 and topology.is_symmetric_at(5)
    assert not RandomOnePeerTopology(3).is_symmetric and not RandomOnePeerTopology(4).is_symmetric_at(0)
    assert not ExponentialTopology(5).is_symmetric_at(0) and not RingTopology(3, directed=True).is_symmetric


@every_maker
def test_one_rank_has_no_peers(make):
    topology = make(1)
    assert topology.out_peers(0, 7) == topology.in_peers(0, 7) == []
    assert topology.mixing_matrix(7).tolist() == [[1.0]] and topology.spectral_gap() == 1


@every_maker
def test_topology_travels_to_another_process_and_is_copied(make):
    topology = make(7)
    for twin in [copy.deepcopy(topology)] + (
        [] if "lambda" in repr(topology) else [pickle.loads(pickle.dumps(topology))]
    ):
        assert [twin.out_peers(r, s) for r in range(7) for s in STEPS] == [
            topology.out_peers(r, s) for r in range(7) for s in STEPS
        ]


@every_maker
def test_repaired_topology_never_names_the_dead_and_stays_stochastic_among_the_living(make):
    for n, dead in [(4, [0]), (8, [3]), (9, [0, 8]), (7, [1, 2, 4, 5]), (12, range(11))]:
        repaired = make(n).without(dead)
        alive = [rank for rank in range(n) if rank not in dead]
        assert repaired.alive == alive and repaired.world_size == n
        assert repaired.is_doubly_stochastic
        for step in STEPS:
            matrix = repaired.mixing_matrix(step)
            living = matrix[alive][:, alive]
            torch.testing.assert_close(living.sum(0), torch.ones(len(alive), dtype=torch.float64), rtol=0, atol=1e-14)
            torch.testing.assert_close(living.sum(1), torch.ones(len(alive), dtype=torch.float64), rtol=0, atol=1e-14)
            for rank in range(n):
                peers = repaired.out_peers(rank, step) + repaired.in_peers(rank, step)
                assert set(peers) <= set(alive) - {rank}
                if rank in dead:
                    assert peers == [] and matrix[rank, rank] == 1
                for peer in repaired.out_peers(rank, step):
                    assert rank in repaired.in_peers(peer, step)
            if repaired.is_symmetric:
                assert torch.equal(matrix, matrix.T)
        assert is_strongly_connected(repaired, repaired.period or 30)


def test_repaired_topology_is_that_of_as_many_ranks_under_the_old_numbers():
    repaired, eight = ExponentialTopology(9).without([2]), ExponentialTopology(8)
    old_numbers = [0, 1, 3, 4, 5, 6, 7, 8]
    for step, position in itertools.product(range(7), range(8)):
        expected = [old_numbers[peer] for peer in eight.out_peers(position, step)]
        assert repaired.out_peers(old_numbers[position], step) == expected
    assert repaired.period == 3 and repaired.spectral_gap() == 1.0
    assert ExponentialTopology(9).spectral_gap() < 0.5


def test_second_death_and_return_of_a_rank():
    topology = RingTopology(6)
    twice = topology.without([1]).without([4])
    assert twice.alive == [0, 2, 3, 5] and twice.topology is topology
    assert twice.out_peers(2, 0) == RepairedTopology(topology, [5, 3, 2, 0]).out_peers(2, 0) == [3, 0]
    assert twice.without([1]).alive == twice.alive, "reported by another peer once more"
    assert RepairedTopology(twice, range(6)).alive == twice.alive
    back = RepairedTopology(twice.topology, [*twice.alive, 1])
    assert back.alive == [0, 1, 2, 3, 5] and back.out_peers(2, 0) == [3, 1]
    twice.alive.append(1)
    assert twice.alive == [0, 2, 3, 5]


def test_peers_per_step_shrink_with_the_living():
    for peers in (3, {0: 1, 4: 3}, lambda step: 3):
        repaired = ExponentialTopology(4, peers).without([1])
        assert repaired.out_peers(3, 5) == [0, 2]
        assert repaired.without([0, 2]).out_peers(3, 5) == []
    assert ExponentialTopology(6, 5).resized(3).peers_at(0) == 2
    # A change of p that the living are too few for is none.
    assert ExponentialTopology(6, {0: 3, 4: 5}).period is None
    assert ExponentialTopology(6, {0: 3, 4: 5}).without([0, 1]).period == 1


@pytest.mark.parametrize("method", ["out_peers", "in_peers"])
def test_rank_outside_and_negative_step_are_refused(method):
    for topology in (RingTopology(4), BipartiteExponentialTopology(4), RingTopology(4).without([1])):
        for rank in (-1, 4, 1.0, True):
            with pytest.raises(ValueError, match=f"from 0 to 3, but is {rank!r}"):
                getattr(topology, method)(rank, 0)
        for step in (-1, 0.5, None):
            with pytest.raises(ValueError, match=f"`step` counts communication steps .* but is {step!r}"):
                getattr(topology, method)(0, step)
            with pytest.raises(ValueError, match="`step` counts"):
                topology.mixing_matrix(step)


def test_unknown_ranks_are_not_removed_and_somebody_must_be_left():
    with pytest.raises(ValueError, match="from 0 to 3, but is 4"):
        RingTopology(4).without([1, 4])
    with pytest.raises(ValueError, match="from 0 to 3, but is -1"):
        RepairedTopology(RingTopology(4), [0, -1])
    with pytest.raises(ValueError, match="at least one of the 4 ranks"):
        RingTopology(4).without(range(4))
    with pytest.raises(ValueError, match="at most 4, but is 5"):
        RingTopology(4).resized(5)
    with pytest.raises(ValueError, match=r"`without\(ranks\)`"):
        RingTopology(4).without([1]).resized(2)


def test_topology_names_its_settings():
    assert (
        repr(ExponentialTopology(8, {0: 1, 9: 2})) == "ExponentialTopology(world_size=8, peers_per_step={0: 1, 9: 2})"
    )
    assert repr(RingTopology(3).without([1])) == (
        "RepairedTopology(RingTopology(world_size=3, directed=False), alive=[0, 2])"
    )


def test_steps_of_the_spectral_gap_are_checked():
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"`steps` .* >= 1, but is {steps}"):
            RingTopology(4).spectral_gap(steps)
    with pytest.raises(ValueError, match="`step` counts"):
        RingTopology(4).spectral_gap(start=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0, -3, 2.0, "4", None, True])
def test_world_size_that_is_no_number_of_ranks_is_refused(kind, bad):
    with pytest.raises(
        ValueError, match=f"`world_size` is the number of ranks and must be an integer >= 1, but is {bad!r}"
    ):
        kind(bad)


def test_a_description_is_of_the_peers_and_not_of_where_a_function_lies():
    def same(hops):
        def peers(step):
            return hops[step % len(hops)]

        return ExponentialTopology(8, peers_per_step=peers).description()

    assert same([1, 2]) == same([1, 2])
    assert same([1, 2]) != same([2, 1])
    assert RingTopology(4).description() != RingTopology(4, directed=True).description()
