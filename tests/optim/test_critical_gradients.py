"""CriticalGradients against float64 loops with the buffer written out; convergence; state."""

import io
import math

import pytest
import torch
from accelerate import Accelerator

from hf_msn import CriticalGradients

STEPS = 100
RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1}, "sum"),
    "momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, "sum"),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9}, "mean"),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95)}, "mean"),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}, "mid"),
}


def parameters(dtype=torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,)]
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def gradients(step: int) -> list[torch.Tensor]:
    """Gradients whose size changes from step to step, so that some are replaced and some are not."""
    generator = torch.Generator().manual_seed(100 + step)
    size = 1.0 + math.sin(1.7 * step)
    return [size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters()]


def with_buffer(capacity, decay, aggregate, kappa=1.0, steps=STEPS):
    """Yield the gradients of the updates, number by number, from a list of whole gradients and their priorities."""
    buffer, priorities = [], []
    for step in range(steps):
        now = [gradient.flatten().tolist() for gradient in gradients(step)]
        past = [[sum(kept[k][i] for kept in buffer) for i in range(len(now[k]))] for k in range(len(now))]
        n, used = len(buffer), []
        for own, total in zip(now, past):
            if n == 0:
                used.append(own)
            elif aggregate == "sum":
                used.append([g + kappa * s / n for g, s in zip(own, total)])
            elif aggregate == "mid":
                used.append([(g + kappa * s / n) / 2 for g, s in zip(own, total)])
            else:
                used.append([(g + kappa * s) / (n + 1) for g, s in zip(own, total)])
        yield used
        priority = sum(math.sqrt(sum(g * g for g in own)) for own in now)
        if n < capacity:
            buffer.append(now)
            priorities.append(priority)
        else:
            smallest = priorities.index(min(priorities))
            if priority > priorities[smallest]:
                buffer[smallest], priorities[smallest] = now, priority
        priorities = [decay * priority for priority in priorities]


def loop(rule: str, updates) -> list[list[float]]:
    """The rules of the optimizers, number by number."""
    settings = RULES[rule][1]
    rate, decay = settings["lr"], settings.get("weight_decay", 0.0)
    weights = [p.flatten().tolist() for p in parameters()]
    first = [[0.0] * len(w) for w in weights]
    second = [[0.0] * len(w) for w in weights]
    for step, used in enumerate(updates, start=1):
        for k, gradient in enumerate(used):
            for i, g in enumerate(gradient):
                w = weights[k][i]
                if rule in ("sgd", "momentum"):
                    first[k][i] = settings.get("momentum", 0.0) * first[k][i] + g + decay * w
                    weights[k][i] = w - rate * first[k][i]
                elif rule == "rmsprop":
                    second[k][i] = 0.9 * second[k][i] + 0.1 * g * g
                    weights[k][i] = w - rate * g / (math.sqrt(second[k][i]) + 1e-8)
                else:
                    first[k][i] = 0.8 * first[k][i] + 0.2 * g
                    second[k][i] = 0.95 * second[k][i] + 0.05 * g * g
                    mean, square = first[k][i] / (1 - 0.8**step), second[k][i] / (1 - 0.95**step)
                    w = w * (1 - rate * decay) if rule == "adamw" else w
                    weights[k][i] = w - rate * mean / (math.sqrt(square) + 1e-8)
    return weights


def run(optimizer, steps, start: int = 0) -> None:
    for step in range(start, steps):
        optimizer.zero_grad()
        for p, gradient in zip(optimizer.param_groups[0]["params"], gradients(step)):
            p.grad = gradient.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_100_steps_equal_a_loop_with_the_buffer_written_out(rule):
    cls, settings, aggregate = RULES[rule]
    optimizer = CriticalGradients(cls(parameters(), **settings), capacity=5, decay=0.9, aggregate=aggregate)
    run(optimizer, STEPS)
    expected = loop(rule, with_buffer(5, 0.9, aggregate))
    for p, weights in zip(optimizer.param_groups[0]["params"], expected):
        assert p.flatten().tolist() == pytest.approx(weights, abs=1e-10)


@pytest.mark.parametrize(
    ("aggregate", "kappa", "expected"), [("sum", 2.0, 7.0), ("mid", 2.0, 3.5), ("mean", 2.0, 11 / 3)]
)
def test_the_buffer_enters_as_its_mean_or_sum(aggregate, kappa, expected):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = CriticalGradients(torch.optim.SGD([p], lr=1.0), aggregate=aggregate, kappa=kappa)
    for gradient in (1.0, 3.0, 3.0):  # at the last step the buffer holds 1 and 3
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert p.grad.item() == pytest.approx(expected)  # 3 + 2 * 2, its half, (3 + 2 * 4) / 3


def test_the_smallest_priority_is_replaced_by_a_greater_one_only():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = CriticalGradients(torch.optim.SGD([p], lr=1.0), capacity=2, decay=0.5)
    for norm, priorities in (
        (4.0, [2.0]),
        (1.0, [1.0, 0.5]),
        (0.5, [0.5, 0.25]),  # equal to the smallest: stays out
        (0.5, [0.25, 0.25]),
        (8.0, [4.0, 0.125]),  # of two smallest the first goes
    ):
        p.grad = torch.tensor([0.0, norm])
        optimizer.step()
        assert optimizer.priorities == priorities


