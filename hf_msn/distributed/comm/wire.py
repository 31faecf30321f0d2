"""The wire format: the precision of messages, and tensors as bytes."""

from collections.abc import Sequence

import torch

from ...checks import check_choice

_WIRE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def checked_wire_dtype(wire_dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a `wire_dtype` argument; `None` stands for the dtype of the parameters."""
    meaning = "is the precision in which parameters are sent"
    return _WIRE_DTYPES[check_choice("wire_dtype", wire_dtype, list(_WIRE_DTYPES), meaning=meaning)]


def as_bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of any dtypes as one flat uint8 tensor on the CPU."""
    parts = [tensor.detach().reshape(-1).cpu().view(torch.uint8) for tensor in tensors if tensor.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def from_bytes(payload: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that [`as_bytes`] was given, with the shapes, dtypes and devices of `like`."""
    parts = payload.split([tensor.numel() * tensor.element_size() for tensor in like])
    # The copy aligns a part to its dtype.
    return [p.clone().view(t.dtype).view(t.shape).to(t.device) for p, t in zip(parts, like)]
