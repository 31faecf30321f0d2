"""What one rank of compare_codistillation.py runs: a classifier of digits, trained anew for each run.

DDP's ranks share each batch; replicas have batches as large as one rank's share, and as many updates.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn import Codistillation, FallingWeightDecay, load_images, pixel_features

PIXEL_MEAN, PIXEL_STD = 0.305, 0.375  # of the training digits
HELD_OUT = 360  # training digits that take the test digits' place in a search: as many as those
LEARNING_RATE_FALLS = (1 / 3, 2 / 3)  # to a tenth, where FallingWeightDecay's factors change


class Digits:
    """All digits of one run, as tensors: what to train on, and what to measure on.

    Args:
        held_out_seed (`int`, *optional*): Measures on training digits that are drawn with it and not trained on, so
            that no test digit is ever seen. By default on the test digits.
    """

    def __init__(self, held_out_seed: int | None = None):
        self.images, self.labels = as_tensors("train")
        if held_out_seed is None:
            self.measured_images, self.measured_labels = as_tensors("test")
            return
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(held_out_seed))
        measured, trained = order[:HELD_OUT], order[HELD_OUT:]
        self.measured_images, self.measured_labels = self.images[measured], self.labels[measured]
        self.images, self.labels = self.images[trained], self.labels[trained]


def as_tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, 1, 8, 8)`, about standardised, and labels `(N,)`."""
    pixels = pixel_features(load_images("digits", split=split))  # (N, 3 * 8 * 8), gray: three equal parts
    images = torch.tensor(pixels.features, dtype=torch.float32)[:, :64].view(-1, 1, 8, 8)
    return (images - PIXEL_MEAN) / PIXEL_STD, torch.tensor(pixels.labels)


def build_model(hidden_size: int) -> nn.Module:
    """A perceptron of two hidden layers: what it has to send grows with the square of `hidden_size`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, 10),
    )


def batches_of(rows: int, batch_size: int, seed: int):
    """Endless row numbers `(batch_size,)` from one shuffled pass over the rows after another."""
    shuffle = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(rows, generator=shuffle)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def train(run: dict, digits: Digits) -> dict:
    """Trains one model on this rank; returns its accuracy in per cent, that of all ranks' mean, bytes and seconds."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    method, seed, steps = run["method"], run["seed"], run["steps"]
    share = run["batch_size"] // world_size
    torch.manual_seed(1000 * seed + rank)  # replicas differ from the first step on; DDP makes its ranks equal
    model = build_model(run["hidden_size"])
    wrapped = DistributedDataParallel(model) if method == "ddp" else model
    decay, factor = run["weight_decay"], FallingWeightDecay(steps)
    learning_rate = run["learning_rate"] / (1 if method == "ddp" else world_size)  # in proportion to the batch
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=decay)
    falls = [round(fraction * steps) for fraction in LEARNING_RATE_FALLS]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
    # Seen together: DDP's ranks take turns in one order; replicas that exchange predictions see the same batches.
    together = method in ("ddp", "predictions")
    draws = batches_of(
        len(digits.labels), run["batch_size"] if method == "ddp" else share, 1000 * seed + (0 if together else rank)
    )

    with codistillation_of(model, optimizer, run, factor) as codistillation:
        sent = 0 if codistillation is None else codistillation.bytes_sent
        dist.barrier()
        started = time.perf_counter()
        for step in range(steps):
            rows = next(draws)
            if method == "ddp":
                rows = rows[rank * share : (rank + 1) * share]
            images = digits.images[rows]
            logits = wrapped(images)
            loss = nn.functional.cross_entropy(logits, digits.labels[rows])
            if codistillation is None:
                if run["falling"]:
                    optimizer.param_groups[0]["weight_decay"] = decay * factor(step)
            else:
                loss = loss + codistillation.loss(logits, images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if codistillation is not None:
                codistillation.step()
        seconds = time.perf_counter() - started
        dist.barrier()  # none leaves before all have sent their last checkpoint: to one that left nothing is sent
        distance = None if codistillation is None else codistillation.distance_of_predictions
    # After leaving, when the last checkpoint has left too.
    sent = 0 if codistillation is None else codistillation.bytes_sent - sent
    payload = sum(p.numel() * p.element_size() for p in model.parameters())
    if method == "ddp":
        sent = steps * 2 * payload * (world_size - 1) // world_size  # as a ring sends it
    own, mean = accuracies(model, digits)
    return {
        **run,
        "rank": rank,
        "accuracy": own,
        "accuracy_of_mean": mean,
        "bytes_sent": sent,
        "model_bytes": payload,
        "seconds": seconds,
        "last_distance": distance,
    }


def codistillation_of(model: nn.Module, optimizer: torch.optim.Optimizer, run: dict, factor: FallingWeightDecay):
    if run["method"] not in ("predictions", "checkpoints"):
        return nullcontext()
    return Codistillation(
        model,
        optimizer,
        exchange=run["method"],
        exchange_every=run["exchange_every"],
        alpha=run["alpha"],
        temperature=run["temperature"],
        weight_decay_schedule=factor if run["falling"] else None,
    )


@torch.no_grad()
def accuracies(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """In per cent: of this rank's model, and of the mean of all ranks' probabilities."""
    own = model.eval()(digits.measured_images).softmax(-1)
    mean = own.clone()
    dist.all_reduce(mean)  # the sum has its largest entry where the mean has it
    return tuple(100 * (p.argmax(-1) == digits.measured_labels).double().mean().item() for p in (own, mean))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    digits, results = {}, []
    for run in spec["runs"]:
        held_out_seed = run["seed"] if spec["held_out"] else None
        if held_out_seed not in digits:
            digits[held_out_seed] = Digits(held_out_seed)
        results.append(train(run, digits[held_out_seed]))
    Path(spec["folder"], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
