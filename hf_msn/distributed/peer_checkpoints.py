"""Copies of a model that hold the checkpoints of other replicas, and their transfer in the background."""

import contextlib
import copy
import datetime
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.exchange import Exchange, PeerError
from .comm.wire import as_bytes, from_bytes
from .gradient_sync import ForwardScope
from .training_state import frozen_and_buffers

logger = logging.getLogger(__name__)

_DEFAULT_SECONDS = 1800.0  # as for process groups


class PeerCheckpoints:
    """For each peer a deep copy of the model, in eval mode and without gradient, filled with its checkpoints.

    A checkpoint has all parameters and the buffers of the state dict, floating-point ones in `dtype`. It travels as
    bytes between CPUs over a separate gloo group. Sending does not wait: gloo moves the bytes in the background.

    With P bytes per checkpoint a rank needs (n - 1) P for the copies, and on the CPU n P during a transfer. Hooks of
    the model are called for its copies, too, and random draws in eval mode come from the generators of the model.

    The forward pass of a copy may communicate over `inner_group` only. Copies kept on `device` move to that of the
    model for their forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: Exchange,
        inner_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ):
        self._model, self._exchange, self._dtype = model, exchange, dtype
        peers = [place for place in range(exchange.size) if place != exchange.rank]
        self._copies = {peer: _frozen_copy(model, dtype, device) for peer in peers}
        for module in self._copies.values():
            ForwardScope(module).limit_to(inner_group)
        self._num_bytes = checkpoint_of(self._model, self._dtype).numel()
        self._seconds = exchange.timeout_seconds or _DEFAULT_SECONDS
        self._received: dict[int, dict[int, torch.Tensor]] = {}  # by step and peer
        self._works: dict[int, dict[int, list]] = {}  # by step and peer, until they are known to be complete
        self._group: dist.ProcessGroup | None = None
        self.step: int | None = None  # of the checkpoints in use
        self.bytes_sent, self.seconds_waiting = 0, 0.0

    def connect(self) -> None:
        """Connect the replicas. All must call it together."""
        # Not `new_group`: its names and connections would be those of an earlier group of these ranks that failed.
        device = next(self._model.parameters()).device
        name = torch.tensor([secrets.randbits(62)], device=device)
        self._exchange.broadcast_([name])
        store = dist.PrefixStore(f"hf_msn/replicas/{name.item()}", dist.distributed_c10d._get_default_store())
        timeout = datetime.timedelta(seconds=self._seconds)
        try:
            self._group = dist.ProcessGroupGloo(store, self._exchange.rank, self._exchange.size, timeout)
        except RuntimeError as error:
            raise PeerError(f"The replicas must connect within {self._seconds} s, but do not. ({error})") from error
        # A replica that leaves closes its connections, at which gloo fails in those that still connect to others.
        self._exchange.meet("connected replicas", None, device)

    def send(self, step: int) -> None:
        """Send the model as it is after `step` updates, and prepare to receive those of the peers. Does not wait."""
        snapshot = checkpoint_of(self._model, self._dtype)
        self._received[step] = {peer: torch.empty_like(snapshot) for peer in self._copies}
        self._works[step] = {
            peer: self._swap(peer, step, snapshot, self._received[step][peer]) for peer in self._copies
        }
        self.bytes_sent += snapshot.numel() * len(self._copies)
        if any(isinstance(works, RuntimeError) for works in self._works[step].values()):
            self._wait(step)

    def use(self, step: int) -> None:
        """Fill the copies with the checkpoints of `step`, and wait for those that have not arrived."""
        self._wait(step)
        self._fill(step, self._received.pop(step))

    def outputs(self, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> list[Any]:
        """Return `forward(copy, batch)` of each copy, in the order of the replicas; nothing before the first `use`."""
        if self.step is None:
            return []
        device = next(self._model.parameters()).device
        batch = batch if self._dtype is None else _batch_in_dtype(batch, self._dtype)
        outputs = []
        for module in self._copies.values():
            with torch.no_grad(), _moved_to(module, device):
                outputs.append(forward(module, batch))
        return outputs

    def state(self) -> dict[str, Any]:
        """Return the checkpoints in use and those in transfer, for which it waits."""
        self._complete_transfers()
        in_use = {} if self.step is None else {peer: checkpoint_of(module) for peer, module in self._copies.items()}
        return {"step": self.step, "in_use": in_use, "received": {**self._received}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned, for the same model and `copies_dtype`."""
        for payloads in (state["in_use"], *state["received"].values()):
            for payload in payloads.values():
                if payload.numel() != self._num_bytes:
                    raise ValueError(
                        f"A state must hold checkpoints of this model and `copies_dtype`, {self._num_bytes} bytes "
                        f"each, but holds {payload.numel()}. Load the state of the same model and settings."
                    )
        self._complete_transfers()
        self._received = {**state["received"]}
        if state["step"] is not None:
            self._fill(state["step"], state["in_use"])

    def close(self, wait: bool) -> None:
        """Release the copies and close the connections. With `wait`, transfers are completed first."""
        try:
            if wait:
                self._complete_transfers()
        except PeerError as error:
            logger.warning(f"The last checkpoint was not transferred: {error}")
        self._works.clear()  # first: they write to what is received
        self._group, self._copies, self._received, self.step = None, {}, {}, None

    def _swap(self, peer: int, tag: int, sent: torch.Tensor, received: torch.Tensor) -> list | RuntimeError:
        """Start to send and to receive, and return the operations with their tensors, which must outlive them."""
        try:
            works = [self._group.send([sent], peer, tag), self._group.recv([received], peer, tag)]
        except RuntimeError as error:  # the connection is closed
            return error
        return [(work, sent, received) for work in works]

    def _complete_transfers(self) -> None:
        for step in list(self._works):
            self._wait(step)

    def _wait(self, step: int) -> None:
        started, ranks = time.monotonic(), self._exchange.global_ranks
        errors = {
            ranks[peer]: _error_of(works, started + self._seconds) for peer, works in self._works.pop(step, {}).items()
        }
        self.seconds_waiting += time.monotonic() - started
        lost = {rank: error for rank, error in errors.items() if error is not None}
        if lost:
            names = ", ".join(map(str, lost))
            raise PeerError(
                f"All replicas must exchange checkpoints after {step} updates, but rank {names} did not within "
                f"`timeout_seconds={self._seconds}`: it has died, hangs or is slow. See its log; if it is slow, pass "
                f"more seconds. ({next(iter(lost.values()))})",
                [*lost],
            )

    @torch.no_grad()
    def _fill(self, step: int, payloads: Mapping[int, torch.Tensor]) -> None:
        self.step = step
        for peer, payload in payloads.items():
            tensors = exchanged_tensors(self._copies[peer])
            for tensor, part in zip(tensors, from_bytes(payload, tensors)):
                tensor.copy_(part)


