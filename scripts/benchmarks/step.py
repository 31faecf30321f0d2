"""Images per second of the whole training step, against a plainly written one, in turns in the same run.

The views are in memory; forward, backward, clipping, optimizer, schedules and moving average are timed. Where other
jobs share the CPU, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow both steps.

    python scripts/benchmarks/step.py --model s16 --precision fp32 bf16
    python scripts/benchmarks/step.py --precision bf16 --no_plain --profile
    torchrun --nproc_per_node 8 scripts/benchmarks/step.py --model b16 --batch_size 128 --precision bf16
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_step import PlainStep
from report import check_known, machine, markdown_table, now, option, save, summarize
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_msn import MSNConfig, MSNForPreTraining, MSNTrainer, MSNTrainingArguments
from hf_msn.cli.main import run_script
from hf_msn.models import onednn_linear

FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "mask_ratio")
MODELS = {
    "vit_tiny": (192, 12, 3, 16, 0.15),
    "s16": (384, 12, 6, 16, 0.15),
    "b16": (768, 12, 12, 16, 0.3),
    "l16": (1024, 24, 16, 16, 0.5),
    "b8": (768, 12, 12, 8, 0.3),
    "b4": (768, 12, 12, 4, 0.7),
    "l7": (1024, 24, 16, 7, 0.7),
}


@dataclass
class ModelArguments:
    model: Literal["vit_tiny", "s16", "b16", "l16", "b8", "b4", "l7"] = option("Size of the paper.", "s16")
    hidden_size: int | None = option("In place of the model's.")
    num_hidden_layers: int | None = option("In place of the model's.")
    num_attention_heads: int | None = option("In place of the model's.")
    patch_size: int | None = option("In place of the model's.")
    mask_ratio: float | None = option("In place of the model's.")

    def __post_init__(self):
        for name, value in zip(FIELDS, MODELS[self.model]):
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class BenchmarkArguments(ModelArguments):
    image_size: int = option("Pixels of target and anchor views.", 224)
    focal_size: int | None = option("Pixels of focal views. 96, or 98 with patches of 7 pixels.")
    anchor_views: int = option("Masked global views per image, besides the target.", 1)
    focal_views: int = option("Small views per image.", 10)
    batch_size: int = option("Images per rank.", 8)
    precision: list[str] = option("fp32, bf16 (autocast) or both.", ("fp32", "bf16"))
    steps: int = option("Timed pairs of steps, one of ours and one plain.", 7)
    warmup_steps: int = option("Pairs before them.", 2)
    compile_encoder: bool = option("torch.compile our encoders; the compilation is in the warm-up.", False)
    gradient_checkpointing: bool = option("Recompute our activations in the backward pass.", False)
    profile: bool = option("Print the operators that one more step spends its time on.", False)
    peak_tflops: float | None = option("TFLOP/s of a large product on this device, to print the part reached (MFU).")
    plain: bool = option("Measure the plain step too; --no_plain where memory is short.", True)
    threads: int = option("CPU threads, shared by the ranks of this machine.", 2)
    cpu: bool = option("Use the CPU where there is a GPU.", False)
    output: str | None = option("JSON file for settings, times and ratios.")

    def __post_init__(self):
        super().__post_init__()
        check_known("precision", self.precision, ("fp32", "bf16"))
        if self.focal_size is None:
            self.focal_size = 98 if self.patch_size == 7 else 96

    def build_model(self) -> MSNForPreTraining:
        torch.manual_seed(0)
        config = MSNConfig(
            **{name: getattr(self, name) for name in FIELDS},
            image_size=self.image_size,
            intermediate_size=4 * self.hidden_size,
            use_sinkhorn=False,
            me_max_weight=5.0,
        )
        return MSNForPreTraining(config)


def random_views(args: Any, rank: int) -> dict[str, torch.Tensor]:
    """Return one batch, which every step sees again."""
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


def flops_per_image(model: MSNForPreTraining, batch: dict[str, torch.Tensor]) -> float:
    """Count the operations of forward and backward pass per image. The model must not be compiled."""
    with FlopCounterMode(display=False) as counter:
        model.train()(**{name: views[:2] for name, views in batch.items()}).loss.backward()
    return counter.get_total_flops() / 2


def product_rates(repeats: int = 7) -> dict[str, float]:
    """Return GFLOP/s of torch's products and of oneDNN's on the CPU, for the first layer of an S/16's MLP."""
    rates, (rows, inputs, outputs) = {}, (1576, 384, 1536)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        libraries = {"torch": F.linear}
        if onednn_linear._PRODUCT is not None and (precision == "fp32" or onednn_linear.HAS_BFLOAT16):
            libraries["oneDNN"] = onednn_linear._product
        for library, product in libraries.items():
            seconds = []
            for _ in range(repeats):
                started = now()
                product(a, weight)
                seconds.append(now() - started)
            rates[f"{library} {precision}"] = 2 * rows * inputs * outputs / sorted(seconds)[repeats // 2] / 1e9
    return rates


class Stopwatch(TrainerCallback):
    """Time each step of the trainer, and after each let the plain step take its turn on the same views."""

    def __init__(self, trainer: MSNTrainer, plain: PlainStep | None, batch: dict, args: BenchmarkArguments):
        self.trainer, self.plain, self.batch, self.warmup_steps = trainer, plain, batch, args.warmup_steps
        self.ours, self.plainly, self.warmup = [], [], []
        self.timed = args.warmup_steps + args.steps
        self.on_gpu = torch.cuda.is_available()
        self.profiler = profile(activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.timed:
            self.profiler.start()
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
            self.profiler.stop()
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
        if dist.is_initialized():
            dist.barrier()
        return now()

    def longest_operators(self, shown: int = 12) -> list[dict]:
        """Return `name`, `calls` and `share` of the time of the operators that took longest."""
        time = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        found = sorted(self.profiler.key_averages(), key=lambda entry: -getattr(entry, time))
        total = sum(getattr(entry, time) for entry in found)
        return [{"name": e.key, "calls": e.count, "share": getattr(e, time) / total} for e in found[:shown]]


def measure(args: BenchmarkArguments, precision: str) -> dict[str, Any]:
    """Time each step, ours and plain, after the check that both start with the same loss.

    Returns:
        `dict`: seconds of the steps in `hf_msn`, `plain` and `warmup`; `gflop` per image; `peak_mib` of the GPU;
        `profile`.
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
            dataloader_num_workers=0,  # the views are in memory
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
        if stopwatch.plain is not None:
            check_same_loss(args.build_model().to(training.device), stopwatch.plain, views)
        on_gpu = training.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.add_callback(stopwatch)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {
        "hf_msn": stopwatch.ours,
        "plain": stopwatch.plainly,
        "warmup": stopwatch.warmup,
        "gflop": flops_per_image(args.build_model().to(training.device), views) / 1e9,
        "peak_mib": peak,
        "profile": stopwatch.longest_operators() if args.profile else None,
    }


def check_same_loss(model: MSNForPreTraining, plain: PlainStep, batch: dict[str, torch.Tensor]) -> None:
    """Check that both steps do the same work: without masks their first losses agree to 1e-4."""
    mask_ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    with torch.no_grad():
        ours, theirs = model.train()(**batch).loss.item(), plain.loss(batch, mask_ratio=0.0).item()
    model.config.mask_ratio = mask_ratio
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise RuntimeError(
            f"The first loss is {ours:.6f}, of the plain step {theirs:.6f}: the two must agree to 1e-4."
        )


def report(args: BenchmarkArguments, measured: dict[str, dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Print the table. Return its contents for the JSON file."""
    images = args.batch_size * ranks
    print(
        f"{args.model} ({args.hidden_size} x {args.num_hidden_layers}, patch {args.patch_size}), 1 target + "
        f"{args.anchor_views} anchor + {args.focal_views} focal views of {args.image_size} and {args.focal_size} px, "
        f"{args.mask_ratio:.0%} dropped, batch {args.batch_size} x {ranks} ranks\n{machine()['processor']}, "
        f"{args.threads} threads, torch {torch.__version__}; median of {args.steps} steps (quartiles)\n"
    )
    results, rows = {}, []
    for precision, found in measured.items():
        entry = {**found, "seconds": {name: found[name] for name in ("hf_msn", "plain", "warmup")}}
        entry["hf_msn"] = summarize([images / value for value in found["hf_msn"]])
        entry["plain"] = summarize([images / value for value in found["plain"]]) if found["plain"] else None
        # Pairs are neighbours in time: whatever else the machine did slowed both.
        pairs = [theirs / ours for ours, theirs in zip(found["hf_msn"], found["plain"])]
        entry["ratio"] = summarize(pairs) if pairs else None
        entry["tflops_per_rank"] = entry["hf_msn"]["median"] / ranks * found["gflop"] / 1e3
        mfu = f"{entry['tflops_per_rank'] / args.peak_tflops:.1%}" if args.peak_tflops else "-"
        peak = "-" if found["peak_mib"] is None else f"{found['peak_mib']:.0f}"
        speed = f"{entry['tflops_per_rank']:.3f}"
        rows.append([precision, entry["plain"], entry["hf_msn"], entry["ratio"], speed, mfu, peak])
        results[precision] = entry
    columns = ["precision", "plain fp32, images/s", "hf_msn, images/s", "ratio of a pair", "TFLOP/s per rank", "MFU"]
    print(markdown_table([*columns, "peak MiB"], rows))
    for precision, entry in results.items():
        if entry["profile"]:
            shares = [[e["name"], e["calls"], f"{e['share']:.1%}"] for e in entry["profile"]]
            print(f"\n{precision}\n" + markdown_table(["operator", "calls", "share of the step"], shares))
    if args.compile_encoder:
        print(f"\nfirst step, with compilation: {max(max(found['warmup']) for found in measured.values()):.1f} s")
    rates = product_rates() if args.cpu or not torch.cuda.is_available() else None
    if rates:
        print("\nGFLOP/s of a product: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    return {"arguments": asdict(args), "machine": {**machine(), "ranks": ranks, "gflops": rates}, "results": results}


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(max(1, args.threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    measured = {precision: measure(args, precision) for precision in args.precision}
    if int(os.environ.get("RANK", 0)) == 0:
        results = report(args, measured, int(os.environ.get("WORLD_SIZE", 1)))
        save(results, args.output)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
