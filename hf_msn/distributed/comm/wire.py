"""The wire format: the precision of messages, and tensors as bytes."""

from collections.abc import Sequence

import torch

from ...checks import check_choice

_WIRE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
_BITS = {"int8": 8, "int4": 4}
BLOCK = 128  # numbers that share a scale: 132 bytes in int8, 68 in int4


def checked_wire_dtype(wire_dtype: str | None, *, blocks: bool = False) -> torch.dtype | int | None:
    """Return the dtype of a `wire_dtype` argument; `None` stands for the dtype of what is sent.

    With `blocks`, "int8" and "int4" are allowed, for which the number of bits is returned.
    """
    known: dict = _WIRE_DTYPES | (_BITS if blocks else {})
    takers = "'int8' and 'int4' are for LocalSGD, SlowMo, DiLoCo and StreamingDiLoCo."
    remedy = takers if wire_dtype in _BITS and not blocks else ""
    meaning = "is the precision in which numbers are sent"
    return known[check_choice("wire_dtype", wire_dtype, list(known), meaning=meaning, remedy=remedy)]


def encode_blocks(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round numbers to signed integers of 8 or 4 bits, with a scale for each block of 128.

        scale = max |x| / m,    q = round(x / scale),    m = 127 or 7

    Args:
        x (`torch.Tensor`): Floating point, `(N,)` with N a multiple of 128.
        bits (`int`): 8 or 4.

    Returns:
        `torch.Tensor`: uint8, `(N / 128, 4 + 16 * bits)`: the float32 scale, and the integers; of two of 4 bits the
        first one is in the low half.
    """
    blocks = x.float().view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    q = (blocks / torch.where(scale == 0, 1.0, scale)).round_().to(torch.int8).view(torch.uint8)
    if bits == 4:
        q = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
    return torch.cat([scale.view(torch.uint8), q], 1)


def decode_blocks(payload: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers of [`encode_blocks`] as float32, `(N,)`."""
    scale, q = payload[:, :4].contiguous().view(torch.float32), payload[:, 4:]
    if bits == 4:
        q = torch.stack([q << 4, q], 2).flatten(1)
    numbers = q.contiguous().view(torch.int8)
    if bits == 4:
        numbers = numbers >> 4  # of the upper half, with its sign
    return (numbers * scale).flatten()


def as_bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of any dtypes as one flat uint8 tensor on the CPU."""
    parts = [tensor.detach().reshape(-1).cpu().view(torch.uint8) for tensor in tensors if tensor.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def from_bytes(payload: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that [`as_bytes`] was given, with the shapes, dtypes and devices of `like`."""
    parts = payload.split([tensor.numel() * tensor.element_size() for tensor in like])
    # The copy aligns a part to its dtype.
    return [p.clone().view(t.dtype).view(t.shape).to(t.device) for p, t in zip(parts, like)]
