"""MSN by other libraries beside ours: images a second of the training step and of making the views, turn by turn.

All sides have the same model, views, batch, threads and precision, in one process. A library that is not installed is
named and left out: pip install lightly timm, pip install stable-pretraining.

    python scripts/benchmark_peers.py --model s16 --output peers.json
    python scripts/benchmark_peers.py --model vit_tiny --precision fp32 --peers lightly
"""

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

import torch
from benchmark_report import bars, machine, markdown_table, save, summarize
from benchmark_step import ModelArguments, option, random_views
from peer_sides import Shape, Side, UnsupportedViewsError, our_side
from peer_views import made_up_jpegs, measure_views, our_views
from transformers import HfArgumentParser

# name: the sibling module with its SIDES and VIEWS, and how it is installed
PEERS = {
    "lightly": ("peers_lightly", "pip install lightly timm"),
    "stable_pretraining": ("peers_stable_pretraining", "pip install stable-pretraining"),
}


@dataclass
class PeerArguments(ModelArguments):
    model: Literal["vit_tiny", "s16", "b16", "l16"] = option("Size of the paper.", "s16")
    num_prototypes: int = option("Prototypes of every side.", 1024)
    image_size: int = option("Pixels of target and anchor views.", 224)
    focal_size: int = option("Pixels of focal views.", 96)
    anchor_views: int = option("Masked global views an image, besides the target.", 1)
    focal_views: list[int] = field(
        default_factory=lambda: [10, 0],
        metadata={"help": "Small views an image; a table for each number. Not every library can have any."},
    )
    batch_size: int = option("Images of a step.", 8)
    precision: list[str] = field(
        default_factory=lambda: ["fp32", "bf16"], metadata={"help": "fp32, bf16 (autocast) or both, for all sides."}
    )
    peers: list[str] = field(
        default_factory=lambda: list(PEERS), metadata={"help": f"Libraries to compare with, of {', '.join(PEERS)}."}
    )
    steps: int = option("Timed rounds; in each, every side takes one step.", 7)
    warmup_steps: int = option("Rounds before them.", 2)
    images: int = option("JPEGs whose views are timed; 0 leaves the views out.", 24)
    jpeg_size: list[int] = field(default_factory=lambda: [500, 375], metadata={"help": "Their width and height."})
    threads: int = option("CPU threads of the steps. The views are made on one.", 2)
    cpu: bool = option("Use the CPU where there is a GPU.", False)
    output: str | None = option("Write settings, times and ratios to this JSON file, and a picture beside it.")

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("precision", ["fp32", "bf16"]), ("peers", list(PEERS))):
            if wrong := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"`{name}` is of {' and '.join(known)}, but has {wrong}.")
        for name, least in (("steps", 1), ("warmup_steps", 1), ("anchor_views", 1), ("batch_size", 2), ("images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, but is {getattr(self, name)}.")
        if not self.focal_views or min(self.focal_views) < 0:
            raise ValueError(f"`focal_views` is one or more numbers >= 0, but is {self.focal_views}.")
        if len(self.jpeg_size) != 2 or min(self.jpeg_size) < 16:
            raise ValueError(f"`jpeg_size` is width and height, each >= 16, but is {self.jpeg_size}.")

    def shape(self, focal_views: int) -> Shape:
        named = {entry.name: getattr(self, entry.name) for entry in fields(Shape)}
        return Shape(**{**named, "focal_views": focal_views})


def load_peers(names: list[str]) -> tuple[list[Callable], list[Callable], dict[str, str]]:
    """What builds the steps and the views of the libraries that are installed, and why the others are not here."""
    sides, views, absent = [], [], {}
    for name in names:
        module, install = PEERS[name]
        try:
            module = importlib.import_module(module)
        except ImportError as error:
            absent[name] = f"not installed ({error}): {install}"
            continue
        sides += module.SIDES
        views += module.VIEWS
    return sides, views, absent


def build_sides(builders: list[Callable], shape: Shape, device: torch.device) -> tuple[list[Side], list[str]]:
    """The sides that can take these views, and a line for each that cannot."""
    sides, refusals = [], []
    for builder in builders:
        torch.manual_seed(0)
        try:
            sides.append(builder(shape, device))
        except UnsupportedViewsError as error:
            name = builder.__module__.removeprefix("peers_").replace("_", "-")
            refusals.append(f"{name}: not at {shape.focal_views} focal views ({error})")
    return sides, refusals


def check_equal_work(ours: dict, theirs: dict, name: str, other_tokens: bool) -> None:
    """Refuses a comparison of unequal work.

    Raises:
        RuntimeError: A loss that is not finite, other prototypes, other tokens (unless the side says so), parameters
            that differ by more than 3 %.
    """
    for side, work in (("hf_msn", ours), (name, theirs)):
        if not math.isfinite(work["loss"]):
            raise RuntimeError(f"The loss of {side} is {work['loss']}: its times mean nothing.")
    wrong = [
        key for key in ("prototypes", "tokens") if ours[key] != theirs[key] and not (key == "tokens" and other_tokens)
    ]
    if abs(theirs["parameters"] - ours["parameters"]) > 0.03 * ours["parameters"]:
        wrong.append("parameters")
    if wrong:
        told = "; ".join(f"{key}: {ours[key]} of hf_msn, {theirs[key]} of {name}" for key in wrong)
        raise RuntimeError(f"The two steps do not do the same work and are not compared. {told}.")


def measure_steps(sides: list[Side], batch: dict[str, torch.Tensor], precision: str, steps: int, warmup: int) -> dict:
    """Seconds of each step of each side; in every round all sides take one, in turn from another one on."""
    prepared = [side.prepare(batch) for side in sides]
    seconds = {side.name: [] for side in sides}
    for number in range(warmup + steps):
        for place in range(len(sides)):
            turn = (number + place) % len(sides)
            started = now()
            loss = sides[turn].step(prepared[turn], precision)
            elapsed = now() - started
            if not torch.isfinite(loss):
                raise RuntimeError(f"The loss of {sides[turn].name} became {loss.item()} in {precision}.")
            if number >= warmup:
                seconds[sides[turn].name].append(elapsed)
    return seconds


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rates(seconds: dict[str, list[float]], images: int) -> dict[str, dict]:
    """Images a second of each side, and ours over theirs, round by round."""
    ours = seconds["hf_msn"]
    return {
        name: {
            "images_per_second": summarize([images / value for value in times]),
            # Times of one round are neighbours: what else the machine did slowed all.
            "ratio": None if name == "hf_msn" else summarize([b / a for a, b in zip(ours, times)]),
            "seconds": times,
        }
        for name, times in seconds.items()
    }


def run_steps(args: PeerArguments, builders: list[Callable], focal_views: int) -> dict:
    """Counts and times the steps at one number of focal views."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    shape = args.shape(focal_views)
    sides, refusals = build_sides([our_side, *builders], shape, device)
    batch = {name: views.to(device) for name, views in random_views(shape, 0).items()}
    work = {side.name: side.work(side.prepare(batch), args.batch_size) for side in sides}
    for side in sides[1:]:
        check_equal_work(work["hf_msn"], work[side.name], side.name, side.other_tokens)
    return {
        "work": work,
        "refusals": refusals,
        "differs": {side.name: side.differs for side in sides},
        "precision": {
            precision: rates(measure_steps(sides, batch, precision, args.steps, args.warmup_steps), args.batch_size)
            for precision in args.precision
        },
    }


def run_views(args: PeerArguments, builders: list[Callable]) -> dict:
    """Times the views of one image from a JPEG."""
    shape = args.shape(max(args.focal_views))
    makers = [builder(shape) for builder in [our_views, *builders]]
    seconds = measure_views(makers, made_up_jpegs(args.images, *args.jpeg_size), shape)
    return {"rates": rates(seconds, 1), "differs": {maker.name: maker.differs for maker in makers}}


def report(args: PeerArguments, steps: dict[int, dict], views: dict | None, absent: dict[str, str]) -> dict:
    """Prints the tables and what each side leaves out; returns what they show, as JSON takes it."""
    print(
        f"{args.model} ({args.hidden_size} x {args.num_hidden_layers}, patch {args.patch_size}), {args.image_size} "
        f"and {args.focal_size} px, {args.mask_ratio:.0%} dropped, batch {args.batch_size}\n{machine()['processor']}, "
        f"{args.threads} threads, torch {torch.__version__}; median of {args.steps} steps (quartiles)"
    )
    for focal_views, entry in steps.items():
        print(f"\nTraining step, images/s: 1 target + {args.anchor_views} anchor + {focal_views} focal views\n")
        columns = ["", "parameters, M", "tokens an image", "GFLOP an image"]
        columns += [title for precision in args.precision for title in (precision, "hf_msn / it")]
        rows = []
        for name, work in entry["work"].items():
            tokens = sum(length * number for length, number in work["tokens"].items())
            row = [name, f"{work['parameters'] / 1e6:.2f}", f"{tokens:.0f}", f"{work['gflop']:.2f}"]
            for precision in args.precision:
                rate = entry["precision"][precision][name]
                row += [rate["images_per_second"], rate["ratio"]]
            rows.append(row)
        print(markdown_table(columns, rows))
        print("".join(f"\n{refusal}" for refusal in entry["refusals"]))
    if views is not None:
        focal_views = max(args.focal_views)
        print(
            f"\nViews of an image from a JPEG of {' x '.join(map(str, args.jpeg_size))}, 1 thread, images/s: "
            f"{1 + args.anchor_views} + {focal_views} views; median of {args.images}\n"
        )
        rows = [[name, entry["images_per_second"], entry["ratio"]] for name, entry in views["rates"].items()]
        print(markdown_table(["", "images/s", "hf_msn / it"], rows))
    differs = {f"{name}, step": lines for entry in steps.values() for name, lines in entry["differs"].items() if lines}
    differs |= {f"{name}, views": lines for name, lines in (views or {"differs": {}})["differs"].items() if lines}
    grouped = {}
    for name, lines in differs.items():
        grouped.setdefault(tuple(lines), []).append(name)
    print("\nWhat each leaves out or does otherwise")
    for lines, names in grouped.items():
        print(f"\n{' and '.join(names)}" + "".join(f"\n- {line}" for line in lines))
    print("".join(f"\n{name}: {reason}" for name, reason in absent.items()))
    return {
        "arguments": asdict(args),
        "machine": machine(args.threads),
        "steps": steps,
        "views": views,
        "differs": differs,
        "absent": absent,
    }


def picture(results: dict):
    """Images a second of every step, as bars."""
    named = {
        f"{name}, {focal_views} focal views, {precision}": rate["images_per_second"]
        for focal_views, entry in results["steps"].items()
        for precision, sides in entry["precision"].items()
        for name, rate in sides.items()
    }
    return bars(named, "images / s", f"Training step, {results['arguments']['model']}")


def main() -> None:
    (args,) = HfArgumentParser(PeerArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    sides, views, absent = load_peers(args.peers)
    steps = {focal_views: run_steps(args, sides, focal_views) for focal_views in dict.fromkeys(args.focal_views)}
    made = run_views(args, views) if args.images else None
    results = report(args, steps, made, absent)
    save(results, args.output, picture(results) if args.output else None)


if __name__ == "__main__":
    main()
