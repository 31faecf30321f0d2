"""A network of timm in a folder that timm (`hf-hub:`, `local-dir:`) and transformers (`TimmWrapper`) both load."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BaseImageProcessor

from ..evaluation.backbones import weights_sha256
from ..models.configuration_semi_supervised import SemiSupervisedConfig
from .export_image_processor import output_size

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def check_timm_can_make(config: SemiSupervisedConfig) -> None:
    """Raises a `ValueError` if timm alone cannot make the encoder that `config` describes."""
    if config.small_image_stem:
        raise ValueError(
            f"'{config.timm_model}' with `small_image_stem` is no network that timm can make: none of its options "
            "gives a 3x3 stem of stride 1 without pooling. Share the checkpoint itself, which hf_msn loads with "
            "`from_pretrained`, or train without `small_image_stem`."
        )


def new_network(config: SemiSupervisedConfig, num_classes: int) -> nn.Module:
    """A network as `config` describes it, with a fresh classifier; the global random state is left as it is."""
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(config.timm_model, num_classes=num_classes, **(config.timm_options or {}))


def save_timm_network(
    network: nn.Module,
    config: SemiSupervisedConfig,
    image_processor: BaseImageProcessor,
    folder: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    timm reads its transform from `config.json`, transformers that of `preprocessor_config.json`; both are that of
    `image_processor`.

    Raises:
        ValueError: If timm's transform cannot express the image processor, or makes another network of the folder.
    """
    architecture = network.pretrained_cfg.get("architecture") or config.timm_model.split(".")[0]
    options = dict(config.timm_options or {})
    made_for = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if made_for is not None and _takes_any_size(network, options):
        options["img_size"] = list(made_for)  # of the position embeddings, whatever the size of the images
    num_classes = 0 if class_names is None else len(class_names)
    written = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": network.num_features,
        "model_args": options,
        # else transformers takes timm's transform where the folder is local, whose crops differ by a pixel
        "image_processor_type": image_processor.to_dict()["image_processor_type"],
        "pretrained_cfg": {
            **_input_settings(network, options),
            **timm_transform_settings(image_processor),
            "num_classes": num_classes,
        },
    }
    if class_names is not None:
        written["label_names"] = list(class_names)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor.save_pretrained(folder)
    _check_it_loads_equal(network, config.timm_model, folder, written["pretrained_cfg"]["input_size"])


def timm_transform_settings(image_processor: BaseImageProcessor) -> dict:
    """The fields of timm's `pretrained_cfg` that make the transform of an image processor.

    Raises:
        ValueError: If it does more or less than resize the shortest edge, crop a square and normalise.
    """
    settings = image_processor.to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    edge, (height, width) = size.get("shortest_edge"), output_size(image_processor)
    steps = all(settings.get(name) for name in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"))
    interpolation = _INTERPOLATIONS.get(int(settings.get("resample", -1)))
    by_255 = abs(settings.get("rescale_factor", 0) * 255 - 1) < 1e-6
    if not (
        steps and edge and by_255 and interpolation and crop.get("height") == crop.get("width") == height == width
    ):
        raise ValueError(
            "timm's transform resizes the shortest edge, crops the middle square and normalises values in [0, 1], but "
            f"`image_processor` has {settings}. Pass one of `evaluation_image_processor(...)`."
        )
    fraction = width / edge
    if math.floor(width / fraction) != edge:  # timm rounds down what it divides
        fraction = width / (edge + 0.5)
    return {
        "input_size": [3, height, width],
        "crop_pct": fraction,
        "crop_mode": "center",
        "interpolation": interpolation,
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
    }


def _input_settings(network: nn.Module, options: dict) -> dict:
    """What timm must know of the network to build it as it is, and not fitted to another input."""
    settings = {name: network.pretrained_cfg.get(name) for name in ("first_conv", "classifier")}
    settings["fixed_input_size"] = network.pretrained_cfg.get("fixed_input_size", False) and not _takes_any_size(
        network, options
    )
    return {name: value for name, value in settings.items() if value is not None}


def _takes_any_size(network: nn.Module, options: dict) -> bool:
    patches = getattr(network, "patch_embed", None)
    return bool(options.get("dynamic_img_size")) or getattr(patches, "strict_img_size", None) is False


@torch.no_grad()
def _check_it_loads_equal(network: nn.Module, name: str, folder: Path, size: list[int]) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        loaded(torch.zeros(1, *size))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # each network checks in its own way
        raise ValueError(
            f"'{name}' cannot be exported for images of {size[-1]} pixels: {error} Pass an `image_processor` of the "
            "size that the network takes; a ViT of timm has it as `img_size` in `timm_options`."
        ) from error
    dtype = next((tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()), None)
    if weights_sha256(loaded.to(dtype)) != weights_sha256(network):
        raise ValueError(
            f"'{name}' cannot be exported: of its name, its `timm_options` and images of {size[-1]} pixels timm makes "
            "another network. One of fixed size needs an `image_processor` of that size, or `img_size` in "
            "`timm_options`; one that was changed after it was made cannot be expressed."
        )
