"""SlowMo over gossip against loops over ranks in float64, and its resume."""

import pytest
import torch
from gossip_reference import (
    NUM_STEPS,
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
from states import same
from topologies import Star

from hf_msn.distributed.async_gossip import AsyncGossip
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.topology import CompleteTopology

SLOW = {"sync_every": 3, "slow_momentum": 0.6}
PLAIN = {"momentum": 0.0, "quasi_global_momentum": (0.5, 0.8)}
CASES = {
    "sgp": {"slowmo": SLOW},
    "sgp, irregular": {"slowmo": SLOW, "topology": Lopsided},
    "sgp, irregular, zeros": {"slowmo": {**SLOW, "sync_every": 2}, "topology": Star, "rates": WITH_ZEROS},
    "sgp, every other step": {"slowmo": SLOW, "sync_every": 2},
    "noaverage": {"slowmo": {**SLOW, "average": False}},
    "noaverage, irregular": {"slowmo": {**SLOW, "average": False}, "topology": Star},
    "slow_lr": {"slowmo": {**SLOW, "slow_lr": 0.7}, "topology": Star, "sync_after": 4},
    "sharded": {"slowmo": {**SLOW, "shard_state": True}, "topology": Star},
    "only averages": {"slowmo": {**SLOW, "slow_momentum": 0.0}, "topology": Lopsided},
    "d-psgd": {"slowmo": SLOW, "push_sum": False},
    "qgm": {"slowmo": SLOW, **PLAIN, "topology": Lopsided},
    "extra rounds and bfloat16": {"slowmo": SLOW, "consensus_target": 0.1, "wire_dtype": "bfloat16"},
}


def _train_all_cases(rank, n):
    return {name: train(rank, case, n) for name, case in CASES.items()}


@pytest.mark.distributed
@pytest.mark.slow
def test_every_variant_follows_its_equations_on_every_rank_at_every_step():
    n = 4
    results = run_ranks(_train_all_cases, n, n)
    for name, case in CASES.items():
        expected, _ = reference(n, case)
        for rank in range(n):
            torch.testing.assert_close(
                results[rank][name], expected[rank], rtol=1e-9, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}"
            )
        assert all(torch.equal(result[name][NUM_STEPS], results[0][name][NUM_STEPS]) for result in results), name


def test_one_rank_is_slow_momentum_with_and_without_a_quasi_global_one():
    for case in ({"slowmo": SLOW}, {"slowmo": SLOW, **PLAIN}):
        torch.testing.assert_close(train(0, case, 1), reference(1, case)[0][0], rtol=1e-9, atol=1e-11)


def test_entering_again_starts_a_period_of_the_base_too():
    model = make_model()
    optimizer = make_optimizer(model, 0.0)
    gossip = Gossip(model, optimizer, sync_every=2)
    for _ in range(2):
        with SlowMo(model, optimizer, base=gossip, sync_every=3) as sync:
            assert gossip.local_steps == 0
            for step in range(3):
                take_step(model, optimizer, (0.1, 0.1), 0, step)
                sync.step()


RESUMED = [
    {"slowmo": SLOW},
    {"slowmo": SLOW, "topology": Star},
    {"slowmo": {**SLOW, "average": False}, "topology": Star, "sync_every": 3},
    {"slowmo": SLOW, **PLAIN, "topology": Lopsided, "wire_dtype": "bfloat16"},
]


def _resume_all(rank, n):
    return [resume(rank, case, n) for case in RESUMED]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_period():
    n = 3
    results = run_ranks(_resume_all, n, n)
    for result in results:
        for case, (ends, saved) in enumerate(result):
            straight, *resumed = ends
            assert saved["sync"]["local_steps"] == 1  # three steps to the outer one, one after it
            assert all(same(straight, other) for other in resumed), case
    for case in (1, 2):
        weights = [result[case][1]["sync"]["base"]["push_sum_weight"] for result in results]
        assert len(set(weights)) > 1
        assert sum(weights) == pytest.approx(n)


def _start_late(rank):
    model = make_model(rank)
    optimizer = make_optimizer(model, 0.0)
    gossip = Gossip(model, optimizer, topology=CompleteTopology(2))
    with SlowMo(model, optimizer, base=gossip, sync_every=4, sync_start_step=2) as sync:
        rounds, seen = [], []
        for step in range(8):
            model.weight.grad = torch.full_like(model.weight, float(rank == step % 2))
            model.bias.grad = torch.zeros_like(model.bias)
            optimizer.step()
            sync.step()
            rounds.append(gossip.rounds)
            seen.append(flat(model))
        return rounds, torch.stack(seen), (sync.bytes_sent >= gossip.bytes_sent > 0)


@pytest.mark.distributed
def test_gossip_begins_with_the_first_local_step():
    results = run_ranks(_start_late, 2)
    for rounds, seen, counted in results:
        assert rounds == [0, 0, 1, 2, 3, 4, 5, 6]
        assert counted
        # Before, gradients are averaged; after, parameters are.
        torch.testing.assert_close(seen, results[0][1])


@pytest.mark.parametrize("kind", [SlowMo, AsyncGossip])
def test_what_has_no_common_steps_cannot_be_a_base(kind):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"`base`.*{kind.__name__}"):
        SlowMo(model, optimizer, base=kind(model, optimizer))


def _over_local_sgd(rank):
    model = make_model()
    optimizer = make_optimizer(model, 0.0)
    base, seen = LocalSGD(model, optimizer, sync_every=2), []
    with SlowMo(model, optimizer, base=base, sync_every=6, slow_momentum=0.6) as sync:
        for step in range(NUM_STEPS):
            take_step(model, optimizer, (0.1, 0.2), rank, step)
            sync.step()
            seen.append(flat(model))
    return torch.stack(seen)


@pytest.mark.distributed
def test_over_local_sgd_the_ranks_average_between_the_outer_steps():
    rates = torch.tensor([0.1] * 6 + [0.2] * 2, dtype=torch.float64)
    x, v = [flat(make_model())] * 3, torch.zeros(8, dtype=torch.float64)
    x0 = x[0]
    for step, seen in enumerate(zip(*run_ranks(_over_local_sgd, 3))):
        x = [z - rates * gradient(z, rank, step) for rank, z in enumerate(x)]
        if step % 2:
            x = [sum(x) / 3] * 3
        if step % 6 == 5:
            v = 0.6 * v + (x0 - x[0])
            x0 = x0 - v
            x = [x0] * 3
        torch.testing.assert_close(list(seen), x, rtol=1e-9, atol=1e-11)
