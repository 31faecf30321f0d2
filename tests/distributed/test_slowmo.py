"""SlowMo against its equations, written as loops over ranks in float64."""

import pytest
import torch
import torch.distributed as dist
from gossip_reference import CHANGING, NUM_STEPS, WITH_ZEROS, data, make_model, take_step, values
from launch import run_ranks
from states import resumed_in_two_ways, same

from hf_msn.distributed.comm import flat as flat_buffers
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.slowmo import SlowMo

DEFAULTS = {"optimizer": "sgd", "rates": CHANGING, "sync_after": None, "sync_every": 3, "slow_momentum": 0.6}
CASES = {
    "plain": {},
    "slow_lr": {"slow_lr": 0.7},
    "reset": {"base_buffers": "reset"},
    "average": {"base_buffers": "average"},
    "adam maintain": {"optimizer": "adam"},
    "adam reset": {"optimizer": "adam", "base_buffers": "reset"},
    "adam average": {"optimizer": "adam", "base_buffers": "average"},
    "zeros": {"rates": WITH_ZEROS},
    "noaverage": {"average": False},
    "sync in the middle": {"sync_after": 4},
    "no momentum": {"slow_momentum": 0.0, "slow_lr": 0.5},
    "every step": {"sync_every": 1},
    "local sgd": {"slow_momentum": 0.0},
    "sharded zeros": {"shard_state": True, "rates": WITH_ZEROS},
    "sharded local sgd": {"shard_state": True, "slow_momentum": 0.0},
}


def make_optimizer(model, name):
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    if name == "adam":
        return torch.optim.Adam(groups, lr=0.1)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def train(rank, case):
    case = {**DEFAULTS, **case}
    name, rates, sync_after = (case.pop(key) for key in ("optimizer", "rates", "sync_after"))
    model = make_model(seed=rank)  # made equal when entering
    optimizer = make_optimizer(model, name)
    seen = []
    with SlowMo(model, optimizer, **case) as sync:
        for step in range(NUM_STEPS):
            take_step(model, optimizer, rates[step], rank, step)
            sync.step()
            if step == sync_after:
                sync.sync()
            seen.append(values(model))
    return [*seen, values(model)]


def reference(num_ranks, case):
    """Return the result of `train` for each rank, by loops over ranks and parameters."""
    case = {"base_buffers": "maintain", "slow_lr": 1.0, "average": True, **DEFAULTS, **case}
    models = [make_model() for _ in range(num_ranks)]
    optimizers = [make_optimizer(model, case["optimizer"]) for model in models]
    x = [list(model.parameters()) for model in models]
    x0 = [values(model) for model in models]
    v = [[torch.zeros_like(p) for p in own] for own in x0]
    previous = [None, None]
    seen = [[] for _ in models]

    def mean_of(parameter):
        return sum(own[parameter].detach() for own in x) / num_ranks

    @torch.no_grad()
    def outer_step(rates):
        for i in range(2):
            mean, factor = mean_of(i), rates[i] / previous[i] if previous[i] else 1.0
            for r in range(num_ranks):
                xbar = mean if case["average"] else x[r][i]
                v[r][i] = case["slow_momentum"] * factor * v[r][i] + (x0[r][i] - xbar)
                x0[r][i] = x0[r][i] - case["slow_lr"] * v[r][i]
                x[r][i].copy_(x0[r][i])
            previous[i] = rates[i]
            states = [optimizer.state[own[i]] for optimizer, own in zip(optimizers, x)]
            if case["base_buffers"] == "average":
                for name in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & states[0].keys():
                    mean_moment = sum(state[name] for state in states) / num_ranks
                    for state in states:
                        state[name] = mean_moment.clone()
        if case["base_buffers"] == "reset":
            optimizers[:] = [make_optimizer(model, case["optimizer"]) for model in models]

    @torch.no_grad()
    def consensus():
        for i in range(2):
            mean = mean_of(i)
            for own in x:
                own[i].copy_(mean)

    for step in range(NUM_STEPS):
        for r in range(num_ranks):
            take_step(models[r], optimizers[r], case["rates"][step], r, step)
        if (step + 1) % case["sync_every"] == 0:
            outer_step(case["rates"][step])
        if step == case["sync_after"]:
            consensus()
        for r in range(num_ranks):
            seen[r].append(values(models[r]))
    if NUM_STEPS % case["sync_every"]:
        outer_step(case["rates"][-1])
    consensus()
    return [[*seen[r], values(models[r])] for r in range(num_ranks)]


def _train_all_cases(rank):
    results = {name: train(rank, case) for name, case in CASES.items()}
    flat_buffers.BUCKET_BYTES = 1  # a bucket for each tensor
    small = {name: train(rank, CASES[name]) for name in ("zeros", "sharded zeros", "adam average")}
    return results, small


@pytest.mark.slow
@pytest.mark.distributed
def test_every_variant_follows_its_equations_at_every_step():
    results, small = zip(*run_ranks(_train_all_cases, 3))
    for name, case in CASES.items():
        for rank, expected in enumerate(reference(3, case)):
            for found in (results[rank][name], small[rank].get(name, expected)):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
            assert same(results[rank][name][-1], results[0][name][-1]), name


