"""MSN by other libraries beside ours: images per second of the training step and of making the views, in turns.

All sides have the same model, views, batch, threads and precision, in one process. A library that is not installed is
named and left out: pip install lightly timm stable-pretraining.

    python scripts/benchmarks/peers.py --model s16 --output runs/peers.json
    python scripts/benchmarks/peers.py --model vit_tiny --precision fp32 --peers lightly
"""

import copy
import io
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # stable-pretraining logs to stdout, where the table is printed

import timm.models.vision_transformer as timm_vit
import torch
from data import photograph
from PIL import Image
from report import bars, check_known, machine, markdown_table, now, option, save, summarize
from step import FIELDS, ModelArguments, random_views
from torch import nn
from transformers import HfArgumentParser

from hf_msn import MSNConfig, MSNForPreTraining, MultiViewTransform, decode_image
from hf_msn.cli.main import run_script

MOMENTUM = 0.996


@dataclass
class PeerArguments(ModelArguments):
    num_prototypes: int = option("Prototypes of every side.", 1024)
    image_size: int = option("Pixels of target and anchor views.", 224)
    focal_size: int = option("Pixels of focal views.", 96)
    focal_views: list[int] = option("Focal views per image; one table per number.", (10, 0))
    batch_size: int = option("Images per step.", 8)
    precision: list[str] = option("Precision of all sides.", ("fp32", "bf16"))
    peers: list[str] = option("Libraries.", ("lightly", "stable_pretraining"))
    steps: int = option("Timed rounds; in each, every side takes one step.", 7)
    warmup_steps: int = option("Rounds before them.", 2)
    images: int = option("JPEGs of 500 x 375 whose views are timed; 0 leaves the views out.", 24)
    threads: int = option("CPU threads of the steps. The views are made on one.", 2)
    cpu: bool = option("Use the CPU where there is a GPU.", False)
    output: str | None = option("JSON file; a picture goes beside it.")

    anchor_views = 1

    def __post_init__(self):
        super().__post_init__()
        check_known("precision", self.precision, ("fp32", "bf16"))
        check_known("peers", self.peers, SIDES)


@dataclass
class Side:
    """One library's training step: `loss(batch)` with gradient, its optimizer, and the update of the moving average.

    `differs` lists what the library leaves out or does otherwise.
    """

    name: str
    model: nn.Module
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    update_target: Callable[[], None]
    optimizer: torch.optim.Optimizer
    clipped: list[nn.Parameter] | None = None
    differs: tuple[str, ...] = ()

    def step(self, batch: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        device = batch["pixel_values"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss(batch)
        loss.backward()
        if self.clipped is not None:
            nn.utils.clip_grad_norm_(self.clipped, 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_target()
        return loss.detach()


def our_side(args: PeerArguments, focal_views: int, device: torch.device) -> Side:
    """Our model with the optimizer, the parameter groups and the clipping of `MSNTrainer`."""
    shape = {name: getattr(args, name) for name in (*FIELDS, "image_size", "num_prototypes")}
    model = MSNForPreTraining(MSNConfig(**shape, intermediate_size=4 * args.hidden_size)).to(device).train()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim > 1 and name != "prototypes"]
    others = [parameter for name, parameter in trained if parameter.ndim == 1 or name == "prototypes"]
    return Side(
        name="hf_msn",
        model=model,
        loss=lambda batch: model(**batch).loss,
        update_target=lambda: model.update_target(MOMENTUM),
        optimizer=torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], fused=True),
        clipped=[parameter for name, parameter in trained if name != "prototypes"],
    )


def timm_encoder(args: PeerArguments, **settings: Any) -> nn.Module:
    return timm_vit.VisionTransformer(
        img_size=args.image_size,
        patch_size=args.patch_size,
        depth=args.num_hidden_layers,
        num_heads=args.num_attention_heads,
        embed_dim=args.hidden_size,
        num_classes=0,
        **settings,
    )


