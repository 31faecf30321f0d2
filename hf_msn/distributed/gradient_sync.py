"""Local gradients: switches for the averaging of DDP and of losses over ranks, and the base of what uses them."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .batch_norm import CrossRankBatchNorm
from .collectives import group_scope
from .comm.exchange import Exchange
from .comm.flat import FlatTensors, split_into_buckets
from .step_calls import StepCalls
from .subgroups import subgroup
from .training_state import is_sharded, local, plain_optimizer, refuse_unsupported

# Models and optimizers with a sync object: two on one would undo each other's work.
_in_use: "weakref.WeakSet[nn.Module | torch.optim.Optimizer]" = weakref.WeakSet()


@dataclass
class _Switch:
    """State of the communication hook: the group to average gradients over, or no averaging."""

    group: dist.ProcessGroup | None
    averages: bool = True


def _switchable_hook(switch: _Switch, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    if not switch.averages:
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    # Divided before the sum, as DDP does: the same bits.
    gradients = bucket.buffer().div_(dist.get_world_size(switch.group))
    work = dist.all_reduce(gradients, group=switch.group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class GradientSync:
    """Controls whether gradients are local, averaged inside `inner`, or averaged over all ranks.

    Collectives of the forward pass follow, see [`ForwardScope`]. A communication hook switches the averaging of DDP,
    whose buffers are not broadcast while gradients are local. Without DDP, gradients that must be averaged are
    averaged before the step of the optimizer. FSDP2 averages those of sharded parameters over the shards itself.
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
        self._model, self._ddp, self._optimizer, self._parameters = model, ddp, optimizer, list(parameters)
        self._outer, self._inner = outer, inner
        self._forward_scope = ForwardScope(model)
        self._exchanges: list[Exchange] = []
        self._remove_hook: Callable[[], None] | None = None
        if ddp is None:
            self._remove_hook = optimizer.register_step_pre_hook(lambda *_: self._average_gradients()).remove
        else:
            self._switch = _switch_of(ddp)
            self._broadcast_buffers = ddp.broadcast_buffers
        _in_use.update((model, optimizer))

    def average_over_all(self) -> None:
        """Average over all ranks, as without a sync object."""
        self._forward_scope.lift()
        if self._ddp is None:
            self._exchanges = [exchange for exchange in (self._inner, self._outer) if exchange is not None]
        else:
            self._average_by_ddp(self._outer.group if self._inner is None else self._ddp.process_group)

    def keep_local(self) -> None:
        """Keep gradients on each rank, or inside each inner group."""
        self._forward_scope.limit_to(None if self._inner is None else self._inner.group)
        if self._ddp is None:
            self._exchanges = [] if self._inner is None else [self._inner]
        else:
            self._switch.averages = self._inner is not None
            self._switch.group = None if self._inner is None else self._inner.group
            self._ddp.broadcast_buffers = False

    def restore(self) -> None:
        """Restore DDP's own averaging and broadcast of buffers, and remove the hook of the optimizer."""
        self._forward_scope.lift()
        if self._remove_hook is not None:
            self._remove_hook()
        if self._ddp is not None:
            self._average_by_ddp(self._ddp.process_group)
        _in_use.difference_update((self._model, self._optimizer))

    def _average_by_ddp(self, group: dist.ProcessGroup | None) -> None:
        self._switch.averages, self._switch.group = True, group
        self._ddp.broadcast_buffers = self._broadcast_buffers

    @torch.no_grad()
    def _average_gradients(self) -> None:
        whole = [p for p in self._parameters if not is_sharded(p)]
        parts = [(exchange, whole if exchange is self._inner else self._parameters) for exchange in self._exchanges]
        parts = [(exchange, parameters) for exchange, parameters in parts if exchange.size > 1 and parameters]
        if not parts:
            return
        # A parameter may have no gradient on some ranks only: those take part with zeros.
        for exchange, _ in parts:
            exchange.meet("an average of gradients", None, self._parameters[0].device)
        gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters}
        for exchange, parameters in parts:
            flat = FlatTensors([local(gradients[p]) for p in parameters])
            exchange.mean_(flat.copy_in())
            flat.copy_back()
        for parameter, gradient in gradients.items():
            if parameter.grad is None and bool((gradient.full_tensor() if is_sharded(gradient) else gradient).any()):
                parameter.grad = gradient


