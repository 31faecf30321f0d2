"""NoLoCo against its equations, written as loops over ranks in float64."""

import pytest
import torch
import torch.distributed as dist
from gossip_reference import CHANGING, NUM_STEPS, flat, make_model, make_optimizer, take_step
from launch import run_ranks
from states import resumed_in_two_ways, same

from hf_msn import NoLoCo, RandomOnePeerTopology, SlowMo
from hf_msn.distributed.comm import flat as flat_buffers

DEFAULTS = {"sync_every": 3, "outer_lr": 0.7, "outer_momentum": 0.5, "pull": 0.7, "seed": 0}
CASES = {
    "authors": {},
    "three constants": {"outer_lr": 0.4, "outer_momentum": 0.3, "pull": 0.9, "seed": 5},
    "no momentum": {"outer_momentum": 0.0, "pull": 0.1, "sync_every": 1},
    "sync inside a period": {"sync_after": 4},
    "sync after an outer step": {"sync_after": 2},
}


def train(rank, case, steps=NUM_STEPS):
    """x after every step and after leaving, (steps + 1, 8)."""
    case = {**DEFAULTS, **case}
    sync_after = case.pop("sync_after", None)
    model = make_model(seed=rank)  # made equal when entering
    optimizer = make_optimizer(model, 0.9)
    seen = []
    with NoLoCo(model, optimizer, **case) as sync:
        for step in range(steps):
            take_step(model, optimizer, CHANGING[step], rank, step)
            sync.step()
            if step == sync_after:
                sync.sync()
            seen.append(flat(model))
    return torch.stack([*seen, flat(model)])


def outer_step(phi, delta, x, pairs, case):
    """One outer step of all ranks; `pairs[i]` is the rank that i exchanges with, itself where it rests."""
    a, b, g = case["outer_momentum"], case["outer_lr"], case["pull"]
    moved = []
    for i, j in enumerate(pairs):
        group = {i, j}
        mean_change = sum(phi[r] - x[r] for r in group) / len(group)
        mean_anchor = sum(phi[r] for r in group) / len(group)
        moved.append(a * delta[i] - b * mean_change - g * (phi[i] - mean_anchor))
    return [p + d for p, d in zip(phi, moved)], moved


def reference(num_ranks, case):
    """Return the result of `train` for each rank, by loops over ranks."""
    case = {**DEFAULTS, **case}
    models = [make_model() for _ in range(num_ranks)]
    optimizers = [make_optimizer(model, 0.9) for model in models]
    pairs = RandomOnePeerTopology(num_ranks, case["seed"], directed=False)
    phi = [flat(model) for model in models]
    delta = [torch.zeros_like(p) for p in phi]
    rounds = 0
    seen = [[] for _ in models]

    def set_all(values):
        for model, value in zip(models, values):
            torch.nn.utils.vector_to_parameters(value.clone(), model.parameters())

    def end_period():
        nonlocal phi, delta, rounds
        phi, delta = outer_step(phi, delta, [flat(model) for model in models], pairs.targets(rounds), case)
        rounds += 1
        set_all(phi)

    def consensus():
        nonlocal phi
        mean = sum(flat(model) for model in models) / num_ranks
        phi = [p + mean - flat(model) for p, model in zip(phi, models)]
        set_all([mean] * num_ranks)

    for step in range(NUM_STEPS):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers)):
            take_step(model, optimizer, CHANGING[step], rank, step)
        if (step + 1) % case["sync_every"] == 0:
            end_period()
        if step == case.get("sync_after"):
            consensus()
        for model, rows in zip(models, seen):
            rows.append(flat(model))
    if NUM_STEPS % case["sync_every"]:
        end_period()
    consensus()
    return [torch.stack([*rows, flat(model)]) for model, rows in zip(models, seen)]


def _resume(rank):
    def make(seed):
        model = make_model(seed)
        optimizer = make_optimizer(model, 0.9)
        return model, optimizer, NoLoCo(model, optimizer, sync_every=3)

    def step_of(model, optimizer, step):
        take_step(model, optimizer, (0.1, 0.2), rank, step)

    return resumed_in_two_ways(make, step_of, NUM_STEPS)


def _bytes_and_pairs(rank):
    """The bytes of an outer step, and an outer step of a pair while a rank of the other pair has not come."""
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = NoLoCo(model, optimizer, sync_every=1).start()
    pairs = RandomOnePeerTopology(4, 0, directed=False).targets(0)
    slow = next(other for other in (1, 2, 3) if other != pairs[0])
    store = dist.distributed_c10d._get_default_store()
    if rank == slow:
        store.wait(["rank 0 has ended"])
    before = sync.bytes_sent
    model.zero_grad()
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    sync.step()
    if rank == 0:
        store.set("rank 0 has ended", "")
    sent = sync.bytes_sent - before
    sync.stop()
    return sent


