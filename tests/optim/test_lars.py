"""LARS against a float64 loop written from its paper, and against timm's where the two must agree."""

import inspect

import pytest
import timm.optim
import torch

from hf_msn.optim.lars import LARS

HAS_FOREACH = "foreach" in inspect.signature(timm.optim.Lars).parameters  # timm 1.0.31
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}] if HAS_FOREACH else [{}]
RATES = [0.1, 0.4, 0.4, 0.2, 0.0, 0.3]


def parameters(dtype=torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2, 2)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters()]


def loop_lars(rates, momentum=0.9, weight_decay=0.01, trust=0.001, eps=1e-8, excluded=(1,)) -> list[torch.Tensor]:
    weights = [p.detach().clone() for p in parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for place, g in enumerate(gradients(step)):
            w = weights[place]
            if place not in excluded:
                w_norm = sum(float(x) ** 2 for x in w.flatten()) ** 0.5
                g_norm = sum(float(x) ** 2 for x in g.flatten()) ** 0.5
                ratio = trust * w_norm / (g_norm + weight_decay * w_norm + eps) if w_norm > 0 and g_norm > 0 else 1.0
                g = ratio * (g + weight_decay * w)
            velocities[place] = momentum * velocities[place] + rate * g
            weights[place] = w - velocities[place]
    return weights


def run(optimizer_class, rates, weight_decay=0.01, **settings) -> list[torch.Tensor]:
    weights = parameters()
    groups = [
        {"params": [weights[0], weights[2]], "weight_decay": weight_decay, **settings.pop("group", {})},
        {"params": [weights[1]], "weight_decay": 0.0},
    ]
    optimizer = optimizer_class(groups, lr=rates[0], momentum=settings.pop("momentum", 0.9), **settings)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, g in zip(weights, gradients(step)):
            p.grad = g.clone()
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    return [p.detach() for p in weights]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_under_a_changing_learning_rate_equal_the_loop(implementation):
    for found, expected in zip(run(LARS, RATES, **implementation), loop_lars(RATES)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_at_a_constant_learning_rate_it_is_that_of_timm():
    for found, expected in zip(run(LARS, [0.3] * 5), run(timm.optim.Lars, [0.3] * 5)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    differ = [(a - b).abs().max() for a, b in zip(run(LARS, RATES), run(timm.optim.Lars, RATES))]
    assert min(differ) > 1e-5  # what the class is there for


def test_without_weight_decay_a_group_adapts_if_told_to():
    found = run(LARS, RATES, weight_decay=0.0, group={"always_adapt": True})
    for value, expected in zip(found, loop_lars(RATES, weight_decay=0.0)):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found = run(LARS, RATES, weight_decay=0.0)
    for value, expected in zip(found, loop_lars(RATES, weight_decay=0.0, excluded=(0, 1, 2))):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_without_momentum_it_is_scaled_gradient_descent():
    for found, expected in zip(run(LARS, RATES, momentum=0.0), loop_lars(RATES, momentum=0.0)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_it_goes_on_from_a_state_dict():
    weights = parameters()
    optimizer = LARS(weights, lr=0.1, weight_decay=0.01)
    for step in range(4):
        if step == 2:
            state, weights = optimizer.state_dict(), [torch.nn.Parameter(p.detach().clone()) for p in weights]
            optimizer = LARS(weights, lr=0.1, weight_decay=0.01)
            optimizer.load_state_dict(state)
        for p, g in zip(weights, gradients(step)):
            p.grad = g
        optimizer.step()
    for found, expected in zip(weights, loop_lars([0.1] * 4, excluded=())):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
