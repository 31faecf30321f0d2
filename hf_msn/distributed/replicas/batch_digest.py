"""A number that tells whether two ranks hold the same batch, without sending the batch."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch

_CHUNK = 2**22  # numbers summed up at a time, so that a large batch is not copied whole
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, and far from a power of two: close places have unlike weights


@torch.no_grad()
def batch_digest(batch: Any, device: torch.device) -> torch.Tensor:
    """Two int64, `(2,)`, that are the same for equal batches and, but for rare accidents, for no others.

    The first is of names, shapes, dtypes and all that is not a tensor, the second a sum over all tensors of bits times
    weights of their places, modulo 2^64: integers, so that the order in which a device adds does not matter.

    Args:
        batch: Tensors, in mappings and sequences as deep as need be.
        device (`torch.device`): Of the result.
    """
    texts: list[str] = []
    sums = torch.zeros((), dtype=torch.int64, device=device)
    for path, leaf in _leaves(batch, ""):
        if torch.is_tensor(leaf):
            texts.append(f"{path} {tuple(leaf.shape)} {leaf.dtype}")
            sums = sums * 31 + _sum_of_bits(leaf.detach()).to(device)
        else:
            texts.append(f"{path} {leaf!r}")
    text = "\n".join(texts).encode()
    # Two checksums of 32 bits, of which 63 fit.
    number = (zlib.crc32(text) << 31) ^ zlib.adler32(text)
    return torch.stack([torch.tensor(number, dtype=torch.int64, device=device), sums])


def _leaves(value: Any, path: str):
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, element in enumerate(value):
            yield from _leaves(element, f"{path}[{index}]")
    else:
        yield path, value


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.element_size()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        size //= 2
    flat = tensor.contiguous().reshape(-1)
    flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=tensor.device)
        # Of the product with the factor the upper bits depend on the whole place; odd, so that no bit gets lost.
        total += (part * ((places * _FACTOR) >> 13 | 1)).sum()
    return total
