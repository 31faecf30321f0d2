"""Exchange of objects, rows and failures between the ranks of an evaluation."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.collectives import world_size

T = TypeVar("T")
S = TypeVar("S")


def gather_objects(value: T) -> list[T]:
    """Return the `value` of every rank, in rank order. For small objects: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(array: np.ndarray, counts: list[int], chunk_rows: int = 8192) -> np.ndarray:
    """Return the rows of all ranks, rank 0's first. `counts` are the numbers of rows of each rank; they may be 0.

    `array` (counts[rank], D) has the same `D` and dtype on every rank. Messages of `chunk_rows` rows bound the extra
    memory at `world_size * chunk_rows` rows.
    """
    if world_size() == 1:
        return array
    # gloo moves CPU tensors; nccl alone moves only those on the accelerator
    device = "cpu" if "gloo" in dist.get_backend_config() else torch.device("cuda", torch.cuda.current_device())
    pieces: list[list[np.ndarray]] = [[] for _ in counts]
    for start in range(0, max(counts), chunk_rows):
        size = min(chunk_rows, max(counts) - start)
        chunk = np.zeros((size, array.shape[1]), dtype=array.dtype)
        own = array[start : start + size]
        chunk[: len(own)] = own
        sent = torch.from_numpy(chunk).to(device)
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent)
        for source, piece in enumerate(received):
            pieces[source].append(piece[: max(0, counts[source] - start)].cpu().numpy())
    return np.concatenate([piece for of_rank in pieces for piece in of_rank])


def run_on_every_rank(work: Callable[[], T], summarize: Callable[[T], S]) -> tuple[T, list[S]]:
    """Run `work` on this rank and gather a small summary of it: this rank's result, and the summaries in rank order.

    A failure on one rank is raised on all, as itself there and as a `RuntimeError` that names the rank elsewhere. The
    others would wait for it in the next collective until its timeout. `work` must not use collectives.
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
            raise RuntimeError(f"Evaluation stops on all ranks because it failed on rank {rank}: {failure}")
    return result, [summary for summary, _ in outcomes]
