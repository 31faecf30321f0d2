"""Copies of a model that hold other replicas' parameters, to be asked for their predictions."""

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.wire import as_bytes
from ..local_training.forward_scope import ForwardScope


class PeerCopies:
    """For each peer a deep copy of the model in eval mode, without gradient.

    What travels and is kept are all parameters (frozen ones too) and the buffers of the state dict, floating-point
    ones in `dtype`. With P bytes of them a rank needs (n - 1) P for the copies, P on the CPU for what it sends, until
    that has left, and (n - 1) P on the CPU for what has arrived and is not yet used. A loss takes n - 1 more forward
    passes. Hooks on the model are called for its copies too, and random draws of a forward pass in eval mode are taken
    from the same generators as the model's.

    Args:
        model (`nn.Module`): Without wrapper.
        peers (collection of `int`): Places of the other replicas.
        dtype (`torch.dtype`, *optional*): Of the copies; by default that of the model.
        device (`torch.device`, *optional*): Where the copies rest. Each is brought to the model's device for its
            forward pass only, which then needs P there for one of them. By default they stay on the model's device.
        scope (`ProcessGroup`, *optional*): The ranks over which a copy's forward pass may exchange, if it does.
    """

    def __init__(
        self,
        model: nn.Module,
        peers: Collection[int],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        scope: dist.ProcessGroup | None = None,
    ):
        self._model, self.dtype = model, dtype
        self._models = {peer: _frozen_copy(model, dtype, device) for peer in sorted(peers)}
        self.snapshot_step: int | None = None
        self._filled: set[int] = set()
        for module in self._models.values():
            ForwardScope(module).limit_to(scope)

    @property
    def peers(self) -> list[int]:
        """Places of the peers whose parameters are in use."""
        return sorted(self._filled)

    def snapshot(self) -> torch.Tensor:
        """The model as it is now, as bytes on the CPU in the precision of the copies."""
        return as_bytes([_in_dtype(tensor, self.dtype) for tensor in exchanged_tensors(self._model)])

    @torch.no_grad()
    def fill(self, step: int, payloads: Mapping[int, torch.Tensor]) -> None:
        """Puts the peers' snapshots of a step in use, and no others.

        Args:
            step (`int`): The number of updates that the snapshots have seen.
            payloads (`Mapping[int, Tensor]`): What `snapshot` made, by peer.
        """
        self.snapshot_step, self._filled = step, set(payloads)
        for peer, payload in payloads.items():
            tensors = [tensor for tensor in exchanged_tensors(self._models[peer]) if tensor.numel()]
            parts = payload.split([tensor.numel() * tensor.element_size() for tensor in tensors])
            for tensor, part in zip(tensors, parts):
                # A copy first: a part need not lie where its dtype has to.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    def keep_only(self, peers: set[int]) -> None:
        """Lets go of the copies of all others."""
        self._filled &= peers
        for peer in self._models.keys() - peers:
            del self._models[peer]

    @contextlib.contextmanager
    def of(self, peer: int, batch: Any) -> Iterator[tuple[nn.Module, Any]]:
        """The copy, ready on the model's device, and the batch in its precision."""
        device = next(self._model.parameters()).device
        with torch.no_grad(), _brought_to(self._models[peer], device) as module:
            yield module, batch if self.dtype is None else _batch_in_dtype(batch, self.dtype)

    def state(self) -> dict[str, Any]:
        """The copies in use as bytes, with the step of their snapshots."""
        return {
            "step": self.snapshot_step,
            "of": {peer: as_bytes(exchanged_tensors(self._models[peer])) for peer in self.peers},
        }

    def check(self, payloads: Mapping[int, torch.Tensor]) -> None:
        """Refuses snapshots of another model.

        Raises:
            ValueError: With both sizes.
        """
        need = sum(
            tensor.numel() * (self.dtype if _converts(tensor, self.dtype) else tensor.dtype).itemsize
            for tensor in exchanged_tensors(self._model)
        )
        for peer, payload in payloads.items():
            if payload.numel() != need:
                raise ValueError(
                    f"A state of Codistillation must hold copies of this model in this precision, here {need} bytes "
                    f"each, but holds {payload.numel()} for replica {peer}. Load the state of the same model with the "
                    "same `copies_dtype`."
                )


def exchanged_tensors(model: nn.Module) -> list[torch.Tensor]:
    """All parameters, then the buffers that are in the state dict; each tensor once, in the order of the modules."""
    found: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), buffer)
    return list(found.values())


def _frozen_copy(model: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> nn.Module:
    # Process groups can't be copied, and must not.
    groups = (value for m in model.modules() for value in vars(m).values() if isinstance(value, dist.ProcessGroup))
    module = copy.deepcopy(model, {id(group): group for group in groups}).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.grad = None
    # Buffers outside of the state dict stay in their precision: tables of positions lose too much.
    for tensor in exchanged_tensors(module):
        tensor.data = _in_dtype(tensor.data, dtype)
    if device is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(device)
    return module


def _converts(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.is_floating_point()


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.detach().to(dtype) if _converts(tensor, dtype) else tensor.detach()


def _batch_in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(batch):
        return _in_dtype(batch, dtype)
    if isinstance(batch, Mapping):
        return {key: _batch_in_dtype(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_batch_in_dtype(value, dtype) for value in batch)
    return batch


@contextlib.contextmanager
def _brought_to(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device != device]
    at_rest = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield module
    finally:
        for tensor, home in zip(tensors, at_rest):
            tensor.data = home
