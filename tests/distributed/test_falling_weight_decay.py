"""A weight decay that falls during training."""

import copy

import pytest
import torch

from hf_msn.distributed.codistillation import Codistillation
from hf_msn.distributed.falling_weight_decay import FallingWeightDecay

pytestmark = pytest.mark.filterwarnings("ignore:.*one replica only")


def test_schedule_falls_by_its_factors_at_its_fractions():
    schedule = FallingWeightDecay(100, (1.0, 0.1, 0.0), (0.5, 0.8))
    assert [schedule(step) for step in (0, 49, 50, 79, 80, 100)] == [1.0, 1.0, 0.1, 0.1, 0.0, 0.0]
    schedule = FallingWeightDecay(9)
    assert [schedule(step) for step in (*range(10), 1000)] == [1.0] * 3 + [0.1] * 3 + [0.0] * 5


def test_weight_decay_of_an_optimizer_falls_and_is_restored():
    model = torch.nn.Linear(1, 1).double()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer, sizes = torch.optim.SGD(groups, lr=0.1), []
    with Codistillation(model, optimizer, weight_decay_schedule=FallingWeightDecay(9)) as codistillation:
        for _ in range(9):
            with torch.no_grad():
                model.weight.fill_(1.0)
            model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
            optimizer.step()
            codistillation.step()
            sizes.append(1.0 - model.weight.item())
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert sizes == pytest.approx([0.05] * 3 + [0.005] * 3 + [0.0] * 3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("enter_first", [True, False])
def test_initial_weight_decay_survives_a_resume(enter_first):
    def make():
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.4)
        return model, optimizer, Codistillation(model, optimizer, weight_decay_schedule=FallingWeightDecay(4))

    def step(model, optimizer, codistillation):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        codistillation.step()
        return optimizer.param_groups[0]["weight_decay"]

    first = make()
    first[2].start()
    assert [step(*first) for _ in range(3)] == pytest.approx([0.4, 0.4, 0.04])
    model, optimizer, codistillation = make()
    if enter_first:
        codistillation.start()
    optimizer.load_state_dict(copy.deepcopy(first[1].state_dict()))
    codistillation.load_state_dict(first[2].state_dict())
    if not enter_first:
        codistillation.start()
    assert step(model, optimizer, codistillation) == 0.0
    codistillation.stop()
    assert optimizer.param_groups[0]["weight_decay"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0,), "total_steps"),
        ((10, (0.1, 1.0), (0.5,)), "factors"),
        ((10, (1.0, -0.1), (0.5,)), "factors"),
        ((10, (1.0, 0.1, 0.0), (0.5,)), "fractions"),
        ((10, (1.0, 0.1, 0.0), (0.8, 0.5)), "fractions"),
    ],
)
def test_arguments_outside_of_their_rule_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        FallingWeightDecay(*arguments)


def test_optimizer_without_weight_decay_is_refused():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="LBFGS"):
        Codistillation(model, torch.optim.LBFGS(model.parameters()), weight_decay_schedule=FallingWeightDecay(5))
