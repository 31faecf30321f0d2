"""The image processor that goes with the weights of an export."""

import logging
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from ..data.transforms import evaluation_image_processor
from ..evaluation.backbones import is_timm_model, resolve_image_processor

logger = logging.getLogger(__name__)


def image_processor_for(
    model: nn.Module, encoder: nn.Module, image_processor: BaseImageProcessor | None
) -> BaseImageProcessor:
    """The image processor to save with an export: the given one, the one saved with the model, or the paper's.

    The paper's is made for the encoder's size and ImageNet's mean and standard deviation, which a warning names.

    Raises:
        ValueError: If the given one cannot be saved, or an image comes out of it in another size than a ViT takes.
    """
    takes = encoder.pretrained_cfg["input_size"][-1] if is_timm_model(encoder) else model.config.image_size
    if image_processor is None:
        try:
            image_processor = resolve_image_processor(model)
        except ValueError:
            logger.warning(
                "No image processor is saved with the model: the export gets the paper's evaluation at %d pixels, "
                "normalised by ImageNet's mean and standard deviation. Features are only right if training normalised "
                "images so too; else pass `image_processor=`, such as `transform.evaluation_image_processor()`.",
                takes,
            )
            image_processor = evaluation_image_processor(takes)
    if not isinstance(image_processor, BaseImageProcessor):
        raise ValueError(
            "`image_processor` must be an image processor of transformers, which can be saved, but is "
            f"{type(image_processor)}. Pass `transform.evaluation_image_processor()`."
        )
    side, wanted = output_size(image_processor), (takes, takes)
    if not is_timm_model(encoder) and side != wanted:
        raise ValueError(
            f"Images come out of `image_processor` with {side[0]} x {side[1]} pixels, but the exported ViT takes "
            f"{takes} x {takes}, so the two would not work together. Pass `evaluation_image_processor({takes}, ...)`."
        )
    return image_processor


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor makes of an image."""
    image = Image.fromarray(np.zeros((300, 400, 3), dtype=np.uint8))
    pixels: Any = image_processor(images=image, return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[-2:])
