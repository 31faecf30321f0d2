"""Local SGD: local steps, and the average of the parameters every few of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..checks import check_choice
from .comm.exchange import Exchange
from .comm.flat import FlatTensors
from .comm.survivor_exchange import SurvivorExchange
from .comm.wire import BLOCK, checked_wire_dtype, decode_blocks, encode_blocks
from .local_update import LocalUpdate
from .training_state import frozen_and_buffers, moments


class LocalSGD(LocalUpdate):
    """Average the parameters over the ranks every `sync_every` optimizer steps.

        x_i <- mean_j x_j        after every `sync_every` local steps

    [arXiv 1805.09767](https://arxiv.org/abs/1805.09767); post-local with `sync_start_step`. With `sync_every=1` and
    plain SGD it is training with averaged gradients, up to rounding. On one rank it does nothing and warns. Other
    arguments, consensus and errors are those of [`LocalUpdate`].

    With a `wire_dtype` the ranks average their changes since the anchor a, the last average, with error feedback:

        q_i = round(x_i - a + e_i),    e_i <- x_i - a + e_i - q_i,    x_i <- a + mean_j q_j

    In bfloat16 a partial sum that travels from rank to rank is rounded as well, without feedback: by up to 2^-8 of the
    change, equally on all ranks. In int8 and int4 a block of 128 numbers shares the float32 scale max |q| / 127 or
    max |q| / 7. Each rank sums the q_j of its 1/n of the numbers in float32, and rounds their mean, with feedback:

        m = mean_j q_j + r,    x_i <- a + round(m),    r <- m - round(m)

    Bytes that a rank sends for N parameters over n ranks: 2bN(n - 1)/n, with b = 4 for float32 parameters, 2 for
    bfloat16, 132/128 for int8 and 68/128 for int4, where N is padded to a multiple of 128n in each bucket of 32 MiB.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps per period.
        wire_dtype (`str`, *optional*): `"bfloat16"`, `"int8"` or `"int4"` send 2, about 1 or 0.53 bytes per parameter:
            the change since the last average is rounded, and the rounding error is added to the next. It needs memory
            for two copies of the trainable parameters. By default the parameters' own precision, and no memory.
        on_lost_rank (`str`, *optional*, defaults to `"raise"`): What follows when a rank dies, leaves after an error,
            or is silent for `timeout_seconds`: `"raise"` ends the training with a [`PeerError`] that names it,
            `"continue"` goes on with the ranks that are left, in a loop of your own. `absent_ranks` has the lost ones.
            See docs/communication.md, "Faults". It needs `timeout_seconds`, gloo, and memory for a copy of the
            parameters and of the method's state during an exchange.
        kwargs: `group` and the other arguments of [`LocalUpdate`].

    Raises:
        ValueError: If `wire_dtype` is unknown, or given for complex parameters, if `on_lost_rank="continue"` comes
            without `timeout_seconds` or with `sync_start_step`, `inner_group` or DDP's `find_unused_parameters`, and
            as [`LocalUpdate`] raises.
        PeerError: With `on_lost_rank="continue"` on a rank that comes back after the others have gone on without it.
    """

    takes_shards = True
    _setting_names = (*LocalUpdate._setting_names, "wire_dtype")
    _only_averages = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 12,
        wire_dtype: str | None = None,
        on_lost_rank: str = "raise",
        **kwargs: Any,
    ):
        super().__init__(model, optimizer, sync_every=sync_every, **kwargs)
        self.on_lost_rank = check_choice("on_lost_rank", on_lost_rank, ("raise", "continue"))
        self._survivors: SurvivorExchange | None = None
        if on_lost_rank == "continue":
            self._check_no_lockstep(kwargs)
            self._exchange = self._survivors = SurvivorExchange(self._exchange.group, kwargs["timeout_seconds"])
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype, blocks=True)
        self._anchors: list[torch.Tensor] = []
        self._rounding_errors: dict[int, torch.Tensor] = {}
        self._mean_errors: dict[int, torch.Tensor] = {}  # of the means that this rank rounds: int8, int4

    def _check_no_lockstep(self, settings: dict[str, Any]) -> None:
        if settings.get("timeout_seconds") is None:
            raise ValueError(
                "`on_lost_rank='continue'` needs `timeout_seconds`, after which a silent rank is lost, but it is "
                "None. Choose more than the longest optimizer step, evaluation or save takes."
            )
        inner = None if self._inner is None else self._inner.global_ranks  # of a sharded model, too
        unused = getattr(self._ddp, "find_unused_parameters", False)
        waiting = {"sync_start_step": self.sync_start_step, "inner_group": inner, "find_unused_parameters": unused}
        for name, value in waiting.items():
            if value:
                raise ValueError(
                    "`on_lost_rank='continue'` needs steps in which no rank waits for a lost one, with whole models "
                    f"and local gradients, but `{name}` is {value}. Leave it out, or set `on_lost_rank='raise'`."
                )

    @property
    def absent_ranks(self) -> list[int]:
        return [] if self._survivors is None else self._survivors.absent_ranks

    def _description(self) -> list[str]:
        return [*super()._description(), f"setting on_lost_rank={self.on_lost_rank!r}"]

    def _attach(self) -> None:
        if absent := self.absent_ranks:
            raise RuntimeError(
                f"All ranks of the group must be there when entering, but {absent} are lost. Make a group of the "
                "ranks that are left, and a new sync object with it."
            )
        super()._attach()
        if self._survivors is not None:
            self._survivors.connect()
        if self._wire_dtype is not None and any(p.is_complex() for _, p, _ in self._parameters):
            raise ValueError(
                f"`wire_dtype` rounds real floating-point numbers, but is {self.wire_dtype!r} and some parameters are "
                "complex. Leave it out."
            )

    def _detach(self) -> None:
        super()._detach()
        if self._survivors is not None:
            self._survivors.close()

    def _count_local_step(self) -> None:
        if self._survivors is not None:
            self._survivors.note_step(self.steps)
        super()._count_local_step()

    @torch.no_grad()
    def _together(self, event: str, operation: Callable[[], Any], changes: bool = True) -> Any:
        if self._survivors is None:
            return operation()
        tensors: list[torch.Tensor] = []
        if changes:
            tensors = [p for _, p, _ in self._parameters] + frozen_and_buffers(self.model)
            tensors += moments(self.optimizer).values() if self.base_buffers == "average" else []
        before, state = [t.clone() for t in tensors], self._method_state() if changes else {}
        absent, has_failed = self.absent_ranks, False

        def attempt() -> Any:
            nonlocal absent, has_failed
            if has_failed and changes:
                torch._foreach_copy_(tensors, before)
                self._load_method_state(state)
            has_failed = True  # if it comes here again
            if self.absent_ranks != absent:
                absent = self.absent_ranks
                self._mean_errors.clear()  # the ranks round other shards now
            return operation()

        return self._survivors.repeat(event, attempt)

    def _begin_local_steps(self) -> None:
        self._clear_errors()
        if self._wire_dtype is not None:
            self._anchors = [FlatTensors(bucket).copy_in()[0] for bucket in self._bucket_tensors()]

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        self._meet("an outer step")
        for index, bucket in enumerate(self._bucket_tensors()):
            flat = FlatTensors(bucket)
            [x] = flat.copy_in()
            self._mean_(index, x)
            flat.copy_back()
            if self._wire_dtype is not None:
                self._anchors[index].copy_(x)

    def _mean_(self, index: int, x: torch.Tensor) -> None:
        """Replace x, the parameters of bucket number `index`, by their mean over the ranks."""
        if self._wire_dtype is None:
            self._exchange.mean_([x])
        else:
            x.sub_(self._anchors[index])
            self._mean_change_(index, x)
            x.add_(self._anchors[index])

    def _mean_change_(self, index: int, change: torch.Tensor, exchange: Exchange | None = None) -> None:
        """Replace the change of bucket number `index` by its mean over the ranks, in the wire format."""
        wire, exchange = self._wire_dtype, exchange or self._exchange
        if wire is None:
            exchange.mean_([change])
            return
        if index in self._rounding_errors:
            change.add_(self._rounding_errors[index])
        if isinstance(wire, torch.dtype):
            sent = change.to(wire)
            self._rounding_errors[index] = change - sent
            exchange.mean_([sent])
            change.copy_(sent)
            return
        size = change.numel()
        sent = encode_blocks(pad(change, (0, -size % (BLOCK * exchange.size))), wire)
        self._rounding_errors[index] = change - decode_blocks(sent, wire)[:size]
        shards = exchange.swap(sent).chunk(exchange.size)
        zero = torch.zeros((), device=change.device)
        mean = sum((decode_blocks(shard, wire) for shard in shards), zero) / exchange.size
        if index in self._mean_errors:
            mean += self._mean_errors[index]
        rounded = encode_blocks(mean, wire)
        self._mean_errors[index] = mean - decode_blocks(rounded, wire)
        exchange.gather_(sent, rounded)
        change.copy_(decode_blocks(sent, wire)[:size])

    def _clear_errors(self) -> None:
        self._rounding_errors.clear()
        self._mean_errors.clear()

    def _method_state(self) -> dict[str, Any]:
        return {
            "wire_dtype": self.wire_dtype,
            "anchors": [anchor.clone() for anchor in self._anchors],
            "rounding_errors": {index: error.clone() for index, error in self._rounding_errors.items()},
            "mean_errors": {index: error.clone() for index, error in self._mean_errors.items()},
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        if state["wire_dtype"] != self.wire_dtype:
            raise ValueError(
                f"`wire_dtype` must be that of the saved state, {state['wire_dtype']!r}, but is {self.wire_dtype!r}. "
                "Set the same."
            )
        self._anchors = [anchor.to(self._device, copy=True) for anchor in state["anchors"]]
        self._rounding_errors, self._mean_errors = (
            {index: error.to(self._device, copy=True) for index, error in state[name].items()}
            for name in ("rounding_errors", "mean_errors")
        )