def _error_of(works: list | RuntimeError, deadline: float) -> RuntimeError | None:
    """Wait until the operations are complete, and return their error, if any."""
    if isinstance(works, RuntimeError):
        return works
    try:
        for work, *_ in works:
            work.wait(datetime.timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))  # 0 would be no deadline
    except RuntimeError as error:
        return error
    return None


def exchanged_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return all parameters, then the buffers of the state dict; each tensor once, in the order of the modules."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *frozen_and_buffers(model))}
    return list(found.values())


def checkpoint_of(model: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the checkpoint of a model, `(number of bytes,)` of uint8 on the CPU."""
    return as_bytes([_in_dtype(tensor.detach(), dtype) for tensor in exchanged_tensors(model)])


def _frozen_copy(model: nn.Module, dtype: torch.dtype | None, device: str | None) -> nn.Module:
    # Process groups cannot be copied.
    groups = (value for m in model.modules() for value in vars(m).values() if isinstance(value, dist.ProcessGroup))
    module = copy.deepcopy(model, {id(group): group for group in groups}).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.grad = None
    # Buffers outside of the state dict, such as position tables, keep their precision.
    for tensor in exchanged_tensors(module):
        tensor.data = _in_dtype(tensor.data, dtype)
    if device is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(device)
    return module


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _batch_in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(batch):
        return _in_dtype(batch, dtype)
    if isinstance(batch, Mapping):
        return {key: _batch_in_dtype(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_batch_in_dtype(value, dtype) for value in batch)
    return batch


@contextlib.contextmanager
def _moved_to(module: nn.Module, device: torch.device) -> Iterator[None]:
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.device != device]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, kept):
            tensor.data = data
