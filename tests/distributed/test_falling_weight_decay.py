"""Weight decay that falls as training goes on."""

import copy

import pytest
import torch

from hf_msn.distributed.codistillation import Codistillation
from hf_msn.distributed.falling_weight_decay import FallingWeightDecay, falling_factor


def test_weight_decay_falls_by_its_factors_and_is_put_back():
    assert [falling_factor(p, (1.0, 0.1, 0.0), (0.5, 0.8)) for p in (0, 0.49, 0.5, 0.79, 0.8, 1.0)] == [
        *(1.0, 1.0),
        *(0.1, 0.1),
        *(0.0, 0.0),
    ]
    schedule = FallingWeightDecay(9)
    assert [schedule(step) for step in range(10)] == [1.0] * 3 + [0.1] * 3 + [0.0] * 4
    assert schedule(1000) == 0.0
    model = torch.nn.Linear(1, 1).double()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    sizes = []
    with pytest.warns(UserWarning, match="one replica only"):
        codistillation = Codistillation(model, optimizer, weight_decay_schedule=schedule).start()
    for _ in range(9):
        with torch.no_grad():
            model.weight.fill_(1.0)
        model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
        optimizer.step()
        codistillation.step()
        sizes.append(1.0 - model.weight.item())
    assert sizes == pytest.approx([0.05] * 3 + [0.005] * 3 + [0.0] * 3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    codistillation.stop()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_the_weight_decay_that_training_began_with_survives_a_resume():
    def make():
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.4)
        return model, optimizer, Codistillation(model, optimizer, weight_decay_schedule=FallingWeightDecay(4))

    def step(model, optimizer, codistillation):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        codistillation.step()
        return optimizer.param_groups[0]["weight_decay"]

    with pytest.warns(UserWarning, match="one replica only"):
        first = make()
        first[2].start()
        assert [step(*first) for _ in range(3)] == pytest.approx([0.4, 0.4, 0.04])
        saved, in_optimizer = first[2].state_dict(), first[1].state_dict()
        for started_first in (True, False):
            model, optimizer, codistillation = make()
            if started_first:
                codistillation.start()
            optimizer.load_state_dict(copy.deepcopy(in_optimizer))
            codistillation.load_state_dict(saved)
            if not started_first:
                codistillation.start()
            assert step(model, optimizer, codistillation) == 0.0
            codistillation.stop()
            assert optimizer.param_groups[0]["weight_decay"] == 0.4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0,), "total_steps.*>= 1.*0"),
        ((10, (0.1, 1.0), (0.5,)), r"factors.*never rise.*\(0.1, 1.0\)"),
        ((10, (1.0, -0.1), (0.5,)), "factors.*>= 0"),
        ((10, (1.0, 0.1, 0.0), (0.5,)), r"fractions.*2 rising numbers.*\(0.5,\)"),
        ((10, (1.0, 0.1, 0.0), (0.8, 0.5)), "fractions.*rising"),
    ],
)
def test_schedules_outside_their_rules_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        FallingWeightDecay(*arguments)


def test_an_optimizer_without_weight_decay_is_no_one_to_schedule():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight_decay_schedule.*LBFGS"):
        Codistillation(model, torch.optim.LBFGS(model.parameters()), weight_decay_schedule=FallingWeightDecay(5))
