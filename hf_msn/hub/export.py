"""Exports of an encoder that load without hf_msn: a plain ViTMSN for transformers, or timm's form for both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import BaseImageProcessor, ViTMSNModel
from transformers.utils import logging

from ..checks import check_choice
from ..data.transforms import evaluation_image_processor
from ..evaluation.backbones import is_timm_model, resolve_image_processor, unwrapped, weights_sha256
from ..files import check_new_folder, whole_folder, write_json
from ..models.configuration_pretraining import AnyEncoderConfig, PretrainingConfig
from ..models.modeling_pretraining import PretrainingModel
from ..models.paws_resnets import PAWS_NETWORKS

logger = logging.get_logger(__name__)


def export_backbone(
    model: PretrainingModel,
    path: str | Path,
    which: Literal["target", "online"] | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    """Write one encoder in a form that loads where hf_msn is not installed, with its image processor.

    A ViT becomes a plain `ViTMSNModel`: `AutoModel.from_pretrained(path)`, `AutoImageProcessor.from_pretrained(path)`.
    A network of timm gets timm's own form: `timm.create_model("local-dir:...")`, on the Hub `"hf-hub:user/name"`, and
    by `AutoModel` as a `TimmWrapperModel`. `pretrained_by` in `config.json` names the method, for the card.

    Args:
        model (a pretraining model, such as [`MSNForPreTraining`]): The pretrained model, also in
            `DistributedDataParallel` or `torch.compile`. Heads and prototypes are left out.
        path (`str` or `Path`): Folder to write. It must not exist or be empty.
        which (`str`, *optional*): Of MSN and BYOL: `"target"` or `"online"`; by default the one that their papers
            evaluate, MSN's target and BYOL's online encoder. The others have one encoder.
        image_processor (`BaseImageProcessor`, *optional*): Saved beside it; it must normalise as in training:
            `MultiViewTransform.evaluation_image_processor()`. By default the one saved with the model, else the
            paper's (shortest edge 256, centre crop 224, scaled to the model's size), with a warning.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `model` is no pretraining model, `which` is neither, the folder is not empty, the image
            processor does not fit, or timm cannot make the encoder without hf_msn.
    """
    check_choice("which", which, (None, "target", "online"))
    model = pretraining_model(model)
    path = check_new_folder(path, "path")
    encoder = model.evaluation_encoder if which is None else model.encoder
    if which == "target":
        encoder = getattr(model, "target_encoder", None) or encoder
    image_processor = image_processor_for(model, encoder, image_processor)
    with whole_folder(path, "path") as folder:
        write_backbone(encoder, model.config, image_processor, folder)
    return path


def write_backbone(
    encoder: nn.Module, config: PretrainingConfig, image_processor: BaseImageProcessor, folder: Path
) -> None:
    """Write an encoder that `config` describes into an existing folder."""
    check_timm_can_make(config)
    if is_timm_model(encoder):
        save_timm_network(encoder, config, image_processor, folder)
        return
    with torch.random.fork_rng(devices=[]):  # an export during training does not change its random numbers
        export = ViTMSNModel(config.to_vit_msn_config()).to(encoder.dtype)
    export.config.pretrained_by = config.describe_method()
    export.load_state_dict(encoder.state_dict())
    export.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def pretraining_model(model: nn.Module) -> PretrainingModel:
    """Return `model` without wrappers."""
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(model, PretrainingModel):
        plain = " `save_pretrained` writes it for plain transformers." if hasattr(model, "save_pretrained") else ""
        raise ValueError(
            "`model` must be a pretraining model of hf_msn, such as an MSNForPreTraining, but is "
            f"{type(model).__name__}.{plain} Load a folder with `MSNForPreTraining.from_pretrained(folder)`."
        )
    if any(parameter.is_meta or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            "The weights of `model` are spread over ranks or absent, but an export needs all of them. Save it with "
            "`trainer.save_model(folder)`, load that with `from_pretrained`, and export the loaded model."
        )
    return model


def image_processor_for(
    model: nn.Module, encoder: nn.Module, image_processor: BaseImageProcessor | None
) -> BaseImageProcessor:
    """Return the given image processor, else the one saved with the model, else the paper's with a warning."""
    size = encoder.pretrained_cfg["input_size"][-1] if is_timm_model(encoder) else model.config.image_size
    if image_processor is None:
        try:
            image_processor = resolve_image_processor(model)
        except ValueError:
            logger.warning(
                f"No image processor is saved with the model: the export gets the paper's, at {size} pixels, "
                "with ImageNet's mean and standard deviation. Features are only right if training normalised images "
                "like this; else pass `image_processor=`, such as `transform.evaluation_image_processor()`."
            )
            image_processor = evaluation_image_processor(size)
    if not isinstance(image_processor, BaseImageProcessor):
        raise ValueError(
            f"`image_processor` must be an image processor of transformers, but is {type(image_processor)}. Pass "
            "`transform.evaluation_image_processor()`."
        )
    output = _output_size(image_processor)
    if not is_timm_model(encoder) and output != (size, size):
        raise ValueError(
            f"`image_processor` gives images of {output[0]} x {output[1]} pixels, but the exported ViT takes {size} x "
            f"{size}. Pass `evaluation_image_processor({size}, ...)`."
        )
    return image_processor