def _train_all(rank):
    size = dist.get_world_size()
    found = {name: train(rank, case) for name, case in CASES.items()}
    bucket_bytes, flat_buffers.BUCKET_BYTES = flat_buffers.BUCKET_BYTES, 1  # a bucket for each tensor
    small = train(rank, CASES["three constants"])
    flat_buffers.BUCKET_BYTES = bucket_bytes
    return found, small, _resume(rank), _bytes_and_pairs(rank) if size == 4 else None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_it_follows_its_equations_and_resumes_and_only_pairs_wait(num_ranks):
    results = run_ranks(_train_all, num_ranks)
    for name, case in CASES.items():
        for rank, expected in enumerate(reference(num_ranks, case)):
            found = results[rank][0][name]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(found[-1], results[0][0][name][-1])
    for found, small, ((straight, *resumed), saved), sent in results:
        torch.testing.assert_close(small, found["three constants"], rtol=1e-12, atol=1e-12)
        assert saved["sync"]["local_steps"] == 1 and saved["sync"]["rounds"] == 1
        assert all(same(straight, end) for end in resumed)
        assert sent in (None, 4 * 10100)  # one copy of the parameters
    # the ranks differ inside of the run
    assert not torch.equal(results[0][0]["authors"][5], results[1][0]["authors"][5])


@pytest.mark.parametrize("num_ranks", [4, 5])
def test_the_mean_is_kept_and_the_spread_follows_the_recursion_of_second_moments(num_ranks):
    case = {"outer_lr": 0.7, "outer_momentum": 0.5, "pull": 0.9}
    a, g = case["outer_momentum"], case["pull"]
    c = num_ranks / (num_ranks - 1) / 2 if num_ranks % 2 == 0 else 0.5
    torch.manual_seed(0)
    start = torch.randn(num_ranks, 50).double()
    squares = torch.zeros(5).double()
    for seed in range(100):
        phi, delta = list(start), [torch.zeros(50).double()] * num_ranks
        pairs = RandomOnePeerTopology(num_ranks, seed, directed=False)
        for step in range(len(squares)):
            squares[step] += (torch.stack(phi) - start.mean(0)).square().mean() / 100
            phi, delta = outer_step(phi, delta, phi, pairs.targets(step), case)  # without local steps
            torch.testing.assert_close(torch.stack(phi).mean(0), start.mean(0), rtol=0, atol=1e-12)
    spread, cross, speed = squares[0].item(), 0.0, 0.0  # of phi, phi delta and delta
    for found in squares.tolist():
        assert found == pytest.approx(spread, rel=0.1)
        speed = a * a * speed - 2 * a * g * c * cross + g * g * c * spread
        cross, spread = (
            a * cross - g * c * spread + speed,
            spread + 2 * (a * cross - g * c * spread) + speed,
        )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_bound_of_pull_is_where_the_spread_stops_to_contract(momentum):
    def radius(g, c=0.5):
        speed = torch.tensor([g * g * c, -2 * momentum * g * c, momentum**2])
        cross = torch.tensor([-g * c, momentum, 0.0]) + speed
        spread = torch.tensor([1 - 2 * g * c, 2 * momentum, 0.0]) + speed
        return torch.linalg.eigvals(torch.stack([spread, cross, speed])).abs().max().item()

    model = make_model()
    bound = 2 * (1 - momentum**2)
    assert radius(0.99 * bound) < 1 < radius(1.01 * bound)
    NoLoCo(model, make_optimizer(model, 0.0), outer_momentum=momentum, pull=0.99 * bound)
    for pull in (0.0, 1.01 * bound):
        with pytest.raises(ValueError, match=f"`pull`.*{pull!r}"):
            NoLoCo(model, make_optimizer(model, 0.0), outer_momentum=momentum, pull=pull)


@pytest.mark.parametrize(
    "wrong",
    [
        {"outer_lr": 0.0},
        {"outer_momentum": 1.0},
        {"seed": -1},
        {"pull": float("nan")},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    model = make_model()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoLoCo(model, make_optimizer(model, 0.0), **wrong)
    with pytest.raises(ValueError, match="NoLoCo"):
        optimizer = make_optimizer(model, 0.0)
        SlowMo(model, optimizer, base=NoLoCo(model, optimizer))


def test_one_rank_is_an_outer_sgd_with_momentum_in_at_least_float32():
    torch.testing.assert_close(train(0, {}), reference(1, {})[0], rtol=1e-9, atol=1e-11)
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    sync = NoLoCo(model, torch.optim.SGD(model.parameters(), lr=1.0), sync_every=1).start()
    for _ in range(2):
        with torch.no_grad():
            model.weight.sub_(0.125)
        sync.step()
    state = sync.state_dict()
    # delta = -0.7 * 0.125, then 0.5 * delta - 0.7 (phi - x) with x = bfloat16(phi) - 0.125
    first = 1 - 0.7 * 0.125
    second = 0.5 * -0.0875 - 0.7 * (first - (torch.tensor(first).bfloat16().item() - 0.125))
    assert state["anchors"][0].dtype == state["momenta"][0].dtype == torch.float32
    assert state["momenta"][0].item() == pytest.approx(second)
    assert state["anchors"][0].item() == pytest.approx(first + second)
