"""Peers and mixing matrices against loops written from the definitions, and rules that hold for every topology."""

import itertools
import math

import pytest
import torch
from topologies import (
    MAKERS,
    SIZES,
    STEPS,
    SYMMETRIC,
    Star,
    every_maker,
    is_exact_mean,
    product,
)

from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RepairedTopology,
    RingTopology,
    TwoSidesTopology,
    check_topology,
    two_sides,
)

KINDS = [BipartiteExponentialTopology, CompleteTopology, ExponentialTopology, RandomOnePeerTopology, RingTopology]


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


@pytest.mark.parametrize(
    ("topology", "rounds"),
    [(kind(2**k), k) for kind in (ExponentialTopology, BipartiteExponentialTopology) for k in range(1, 6)]
    + [(ExponentialTopology(3**k, 2), k) for k in (1, 2)]
    + [(CompleteTopology(n), 1) for n in SIZES[1:]],
)
def test_complete_and_exponential_topologies_are_the_exact_mean_after_a_few_steps(topology, rounds):
    # From any start; the last pairing of a bipartite one needs those before it.
    for start in range(4) if isinstance(topology, ExponentialTopology) else (0,):
        assert is_exact_mean(topology, rounds, start)
        assert not is_exact_mean(topology, rounds - 1, start)
    assert topology.spectral_gap() == 1.0


def test_one_peer_exponential_on_6_ranks_is_never_the_exact_mean():
    topology = ExponentialTopology(6)
    assert not any(is_exact_mean(topology, steps) for steps in range(1, 10))
    assert topology.spectral_gap() < 0.5


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


def test_random_targets_are_a_reproducible_permutation_without_fixed_points():
    for n, step in itertools.product(SIZES[1:], STEPS):
        targets = [RandomOnePeerTopology(n, seed=5).out_peers(rank, step) for rank in range(n)]
        torch.manual_seed(step)  # the global generators have no part in it
        assert targets == [RandomOnePeerTopology(n, seed=5).out_peers(rank, step) for rank in range(n)]
        assert sorted(target for (target,) in targets) == list(range(n))
        assert all(target != rank for rank, (target,) in enumerate(targets))


def test_random_draws_differ_by_step_and_by_seed():
    # Seeds that differ in high bits only, and (seed, step) that write the digits of (12, 3), must not coincide either.
    seeds = [*range(20), *[seed << 32 for seed in range(1, 20)]]
    pairs = [*itertools.product(seeds, range(20)), (1, 23), (123, 0)]
    draws = [tuple(RandomOnePeerTopology(12, seed).targets(step)) for seed, step in pairs]
    assert len(set(draws)) == len(draws)


def test_random_draw_is_the_same_in_every_version():
    assert RandomOnePeerTopology(8, seed=0).targets(0) == [1, 6, 5, 0, 2, 4, 7, 3]
    assert RandomOnePeerTopology(7, seed=1, directed=False).targets(10**6) == [4, 2, 1, 6, 0, 5, 3]


def chi_square(counts, draws, kinds):
    return sum((count - draws / kinds) ** 2 for count in counts) / (draws / kinds)


def test_random_derangements_are_uniform():
    counts = {}
    for step in range(4500):
        key = tuple(RandomOnePeerTopology(4, seed=1).targets(step))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 9  # the derangements of 4
    assert chi_square(counts.values(), 4500, 9) < 26.1  # 8 degrees of freedom: passed by chance in 0.1 %


def test_random_pairs_and_the_resting_rank_are_uniform():
    counts, resting = {}, [0] * 5
    for step in range(4500):
        topology = RandomOnePeerTopology(5, seed=2, directed=False)
        targets = topology.targets(step)
        assert all(targets[targets[rank]] == rank for rank in range(5))
        idle = [rank for rank in range(5) if targets[rank] == rank]
        assert len(idle) == 1 and topology.out_peers(idle[0], step) == topology.in_peers(idle[0], step) == []
        resting[idle[0]] += 1
        counts[tuple(targets)] = counts.get(tuple(targets), 0) + 1
    assert len(counts) == 15 and chi_square(counts.values(), 4500, 15) < 36.1  # 14 degrees of freedom, 0.1 %
    assert chi_square(resting, 4500, 5) < 18.5  # 4 degrees of freedom, 0.1 %
    even = RandomOnePeerTopology(6, seed=2, directed=False)
    assert all(len(even.out_peers(rank, step)) == 1 for rank in range(6) for step in range(50))


