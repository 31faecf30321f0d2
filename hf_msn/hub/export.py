"""Exports of the encoder alone that load without hf_msn."""

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import BaseImageProcessor, ViTMSNModel

from ..evaluation.backbones import unwrapped
from ..files import check_new_folder, whole_folder
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_pretraining import PretrainingModel
from ..models.modeling_semi_supervised import SemiSupervisedModel
from .export_image_processor import image_processor_for
from .timm_form import check_timm_can_make, save_timm_network


def export_backbone(
    model: MSNForPreTraining | SemiSupervisedModel,
    path: str | Path,
    which: Literal["target", "online"] = "target",
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    """Writes one encoder in a form that loads where hf_msn is not installed, with its image processor.

    A ViT becomes a plain `ViTMSNModel`: `AutoModel.from_pretrained(path)`, `AutoImageProcessor.from_pretrained(path)`.
    A network of timm gets timm's own form: `timm.create_model("local-dir:...")`, on the Hub `"hf-hub:user/name"`, and
    by `AutoModel` as a `TimmWrapperModel`.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`] or [`SuNCEtForPreTraining`]): The pretrained model, also
            in `DistributedDataParallel` or `torch.compile`. Heads and prototypes are left behind.
        path (`str` or `Path`): Folder to write. It must not exist or be empty.
        which (`str`, *optional*, defaults to `"target"`): Of MSN: `"target"`, which the paper evaluates, or
            `"online"`. The others have one encoder.
        image_processor (`BaseImageProcessor`, *optional*): Saved beside it as `preprocessor_config.json`; features
            are only right for images that are normalised as in training:
            `MultiViewTransform.evaluation_image_processor()`. By default the one saved with the model; if there is
            none, the paper's (shortest edge 256, centre crop 224, scaled to the model's size) with ImageNet's mean and
            standard deviation, and a warning.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If `model` is no pretraining model, `which` is neither, the folder is not empty, the image
            processor does not fit, or timm cannot make the encoder without hf_msn.
    """
    if which not in ("target", "online"):
        raise ValueError(
            f"`which` must be 'target' or 'online', but is '{which}'. The paper evaluates the target encoder."
        )
    model = pretraining_model(model)
    path = check_new_folder(path, "path")
    timm_model = getattr(model.config, "timm_model", None)
    if timm_model is not None:
        check_timm_can_make(model.config)
    encoder = model.evaluation_encoder if which == "target" else model.encoder
    image_processor = image_processor_for(model, encoder, image_processor)
    with whole_folder(path, "path") as folder:
        if timm_model is not None:
            save_timm_network(encoder, model.config, image_processor, folder)
        else:
            with torch.random.fork_rng(devices=[]):  # an export in the middle of training changes nothing in it
                export = ViTMSNModel(model.config.to_vit_msn_config()).to(model.dtype)
            export.load_state_dict(encoder.state_dict())
            export.save_pretrained(folder)
            image_processor.save_pretrained(folder)
    return path


def pretraining_model(model: nn.Module) -> MSNForPreTraining | SemiSupervisedModel:
    """`model` without wrappers.

    Raises:
        ValueError: If it is no pretraining model of hf_msn, or sharded.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(model, PretrainingModel):
        plain = " Plain transformers loads that already: write it with `save_pretrained`."
        raise ValueError(
            "`model` must be an MSNForPreTraining, PAWSForPreTraining or SuNCEtForPreTraining, but is "
            f"{type(model).__name__}.{plain if hasattr(model, 'save_pretrained') else ''} A folder is loaded first: "
            "`MSNForPreTraining.from_pretrained(folder)`."
        )
    if any(parameter.is_meta or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            "The weights of `model` are spread over ranks or not there, but an export needs all of them. Save it with "
            "`trainer.save_model(folder)`, load that with `from_pretrained`, and export what was loaded."
        )
    return model
