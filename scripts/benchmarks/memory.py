"""Peak memory and processor time of one step on the CPU by the batch, plain and with a gradient cache.

Each number comes from a process of its own, which takes a small step before. `--method simclr` has two views per image
and a tiled loss; `--method paws` adds supports and small crops. `count_bytes` counts the bytes without a device.

    python scripts/benchmarks/memory.py --output docs/memory.json
    python scripts/benchmarks/memory.py --method paws --batch_sizes 64 256 --supports 96
    python scripts/benchmarks/memory.py --count_only --method paws --batch_sizes 4096 --supports 6720 --classes 960 \
        --timm_model resnet50 --image_size 224 --small_size 96 --small_crops 6 --projection_hidden_dim 2048
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from report import machine, markdown_table, option, save, subplots
from torch import nn
from transformers import HfArgumentParser

from hf_msn import GradientCache, PAWSConfig, PAWSForPreTraining, SuNCEtConfig, SuNCEtForPreTraining
from hf_msn.cli.main import run_script

MIB = 2**20


@dataclass
class MemoryArguments:
    method: Literal["simclr", "paws"] = option("Method.", "simclr")
    batch_sizes: list[int] = option("Images per step.", (64, 256, 1024, 4096))
    chunk_size: int = option("Images per pass of the encoder, with the gradient cache.", 64)
    plain_up_to: int = option("Largest batch of the plain step: its memory grows with the batch.", 4096)
    supports: int = option("Labelled images per step, of PAWS.", 96)
    classes: int = option("Their classes.", 10)
    small_crops: int = option("Small crops per image, of PAWS.", 2)
    timm_model: str | None = option("Encoder; by default a ViT.")
    hidden_size: int = option("Of the ViT.", 128)
    num_hidden_layers: int = option("Of the ViT.", 2)
    patch_size: int = option("Of the ViT.", 4)
    projection_hidden_dim: int = option("Hidden width of the head.", 256)
    projection_dim: int = option("Width of the projections.", 128)
    tile_size: int = option("Of the loss of SimCLR.", 512)
    image_size: int = option("Pixels of the views.", 32)
    small_size: int = option("Pixels of the small crops.", 16)
    count_only: bool = option("Print the counted bytes, and measure nothing.", False)
    output: str | None = option("JSON file for the numbers; the plot is beside it.")
    measured: str | None = option("Used by the script itself: batch and chunk of this process.")

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("projection_hidden_dim", "projection_dim")}
        if self.timm_model is not None:
            fields["timm_model"] = self.timm_model
        else:
            fields |= {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "patch_size")}
            fields |= {"num_attention_heads": self.hidden_size // 64, "intermediate_size": 4 * self.hidden_size}
            fields["image_size"] = self.image_size
        if self.method == "paws":
            return PAWSForPreTraining(PAWSConfig(**fields)).train()
        return SuNCEtForPreTraining(SuNCEtConfig(**fields, nt_xent_tile_size=self.tile_size)).train()

    def views(self, batch_size: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return random views. Made in place, so that the peak of memory is that of the step."""
        sides = {"pixel_values": (batch_size,), "anchor_pixel_values": (batch_size, 1)}
        if self.method == "paws":
            sides |= {"support_pixel_values": (self.supports,), "focal_pixel_values": (batch_size, self.small_crops)}
        batch = {}
        for name, shape in sides.items():
            side = self.small_size if name == "focal_pixel_values" else self.image_size
            if 0 not in shape:
                batch[name] = torch.empty(*shape, 3, side, side, device=device).normal_()
        if self.method == "paws":
            batch["support_labels"] = torch.arange(self.supports, device=device) % self.classes
        return batch


