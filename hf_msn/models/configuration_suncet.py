"""Configuration of SimCLR + SuNCEt: the settings of the forward pass."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from ..checks import check_integer
from .configuration_pretraining import SemiSupervisedConfig


@strict
class SuNCEtConfig(SemiSupervisedConfig):
    """Configuration of a [`SuNCEtForPreTraining`] (arXiv 2006.10803).

    The encoder is a ViTMSN, described by the fields of `ViTMSNConfig`, or a network of timm: see
    [`AnyEncoderConfig`], which has the other fields.
    """

    model_type = "suncet"

    full_gradient: bool = HfArg(
        default=True,
        help="Gradient of SimCLR's loss also through the views that one is compared with, as in its equation. The "
        "authors' code of SuNCEt has none there.",
    )
    nt_xent_tile_size: int | None = HfArg(
        default=None,
        help="Rows and columns of a tile of the similarities in SimCLR's loss, such as 1024: one tile at a time is in "
        "memory. null: all similarities at once, a row per view and a column per view of all ranks.",
    )
    prediction_head: bool = HfArg(
        default=False,
        help="A prediction head, as of PAWS, after which images are compared. Fine-tuning keeps that of a checkpoint "
        "of PAWS.",
    )
    prediction_hidden_dim: int | None = HfArg(
        default=None, help="Its hidden width; by default a quarter of projection_dim."
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.nt_xent_tile_size is not None:
            check_integer("nt_xent_tile_size", self.nt_xent_tile_size, remedy="Leave it out for one matrix.")
