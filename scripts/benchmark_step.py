"""Images a second of the whole training step, against a plainly written one, turn by turn in the same run.

The views are in memory already; forward, backward, clipping, optimizer, schedules and moving average are timed.
Where other jobs share the CPU, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait cost both steps most.

    python scripts/benchmark_step.py --model s16 --precision fp32 bf16
    python scripts/benchmark_step.py --model vit_tiny --world_size 2
    python scripts/benchmark_step.py --precision bf16 --no_plain --profile
    torchrun --nproc_per_node 8 scripts/benchmark_step.py --model b16 --batch_size 128 --precision bf16
"""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from benchmark_report import bars, cell, machine, save, summarize
from plain_step import PlainStep
from step_costs import StepProfile, flops_an_image, shares_table
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_msn import MSNConfig, MSNForPreTraining, MSNTrainer, MSNTrainingArguments

MODELS = {
    name: dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "mask_ratio"), values))
    for name, values in {
        "vit_tiny": (192, 12, 3, 16, 0.15),
        "s16": (384, 12, 6, 16, 0.15),
        "b16": (768, 12, 12, 16, 0.3),
        "l16": (1024, 24, 16, 16, 0.5),
        "b8": (768, 12, 12, 8, 0.3),
        "b4": (768, 12, 12, 4, 0.7),
        "l7": (1024, 24, 16, 7, 0.7),
    }.items()
}


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """A size of the paper, of which each number can be another."""

    model: Literal["vit_tiny", "s16", "b16", "l16", "b8", "b4", "l7"] = option("Size of the paper.", "s16")
    hidden_size: int | None = option("In place of the model's.")
    num_hidden_layers: int | None = option("In place of the model's.")
    num_attention_heads: int | None = option("In place of the model's.")
    patch_size: int | None = option("In place of the model's.")
    mask_ratio: float | None = option("In place of the model's.")

    def __post_init__(self):
        for name, value in MODELS[self.model].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class BenchmarkArguments(ModelArguments):
    image_size: int = option("Pixels of target and anchor views.", 224)
    focal_size: int | None = option("Pixels of focal views. 96, or 98 where the patches are of 7 pixels.")
    anchor_views: int = option("Masked global views an image, besides the target.", 1)
    focal_views: int = option("Small views an image.", 10)
    batch_size: int = option("Images a rank.", 8)
    precision: list[str] = field(
        default_factory=lambda: ["fp32", "bf16"],
        metadata={"help": "fp32, bf16 (autocast) or both. The plain step is always in float32."},
    )
    steps: int = option("Timed pairs of steps, one of ours and one plain.", 7)
    warmup_steps: int = option("Pairs before them.", 2)
    compile_encoder: bool = option("torch.compile our encoders; their compilation is in the warm-up.", False)
    gradient_checkpointing: bool = option("Compute our activations anew in the backward pass, to save memory.", False)
    profile: bool = option("Print what our step spends its time on, from one more step.", False)
    peak_tflops: float | None = option(
        "What the device can do at the most, in TFLOP/s, to print the part reached (MFU)."
    )
    plain: bool = option("Measure the plain step too; --no_plain where memory is short.", True)
    world_size: int = option("Start this many ranks on this machine. Or start them by torchrun.", 1)
    threads: int = option("CPU threads, shared by the ranks of this machine.", 2)
    cpu: bool = option("Use the CPU where there is a GPU.", False)
    output: str | None = option("Write settings, times and ratios to this JSON file, and a picture beside it.")

    def __post_init__(self):
        super().__post_init__()
        wrong = sorted(set(self.precision) - {"fp32", "bf16"})
        if wrong or not self.precision:
            raise ValueError(f"`precision` is of fp32 and bf16, but is {self.precision}.")
        for name, least in (("steps", 1), ("warmup_steps", 1), ("anchor_views", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, but is {getattr(self, name)}.")
        if self.focal_size is None:
            self.focal_size = 98 if self.patch_size == 7 else 96

    def build_model(self) -> MSNForPreTraining:
        torch.manual_seed(0)
        fields = {name: getattr(self, name) for name in MODELS[self.model]}
        return MSNForPreTraining(
            MSNConfig(
                **fields,
                image_size=self.image_size,
                intermediate_size=4 * self.hidden_size,
                use_sinkhorn=False,
                me_max_weight=5.0,
            )
        )


def random_views(args: BenchmarkArguments, rank: int) -> dict[str, torch.Tensor]:
    """One batch, which every step sees again."""
    generator = torch.Generator().manual_seed(rank)

    def views(*shape):
        return torch.randn(args.batch_size, *shape, generator=generator)

    batch = {
        "pixel_values": views(3, args.image_size, args.image_size),
        "anchor_pixel_values": views(args.anchor_views, 3, args.image_size, args.image_size),
    }
    if args.focal_views:
        batch["focal_pixel_values"] = views(args.focal_views, 3, args.focal_size, args.focal_size)
    return batch


class Stopwatch(TrainerCallback):
    """Times each step of the trainer, and after each lets the plain step take its turn on the same views."""

    def __init__(
        self, trainer: MSNTrainer, plain: PlainStep | None, batch: dict[str, torch.Tensor], args: BenchmarkArguments
    ):
        self.trainer, self.plain, self.warmup_steps = trainer, plain, args.warmup_steps
        self.batch = batch
        self.ours, self.plainly, self.warmup = [], [], []
        self.timed = args.warmup_steps + args.steps
        self.profile = StepProfile() if args.profile else None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.timed:
            self.profile.start()
            return
        self.settings = {
            "learning_rate": self.trainer.lr_scheduler.get_last_lr()[0],
            "weight_decay": self.trainer.weight_decay_now(),
            "momentum": self.trainer.ema_momentum_now(),
            "max_grad_norm": args.max_grad_norm,
        }
        self.started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.timed:
            self.profile.stop()
            return
        seconds = self._now() - self.started
        warm = state.global_step > self.warmup_steps
        (self.ours if warm else self.warmup).append(seconds)
        if self.plain is not None:
            started = self._now()
            self.plain.step(self.batch, **self.settings)
            if warm:
                self.plainly.append(self._now() - started)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()


def measure(args: BenchmarkArguments, precision: str) -> dict[str, Any]:
    """Seconds of each step, ours and plain, after the check that both have the same loss at the start.

    Returns:
        `dict`: The seconds `hf_msn`, `plain` and `warmup`; `gflop` of ours for one image; `peak_mib`, the most that
        tensors took on the GPU, of both if both run, else `None`; `profile`, if it was asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = MSNTrainingArguments(
            folder,
            bf16=precision == "bf16",
            use_cpu=args.cpu or not torch.cuda.is_available(),
            per_device_train_batch_size=args.batch_size,
            max_steps=args.warmup_steps + args.steps + args.profile,
            compile_encoder=args.compile_encoder,
            gradient_checkpointing=args.gradient_checkpointing,
            sync_batch_norm=False,  # the plain step has each rank's own statistics
            warmup_epochs=0,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        batch = random_views(args, training.process_index)
        rows = range(training.max_steps * training.world_size * args.batch_size)
        trainer = MSNTrainer(args.build_model(), training, data_collator=lambda _: batch, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        views = {name: view.to(training.device) for name, view in batch.items()}
        stopwatch = Stopwatch(trainer, PlainStep(trainer.model) if args.plain else None, views, args)
        if stopwatch.plain is not None:  # with a model of the same weights that is not compiled
            check_same_loss(args.build_model().to(training.device), stopwatch.plain, views)
        if training.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.add_callback(stopwatch)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / 2**20 if training.device.type == "cuda" else None
    return {
        "hf_msn": stopwatch.ours,
        "plain": stopwatch.plainly,
        "warmup": stopwatch.warmup,
        "gflop": flops_an_image(args.build_model().to(training.device), views) / 1e9,
        "peak_mib": peak,
        "profile": stopwatch.profile.shares() if args.profile else None,
    }


def check_same_loss(model: MSNForPreTraining, plain: PlainStep, batch: dict[str, torch.Tensor]) -> None:
    """Both steps must do the same work: from the same weights, without masks, their losses agree to 1e-4."""
    mask_ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    with torch.no_grad():
        ours, theirs = model.train()(**batch).loss.item(), plain.loss(batch, mask_ratio=0.0).item()
    model.config.mask_ratio = mask_ratio
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise RuntimeError(
            f"From the same weights and views the loss is {ours:.6f} and plainly {theirs:.6f}, but they must agree to "
            "1e-4: one of the two steps is wrong, and their times mean nothing."
        )


def report(args: BenchmarkArguments, measured: dict[str, dict[str, Any]], ranks: int) -> dict:
    """Prints the table; returns what it shows, as JSON takes it."""
    images = args.batch_size * ranks
    views = f"1 target + {args.anchor_views} anchor + {args.focal_views} focal views"
    print(
        f"{args.model} ({args.hidden_size} x {args.num_hidden_layers}, patch {args.patch_size}), {views} of "
        f"{args.image_size} and {args.focal_size} px, {args.mask_ratio:.0%} dropped, batch {args.batch_size} x "
        f"{ranks} rank{'s' * (ranks > 1)}\n{machine()['processor']}, {args.threads} threads, torch "
        f"{torch.__version__}; median of {args.steps} steps (quartiles)\n"
    )
    print(f"{'precision':<10}{'plain fp32, images/s':>26}{'hf_msn, images/s':>26}{'ratio of a pair':>24}")
    results = {}
    for precision, found in measured.items():
        seconds = {name: found[name] for name in ("hf_msn", "plain", "warmup")}
        entry = {"hf_msn": summarize([images / value for value in seconds["hf_msn"]]), "seconds": seconds}
        entry["tflops_a_rank"] = entry["hf_msn"]["median"] / ranks * found["gflop"] / 1e3
        entry |= {name: found[name] for name in ("gflop", "peak_mib", "profile")}
        columns = ["-", cell(entry["hf_msn"]), "-"]
        if seconds["plain"]:
            entry["plain"] = summarize([images / value for value in seconds["plain"]])
            # Pairs are neighbours in time: what else the machine did slowed both.
            entry["ratio"] = summarize([theirs / ours for ours, theirs in zip(seconds["hf_msn"], seconds["plain"])])
            columns = [cell(entry["plain"]), columns[1], cell(entry["ratio"])]
        print(f"{precision:<10}{columns[0]:>26}{columns[1]:>26}{columns[2]:>24}")
        results[precision] = entry
    print()
    for precision, entry in results.items():
        line = f"hf_msn, {precision}: {entry['gflop']:.1f} GFLOP an image, {entry['tflops_a_rank']:.3f} TFLOP/s a rank"
        if args.peak_tflops:
            line += f", {entry['tflops_a_rank'] / args.peak_tflops:.0%} of {args.peak_tflops:g} (MFU)"
        if entry["peak_mib"] is not None:
            line += f", {entry['peak_mib']:.0f} MiB at the peak{' with the plain step' * args.plain}"
        print(line)
        if entry["profile"]:
            print("\n" + shares_table(entry["profile"]) + "\n")
    if args.compile_encoder:
        print(f"\nfirst step, with compilation: {max(max(times['warmup']) for times in measured.values()):.1f} s")
    return {"arguments": asdict(args), "machine": {**machine(), "ranks": ranks}, "results": results}


def picture(results: dict):
    """Images a second, plain and ours, as bars."""
    named = {}
    for precision, entry in results["results"].items():
        named |= {f"plain fp32 (beside {precision})": entry["plain"]} if "plain" in entry else {}
        named[f"hf_msn {precision}"] = entry["hf_msn"]
    return bars(named, "images / s", f"Training step, {results['arguments']['model']}")


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    if args.world_size > 1 and "WORLD_SIZE" not in os.environ:
        from torch.distributed.run import main as torchrun

        return torchrun(["--standalone", f"--nproc_per_node={args.world_size}", __file__, *sys.argv[1:]])
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, args.threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    measured = {precision: measure(args, precision) for precision in args.precision}
    if int(os.environ.get("RANK", 0)) == 0:
        results = report(args, measured, ranks)
        save(results, args.output, picture(results) if args.output else None)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