@pytest.mark.parametrize("case", ["plain", "adam reset", "zeros", "slow_lr", "sharded zeros"])
def test_one_rank_is_an_outer_sgd_with_momentum(case):
    torch.testing.assert_close(train(0, CASES[case]), reference(1, CASES[case])[0], rtol=1e-9, atol=1e-11)


def _average_in_three_ways(rank):
    def run(make_sync):
        model = make_model(seed=0).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sync = make_sync(model, optimizer)
        for step in range(6):
            x, y = data(rank, step)
            optimizer.zero_grad()
            ((model(x.float()) - y.float()) ** 2).mean().backward()
            optimizer.step()
            if sync is not None:
                sync.step()
            elif step % 2:
                flat = torch.cat([p.detach().flatten() for p in model.parameters()])
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
                torch.nn.utils.vector_to_parameters(flat, model.parameters())
        return values(model)

    return [
        run(lambda *_: None),
        run(lambda *it: SlowMo(*it, sync_every=2, slow_momentum=0.0).start()),
        run(lambda *it: LocalSGD(*it, sync_every=2).start()),
        run(lambda *it: SlowMo(*it, sync_every=2, slow_momentum=0.0, shard_state=True).start()),
    ]


@pytest.mark.distributed
def test_without_momentum_it_is_an_average_to_the_bit():
    for plain, slow, local, sharded in run_ranks(_average_in_three_ways, 3):
        for p, a, b, c in zip(plain, slow, local, sharded):
            assert torch.equal(p, a)
            assert torch.equal(p, b)
            torch.testing.assert_close(p, c)


def _state_sizes_and_bytes(rank):
    results = []
    for shard in (False, True):
        model = torch.nn.Linear(100, 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = SlowMo(model, optimizer, sync_every=1, shard_state=shard).start()
        before = sync.bytes_sent
        sync.step()
        state = sync.state_dict()
        results.append((sum(t.numel() for t in state["anchors"] + state["momenta"]), sync.bytes_sent - before))
    return results


@pytest.mark.distributed
def test_sharded_state_takes_1_nth_of_the_memory_and_the_same_bytes():
    numbers = 10100
    sent = 2 * 3 * numbers * 4 // 4
    assert run_ranks(_state_sizes_and_bytes, 4) == [[(2 * numbers, sent), (2 * numbers // 4, sent)]] * 4


def _resume(rank, case):
    case = {**DEFAULTS, **case}
    name, rates = case.pop("optimizer"), case.pop("rates")
    case.pop("sync_after")

    def make(seed):
        model = make_model(seed)
        optimizer = make_optimizer(model, name)
        return model, optimizer, SlowMo(model, optimizer, **case)

    def step_of(model, optimizer, step):
        take_step(model, optimizer, rates[step], rank, step)

    return resumed_in_two_ways(make, step_of, NUM_STEPS)


RESUMED = [{}, {"shard_state": True, "optimizer": "adam", "base_buffers": "average"}, {"sync_start_step": 5}]


def _resume_all(rank):
    return [_resume(rank, case) for case in RESUMED]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_resumes_bit_for_bit_inside_a_period():
    results = run_ranks(_resume_all, 4)
    for case, ((straight, *resumed), saved) in [entry for result in results for entry in enumerate(result)]:
        assert saved["sync"]["local_steps"] == [1, 1, 0][case]
        assert all(same(straight, end) for end in resumed), case
    weights = [result[0][1]["model"]["weight"] for result in results]
    assert not torch.equal(weights[0], weights[1])


def test_a_state_of_other_tensors_is_refused():
    model = make_model()
    state = SlowMo(model, make_optimizer(model, "sgd")).start().state_dict()
    other = make_model()
    optimizer = make_optimizer(other, "sgd")
    with pytest.raises(ValueError, match="slow_momentum"):
        SlowMo(other, optimizer, slow_momentum=0.0).load_state_dict(state)
    with pytest.raises(ValueError, match="LocalSGD"):
        LocalSGD(other, optimizer).load_state_dict(state)


def test_entering_again_resets_the_momentum():
    model = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sync = SlowMo(model, optimizer, sync_every=1, slow_momentum=0.5)
    for rate in (1.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            model.weight.fill_(2.0)
        with sync:
            for expected in (1.0, -0.5):  # v = 1, then 0.5 * 1 + 1
                with torch.no_grad():
                    model.weight.sub_(1.0)
                sync.step()
                assert model.weight.item() == expected
            assert sync.state_dict()["previous_learning_rates"] == [rate]
    sync.start()
    assert sync.state_dict()["previous_learning_rates"] is None


def test_bfloat16_parameters_have_a_momentum_in_float32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sync = SlowMo(model, optimizer, sync_every=1, slow_momentum=0.9).start()
    for _ in range(2):
        with torch.no_grad():
            model.weight.sub_(0.125)
        sync.step()
    assert sync.state_dict()["momenta"][0].dtype == torch.float32
    assert sync.state_dict()["momenta"][0].item() == pytest.approx(0.9 * 0.125 + 0.125)
    assert model.weight.item() == torch.tensor(0.875 - 0.2375).bfloat16().item()
