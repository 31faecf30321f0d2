"""Configuration of SimCLR + SuNCEt: the settings of the forward pass."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from .configuration_pretraining import SemiSupervisedConfig


@strict
class SuNCEtConfig(SemiSupervisedConfig):
    """Configuration of a [`SuNCEtForPreTraining`] (arXiv 2006.10803).

    The encoder is a ViTMSN, described by the fields of `ViTMSNConfig`, or a network of timm: see
    [`SemiSupervisedConfig`], which has the other fields.
    """

    model_type = "suncet"

    full_gradient: bool = HfArg(
        default=True,
        help="Gradient of SimCLR's loss also through the views that one is compared with, as in its equation. The "
        "authors' code of SuNCEt has none there.",
    )
