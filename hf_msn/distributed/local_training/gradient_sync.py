"""Switches the averaging of gradients off and on, for models with and without `DistributedDataParallel`."""

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..comm.exchange import Exchange
from ..comm.flat import FlatTensors
from .forward_scope import ForwardScope

# DDP takes one hook for its lifetime, so a second sync object has to find the first one's.
_switches: "weakref.WeakKeyDictionary[DistributedDataParallel, _Switch]" = weakref.WeakKeyDictionary()


class _Switch:
    """The hook's state: over which group gradients are averaged now, or not at all."""

    def __init__(self):
        self.averages = True
        self.group: dist.ProcessGroup | None = None


def _switchable_hook(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    if not switch.averages:
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    # Divided before the sum, as DDP does it: the same bits.
    gradients = bucket.buffer().div_(dist.get_world_size(switch.group))
    work = dist.all_reduce(gradients, group=switch.group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class GradientSync:
    """What happens to gradients while a sync object is active: local, averaged inside `inner`, or averaged over all.

    What a forward pass exchanges goes along with them, see [`ForwardScope`].

    Args:
        model (`nn.Module`): The model without wrapper.
        ddp (`DistributedDataParallel`, *optional*): The wrapper, if there is one. Its hook is switched; its buffers
            are not broadcast while gradients are local.
        optimizer (`torch.optim.Optimizer`): Without `ddp`, gradients are averaged before its step, where they must be.
        parameters (`Sequence[torch.Tensor]`): The trainable parameters.
        outer (`Exchange`): The ranks that train locally.
        inner (`Exchange`, *optional*): The ranks that share their gradients at every step.

    Raises:
        ValueError: If another communication hook is registered on `ddp`.
    """

    def __init__(
        self,
        model: nn.Module,
        ddp: DistributedDataParallel | None,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.Tensor],
        outer: Exchange,
        inner: Exchange | None,
    ):
        self._ddp, self._optimizer, self._parameters = ddp, optimizer, list(parameters)
        self._outer, self._inner = outer, inner
        self._forward_scope = ForwardScope(model)
        self._exchanges: list[Exchange] = []
        self._remove_hook: Callable[[], None] | None = None
        if ddp is None:
            self._remove_hook = optimizer.register_step_pre_hook(lambda *_: self._average_gradients()).remove
        else:
            self._switch = _switch_of(ddp)
            self._broadcast_buffers = ddp.broadcast_buffers

    def average_over_all(self) -> None:
        """As without a sync object: until the local steps begin."""
        self._forward_scope.lift()
        if self._ddp is None:
            self._exchanges = [exchange for exchange in (self._inner, self._outer) if exchange is not None]
        else:
            self._switch.averages = True
            self._switch.group = self._ddp.process_group if self._inner is not None else self._outer.group
            self._ddp.broadcast_buffers = self._broadcast_buffers

    def keep_local(self) -> None:
        """Each rank (or each inner group) steps on gradients of its own."""
        self._forward_scope.limit_to(None if self._inner is None else self._inner.group)
        if self._ddp is None:
            self._exchanges = [] if self._inner is None else [self._inner]
        else:
            self._switch.averages = self._inner is not None
            self._switch.group = None if self._inner is None else self._inner.group
            self._ddp.broadcast_buffers = False

    def restore(self) -> None:
        """DDP averages over its own group again and broadcasts buffers as before; the optimizer's hook is removed."""
        self._forward_scope.lift()
        if self._remove_hook is not None:
            self._remove_hook()
        if self._ddp is not None:
            self._switch.averages, self._switch.group = True, self._ddp.process_group
            self._ddp.broadcast_buffers = self._broadcast_buffers

    @torch.no_grad()
    def _average_gradients(self) -> None:
        if not any(exchange.size > 1 for exchange in self._exchanges):
            return
        # A parameter may be without gradient on some ranks only: all take part with zeros.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = FlatTensors(gradients)
        buffers = flat.copy_in()
        for exchange in self._exchanges:
            exchange.mean_(buffers)
        flat.copy_back()
        for parameter, gradient in zip(self._parameters, gradients):
            if parameter.grad is None and bool(gradient.any()):
                parameter.grad = gradient


def find_wrapper(model: nn.Module) -> tuple[DistributedDataParallel | None, nn.Module]:
    """The `DistributedDataParallel` around a model (or `None`), and the model inside of it and of `torch.compile`."""
    ddp = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp, model = model, model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return ddp, model


def _switch_of(ddp: DistributedDataParallel) -> _Switch:
    if ddp not in _switches:
        if ddp._comm_hooks:
            raise ValueError(
                "The gradients of a DistributedDataParallel model are kept local by a communication hook, and DDP "
                f"takes one only, but `{ddp._comm_hooks[0][0].__qualname__}` is registered. Leave that one out."
            )
        _switches[ddp] = _Switch()
        _switches[ddp].group = ddp.process_group
        ddp.register_comm_hook(_switches[ddp], _switchable_hook)
    return _switches[ddp]