def lightly_side(args: PeerArguments, focal_views: int, device: torch.device) -> Side:
    """lightly's components put together as in its documentation, on timm's VisionTransformer."""
    from lightly.loss import MSNLoss
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.heads import MSNProjectionHead

    vit = timm_encoder(args, dynamic_img_size=True)
    online = nn.ModuleDict(
        {
            "encoder": MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization="learn"),
            "head": MSNProjectionHead(input_dim=args.hidden_size),
        }
    )
    target = copy.deepcopy(online)
    utils.deactivate_requires_grad(target)
    prototypes = nn.Linear(256, args.num_prototypes, bias=False)
    model = nn.ModuleDict({"online": online, "target": target, "prototypes": prototypes}).to(device).train()
    criterion = MSNLoss()

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        anchors = torch.cat(batch["anchor_pixel_values"].unbind(1))
        kept, _ = utils.random_token_mask(
            (len(anchors), online["encoder"].sequence_length), mask_ratio=args.mask_ratio, device=device
        )
        projected = [online["head"](online["encoder"](anchors, idx_keep=kept))]
        if focal_views:
            projected.append(online["head"](online["encoder"](torch.cat(batch["focal_pixel_values"].unbind(1)))))
        with torch.no_grad():
            targets = target["head"](target["encoder"](batch["pixel_values"]))
        return criterion(torch.cat(projected), targets, prototypes.weight)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Side(
        name="lightly",
        model=model,
        loss=loss,
        update_target=lambda: utils.update_momentum(online, target, MOMENTUM),
        optimizer=torch.optim.AdamW(trained, lr=1.5e-4),
        differs=(
            "parts without a loop: no schedules, no groups without decay, no clipping, torch's default AdamW",
            "computes all tokens in the last block, though the loss reads the [CLS] alone",
            "anchors and focal views have batch statistics of their own in the head",
            "the loss is the logarithm of a power of probabilities, not computed in log space",
        ),
    )


def stable_pretraining_side(args: PeerArguments, focal_views: int, device: torch.device) -> Side | None:
    """The method `MSN` of stable-pretraining, without Lightning's loop. It takes no focal views."""
    from stable_pretraining.backbone import TeacherStudentWrapper
    from stable_pretraining.methods.msn import MSN

    if focal_views:
        return None
    model = MSN(
        timm_encoder(args),
        n_prototypes=args.num_prototypes,
        mask_ratio=args.mask_ratio,
        image_size=args.image_size,
        ema_decay_start=MOMENTUM,
    )
    model = model.to(device).train()
    averages = [module for module in model.modules() if isinstance(module, TeacherStudentWrapper)]
    return Side(
        name="stable-pretraining",
        model=model,
        loss=lambda batch: model(view1=batch["anchor_pixel_values"][:, 0], view2=batch["pixel_values"]).loss,
        update_target=lambda: [average.update_teacher() for average in averages],
        optimizer=torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad]),
        differs=(
            "drops nothing: a mask token takes the place of a masked patch, at the cost of all tokens",
            "no focal views, no batch normalisation in the head, prototypes are not normalised",
            "its Lightning loop is left out, and torch's default AdamW taken, without groups and clipping",
        ),
    )


SIDES = {"lightly": lightly_side, "stable_pretraining": stable_pretraining_side}


def build_sides(args: PeerArguments, focal_views: int, device: torch.device) -> tuple[list[Side], list[str]]:
    """Return the sides that can take these views, and a line for each that cannot."""
    sides, absent = [], []
    for name in ["hf_msn", *args.peers]:
        torch.manual_seed(0)
        try:
            side = our_side(args, focal_views, device) if name == "hf_msn" else SIDES[name](args, focal_views, device)
        except ImportError as error:
            absent.append(f"{name}: not installed ({error})")
            continue
        if side is None:
            absent.append(f"{name}: takes no focal views")
        else:
            sides.append(side)
    return sides, absent


def check_equal_size(sides: list[Side]) -> None:
    """Check that the trained parameters differ by at most 3 % from ours."""
    sizes = {side.name: sum(p.numel() for p in side.model.parameters() if p.requires_grad) for side in sides}
    wrong = {name: size for name, size in sizes.items() if abs(size / sizes["hf_msn"] - 1) > 0.03}
    if wrong:
        raise RuntimeError(f"The models differ in size and are not compared: {wrong}, ours {sizes['hf_msn']}.")


