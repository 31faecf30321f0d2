"""Configuration of BYOL and SimSiam: the settings of the forward pass. Schedules are in `BYOLTrainingArguments`."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from .configuration_pretraining import AnyEncoderConfig
from .direct_predictor import RULES

PREDICTORS = ("mlp", "linear", *RULES)


@strict
class BYOLConfig(AnyEncoderConfig):
    """Configuration of a [`BYOLForPreTraining`] (arXiv 2006.07733; SimSiam, 2011.10566, with `ema=False`).

    The encoder is a ViTMSN, described by the fields of `ViTMSNConfig`, or a network of timm: see
    [`AnyEncoderConfig`]. The predictor is

    - `"mlp"`: linear, batch normalisation, activation, linear, as in both papers;
    - `"linear"`: one linear layer without bias, trained as the rest;
    - `"direct_pred"`, `"direct_copy"`: such a layer, set after each update from the correlation of its input instead
      of trained (arXiv 2102.06810, 2110.04947): see [`~hf_msn.models.direct_predictor.InputCorrelation`].

    SimSiam's heads are `projection_layers=3`, `projection_output_batch_norm=True`, `projection_hidden_dim=2048`,
    `projection_dim=2048`, `prediction_hidden_dim=512`.
    """

    model_type = "byol"

    ema: bool = HfArg(
        default=True,
        help="The target is a moving average of the network, as in BYOL; false: the network itself, without gradient, "
        "as in SimSiam. No copy is in memory then.",
    )
    predictor: str = HfArg(
        default="mlp",
        help="mlp; linear: one trained layer; direct_pred, direct_copy: one layer that is set from the correlation of "
        "its input.",
    )
    prediction_hidden_dim: int | None = HfArg(
        default=None, help="Hidden width of the mlp; by default projection_hidden_dim, as in BYOL."
    )
    predictor_rho: float | int | None = HfArg(
        default=None,
        help="rho of the running correlation, in [0, 1): the share that stays at each update. By default 0.3, and 0.5 "
        "with direct_copy.",
    )
    predictor_eps: float | int | None = HfArg(
        default=None,
        help="eps, added to each eigenvalue of the predictor, whose others are at most 1. By default 0.1 with "
        "direct_pred, 0.3 with direct_copy.",
    )
    predictor_update_every: int = HfArg(
        default=1, help="Updates from one time that direct_pred and direct_copy set the predictor to the next."
    )
    projection_hidden_dim: int = HfArg(default=4096, help="Width of the projection head's hidden layers.")
    projection_layers: int = HfArg(default=2, help="Linear layers of the projection head: 2, or 3 as in SimSiam.")
    projection_output_batch_norm: bool = HfArg(
        default=False, help="Batch normalisation of the projections, without scale and shift, as in SimSiam."
    )
    batch_norm_per_resolution: bool = HfArg(
        default=True,
        help="Batch statistics of the heads for each global view, and for the small crops, by themselves, as in the "
        "authors' codes; false: for all views together.",
    )
    mask_ratio: float | int = HfArg(
        default=0.0,
        help="Fraction of the patches that each global view loses before the encoder of a ViT, in [0, 1), as MSN's "
        "anchors do. A moving average sees whole views.",
    )
    shared_mask: bool = HfArg(
        default=False, help="One mask for the whole batch and all ranks, instead of one per image."
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_choice("predictor", self.predictor, PREDICTORS)
        if self.prediction_hidden_dim is not None:
            check_integer("prediction_hidden_dim", self.prediction_hidden_dim)
        remedy = "The papers have rho 0.3 and eps 0.01 to 0.1 (direct_pred), 0.5 and 0.3 (direct_copy)."
        if self.predictor_rho is not None:
            check_number("predictor_rho", self.predictor_rho, minimum=0, below=1, remedy=remedy)
        if self.predictor_eps is not None:
            check_number("predictor_eps", self.predictor_eps, minimum=0, remedy=remedy)
        check_integer("predictor_update_every", self.predictor_update_every, meaning="counts updates")
        if self.predictor not in RULES:
            for name, unset in (("predictor_eps", None), ("predictor_update_every", 1)):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"`{name}` belongs to the predictors {', '.join(RULES)}, but `predictor` is "
                        f"{self.predictor!r}. Leave it out, or choose one of these."
                    )
        check_choice("projection_layers", self.projection_layers, (2, 3))
        if self.timm_model is None:
            self._check_masks()
        elif self.mask_ratio != 0:
            raise ValueError(
                f"`mask_ratio` must be 0 for a network of timm, but is {self.mask_ratio}: only the ViT that trains "
                "without `timm_model` can leave patches out."
            )

    @property
    def prediction_width(self) -> int:
        """Hidden width of the predictor `"mlp"`."""
        return self.projection_hidden_dim if self.prediction_hidden_dim is None else self.prediction_hidden_dim

    def describe_method(self) -> dict[str, str | bool]:
        return {**super().describe_method(), "ema": self.ema, "predictor": self.predictor}
