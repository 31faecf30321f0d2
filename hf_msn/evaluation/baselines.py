"""What pretraining has to beat: the pixels themselves, and the same network with random weights."""

import copy
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ViTMSNModel

from ..data.map_style import AnyDataset
from ..models.configuration_pretraining import PretrainingConfig
from ..models.encoder import PatchDroppingViTMSNModel
from .backbones import FeatureSpace, find_backbone, is_timm_model, unwrapped
from .features import Features, pixel_features, process_image, unit_range

MAX_PIXEL_SIZE = 64


def raw_pixel_features(dataset: AnyDataset, image_processor: Any, **extraction: Any) -> Features:
    """Return the RGB values in [0, 1] of whole images as features, with the arguments of `pixel_features`.

    The images are resized, where they differ, to the size that `image_processor` gives, but at most 64 x 64: 12,288
    values, 49 kB per image.
    """
    height, width = process_image(image_processor, Image.new("RGB", (400, 300))).shape[-2:]
    size = (min(width, MAX_PIXEL_SIZE), min(height, MAX_PIXEL_SIZE))

    def to_pixels(image: Image.Image) -> torch.Tensor:
        return unit_range(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))

    return pixel_features(dataset, to_pixels, **extraction)


def untrained_like(model: nn.Module, features: FeatureSpace = "backbone", seed: int = 0) -> nn.Module | None:
    """Return a model of the same architecture with the random weights that it would start from.

    `None` if the model does not say how it was made: it is neither of transformers nor of timm, or was changed since.
    """
    model = unwrapped(model)
    made = find_backbone(model) if features == "backbone" else model
    if isinstance(getattr(model, "config", None), PretrainingConfig) and not isinstance(made, PreTrainedModel):
        made = model  # whose configuration has the options of its network of timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(made, PreTrainedModel):
            # transformers starts a ViTMSN without positions, too weak a baseline
            cls = PatchDroppingViTMSNModel if type(made) is ViTMSNModel else type(made)
            try:
                return cls(copy.deepcopy(made.config)).eval()
            except (TypeError, ValueError):  # a class of the user's own that takes more than a configuration
                return None
        architecture = made.pretrained_cfg.get("architecture") if is_timm_model(made) else None
        if architecture is None:
            return None
        fresh = timm.create_model(architecture, pretrained=False, num_classes=made.num_classes).eval()
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (made, fresh)]
    return fresh if shapes[0] == shapes[1] else None