def check_timm_can_make(config: PretrainingConfig) -> None:
    """Raise a `ValueError` if the encoder is a network that timm alone cannot make."""
    name = getattr(config, "timm_model", None)
    if name is not None and (config.small_image_stem or name in PAWS_NETWORKS):
        raise ValueError(
            f"'{name}'{' with `small_image_stem`' if config.small_image_stem else ''} is a network that timm cannot "
            "make without hf_msn. Share the checkpoint itself, which hf_msn loads with `from_pretrained`, or train "
            "another `timm_model`."
        )


def save_timm_network(
    network: nn.Module,
    config: AnyEncoderConfig,
    image_processor: BaseImageProcessor,
    folder: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json`.

    timm reads its transform from `config.json`, transformers that of `preprocessor_config.json`; both are that of
    `image_processor`.
    """
    options, cfg = dict(config.timm_options or {}), network.pretrained_cfg
    if cfg.get("fixed_input_size"):  # timm made the network for its own size, whatever that of the images is
        options.setdefault("img_size", list(cfg["input_size"][-2:]))
    num_classes = 0 if class_names is None else len(class_names)
    described = {
        **{name: cfg[name] for name in ("first_conv", "classifier") if cfg.get(name) is not None},
        "fixed_input_size": False,  # else timm would make the network for `input_size`, that of the images
        **_timm_transform(image_processor),
        "num_classes": num_classes,
    }
    written: dict[str, Any] = {
        "architecture": cfg.get("architecture") or config.timm_model.split(".")[0],
        "num_classes": num_classes,
        "num_features": network.num_features,
        "model_args": options,
        "pretrained_by": config.describe_method(),
        # without it transformers takes timm's transform for a local folder, whose crops differ by a pixel
        "image_processor_type": image_processor.to_dict()["image_processor_type"],
        "pretrained_cfg": described,
    }
    if class_names is not None:
        written["label_names"] = list(class_names)
    write_json(folder / "config.json", written)
    # cloned, as safetensors takes no tensor under two names and timm wants both
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor.save_pretrained(folder)
    _check_loads_equal(network, config.timm_model, folder, described["input_size"])


def load_under_head(classifier: nn.Module, encoder: nn.Module, name: str) -> nn.Module:
    """Load an encoder into a classifier of timm. Return its head, which must be one linear layer on the features."""
    fault, head = classifier.load_state_dict(encoder.state_dict(), strict=False), classifier.get_classifier()
    is_linear = isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1))
    own = set(map(id, head.parameters())) if is_linear else set()
    of_head = {key for key, value in classifier.state_dict(keep_vars=True).items() if id(value) in own}
    if not of_head or fault.unexpected_keys or set(fault.missing_keys) != of_head:
        raise ValueError(
            f"A classifier must have one linear layer on its features, but '{name}' has another head. Export the "
            "backbone, fine-tune it with `head` suncet, or take another network."
        )
    return head


def _timm_transform(image_processor: BaseImageProcessor) -> dict:
    """Return the fields of timm's `pretrained_cfg` that make the transform of an image processor."""
    settings = image_processor.to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    edge, (height, width) = size.get("shortest_edge"), _output_size(image_processor)
    steps = all(settings.get(name) for name in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"))
    by_255 = abs(settings.get("rescale_factor", 0) * 255 - 1) < 1e-6
    if not (steps and edge and by_255 and crop.get("height") == crop.get("width") == height == width):
        raise ValueError(
            "timm's transform resizes the shortest edge, crops the middle square and normalises values in [0, 1], but "
            f"`image_processor` has {settings}. Pass one of `evaluation_image_processor(...)`."
        )
    fraction = width / edge
    if math.floor(width / fraction) != edge:  # timm rounds the quotient down
        fraction = width / (edge + 0.5)
    return {
        "input_size": [3, height, width],
        "crop_pct": fraction,
        "crop_mode": "center",
        "interpolation": Image.Resampling(settings["resample"]).name.lower(),
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
    }


@torch.no_grad()
def _check_loads_equal(network: nn.Module, name: str, folder: Path, size: list[int]) -> None:
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
            f"'{name}' cannot be exported: from its name, its `timm_options` and images of {size[-1]} pixels timm "
            "makes another network. One of fixed size needs an `image_processor` of that size, or `img_size` in "
            "`timm_options`; one that was changed after it was made cannot be expressed."
        )


def _output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Return height and width in pixels of the images that an image processor gives."""
    image = Image.fromarray(np.zeros((300, 400, 3), dtype=np.uint8))
    pixels: Any = image_processor(images=image, return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[-2:])
