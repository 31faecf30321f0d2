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


def train(sync, calls, zero_grad=None, num_steps=5):
    for step in range(num_steps):
        backward(sync.model, sync.optimizer, 0, step)
        sync.optimizer.step()
        if zero_grad is not None:
            sync.optimizer.zero_grad(**zero_grad)
        for _ in range(calls(step)):
            sync.step()


@pytest.mark.parametrize("calls", [lambda step: 0, lambda step: 2, lambda step: step % 2], ids=["no", "two", "some"])
@pytest.mark.parametrize("method, end", ENDS)
def test_missing_and_doubled_calls_are_found_at_the_next_sync_or_when_leaving(method, calls, end):
    model = make_model()
    sync = method(model, sgd(model)).start()
    with pytest.raises(RuntimeError, match=r"step\(\)") as caught:
        train(sync, calls)
        getattr(sync, end)()
    with contextlib.suppress(RuntimeError):  # it was left
        sync.stop(caught.value)
    method(model, sync.optimizer).start().stop()


@pytest.mark.parametrize("method, end", ENDS)
def test_calls_before_the_step_of_the_optimizer_are_found(method, end):
    model = make_model()
    sync = method(model, sgd(model)).start()
    for step in range(3):
        backward(model, sync.optimizer, 0, step)
        sync.step()
        sync.optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\)") as caught:
        getattr(sync, end)()
    with contextlib.suppress(RuntimeError):  # it was left
        sync.stop(caught.value)


@pytest.mark.parametrize("zero_grad", [{"set_to_none": True}, {"set_to_none": False}])
@pytest.mark.parametrize("method", [*LOCAL, Codistillation])
def test_doubled_calls_are_found_without_gradients_too(method, zero_grad):
    model = make_model()
    sync = method(model, sgd(model)).start()
    with pytest.raises(RuntimeError, match=r"step\(\)") as caught:
        train(sync, lambda step: 2, zero_grad)
        sync.stop()
    with contextlib.suppress(RuntimeError):  # it was left
        sync.stop(caught.value)


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