@pytest.mark.slow
@every_maker
def test_mixing_matrix_has_the_shares_of_the_peers_and_preserves_the_mean(make):
    for n, step in itertools.product(SIZES, STEPS):
        topology = make(n)
        matrix = topology.mixing_matrix(step)
        expected = [[0.0] * n for _ in range(n)]
        for sender in range(n):
            peers = topology.out_peers(sender, step)
            for receiver in [sender, *peers]:
                expected[receiver][sender] += 1 / (len(peers) + 1)
        assert matrix.tolist() == expected
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(matrix.sum(0), ones, rtol=0, atol=1e-14)
        torch.testing.assert_close(matrix.sum(1), ones, rtol=0, atol=1e-14)
        assert topology.is_doubly_stochastic and topology.is_doubly_stochastic_at(step)


@every_maker
def test_in_peers_are_the_inverse_of_out_peers(make):
    for n, step in itertools.product(SIZES, STEPS):
        topology = make(n)
        out = [topology.out_peers(rank, step) for rank in range(n)]
        for rank in range(n):
            assert sorted(topology.in_peers(rank, step)) == [other for other in range(n) if rank in out[other]]
            assert rank not in out[rank] and len(set(out[rank])) == len(out[rank])
            assert all(type(peer) is int and 0 <= peer < n for peer in out[rank])


def test_an_irregular_topology_is_known_as_one():
    star = Star(5)
    assert not star.is_doubly_stochastic and not star.is_symmetric and not star.is_doubly_stochastic_at(0)
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
def test_contraction_over_a_period_is_bounded_by_the_second_singular_value(make):
    for n in SIZES[1:]:
        topology = make(n)
        steps = topology.period or 4 * math.ceil(math.log2(n))
        centring = torch.eye(n, dtype=torch.float64) - 1 / n
        # The distance from the mean can shrink no less than by the largest stretch of product - mean.
        sigma = torch.linalg.matrix_norm(product(topology, steps) @ centring, ord=2).item()
        assert (1 - topology.spectral_gap()) ** steps == pytest.approx(sigma, rel=1e-6, abs=1e-14)
        assert 0 < topology.spectral_gap() <= 1  # every rank reaches every rank


@pytest.mark.parametrize("name", MAKERS)
def test_is_symmetric_agrees_with_the_matrices(name):
    for n in SIZES[2:]:
        topology = MAKERS[name](n)
        is_complete = getattr(topology, "peers_per_step", None) == n - 1
        assert topology.is_symmetric == (name in SYMMETRIC or is_complete)
        at_steps = [torch.equal(topology.mixing_matrix(step), topology.mixing_matrix(step).T) for step in STEPS]
        assert [topology.is_symmetric_at(step) for step in STEPS] == at_steps
        assert all(at_steps) or not topology.is_symmetric


@every_maker
def test_one_rank_has_no_peers_and_two_exchange(make):
    one, two = make(1), make(2)
    assert one.out_peers(0, 7) == one.in_peers(0, 7) == []
    assert [two.out_peers(rank, 5) for rank in (0, 1)] == [[1], [0]]
    assert one.spectral_gap() == two.spectral_gap() == 1 and two.is_symmetric_at(5)


@every_maker
def test_repaired_topology_is_that_of_fewer_ranks_under_their_numbers(make):
    for n, dead in [(4, [0]), (8, [3]), (9, [0, 8]), (7, [1, 2, 4, 5]), (12, range(11))]:
        repaired, alive = make(n).without(dead), [rank for rank in range(n) if rank not in dead]
        fewer = make(len(alive))
        assert (repaired.alive, repaired.world_size, repaired.period) == (alive, n, fewer.period)
        assert (repaired.is_doubly_stochastic, repaired.is_symmetric) == (True, fewer.is_symmetric)
        assert repaired.spectral_gap() == fewer.spectral_gap() > 0
        for step in STEPS:
            expected = torch.eye(n, dtype=torch.float64)  # a dead rank keeps its own mass
            expected[torch.tensor(alive)[:, None], alive] = fewer.mixing_matrix(step)
            assert torch.equal(repaired.mixing_matrix(step), expected)
            for rank, own in enumerate(expected):
                sources = [peer for peer in range(n) if peer != rank and own[peer] > 0]
                assert sorted(repaired.in_peers(rank, step)) == sources


