"""Run a function on ranks of which some die: the others report through files."""

import logging
import multiprocessing
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from launch import PRELOADED, _describe_failure, _free_port, _run_rank


def run_ranks_that_are_left(function, world_size: int, folder: Path, *args, lost=(), timeout: float = 60.0) -> dict:
    """Call `function(rank, *args)` on every rank of a gloo group; those in `lost` may end or be killed in it.

    Return the result of each of the other ranks, or raise if one of those raised or did not return in time.
    """
    living = [rank for rank in range(world_size) if rank not in lost]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    call = (function, str(folder), len(living), args)
    ranks = [
        context.Process(target=_run_rank, args=(_report, rank, world_size, port, str(folder), timeout, call))
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        for rank in living:
            ranks[rank].join(max(deadline - time.monotonic(), 0.0))
        codes = [ranks[rank].exitcode for rank in living]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    if any(codes):
        late = timeout if all(code in (0, None) for code in codes) else None
        raise AssertionError(_describe_failure(function, ranks, Path(folder), late))
    return {rank: torch.load(folder / f"{rank}.reported", weights_only=False) for rank in living}


def _report(rank, function, folder, num_living, args):
    result = function(rank, *args)
    torch.save(result, Path(folder, f"{rank}.part"))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.reported"))
    deadline = time.monotonic() + 20.0  # the first rank holds the store, and others their connections
    while len(list(Path(folder).glob("*.reported"))) < num_living and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)


class Warnings(logging.Handler):
    """The warnings of this rank."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("hf_msn").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def having(self, words):
        return [line for line in self.lines if words in line]


def all_pids() -> list[int]:
    """Return the process id of every rank."""
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids
