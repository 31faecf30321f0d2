"""What one rank of `benchmark_sync.py --overhead` runs: an MSN step of a ViT-S/16, and what each method adds to it.

Own arithmetic is the time in the method's step and in its hooks on the optimizer's, without the time in exchanges.
Memory is what all tensors of the process hold, less what they hold without a method. The step has the shape of
benchmark_step.py: 12 views of each of 8 images.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from sync_workload import METHODS

from hf_msn import MSNConfig, MSNForPreTraining

BATCH_SIZE = 8


def live_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Stopwatch:
    """Counts the time that a method spends in its own `step()` and in what it hooks into the optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.seconds = 0.0
        self._optimizer = optimizer
        self._handles = [optimizer.register_step_pre_hook(lambda *_: self._start())]  # before those of the method

    def __enter__(self) -> None:
        self._handles.append(self._optimizer.register_step_pre_hook(lambda *_: self._stop()))  # and after

    def __exit__(self, error_type, error, traceback) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._start()
        yield
        self._stop()

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self._started


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = MSNForPreTraining(MSNConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    views = {
        "pixel_values": torch.randn(BATCH_SIZE, 3, 224, 224),
        "anchor_pixel_values": torch.randn(BATCH_SIZE, 1, 3, 224, 224),
        "focal_pixel_values": torch.randn(BATCH_SIZE, 10, 3, 96, 96),
    }

    def backward() -> None:
        optimizer.zero_grad()
        model(**views).loss.backward()

    started = time.perf_counter()
    for _ in range(3):
        backward()
        optimizer.step()
        model.update_target(0.99)
        step_seconds, started = time.perf_counter() - started, time.perf_counter()

    payload = sum(p.numel() * p.element_size() for p in trained)
    results, plain_bytes = [], live_bytes()
    for method in [name for name in spec["methods"] if name not in ("none", "ddp")]:
        stopwatch, seconds, most = Stopwatch(optimizer), [], 0
        with METHODS[method](model, optimizer) as sync, stopwatch:
            for _ in range(spec["repeats"]):
                steps = max(sync.sync_every, 12)
                stopwatch.seconds, waited = 0.0, sync.seconds_waiting
                for _ in range(steps):
                    optimizer.step()
                    with stopwatch.running():
                        sync.step()
                seconds.append((stopwatch.seconds - (sync.seconds_waiting - waited)) / steps)
                most = max(most, live_bytes())
        results.append(
            {
                "method": method,
                "step_seconds": step_seconds,
                "own_seconds": median(seconds),
                "extra_memory": (most - plain_bytes) / payload,
            }
        )
    Path(spec["folder"], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
