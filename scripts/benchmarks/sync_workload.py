"""One rank of sync.py: train a classifier of digits by each method in turn, and time it.

Forward and backward pass sleep layer by layer, as if an accelerator computed: the ranks of one machine would otherwise
wait for its few cores instead of for the network.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn import AsyncGossip, DiLoCo, Gossip, LocalSGD, NoLoCo, OverlapGossip, SlowMo, StreamingDiLoCo

BATCH_SIZE = 32
LAYERS = 4

METHODS = {
    "none": lambda model, optimizer: nullcontext(),
    "ddp": lambda model, optimizer: nullcontext(),
    "local_sgd": partial(LocalSGD, sync_every=12),
    "slowmo": partial(SlowMo, sync_every=12),
    "slowmo_bf16": partial(SlowMo, sync_every=12, wire_dtype="bfloat16"),
    "slowmo_sharded": partial(SlowMo, sync_every=12, shard_state=True),
    "diloco": partial(DiLoCo, sync_every=12),
    "diloco_int8": partial(DiLoCo, sync_every=12, wire_dtype="int8"),
    "diloco_int4": partial(DiLoCo, sync_every=12, wire_dtype="int4"),
    "streaming": partial(StreamingDiLoCo, sync_every=12),
    "streaming_int8": partial(StreamingDiLoCo, sync_every=12, wire_dtype="int8"),
    "streaming_int4": partial(StreamingDiLoCo, sync_every=12, wire_dtype="int4"),
    "noloco": partial(NoLoCo, sync_every=12),
    "sgp": Gossip,
    "sgp_bf16": partial(Gossip, wire_dtype="bfloat16"),
    "dpsgd": partial(Gossip, push_sum=False),
    "osgp": OverlapGossip,
    "osgp_bf16": partial(OverlapGossip, wire_dtype="bfloat16"),
    "slowmo_sgp": lambda model, optimizer: SlowMo(model, optimizer, sync_every=48, base=Gossip(model, optimizer)),
    "slowmo_osgp": lambda model, optimizer: SlowMo(
        model, optimizer, sync_every=48, base=OverlapGossip(model, optimizer)
    ),
    "adpsgd": partial(AsyncGossip, method="ad_psgd"),
    "async_push_sum": partial(AsyncGossip, method="push_sum"),
}


class _Busy(torch.autograd.Function):
    """Sleep for the time of a layer's forward pass, and twice as long in the backward pass."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


class Classifier(nn.Module):
    """A perceptron of four layers on the 64 pixels of a digit; `hidden_size` sets the bytes to send."""

    def __init__(self, hidden_size: int):
        super().__init__()
        sizes = [64, *[hidden_size] * (LAYERS - 1), 10]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(sizes))
        self.seconds = 0.0  # of computing per step

    def forward(self, x):
        x.requires_grad_()  # or the first layer would have no backward pass to sleep in
        for layer in self.layers:
            x = layer(_Busy.apply(x, self.seconds / (3 * LAYERS)).relu())
        return x


def train(method: str, spec: dict, seconds: float, steps: int) -> dict:
    """Train from seed 0. Return speed and bytes after `warmup_steps`, and the time to the target loss.

    Bytes sent in the background belong to the step in which they have left.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Classifier(spec["hidden_size"])
    wrapped = DistributedDataParallel(model) if method == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=spec["learning_rate"], momentum=0.9)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 16
    labels = torch.tensor(labels)
    shuffle = torch.Generator().manual_seed(1000 + rank)
    model.seconds = seconds * (spec["straggler"] if rank == world_size - 1 else 1.0)

    smoothed, times, losses, sent = None, [], [], []
    own_seconds = 0.0
    with METHODS[method](wrapped, optimizer) as sync:
        dist.barrier()
        started = time.perf_counter()
        for step in range(-spec["warmup_steps"], steps):
            if step == 0:
                sent, waited = [getattr(sync, "bytes_sent", 0)], getattr(sync, "seconds_waiting", 0.0)
                own_seconds = 0.0
                started = time.perf_counter()
            rows = torch.randint(len(images), (BATCH_SIZE,), generator=shuffle)
            loss = nn.functional.cross_entropy(wrapped(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            before = time.perf_counter()
            if sync is not None:
                sync.step()
            own_seconds += time.perf_counter() - before
            sent.append(getattr(sync, "bytes_sent", 0))
            optimizer.zero_grad()
            smoothed = loss.item() if smoothed is None else 0.8 * smoothed + 0.2 * loss.item()
            times.append(time.perf_counter() - started)
            losses.append(smoothed)
        ended = time.perf_counter()
        waited = getattr(sync, "seconds_waiting", 0.0) - waited
    payload = sum(p.numel() * p.element_size() for p in model.parameters())
    if method == "ddp":
        sent = [step * 2 * payload * (world_size - 1) // world_size for step in range(steps + 1)]  # as a ring sends it
    reached = next((t for t, value in zip(times, losses) if t > 0 and value <= spec["target_loss"]), None)
    return {
        "method": method,
        "rank": rank,
        "steps_per_second": steps / (ended - started),
        "bytes_per_step": (sent[-1] - sent[0]) / steps,
        "peak_bytes": max(after - before for before, after in pairwise(sent)),
        "model_bytes": payload,
        "seconds_in_sync_per_step": own_seconds / steps,
        "seconds_waiting_per_step": waited / steps,
        "seconds_to_loss": reached,
        "final_loss": losses[-1],
    }


def balanced_seconds(spec: dict) -> float:
    """Return the seconds to sleep per step with which DDP waits for the part `spec["waiting"]` of its step."""
    calm = {**spec, "straggler": 1.0, "warmup_steps": 2}

    def step_seconds(method: str, seconds: float) -> float:
        found = torch.tensor(1.0 / train(method, calm, seconds, 6)["steps_per_second"])
        dist.broadcast(found, 0)
        return found.item()

    awake, seconds = step_seconds("none", 0.0), 0.0
    for _ in range(4):
        waiting = step_seconds("ddp", seconds) - seconds - awake
        seconds = max(waiting * (1.0 - spec["waiting"]) / spec["waiting"] - awake, 0.0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=json.loads, help="Arguments of sync.py, as JSON.")
    spec = parser.parse_args().spec
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seconds = balanced_seconds(spec) if spec["compute_ms"] is None else spec["compute_ms"] / 1000
    results = []
    for repeat in range(spec["repeats"]):
        for method in spec["methods"]:
            found = train(method, spec, seconds, spec["steps"])
            results.append({**found, "repeat": repeat, "compute_seconds": seconds})
    Path(spec["folder"], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
