"""DiLoCo against its equation, written as loops over ranks in float64."""

from functools import partial

import pytest
import torch
from gossip_reference import NUM_STEPS, make_model, take_step, values
from launch import run_ranks
from states import resumed_in_two_ways, same

from hf_msn.distributed.diloco import DiLoCo
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.slowmo import SlowMo

SGD = torch.optim.SGD
RATES = (0.1, 0.2)
OUTER = {"nesterov": None, "adam": partial(torch.optim.Adam, lr=0.1), "average": partial(SGD, lr=1.0)}
OUTER["heavy ball"] = partial(SGD, lr=0.7, momentum=0.6)


def make_optimizer(model):
    return torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}], weight_decay=0.1)


def train(rank, method, **settings):
    model = make_model(seed=rank)  # made equal when entering
    optimizer, seen = make_optimizer(model), []
    with method(model, optimizer, sync_every=3, **settings) as sync:
        for step in range(NUM_STEPS):
            take_step(model, optimizer, RATES, rank, step)
            sync.step()
            seen.append(values(model))
    return [*seen, values(model)]


def reference(num_ranks):
    """Return x of every rank after each step and at the end, with Nesterov's SGD outside."""
    models = [make_model() for _ in range(num_ranks)]
    optimizers = [make_optimizer(model) for model in models]
    x = [list(model.parameters()) for model in models]
    x0, v = values(models[0]), [0.0, 0.0]
    seen = [[] for _ in models]
    for step in range(NUM_STEPS):
        for rank in range(num_ranks):
            take_step(models[rank], optimizers[rank], RATES, rank, step)
        if (step + 1) % 3:
            for rank in range(num_ranks):
                seen[rank].append(values(models[rank]))
            if step + 1 < NUM_STEPS:  # the last outer step is taken when leaving
                continue
        with torch.no_grad():
            for i in range(2):
                delta = sum(x0[i] - own[i] for own in x) / num_ranks
                v[i] = 0.9 * v[i] + delta
                x0[i] = x0[i] - 0.7 * (delta + 0.9 * v[i])
                for own in x:
                    own[i].copy_(x0[i])
        for rank in range(num_ranks):
            seen[rank].append(values(models[rank]))
    return seen


def _resume(rank, wire):
    def make(seed):
        model = make_model(seed)
        optimizer = make_optimizer(model)
        return model, optimizer, DiLoCo(model, optimizer, sync_every=3, wire_dtype=wire)

    def step_of(model, optimizer, step):
        take_step(model, optimizer, RATES, rank, step)

    return resumed_in_two_ways(make, step_of, NUM_STEPS)


def _run_all(rank):
    runs = {
        name: train(rank, DiLoCo, **({} if outer is None else {"outer_optimizer": outer}))
        for name, outer in OUTER.items()
    }
    runs["local_sgd"] = train(rank, LocalSGD)
    runs["slowmo"] = train(rank, SlowMo, slow_momentum=0.6, slow_lr=0.7)
    runs["int8"] = train(rank, DiLoCo, wire_dtype="int8")
    return runs, [_resume(rank, wire) for wire in (None, "int8")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_follows_its_equation_has_its_siblings_as_cases_and_resumes_bit_for_bit(num_ranks):
    results = run_ranks(_run_all, num_ranks)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    for (runs, resumed), expected in zip(results, reference(num_ranks)):
        close(runs["nesterov"], expected)
        close(runs["average"], runs["local_sgd"])
        close(runs["heavy ball"], runs["slowmo"])
        assert not torch.allclose(runs["nesterov"][-1][0], runs["adam"][-1][0])
        torch.testing.assert_close(runs["int8"], expected, rtol=0.05, atol=0.05)
        assert all(same(run[-1], results[0][0][name][-1]) for name, run in runs.items())
        for (straight, *others), saved in resumed:
            assert saved["sync"]["local_steps"] == 1
            assert all(same(straight, end) for end in others)


def test_bfloat16_parameters_have_an_anchor_and_momentum_in_float32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = SGD(model.parameters(), lr=1.0)
    sync = DiLoCo(model, optimizer, sync_every=1, outer_optimizer=partial(SGD, lr=0.1, momentum=0.9)).start()
    for _ in range(2):
        with torch.no_grad():
            model.weight.sub_(0.125)
        sync.step()
    [x0] = sync.state_dict()["anchors"]
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, torch.full_like(x0, 1 - 0.0125 - 0.02375))
    assert model.weight.item() == x0.bfloat16().item()


@pytest.mark.parametrize(
    "outer",
    [torch.optim.LBFGS, torch.optim.Muon, 0.7, lambda _: None, lambda _: SGD(make_model().parameters(), lr=0.1)],
)
def test_an_outer_optimizer_that_cannot_step_by_gradients_of_its_parameters_is_refused(outer):
    model = make_model()
    with pytest.raises(ValueError, match="`outer_optimizer`"):
        DiLoCo(model, make_optimizer(model), outer_optimizer=outer)
