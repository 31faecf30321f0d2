"""Check that ranks hold the same batch by exchanging a digest of it."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .comm.exchange import Exchange

_CHUNK = 2**22  # numbers per partial sum, so that a large batch is not copied as a whole
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd and far from a power of two: nearby positions get unrelated weights


def check_same_batch(exchange: Exchange, batch: Any, device: torch.device) -> None:
    """Compare the digests of all ranks of `exchange`, which must all call it, and name two ranks that differ."""
    own = batch_digest(batch, device)
    digests = own.new_empty(exchange.size * own.numel())
    exchange.gather_(digests, own)
    first, *others = digests.view(exchange.size, -1).tolist()
    for place, digest in enumerate(others, start=1):
        if digest != first:
            ranks = exchange.global_ranks
            raise ValueError(
                f"Replicas that exchange predictions must see the same batch, but those of rank {ranks[0]} and rank "
                f"{ranks[place]} differ. Use the same seed and augmentations in all replicas and shard the data by "
                "the place inside the replica, or use `exchange='checkpoints'`, where each replica has its own data."
            )


@torch.no_grad()
def batch_digest(batch: Any, device: torch.device) -> torch.Tensor:
    """Return two int64 numbers, `(2,)`, that are equal for equal batches and, almost always, only for them.

    The first is a checksum of names, shapes, dtypes and values that are no tensors. The second is the sum over all
    tensors of bits times a weight of their position, modulo 2^64: integers, so the order of the sum does not matter.
    """
    texts: list[str] = []
    total = torch.zeros((), dtype=torch.int64, device=device)
    for path, leaf in _leaves(batch, ""):
        if torch.is_tensor(leaf):
            texts.append(f"{path} {tuple(leaf.shape)} {leaf.dtype}")
            total = total * 31 + _sum_of_bits(leaf.detach()).to(device)
        else:
            texts.append(f"{path} {leaf!r}")
    text = "\n".join(texts).encode()
    checksum = (zlib.crc32(text) << 31) ^ zlib.adler32(text)  # 63 bits
    return torch.stack([torch.tensor(checksum, dtype=torch.int64, device=device), total])


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, element in enumerate(value):
            yield from _leaves(element, f"{path}[{index}]")
    else:
        yield path, value


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().reshape(-1).view(kinds[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=tensor.device)
        # The upper bits of the product depend on the whole position; an odd weight keeps all bits of the value.
        total += (part * ((positions * _FACTOR) >> 13 | 1)).sum()
    return total