def take_step(args: MemoryArguments, batch_size: int, chunk_size: int) -> dict[str, float]:
    """Return `peak_mib` of this process, `base_mib` with the model alone, and processor `seconds` of a step."""
    model = args.build_model()

    def step(size: int, chunk: int) -> None:
        batch = args.views(size)
        model.zero_grad()
        started.append(time.process_time())
        if chunk:
            GradientCache(model, chunk).backward(batch)
        else:
            model(**batch).loss.backward()

    started: list[float] = []
    base = _resident("VmRSS")
    step(args.chunk_size // 2, 0)
    step(batch_size, chunk_size)
    return {"peak_mib": _resident("VmHWM"), "base_mib": base, "seconds": time.process_time() - started[-1]}


def _resident(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def in_own_process(batch_size: int, chunk_size: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--measured", f"{batch_size},{chunk_size}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def saved_bytes(module: nn.Module, function: Callable, inputs: torch.Tensor) -> int:
    """Return the bytes that `function(inputs)` keeps for the backward pass, without those of inputs and `module`."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(inputs)
    own = {t.untyped_storage()._cdata for t in (inputs, *module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


def count_bytes(args: MemoryArguments, batch_size: int, optimizer_states: int = 1) -> dict[str, int]:
    """Count the bytes of one float32 step with a gradient cache, without a device: all tensors are on "meta".

    - `weights`: parameters, gradients and `optimizer_states` (LARS has 1) per parameter;
    - `views`: the pixels of all views;
    - `chunk`: what the encoder keeps of its largest chunk, and as much again at most for the gradients on the way;
    - `heads`: what the heads keep of all rows, and their features;
    - `loss`: for PAWS 6 matrices of anchors x (supports + classes): similarities, logarithms, gradients; for
      SimCLR 4 tiles.
    """
    with torch.device("meta"):
        model = args.build_model()
    batch = args.views(batch_size, "meta")
    rows = {"large": 0, "small": 0}
    for name, tensor in batch.items():
        if tensor.ndim > 3:
            rows["small" if "focal" in name else "large"] += tensor.shape[:-3].numel()
    sizes = {"large": args.image_size, "small": args.small_size}
    chunks, heads = [], 0
    for name, count in rows.items():
        if not count:
            continue
        images = torch.empty(min(count, args.chunk_size), 3, sizes[name], sizes[name], device="meta")
        chunks.append(saved_bytes(model, partial(model._features, model.encoder), images))
        features = torch.empty(count, model.projection_head.fc1.in_features, device="meta", requires_grad=True)
        heads += saved_bytes(model, model.projection_head, features) + 2 * features.nbytes
    anchors = (2 + args.small_crops) * batch_size
    counted = {
        "weights": (2 + optimizer_states) * sum(p.nbytes for p in model.parameters()),
        "views": sum(tensor.nbytes for tensor in batch.values()),
        "chunk": 2 * max(chunks),
        "heads": heads,
        "loss": 4 * (6 * anchors * (args.supports + args.classes) if args.method == "paws" else 4 * args.tile_size**2),
    }
    return {**counted, "total": sum(counted.values())}


def plot(results: list[dict[str, Any]], chunk_size: int) -> Any:
    figure, axes = subplots((6, 3.5))
    for name, label in (("plain", "plain"), ("cached", f"gradient cache, chunks of {chunk_size}")):
        points = [(entry["batch_size"], entry[name]["peak_mib"]) for entry in results if entry[name]]
        axes.plot(*zip(*points), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="images per step", ylabel="peak resident memory, MiB")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    (args,) = HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses()
    if args.measured is not None:
        torch.set_num_threads(1)
        print(json.dumps(take_step(args, *map(int, args.measured.split(",")))))
        return
    counts = {size: count_bytes(args, size) for size in args.batch_sizes}
    rows = [[size, *(f"{part / 1e9:.3f}" for part in count.values())] for size, count in counts.items()]
    print(f"Counted GB with a gradient cache, chunks of {args.chunk_size}\n")
    print(markdown_table(["images", *next(iter(counts.values()))], rows) + "\n")
    if args.count_only:
        return
    results, rows = [], []
    for size in args.batch_sizes:
        plain = in_own_process(size, 0) if size <= args.plain_up_to else None
        cached = in_own_process(size, args.chunk_size)
        # Without the optimizer, and the model is there before the step.
        counted = (counts[size]["total"] - counts[size]["weights"] * 2 / 3) / MIB
        results.append({"batch_size": size, "plain": plain, "cached": cached, "counted_mib": counted})
        rows.append(
            [
                size,
                f"{plain['peak_mib']:.0f}" if plain else "-",
                f"{cached['peak_mib']:.0f}",
                f"{cached['peak_mib'] - cached['base_mib']:.0f}",
                f"{counted:.0f}",
                f"{plain['seconds']:.1f}" if plain else "-",
                f"{cached['seconds']:.1f}",
                f"{cached['seconds'] / plain['seconds']:.2f}" if plain else "-",
            ]
        )
    columns = ["images", "plain, MiB", "cached, MiB", "of which the step", "counted", "plain, CPU s", "cached, CPU s"]
    print(markdown_table([*columns, "ratio"], rows))
    found = {"arguments": asdict(args), "machine": machine(1), "results": results}
    save(found, args.output, plot(results, args.chunk_size))


if __name__ == "__main__":
    run_script(main)
