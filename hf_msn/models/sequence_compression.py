"""Sequence compression (arXiv 2410.22364): cheaper updates with fewer and larger patches."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ViTMSNConfig

from ..checks import check_integer, check_known, check_number
from ..files import read_json
from .masking import num_kept_patches, patches_per_side

KINDS = ("global", "focal", "support", "target")  # of views
LINEAR_STAGES = 5  # shapes change at few steps: each is compiled anew


@dataclass(frozen=True)
class ViewCompression:
    """Token dropout and patch size of one kind of view.

    Args:
        dropout (`float`, *optional*, defaults to 0): Fraction of the patches that each image loses, in [0, 1). Where
            the method masks, as MSN its anchors, of the patches that the mask keeps: of N patches
            floor(N (1 - mask_ratio) (1 - dropout)) are left.
        patch_size (`int`, *optional*): Pixels of a patch, by default the model's.
    """

    dropout: float = 0.0
    patch_size: int | None = None

    def __post_init__(self):
        remedy = "It is the fraction of the patches to drop."
        check_number("dropout", self.dropout, minimum=0, below=1, remedy=remedy)
        if self.patch_size is not None:
            check_integer("patch_size", self.patch_size, meaning="counts pixels", remedy="None is the model's.")

    def drop_ratio(self, mask_ratio: float) -> float:
        """Return the fraction of the patches that mask and dropout take together."""
        return 1 - (1 - mask_ratio) * (1 - self.dropout) if self.dropout else mask_ratio


class SequenceCompression:
    """Compress the views of a pretraining model while it trains: `model.compression = SequenceCompression(0.5)`.

    Patches are dropped at random, others for each image and at each step. They depend on the seed, the rank and the
    number of the draw alone (see [`~PretrainingModel.seed_masks`]), which are in the state dict. Larger patches are
    embedded with the same weights, see [`resample_patch_weight`]; views that are no multiple of them are resized.
    Without dropout and with the model's patch size a step is the plain one, bit for bit. In evaluation mode nothing is
    compressed.

    Args:
        dropout (`float`, *optional*, defaults to 0): Of all views that get a gradient, see [`ViewCompression`].
        patch_size (`int`, *optional*): Likewise.
        views (`Mapping`, *optional*): Settings of single kinds of views in place of these, such as
            `{"focal": {}, "target": {"dropout": 0.5}}`: "global" (anchors in MSN, both global views elsewhere),
            "focal", "support", and "target", the input of a moving average. Targets are whole by default. Where the
            targets are outputs of the trained encoder (PAWS, SimSiam), they come from the compressed global views.

    Attributes:
        views (`dict[str, ViewCompression]`): The settings by kind of view.
        counts (`Counter`): Work of the encoders so far, on this rank: `images` encoded, `tokens` in their layers, and
            `flops` and `plain_flops`, without compression, see [`encoder_flops`]; with a gradient three times those of
            the forward pass.

    Raises:
        ValueError: If a value is out of range, or a kind of view or a setting is unknown.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        patch_size: int | None = None,
        views: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        views = {} if views is None else views
        check_known(views, KINDS, "kind of view", remedy=f"There are {', '.join(KINDS)}.")
        every = ViewCompression(dropout, patch_size)
        self.views = {kind: ViewCompression() if kind == "target" else every for kind in KINDS}
        self.named = tuple(views)
        self.counts: Counter[str] = Counter()
        for kind, settings in views.items():
            if not isinstance(settings, Mapping):
                raise ValueError(
                    f"The {kind} views must have a mapping of settings, but have {settings!r}. Give dropout, "
                    "patch_size or both."
                )
            check_known(settings, ("dropout", "patch_size"), f"setting of the {kind} views")
            self.views[kind] = ViewCompression(**settings)

    def check(self, model, view_sizes: Mapping[str, int] | None = None) -> None:
        """Raise a `ValueError` if a pretraining model cannot be compressed like this, or has no such view.

        `view_sizes` are those of a transform, in pixels; by default global views of `config.image_size` are checked.
        """
        config = model.config
        remedy = f"This model has {', '.join(model.view_kinds)}."
        check_known(self.named, model.view_kinds, "kind of view", remedy=remedy)
        if getattr(config, "timm_model", None) is not None:
            raise ValueError(
                "Sequence compression needs a ViT of this package, whose patches can be dropped, but `timm_model` is "
                f"'{config.timm_model}'. Leave one of them out."
            )
        view_sizes = {"image_size": config.image_size, **(view_sizes or {})}
        for kind in model.view_kinds:
            size = view_sizes.get("focal_size" if kind == "focal" else "image_size")
            if size is not None:
                view = self.views[kind]
                num_patches = patches_per_side(size, view.patch_size or config.patch_size) ** 2
                if num_kept_patches(num_patches, view.drop_ratio(model.mask_ratio_of(kind))) < 1:
                    raise ValueError(
                        f"`dropout` {view.dropout} leaves none of the {num_patches} patches of the {kind} views of "
                        f"{size} pixels. Lower it, or choose a smaller `patch_size`."
                    )

    def count(
        self, config: ViTMSNConfig, view: ViewCompression, images: Sequence[torch.Tensor], mask_ratio: float
    ) -> None:
        """Add a pass of an encoder over `images` of one size to `counts`."""
        sides, num_images = images[0].shape[-2:], sum(map(len, images))
        passes = 3 if torch.is_grad_enabled() else 1
        compressed = (view.patch_size or config.patch_size, view.drop_ratio(mask_ratio))
        for name, (patch_size, ratio) in {"plain_flops": (config.patch_size, mask_ratio), "flops": compressed}.items():
            num_patches = math.prod(patches_per_side(side, patch_size) for side in sides)
            num_kept = num_kept_patches(num_patches, ratio)
            self.counts[name] += passes * num_images * encoder_flops(config, num_patches, num_kept, patch_size)
        self.counts["images"] += num_images
        self.counts["tokens"] += num_images * (1 + num_kept)