def test_ranks_can_be_removed_again_and_taken_back():
    topology = RingTopology(6)
    twice = topology.without([1]).without([4])
    assert twice.alive == [0, 2, 3, 5] and twice.topology is topology
    assert twice.out_peers(2, 0) == RepairedTopology(topology, [5, 3, 2, 0]).out_peers(2, 0) == [3, 0]
    assert twice.without([1]).alive == twice.alive
    assert RepairedTopology(twice, range(6)).alive == twice.alive
    back = RepairedTopology(twice.topology, [*twice.alive, 1])
    assert back.alive == [0, 1, 2, 3, 5] and back.out_peers(2, 0) == [3, 1]
    twice.alive.append(1)
    assert twice.alive == [0, 2, 3, 5]


def test_peers_per_step_shrink_with_the_ranks_alive():
    for peers in (3, {0: 1, 4: 3}, lambda step: 3):
        repaired = ExponentialTopology(4, peers).without([1])
        assert repaired.out_peers(3, 5) == [0, 2]
        assert repaired.without([0, 2]).out_peers(3, 5) == []
    assert ExponentialTopology(6, 5).resized(3).peers_at(0) == 2
    assert ExponentialTopology(6, {0: 3, 4: 5}).period is None
    assert ExponentialTopology(6, {0: 3, 4: 5}).without([0, 1]).period == 1


def test_description_depends_on_the_peers_and_not_on_the_address_of_a_function():
    def same(hops):
        def peers(step):
            return hops[step % len(hops)]

        return ExponentialTopology(8, peers_per_step=peers).description()

    assert same([1, 2]) == same([1, 2])
    assert same([1, 2]) != same([2, 1])
    assert RingTopology(4).description() != RingTopology(4, directed=True).description()


REPAIRED = RingTopology(4).without([1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *[(lambda kind=kind: kind(0), "`world_size`.*0") for kind in KINDS],
        (lambda: RingTopology(4).out_peers(-1, 0), "`rank`.*-1"),
        (lambda: REPAIRED.in_peers(4, 0), "`rank`.*4"),
        (lambda: REPAIRED.out_peers(0, 0.5), "`step`.*0.5"),
        (lambda: RingTopology(4).mixing_matrix(-1), "`step`.*-1"),
        (lambda: RingTopology(4).spectral_gap(0), "`steps`.*0"),
        (lambda: RingTopology(4).spectral_gap(start=-1), "`step`.*-1"),
        (lambda: RingTopology(4).without([1, 4]), "`rank`.*4"),
        (lambda: RingTopology(4).without(range(4)), "`alive`.*4 ranks"),
        (lambda: RingTopology(4).resized(5), "at most 4, but is 5"),
        (lambda: REPAIRED.resized(2), "`without"),
        *[
            (lambda bad=bad: ExponentialTopology(4, bad), "`peers_per_step`")
            for bad in (0, 4, "2", {0: 1, 9: 4}, {0: "2"}, {5: 1})
        ],
        (lambda: ExponentialTopology(4, {0: 1, -1: 1}), "`step`.*-1"),
        (lambda: ExponentialTopology(4, lambda step: 1 + step).out_peers(0, 3), "`peers_per_step`.*4"),
        (lambda: RandomOnePeerTopology(4, seed=-1), "`seed`.*-1"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "topology",
    [
        ExponentialTopology(4),
        RingTopology(4, directed=True),
        RingTopology(5),
        CompleteTopology(3),
        RandomOnePeerTopology(4, directed=False),
    ],
)
def test_a_topology_without_two_sides_that_exchange_is_refused_for_pairs(topology):
    with pytest.raises(ValueError, match=type(topology).__name__):
        check_topology(topology, topology.world_size, must_pair=True)
    check_topology(topology, topology.world_size, must_pair=False)


def test_links_join_ranks_of_different_sides():
    for n in range(1, 10):
        for topology in (TwoSidesTopology(n), BipartiteExponentialTopology(n)):
            sides, bad = two_sides(topology)
            assert bad is None
            assert sides == {rank: rank % 2 for rank in range(n)}
            check_topology(topology, n, must_pair=isinstance(topology, BipartiteExponentialTopology))
    sides, bad = two_sides(TwoSidesTopology(5).without([1]))
    assert (sides, bad) == ({0: 0, 2: 1, 3: 0, 4: 1}, None)
    assert two_sides(RingTopology(6))[0] == {rank: rank % 2 for rank in range(6)}