def measure_steps(args: PeerArguments, sides: list[Side], batch: dict[str, torch.Tensor], precision: str) -> dict:
    """Return seconds of each step of each side; in every round all sides take one, in a rotating order."""
    seconds = {side.name: [] for side in sides}
    for number in range(args.warmup_steps + args.steps):
        for place in range(len(sides)):
            side = sides[(number + place) % len(sides)]
            started = now()
            loss = side.step(batch, precision).item()
            elapsed = now() - started
            if not math.isfinite(loss):
                raise RuntimeError(f"The loss of {side.name} became {loss} in {precision}.")
            if number >= args.warmup_steps:
                seconds[side.name].append(elapsed)
    return seconds


def view_makers(args: PeerArguments) -> dict[str, Callable[[bytes], Any]]:
    """Return for each library a function from a JPEG to all views of the image, with MSN's settings."""
    focal_views = max(args.focal_views)
    transform = MultiViewTransform(image_size=args.image_size, focal_size=args.focal_size, focal_views=focal_views)
    makers = {"hf_msn": lambda jpeg: transform(decode_image({"bytes": jpeg, "path": None}))}
    if "lightly" in args.peers:
        with suppress(ImportError):
            from lightly.transforms import MSNTransform

            sizes = {"random_size": args.image_size, "focal_size": args.focal_size}
            theirs = MSNTransform(**sizes, random_views=2, focal_views=focal_views, cj_strength=0.5)
            makers["lightly"] = lambda jpeg: theirs(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    return makers


def measure_views(makers: dict[str, Callable], images: int) -> dict[str, list[float]]:
    """Return seconds of the views of each image by each side, in turns on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {name: [] for name in makers}
    for jpeg in [photograph(number, (500, 375)) for number in range(images)]:
        for name, make in makers.items():
            started = now()
            make(jpeg)
            seconds[name].append(now() - started)
    torch.set_num_threads(threads)
    return {name: times[1:] or times for name, times in seconds.items()}  # the first image compiles


def compare(seconds: dict[str, list[float]], images: int) -> dict[str, dict]:
    """Return images per second of each side, and its time relative to ours, round by round."""
    return {
        name: {
            "images_per_second": summarize([images / value for value in times]),
            "ratio": summarize([theirs / ours for ours, theirs in zip(seconds["hf_msn"], times)]),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    (args,) = HfArgumentParser(PeerArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    print(
        f"{args.model} ({args.hidden_size} x {args.num_hidden_layers}, patch {args.patch_size}), batch "
        f"{args.batch_size}; {machine()['processor']}, {args.threads} threads, torch {torch.__version__}; medians "
        "(quartiles)"
    )
    columns = ["", "images/s", "its time / ours"]
    results: dict[str, Any] = {"arguments": asdict(args), "machine": machine(), "steps": {}}
    for focal_views in args.focal_views:
        sides, absent = build_sides(args, focal_views, device)
        check_equal_size(sides)
        shape = PeerArguments(**{**asdict(args), "focal_views": focal_views})
        batch = {name: views.to(device) for name, views in random_views(shape, 0).items()}
        for precision in args.precision:
            found = compare(measure_steps(args, sides, batch, precision), args.batch_size)
            results["steps"][f"{focal_views} focal views, {precision}"] = found
            print(f"\nTraining step: 1 target + 1 anchor + {focal_views} focal views, {precision}\n")
            print(markdown_table(columns, [[name, *entry.values()] for name, entry in found.items()]))
        for side in sides[1:]:
            print(f"\n{side.name}" + "".join(f"\n- {line}" for line in side.differs))
        print("".join(f"\n{line}" for line in absent))
    if args.images:
        results["views"] = compare(measure_views(view_makers(args), args.images), 1)
        print(f"\nViews of an image from a JPEG, 1 thread: 2 + {max(args.focal_views)} views\n")
        print(markdown_table(columns, [[name, *entry.values()] for name, entry in results["views"].items()]))
    named = {
        f"{name}, {title}": entry["images_per_second"]
        for title, found in results["steps"].items()
        for name, entry in found.items()
    }
    save(results, args.output, bars(named, "images / s", f"Training step, {args.model}") if args.output else None)


if __name__ == "__main__":
    run_script(main)