@pytest.mark.parametrize("rule", RULES)
def test_a_strongly_convex_problem_is_solved(rule):
    cls, settings, aggregate = RULES[rule]
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    rate = {"sgd": 0.05, "momentum": 0.003}.get(rule, 0.05)  # old gradients need a smaller one
    optimizer = CriticalGradients(cls([p], **{**settings, "weight_decay": 0.0, "lr": rate}), aggregate=aggregate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.98 ** max(step - 200, 0))
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * curvature * p.square()).sum().backward()
        optimizer.step()
        schedule.step()
    assert p.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_resumed_run_equals_one_that_was_not_stopped(dtype):
    def make():
        return CriticalGradients(torch.optim.Adam(parameters(torch.float32), lr=0.01), capacity=3, dtype=dtype)

    whole, stopped, resumed = make(), make(), make()
    run(whole, 40)
    run(stopped, 17)
    saved = io.BytesIO()
    torch.save(stopped.state_dict(), saved)
    saved.seek(0)
    with torch.no_grad():
        for new, old in zip(resumed.param_groups[0]["params"], stopped.param_groups[0]["params"]):
            new.copy_(old)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    run(resumed, 40, start=17)
    for new, old in zip(resumed.param_groups[0]["params"], whole.param_groups[0]["params"]):
        assert torch.equal(new, old)


def test_the_wrapped_optimizer_itself_steps_by_the_buffer_and_saves_it():
    inner, outer = (torch.optim.SGD(parameters(), lr=0.1) for _ in range(2))
    CriticalGradients(inner)
    wrapped = CriticalGradients(outer)
    run(inner, 10)
    run(wrapped, 10)
    for a, b in zip(inner.param_groups[0]["params"], outer.param_groups[0]["params"]):
        assert torch.equal(a, b)
    assert inner.state_dict()["critical_gradients"]["priorities"] == wrapped.priorities
    plain = torch.optim.SGD(parameters(), lr=0.1)
    plain.load_state_dict(inner.state_dict())  # without a buffer it goes on as any other
    wrapped.load_state_dict(plain.state_dict())
    assert wrapped.priorities == []


def test_a_parameter_without_gradient_counts_as_zero():
    a, b = parameters()
    optimizer = CriticalGradients(torch.optim.SGD([a, b], lr=0.1))
    a.grad, b.grad = gradients(0)
    optimizer.step()
    before = b.detach().clone()
    a.grad, b.grad = gradients(1)[0], None
    optimizer.step()
    assert torch.equal(b, before)
    own = gradients(2)[1]
    a.grad, b.grad = None, own.clone()
    optimizer.step()
    assert torch.allclose(b.grad, own + gradients(0)[1] / 2)


def test_the_first_gradient_of_another_parameter_is_used_as_it_is():
    a, b = parameters()
    optimizer = CriticalGradients(torch.optim.SGD([a, b], lr=0.1))
    a.grad = gradients(0)[0]
    optimizer.step()
    a.grad, b.grad = None, gradients(1)[1]
    optimizer.step()
    assert torch.equal(b.grad, gradients(1)[1])
    assert len(optimizer.priorities) == 2


@pytest.mark.parametrize("is_prepared_first", [True, False])
def test_with_accelerate_and_accumulation_it_equals_whole_batches(is_prepared_first):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accumulated, whole = torch.nn.Linear(3, 1, dtype=torch.float64), torch.nn.Linear(3, 1, dtype=torch.float64)
    accumulated.load_state_dict(whole.state_dict())
    optimizer = torch.optim.SGD(accumulated.parameters(), lr=0.1)
    if is_prepared_first:
        optimizer = CriticalGradients(accelerator.prepare(optimizer))
    else:
        optimizer = accelerator.prepare(CriticalGradients(optimizer))
    expected = CriticalGradients(torch.optim.SGD(whole.parameters(), lr=0.1))
    rows = torch.randn(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for batch in rows:
        for half in batch.chunk(2):
            with accelerator.accumulate(accumulated):
                accelerator.backward(accumulated(half).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        whole(batch).square().mean().backward()
        expected.step()
        expected.zero_grad()
    assert torch.allclose(accumulated.weight, whole.weight, rtol=1e-12)


def test_the_running_sum_does_not_drift():
    optimizer = CriticalGradients(torch.optim.SGD(parameters(torch.float32), lr=0.0), capacity=2, decay=0.01)
    run(optimizer, 250)  # each gradient is greater than the last one's decayed priority
    state = optimizer.state_dict()["critical_gradients"]
    assert state["replacements"] > 200
    for place, buffer in state["buffers"].items():
        assert torch.allclose(state["sums"][place], buffer.sum(dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"capacity": 0}, "capacity"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"aggregate": "max"}, "aggregate"),
        ({"kappa": -1.0}, "kappa"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        CriticalGradients(torch.optim.SGD(parameters(), lr=0.1), **arguments)


def test_misuse_is_refused():
    optimizer = CriticalGradients(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(ValueError, match="already"):
        CriticalGradients(optimizer)
    with pytest.raises(ValueError, match="closure"):
        CriticalGradients(torch.optim.LBFGS(parameters()))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match="`optimizer`"):
        CriticalGradients(parameters())
    other = CriticalGradients(torch.optim.SGD(parameters(), lr=0.1), capacity=3)
    with pytest.raises(ValueError, match=r"`capacity` .* 5, but is 3"):
        other.load_state_dict(optimizer.state_dict())
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    sparse = CriticalGradients(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        sparse.step()
