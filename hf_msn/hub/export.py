"""Exports that load without hf_msn."""

import os
import shutil
from pathlib import Path
from typing import Literal

from transformers import BaseImageProcessor, ViTMSNModel

from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_semi_supervised import SemiSupervisedModel


def export_backbone(
    model: MSNForPreTraining | SemiSupervisedModel,
    path: str | Path,
    which: Literal["target", "online"] = "target",
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    """Writes one encoder as a plain `ViTMSNModel`, which loads where hf_msn is not installed.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`] or [`SuNCEtForPreTraining`]): The pretrained model. Heads
            and prototypes are left behind.
        path (`str` or `Path`): Folder to write. It must not exist or be empty.
        which (`str`, *optional*, defaults to `"target"`): Of MSN: `"target"`, which the paper evaluates, or
            `"online"`. The others have one encoder.
        image_processor (`BaseImageProcessor`, *optional*): Saved beside it as `preprocessor_config.json`. Features are
            only right for images that are normalised as in training:
            `MultiViewTransform.evaluation_image_processor()`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `which` is neither, the folder is not empty, or the encoder is a network of timm.
    """
    if which not in ("target", "online"):
        raise ValueError(
            f"`which` must be 'target' or 'online', but is '{which}'. The paper evaluates the target encoder."
        )
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"The folder '{path}' is not empty. Choose another, or remove it first.")
    if getattr(model.config, "timm_model", None) is not None:
        raise ValueError(
            f"The encoder is '{model.config.timm_model}' of timm, which no ViTMSNModel can hold. Save it in timm's "
            "form: `timm.models.save_for_hf(model.encoder, path)`."
        )
    encoder = model.evaluation_encoder if which == "target" else model.encoder
    export = ViTMSNModel(model.config.to_vit_msn_config()).to(model.dtype)
    export.load_state_dict(encoder.state_dict())

    staging = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        export.save_pretrained(staging)
        if image_processor is not None:
            image_processor.save_pretrained(staging)
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path
