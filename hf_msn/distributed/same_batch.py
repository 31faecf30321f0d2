"""Check that ranks are at the same place, with the same batch, by exchanging a digest of it."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .comm.exchange import Exchange, PeerError

_CHUNK = 2**22  # numbers per partial sum, so that a large batch is not copied as a whole
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd and far from a power of two: nearby positions get unrelated weights
_EVENT = -1  # the first number of a batch is >= 0


def compare_digests(exchange: Exchange, own: torch.Tensor) -> None:
    """Check that all ranks of `exchange` come to the same event, or with the same batch. All must call it.

    Raises:
        PeerError: If some ranks come to an event and others to another one or with a batch.
        ValueError: If the batches differ.
    """
    gathered = own.new_empty(exchange.size * own.numel())
    exchange.gather_(gathered, own)
    digests, ranks = gathered.view(exchange.size, -1).tolist(), exchange.global_ranks
    here = digests[exchange.rank]
    others = [rank for rank, digest in zip(ranks, digests) if digest != here]
    if others and any(first == _EVENT for first, _ in digests):
        raise PeerError(
            f"All replicas must come to the same exchange, but rank {ranks[exchange.rank]} comes to another one than "
            f"rank {', '.join(map(str, others))}. Let every rank take the same number of steps.",
            others,
        )
    for rank, digest in zip(ranks, digests):
        if digest != digests[0]:
            raise ValueError(
                f"Replicas that exchange predictions must see the same batch, but those of rank {ranks[0]} and rank "
                f"{rank} differ. Use the same seed and augmentations in all replicas and shard the data by "
                "the place inside the replica, or use `exchange='checkpoints'`, where each replica has its own data."
            )


def event_digest(event: str, device: torch.device) -> torch.Tensor:
    """Return two int64 numbers, `(2,)`, that no batch has."""
    return torch.tensor([_EVENT, zlib.crc32(event.encode())], dtype=torch.int64, device=device)


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
