"""Run a function on n gloo ranks, with a deadline after which no process is left."""

import faulthandler
import gc
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

# `import hf_msn` is lazy, so each module that ranks use is named.
PRELOADED = ["pytest", "hf_msn.distributed.async_gossip", "hf_msn.distributed.slowmo", "hf_msn.trainers.msn_trainer"]


def run_ranks(function, world_size: int, *args, timeout: float = 60.0) -> list:
    """Call `function(rank, *args)` on every rank of a new gloo process group, and return the results, rank 0 first.

    The function is at the top level of a test module, which the ranks import. At the deadline the ranks that still run
    are killed. The AssertionError shows their stacks, or the traceback of the rank that raised first.
    """
    # The server imports once; its forks start in milliseconds and hold nothing of the parent.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(
                target=_run_rank, args=(function, rank, world_size, port, folder, timeout, args), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + timeout  # from here: the first start waits for the server's imports
            while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
                if any(process.exitcode not in (None, 0) for process in ranks):
                    break
                time.sleep(0.01)
            # Judged before the others are killed: they lose their connection to those that go first.
            failed = any(process.exitcode not in (None, 0) for process in ranks)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
            for process in ranks:
                process.join()
        if not all(process.exitcode == 0 for process in ranks):
            raise AssertionError(_describe_failure(function, ranks, Path(folder), None if failed else timeout))
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


def _run_rank(function, rank, world_size, port, folder, timeout, args) -> None:
    gc.freeze()  # Trainer collects garbage: the modules of torch and transformers need not be searched each time
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    with open(Path(folder, f"{rank}.stacks"), "w") as stacks:
        faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5), file=stacks)
        try:
            # A file needs no free port; the port is for what reads the environment, such as accelerate.
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
            )
            torch.save(function(rank, *args), Path(folder, f"{rank}.result"))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            Path(folder, f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # at once: the other ranks wait for this one
        finally:
            faulthandler.cancel_dump_traceback_later()


def _describe_failure(function, ranks, folder: Path, timeout: float | None) -> str:
    codes = [process.exitcode for process in ranks]
    if timeout is not None:
        stacks = "\n".join(f"rank {file.stem}:\n{file.read_text()}" for file in sorted(folder.glob("*.stacks")))
        return f"`{function.__name__}` did not end within {timeout} s (exit codes {codes}):\n{stacks}"
    # One failing rank makes the others lose their connection: the first error is the cause.
    errors = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
    if not errors:
        return f"a rank of `{function.__name__}` died without a word (exit codes {codes})"
    return f"rank {errors[0].stem} of {len(ranks)} failed in `{function.__name__}`:\n{errors[0].read_text()}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