def compression_stages(
    schedule: str | os.PathLike | Sequence[Mapping[str, Any]], patch_size: int
) -> list[tuple[float, SequenceCompression]]:
    """Return the stages of a training: each with the part of the training, in [0, 1), at which it begins.

    Args:
        schedule (`str`, `Path` or a list of stages): "none"; "constant:0.5@24", a dropout of 0.5 and patches of 24
            pixels throughout; "linear:0.5@24", from these to no compression in 5 stages of equal length ("linear":
            from a dropout of 0.75); a list of stages, each with its `progress` and the arguments of a
            [`SequenceCompression`]: `[{"progress": 0, "dropout": 0.5}, {"progress": 0.75}]`; or a JSON file with such
            a list, or with `{"stages": such a list}`.
        patch_size (`int`): That of the model, in pixels.

    Raises:
        ValueError: If the schedule is unknown or no list of stages, a stage has an unknown field or a value out of
            range, or they do not begin at 0 in order.
    """
    if isinstance(schedule, (str, os.PathLike)):
        named = re.fullmatch(r"none|(constant(?=[:@])|linear)(?::([^@]*))?(?:@(\d+))?", os.fspath(schedule))
        schedule = _read_stages(schedule) if named is None else _named_stages(*named.groups(), own_size=patch_size)
    stages = []
    if not isinstance(schedule, Sequence) or not schedule:
        raise ValueError(f"A compression schedule must be a list of one stage or more, but is {schedule!r:.80}.")
    for stage in schedule:
        if not isinstance(stage, Mapping) or "progress" not in stage:
            raise ValueError(
                f"A stage of a compression schedule must be a mapping with `progress`, but is {stage!r:.80}. The "
                'first one is {"progress": 0, ...}.'
            )
        check_known(stage, ("progress", "dropout", "patch_size", "views"), "field of a stage")
        begins = check_number("progress", stage["progress"], minimum=0, below=1, meaning="is a part of the training")
        if begins <= stages[-1][0] if stages else begins != 0:
            raise ValueError(
                f"The stages of a compression schedule must begin at 0 and follow each other, but `progress` {begins} "
                f"comes {'after ' + str(stages[-1][0]) if stages else 'first'}. Put them in order."
            )
        stages.append((begins, SequenceCompression(**{k: value for k, value in stage.items() if k != "progress"})))
    return stages


def _named_stages(name: str | None, rate: str | None, patch_size: str | None, own_size: int) -> list[dict[str, Any]]:
    if name is None:
        return [{"progress": 0}]
    if rate is None:
        rate = "0.75" if name == "linear" and patch_size is None else "0"
    try:
        dropout = float(rate)
    except ValueError:
        dropout = rate  # which is then named
    first = {"progress": 0, "dropout": dropout, "patch_size": None if patch_size is None else int(patch_size)}
    if name == "constant":
        return [first]
    ViewCompression(first["dropout"], first["patch_size"])
    largest = first["patch_size"] or own_size
    shares = [1 - stage / (LINEAR_STAGES - 1) for stage in range(LINEAR_STAGES)]
    return [
        {
            "progress": stage / LINEAR_STAGES,
            "dropout": share * dropout,
            "patch_size": round(own_size + share * (largest - own_size)),
        }
        for stage, share in enumerate(shares)
    ]


def _read_stages(path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise ValueError(
            "A compression schedule must be none, constant:RATE@PATCH, linear:RATE@PATCH or a JSON file, but "
            f"'{path}' is none of them. `constant:0.5` drops half of the patches."
        )
    content = read_json(path)
    return content.get("stages") if isinstance(content, Mapping) else content


def encoder_flops(config: ViTMSNConfig, num_patches: int, num_kept: int, patch_size: int) -> int:
    """Return the FLOPs of a forward pass for one image, 2 per multiply-add, of matrix products alone.

    All patches are embedded, and [CLS] and the kept ones go through the layers; the last one computes the [CLS] alone.
    The backward pass has twice as many. Where linear layers dominate, the cost is in proportion to the number of
    tokens, as in the paper.
    """
    width, hidden, tokens = config.hidden_size, config.intermediate_size, 1 + num_kept
    embedding = num_patches * config.num_channels * patch_size**2 * width
    layer = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    last = 2 * (tokens + 1) * width**2 + 2 * width * hidden + 2 * tokens * width
    return 2 * (embedding + (config.num_hidden_layers - 1) * layer + last)
