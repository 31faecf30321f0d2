"""Loops in which `sync.step()` does not follow each optimizer step once, and optimizers of other models."""

import contextlib

import pytest
import torch
from local_runs import backward, make_model, parameters, sgd

from hf_msn.distributed.async_gossip import AsyncGossip
from hf_msn.distributed.codistillation import Codistillation
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo

pytestmark = pytest.mark.filterwarnings("ignore:.* has one r")


def over_gossip(model, optimizer, **options):
    return SlowMo(model, optimizer, base=Gossip(model, optimizer), **options)


LOCAL = [LocalSGD, SlowMo, over_gossip, Gossip, OverlapGossip, AsyncGossip]
ENDS = [*((method, end) for method in LOCAL for end in ("stop", "sync")), (Codistillation, "stop")]


def take_step(sync, calls, zero_grad=None):
    sync.optimizer.step()
    if zero_grad is not None:
        sync.optimizer.zero_grad(**zero_grad)
    for _ in range(calls):
        sync.step()


def call_before_the_step(sync, step):
    sync.step()
    sync.optimizer.step()


WRONG = {
    "no calls": lambda sync, step: take_step(sync, 0),
    "two": lambda sync, step: take_step(sync, 2),
    "two without gradients": lambda sync, step: take_step(sync, 2, {"set_to_none": True}),
    "two with gradients of 0": lambda sync, step: take_step(sync, 2, {"set_to_none": False}),
    "every other": lambda sync, step: take_step(sync, step % 2),
    "before": call_before_the_step,
}


@pytest.mark.parametrize("loop", WRONG)
@pytest.mark.parametrize("method, end", ENDS)
def test_missing_doubled_and_early_calls_are_found_at_the_next_sync_or_when_leaving(method, loop, end):
    model = make_model()
    sync = method(model, sgd(model)).start()
    with pytest.raises(RuntimeError, match=r"step\(\)") as caught:
        for step in range(5):
            backward(model, sync.optimizer, 0, step)
            WRONG[loop](sync, step)
        getattr(sync, end)()
    with contextlib.suppress(RuntimeError):  # it was left
        sync.stop(caught.value)
    method(model, sync.optimizer).start().stop()


@pytest.mark.parametrize("zero_grad", [None, {"set_to_none": True}, {"set_to_none": False}])
@pytest.mark.parametrize("method", [*LOCAL, Codistillation])
def test_one_call_per_step_and_steps_that_a_gradient_scaler_skips_are_right(method, zero_grad):
    model = make_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    too_large = {0, 1, 3, 4, 5, 6, 9, 10}
    with method(model, optimizer) as sync:
        for step in range(12):
            before = parameters(model)
            optimizer.zero_grad()
            loss = model(torch.ones(6, 3)).square().mean()
            scaler.scale(loss * float("inf") if step in too_large else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, parameters(model)) == (step in too_large)  # the scaler skips the step
            if zero_grad is not None:
                optimizer.zero_grad(**zero_grad)
            sync.step()
            if step == 6 and method is not Codistillation:
                sync.sync()
    assert sync.steps == 12


@pytest.mark.parametrize("method", [*LOCAL, Codistillation])
def test_the_optimizer_of_another_model_is_refused(method):
    model, other = make_model(), make_model()
    with pytest.raises(ValueError, match="`optimizer`"):
        method(model, sgd(other))
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    method(model, both)  # its other parameters take part too