class ForwardScope:
    """While limited, `group=None` means another group in the forward and backward pass of a model.

    A loss over all ranks, such as mean-entropy maximisation or gathered supports, has its right gradient only if DDP
    averages gradients over the same ranks; and it would make the ranks wait for one another at every step. The same
    holds for batch normalisation over ranks ([`CrossRankBatchNorm`], `nn.SyncBatchNorm`).
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list = []
        self._scopes: list = []
        self._norms: list[tuple[nn.Module, dist.ProcessGroup | None]] = []

    def limit_to(self, group: dist.ProcessGroup | None) -> None:
        """Limit the collectives to `group`, or to this process for `None`."""
        self.lift()
        if not (dist.is_available() and dist.is_initialized()):
            return
        group = subgroup([dist.get_rank()], name="alone") if group is None else group
        self._handles = [
            self._model.register_forward_pre_hook(lambda *_: self._enter(group)),
            self._model.register_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        for module in self._model.modules():
            if isinstance(module, (CrossRankBatchNorm, nn.SyncBatchNorm)):
                self._norms.append((module, module.process_group))
                module.process_group = group

    def lift(self) -> None:
        """Undo `limit_to`."""
        for handle in self._handles:
            handle.remove()
        for module, group in self._norms:
            module.process_group = group
        self._handles, self._norms = [], []

    def _enter(self, group: dist.ProcessGroup) -> None:
        scope = group_scope(group)
        scope.__enter__()
        self._scopes.append(scope)

    def _leave(self) -> None:
        if self._scopes:
            self._scopes.pop().__exit__(None, None, None)


def find_wrapper(model: nn.Module) -> tuple[DistributedDataParallel | None, nn.Module]:
    """Return the `DistributedDataParallel` around a model, or `None`, and the model inside of all wrappers."""
    ddp = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp, model = model, model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return ddp, model


def require_free(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that no sync object runs on a model and an optimizer."""
    for one, name in ((model, "A model"), (optimizer, "An optimizer")):
        if one in _in_use:
            raise ValueError(
                f"{name} takes one sync object at a time, but another one runs on this {type(one).__name__}. Leave "
                "that one (`with`, or `stop`) first."
            )


def _switch_of(ddp: DistributedDataParallel) -> _Switch:
    """Return the switch of the hook, which DDP keeps for its lifetime: a second sync object reuses it."""
    if not ddp._comm_hooks:
        ddp.register_comm_hook(_Switch(ddp.process_group), _switchable_hook)
    hook, switch = ddp._comm_hooks[0]
    if hook is not _switchable_hook:
        raise ValueError(
            "The gradients of a DistributedDataParallel model are kept local by a communication hook, of which DDP "
            f"takes one, but `{hook.__qualname__}` is registered. Leave that one out."
        )
    return switch


_Self = TypeVar("_Self", bound="SyncObject")


class SyncObject:
    """Base of what runs beside a model and its optimizer while gradients are local.

    A subclass makes `_exchange` and `_inner`, and has `start`, which calls `_add_hooks`, and `stop`.
    """

    _exchange: Exchange
    _inner: Exchange | None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, takes_shards: bool = False):
        self._ddp, self.model = find_wrapper(model)
        self.optimizer, self._gradient_state = plain_optimizer(optimizer)
        refuse_unsupported(self.model, self.optimizer, takes_shards)
        self.steps = 0
        self._gradients: GradientSync | None = None
        self._calls: StepCalls | None = None
        self._step_hook: Any = None

    def __enter__(self: _Self) -> _Self:
        return self.start()

    def __exit__(self, error_type, error, traceback) -> None:
        self.stop(error)

    @property
    def _exchanges(self) -> list[Exchange]:
        return [exchange for exchange in (self._inner, self._exchange) if exchange is not None]

    @property
    def _place(self) -> tuple[int, ...]:
        return tuple(number for exchange in self._exchanges for number in (exchange.rank, exchange.size))

    def _require_started(self) -> None:
        if self._gradients is None:
            raise RuntimeError(
                f"{type(self).__name__} must be entered before it is used, but is not. Use `with ... as sync:`, or "
                "call `start()` first."
            )

    def _add_hooks(self, parameters: list[torch.Tensor], before_step: Callable[[], None]) -> None:
        own = self.model, self._ddp, self.optimizer
        self._gradients = GradientSync(*own, parameters, self._exchange, self._inner)
        self._step_hook = self.optimizer.register_step_pre_hook(lambda *_: before_step())
        self._calls = StepCalls(type(self).__name__, self.optimizer, parameters)

    def _remove_hooks(self) -> None:
        if self._gradients is not None:
            self._gradients.restore()
            self._gradients = None
        for hook in (self._step_hook, self._calls):
            if hook is not None:
                hook.remove()

    def _count_step(self) -> bool:
        """Count an optimizer step. Return `False` for one in which accelerate only accumulates gradients."""
        self._require_started()
        if self._gradient_state is not None and not self._gradient_state.sync_gradients:
            return False
        self.steps += 1
        self._calls.note_call()
        return True

    def _exchange_in_place(
        self,
        operation: Callable[[Exchange, list[torch.Tensor]], None],
        tensors: list[torch.Tensor],
        exchanges: Sequence[Exchange] | None = None,
    ) -> None:
        exchanges = exchanges or self._exchanges
        whole = [t for t in tensors if not is_sharded(t)], exchanges
        shards = [local(t) for t in tensors if is_sharded(t)], [one for one in exchanges if one is self._exchange]
        for tensors, exchanges in (whole, shards):
            for bucket in split_into_buckets(tensors):
                flat = FlatTensors([tensors[i] for i in bucket])
                for exchange in exchanges:
                    operation(exchange, flat.copy_in())
                    flat.copy_back()
