"""Moments of optimizers: of any shape they are averaged, and reset to those of a new optimizer."""

import copy

import pytest
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
from dog import DoG
from launch import run_ranks
from local_runs import backward, make_model
from torch import nn
from transformers.optimization import Adafactor

from hf_msn import Gossip, LocalSGD, SlowMo
from hf_msn.distributed.training_state import moments, reset_moments

OPTIMIZERS = {
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "adafactor of transformers": lambda parameters: Adafactor(parameters, beta1=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, initial_accumulator_value=0.5),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.02),
    "nadam": torch.optim.NAdam,
    "adamax": torch.optim.Adamax,
    "lion": timm.optim.Lion,
    "lamb": timm.optim.Lamb,
    "novograd": timm.optim.NvNovoGrad,
    "mars": timm.optim.Mars,
    "ademamix": pytorch_optimizer.AdEMAMix,
    "grams": pytorch_optimizer.Grams,
    "diffgrad": pytorch_optimizer.DiffGrad,
    "shampoo": lambda parameters: pytorch_optimizer.Shampoo(parameters, momentum=0.9),
    "nero": pytorch_optimizer.Nero,
    "dog": lambda parameters: DoG(parameters, reps_rel=0.01),
}


def schedule_free(parameters):
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.01)
    optimizer.train()
    return optimizer


SHAMPOO = {"momentum_buffer", "pre_cond_0", "inv_pre_cond_0"}
AVERAGED = {  # moments of a matrix and of a vector
    "adafactor": ({"row_var", "col_var"}, {"variance"}),
    "adafactor of transformers": ({"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"}, {"exp_avg", "exp_avg_sq"}),
    "novograd": ({"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq"}),
    "shampoo": (SHAMPOO | {"pre_cond_1", "inv_pre_cond_1"}, SHAMPOO),
    "dog": (set(), set()),
    "schedule-free": ({"z", "exp_avg_sq"}, {"z", "exp_avg_sq"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_reset_the_optimizer_steps_as_a_new_one(name):
    model = make_model()
    model.register_parameter("scalar", nn.Parameter(torch.tensor(2.0)))
    optimizer = OPTIMIZERS[name](model.parameters())
    for step in range(3):
        backward(model, optimizer, 0, step)
        model.scalar.grad = model.scalar.detach().clone()
        optimizer.step()
    reset_moments(optimizer)
    other = copy.deepcopy(model)
    new = OPTIMIZERS[name](other.parameters())
    for step in range(3, 6):
        for one, its in ((model, optimizer), (other, new)):
            backward(one, its, 0, step)
            one.scalar.grad = one.scalar.detach().clone()
            its.step()
        for p, q in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_complex_moments_count_and_integer_ones_are_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert [name for _, name in moments(optimizer)] == ["momentum_buffer"]
    optimizer.state[p]["state1"] = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="`state1`"):
        reset_moments(optimizer)


def _average(rank):
    results = {}
    for name in AVERAGED:
        model = make_model()
        optimizer = {**OPTIMIZERS, "schedule-free": schedule_free}[name](model.parameters())
        sync = LocalSGD(model, optimizer, sync_every=2, base_buffers="average").start()
        for step in range(2):
            backward(model, optimizer, rank, step)
            optimizer.step()
            before = {key: value.clone() for key, value in moments(optimizer).items()}
            sync.step()
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        results[name] = before, moments(optimizer), {float(step) for step in steps}
    return results


def test_moments_in_bases_of_each_rank_are_reset_but_not_averaged():
    model = make_model()
    optimizer = pytorch_optimizer.SOAP(model.parameters(), lr=0.1)
    for step in range(3):
        backward(model, optimizer, 0, step)
        optimizer.step()
    with pytest.raises(ValueError, match="`GG`"):
        moments(optimizer)
    reset_moments(optimizer)
    weight = model[0].weight.detach().clone()
    backward(model, optimizer, 0, 3)
    optimizer.step()
    assert torch.equal(model[0].weight, weight)  # the first step makes the bases alone


@pytest.mark.parametrize(
    ("method", "settings"),
    [(LocalSGD, {}), (LocalSGD, {"base_buffers": "reset"}), (SlowMo, {"base_buffers": "average"}), (Gossip, {})],
)
def test_a_schedule_free_optimizer_is_refused_unless_both_of_its_weights_are_averaged(method, settings):
    model = make_model()
    with pytest.raises(ValueError, match=method.__name__):
        method(model, schedule_free(model.parameters()), **settings)


@pytest.mark.distributed
def test_moments_of_every_shape_are_averaged():
    results = run_ranks(_average, 2)
    for name, (of_matrices, of_vectors) in AVERAGED.items():
        (first, now, steps), (second, also_now, _) = (result[name] for result in results)
        assert {key for place, key in now if place == 0} == of_matrices
        assert {key for place, key in now if place == 1} == of_vectors
        assert steps <= {2.0}
        assert now if name != "dog" else now.keys() == {(-1, "G"), (-1, "rbar")}
        for key, value in now.items():
            assert not torch.equal(first[key], second[key]) or key == (-1, "rbar")  # still the first distance
            torch.testing.assert_close(value, (first[key] + second[key]) / 2)
            assert torch.equal(value, also_now[key])
