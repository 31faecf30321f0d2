"""What one rank of `benchmark_sync.py --overhead` runs: an MSN step of a ViT-S/16, and what each method adds to it.

Own arithmetic is the time in the optimizer's step and in the method's, without the time in exchanges, less the
optimizer's step of training without a method. Memory is what all tensors of the process hold, less the same. The step
has the shape of benchmark_step.py: 12 views of each of 8 images.
"""

import gc
import json
import os
import sys
import time
from contextlib import nullcontext
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
    results, plain_seconds, plain_bytes = [], 0.0, 0
    for method in ["none", *(name for name in spec["methods"] if name not in ("none", "ddp"))]:
        entered = METHODS[method](model, optimizer)
        with entered if method != "none" else nullcontext() as sync:
            seconds, most = [], 0
            for _ in range(spec["repeats"]):
                spent = waited = 0.0
                for _ in range(sync.sync_every if sync is not None else 12):
                    before, waited_before = time.perf_counter(), 0.0 if sync is None else sync.seconds_waiting
                    optimizer.step()
                    if sync is not None:
                        sync.step()
                    spent += time.perf_counter() - before
                    waited += 0.0 if sync is None else sync.seconds_waiting - waited_before
                seconds.append((spent - waited) / (sync.sync_every if sync is not None else 12))
                most = max(most, live_bytes())
        if method == "none":
            plain_seconds, plain_bytes = median(seconds), most
            continue
        results.append(
            {
                "method": method,
                "step_seconds": step_seconds,
                "own_seconds": median(seconds) - plain_seconds,
                "extra_memory": (most - plain_bytes) / payload,
            }
        )
    Path(spec["folder"], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
