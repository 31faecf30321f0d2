"""Peers of each topology against loops written from its definition, and which means are exact."""

import itertools
import math

import pytest
import torch
from topologies import SIZES, STEPS, is_exact_mean

from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RingTopology,
)


def test_ring_has_both_neighbours_or_the_next_one():
    assert sorted(RingTopology(5).out_peers(0, 3)) == [1, 4]
    assert RingTopology(5, directed=True).out_peers(4, 3) == [0]
    assert RingTopology(5, directed=True).in_peers(0, 3) == [4]


@pytest.mark.parametrize("n", [3, 4, 5, 8, 12, 31])
def test_spectral_gap_of_rings_is_that_of_the_circulant_eigenvalues(n):
    angles = [2 * math.pi * k / n for k in range(1, n)]
    both = 1 - max(abs(1 + 2 * math.cos(angle)) / 3 for angle in angles)
    one = 1 - max(abs(math.cos(angle / 2)) for angle in angles)  # |1 + e^(i angle)| / 2
    assert RingTopology(n).spectral_gap() == pytest.approx(both, abs=1e-12)
    assert RingTopology(n, directed=True).spectral_gap() == pytest.approx(one, abs=1e-12)
    # A circulant matrix is normal: the rate of one step is the rate of any number of them.
    assert RingTopology(n).spectral_gap(3, start=5) == pytest.approx(both, abs=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_complete_is_the_exact_mean_in_one_step(n):
    assert is_exact_mean(CompleteTopology(n), 1)
    assert CompleteTopology(n).spectral_gap() == 1.0


def peers_by_definition(n, p, rank, step):
    """The hops j (p + 1)^i, i = 0..floor(log_{p+1}(n - 1)), in loops; no hop to oneself, none twice."""
    exponents = [i for i in range(n) if (p + 1) ** i <= n - 1]
    peers = []
    if exponents:
        i = exponents[step % len(exponents)]
        for j in range(1, p + 1):
            peer = (rank + j * (p + 1) ** i) % n
            if peer != rank and peer not in peers:
                peers.append(peer)
    return peers


@pytest.mark.parametrize("n", [*SIZES, 27, 64, 65, 126])
def test_exponential_peers_are_those_of_the_definition(n):
    for p in {1, min(2, n - 1), min(4, n - 1), n - 1} - {0}:
        topology = ExponentialTopology(n, p)
        for rank, step in itertools.product({0, n // 2, n - 1}, STEPS):
            assert topology.out_peers(rank, step) == peers_by_definition(n, p, rank, step)


def test_exponential_leaves_out_hops_to_the_sender_and_repeated_targets():
    # n = 6, p = 2, i = 1: hops 3 and 6. The second is the sender itself.
    assert ExponentialTopology(6, 2).out_peers(1, 1) == [4]
    assert ExponentialTopology(6, 2).mixing_matrix(1)[4, 1] == 0.5
    # n = 10, p = 4, i = 1: hops 5, 10, 15, 20. The first and the third are one target, the others the sender.
    assert ExponentialTopology(10, 4).out_peers(1, 1) == [6]
    assert ExponentialTopology(10, 4).out_peers(1, 0) == [2, 3, 4, 5]


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_peer_exponential_is_the_exact_mean_after_log2_n_steps_from_any_start(n):
    rounds = int(math.log2(n))
    for start in range(4):
        assert is_exact_mean(ExponentialTopology(n), rounds, start)
        assert not is_exact_mean(ExponentialTopology(n), rounds - 1, start)
    assert ExponentialTopology(n).spectral_gap() == 1.0


def test_one_peer_exponential_on_6_ranks_is_never_the_exact_mean():
    topology = ExponentialTopology(6)
    assert not any(is_exact_mean(topology, steps) for steps in range(1, 10))
    assert topology.spectral_gap() < 0.5


@pytest.mark.parametrize("n", [3, 9])
def test_two_peer_exponential_is_the_exact_mean_after_log3_n_steps(n):
    rounds = {3: 1, 9: 2}[n]
    assert all(is_exact_mean(ExponentialTopology(n, 2), rounds, start) for start in range(3))
    assert not is_exact_mean(ExponentialTopology(n, 2), rounds - 1)


def test_peers_per_step_follow_the_schedule():
    by_dict, by_function = ExponentialTopology(9, {10: 2, 0: 1}), ExponentialTopology(9, lambda k: 1 if k < 10 else 2)
    for topology, step in itertools.product([by_dict, by_function], range(25)):
        p = 1 if step < 10 else 2
        assert topology.peers_at(step) == p
        assert topology.out_peers(4, step) == peers_by_definition(9, p, 4, step)
    assert by_dict.spectral_gap(2, start=10) == 1.0
    assert by_dict.spectral_gap(4, start=0) == pytest.approx(ExponentialTopology(9).spectral_gap(), abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 6, 8, 10, 12, 26])
def test_bipartite_pairs_of_even_n_are_those_of_the_definition(n):
    hops = [2 ** (i + 1) - 1 for i in range(n) if 2 ** (i + 1) <= n]  # 1, 3, 7, ...
    topology = BipartiteExponentialTopology(n)
    assert topology.period == len(hops)
    for step in STEPS:
        partner = {}
        for even in range(0, n, 2):
            odd = (even + hops[step % len(hops)]) % n
            partner[even], partner[odd] = odd, even
        assert [topology.out_peers(rank, step) for rank in range(n)] == [[partner[rank]] for rank in range(n)]


@pytest.mark.parametrize("n", [3, 5, 7, 9, 11, 27])
def test_bipartite_of_odd_n_lets_the_even_ranks_rest_in_turn_and_pairs_the_others(n):
    hops = [2 ** (i + 1) - 1 for i in range(n) if 2 ** (i + 1) <= n - 1]
    topology = BipartiteExponentialTopology(n)
    for step in STEPS:
        evens, odds = list(range(0, n, 2)), list(range(1, n, 2))
        resting = evens.pop(step % len(evens))
        as_if_even = [rank for pair in zip(evens, odds) for rank in pair]
        partner = {}
        for position in range(0, n - 1, 2):
            even, odd = as_if_even[position], as_if_even[(position + hops[step % len(hops)]) % (n - 1)]
            partner[even], partner[odd] = [odd], [even]
        partner[resting] = []
        assert [topology.out_peers(rank, step) for rank in range(n)] == [partner[rank] for rank in range(n)]
        assert all((rank + peer) % 2 for rank in range(n) for peer in topology.out_peers(rank, step))


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
def test_bipartite_is_the_exact_mean_after_log2_n_steps(n):
    rounds = int(math.log2(n))
    assert is_exact_mean(BipartiteExponentialTopology(n), rounds)
    assert not is_exact_mean(BipartiteExponentialTopology(n), rounds - 1)


def test_random_targets_are_a_permutation_without_fixed_points_the_same_wherever_they_are_drawn():
    for n, step in itertools.product(SIZES[1:], STEPS):
        targets = [RandomOnePeerTopology(n, seed=5).out_peers(rank, step) for rank in range(n)]
        torch.manual_seed(step)  # the global generators have no part in it
        assert targets == [RandomOnePeerTopology(n, seed=5).out_peers(rank, step) for rank in range(n)]
        assert sorted(target for (target,) in targets) == list(range(n))
        assert all(target != rank for rank, (target,) in enumerate(targets))


def test_random_draws_differ_by_step_and_by_seed():
    draws = [tuple(RandomOnePeerTopology(12, seed).targets(step)) for seed in range(20) for step in range(20)]
    # Seeds that differ in high bits only, and (seed, step) that write the digits of (12, 3), must not coincide either.
    draws += [
        tuple(RandomOnePeerTopology(12, seed << 32).targets(step)) for seed in range(1, 20) for step in range(20)
    ]
    draws += [tuple(RandomOnePeerTopology(12, seed).targets(step)) for seed, step in [(1, 23), (123, 0)]]
    assert len(set(draws)) == len(draws)


def test_random_draw_is_the_same_in_every_version():
    assert RandomOnePeerTopology(8, seed=0).targets(0) == [1, 6, 5, 0, 2, 4, 7, 3]
    assert RandomOnePeerTopology(7, seed=1, directed=False).targets(10**6) == [4, 2, 1, 6, 0, 5, 3]


def chi_square(counts, draws, kinds):
    return sum((count - draws / kinds) ** 2 for count in counts) / (draws / kinds)


def test_random_derangements_are_uniform():
    counts = {}
    for step in range(9000):
        key = tuple(RandomOnePeerTopology(4, seed=1).targets(step))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 9  # the derangements of 4
    assert chi_square(counts.values(), 9000, 9) < 26.1  # 8 degrees of freedom: passed by chance in 0.1 %


def test_random_pairs_are_uniform_and_with_odd_n_everybody_rests_alike():
    counts, resting = {}, [0] * 5
    for step in range(9000):
        topology = RandomOnePeerTopology(5, seed=2, directed=False)
        targets = topology.targets(step)
        assert all(targets[targets[rank]] == rank for rank in range(5))
        idle = [rank for rank in range(5) if targets[rank] == rank]
        assert len(idle) == 1 and topology.out_peers(idle[0], step) == topology.in_peers(idle[0], step) == []
        resting[idle[0]] += 1
        counts[tuple(targets)] = counts.get(tuple(targets), 0) + 1
    assert len(counts) == 15 and chi_square(counts.values(), 9000, 15) < 36.1  # 14 degrees of freedom, 0.1 %
    assert chi_square(resting, 9000, 5) < 18.5  # 4 degrees of freedom, 0.1 %
    even = RandomOnePeerTopology(6, seed=2, directed=False)
    assert all(len(even.out_peers(rank, step)) == 1 for rank in range(6) for step in range(50))


@pytest.mark.parametrize("peers", [0, -1, 4, 1.5, "2", None, True, {0: 1, 9: 4}, {0: 0}, {0: "2"}])
def test_more_peers_than_other_ranks_and_no_number_of_peers_are_refused(peers):
    with pytest.raises(ValueError, match="`peers_per_step` must be an integer from 1 to 3, the number of other ranks"):
        ExponentialTopology(4, peers)
    assert ExponentialTopology(4, 3).out_peers(0, 0) == [1, 2, 3]


@pytest.mark.parametrize("schedule", [{}, {5: 1}, {0: 1, -1: 1}, {0: 1, 2.5: 1}, {"0": 1}, {0: 1, "a": 2}])
def test_malformed_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=r"`peers_per_step` as a schedule .* must have step 0 and no negative one"):
        ExponentialTopology(4, schedule)


def test_function_that_returns_too_many_peers_is_refused_at_its_step():
    topology = ExponentialTopology(4, lambda step: 1 + step)
    assert topology.out_peers(0, 2) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"from 1 to 3, .* but is 4 at step 3"):
        topology.out_peers(0, 3)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_seed_that_is_no_number_of_a_draw_is_refused(seed):
    with pytest.raises(ValueError, match=f"`seed` .* but is {seed!r}"):
        RandomOnePeerTopology(4, seed=seed)
