"""What ranks tell each other during evaluation: small objects, rows of arrays, and failures."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.collectives import world_size

T = TypeVar("T")
S = TypeVar("S")


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in rank order, on every rank. For small objects: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(array: np.ndarray, counts: list[int], chunk_rows: int = 8192) -> np.ndarray:
    """The rows of all ranks, rank 0's first, on every rank.

    Args:
        array (`np.ndarray` of shape `(counts[rank], D)`):
            This rank's rows; the same `D` and dtype on every rank. Their number may differ, and be 0.
        counts (`list[int]`):
            Number of rows of each rank.
        chunk_rows (`int`, *optional*, defaults to 8192):
            Rows sent at a time, which bounds the extra memory at `world_size * chunk_rows` rows.

    Returns:
        `np.ndarray` of shape `(sum(counts), D)`.
    """
    if world_size() == 1:
        return array
    # gloo moves CPU tensors; nccl alone moves only those on the accelerator
    device = "cpu" if "gloo" in dist.get_backend_config() else torch.device("cuda", torch.cuda.current_device())
    pieces: list[list[np.ndarray]] = [[] for _ in range(world_size())]
    for start in range(0, max(counts), chunk_rows):
        size = min(chunk_rows, max(counts) - start)
        chunk = np.zeros((size, array.shape[1]), dtype=array.dtype)
        own = array[start : start + size]
        chunk[: len(own)] = own
        sent = torch.from_numpy(chunk).to(device)
        received = [torch.empty_like(sent) for _ in range(world_size())]
        dist.all_gather(received, sent)
        for source, piece in enumerate(received):
            pieces[source].append(piece[: max(0, counts[source] - start)].cpu().numpy())
    return np.concatenate([piece for of_rank in pieces for piece in of_rank])


def run_on_every_rank(work: Callable[[], T], summarize: Callable[[T], S]) -> tuple[T, list[S]]:
    """Runs `work` on this rank and tells all ranks a summary of it; a failure on one rank is raised on all of them.

    Without this, the ranks that did not fail would wait for the failed one in the next collective until its timeout.

    Args:
        work (`Callable[[], T]`): What to do on this rank. It must not use collectives.
        summarize (`Callable[[T], S]`): What of the result the other ranks need; small, as it is pickled.

    Returns:
        `tuple[T, list[S]]`: this rank's result, and the summaries of all ranks in rank order.

    Raises:
        The exception of `work` where it failed; `RuntimeError` naming the failed rank and its error on the others.
    """
    result, summary, error = None, None, None
    try:
        result = work()
        summary = summarize(result)
    except Exception as caught:
        error = caught
    outcomes = gather_objects((summary, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RuntimeError(
                f"Evaluation failed on rank {rank} and so stops on all ranks. Rank {rank} said: {failure}"
            )
    return result, [summary for summary, _ in outcomes]
