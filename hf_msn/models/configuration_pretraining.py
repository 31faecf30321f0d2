"""Bases of the configurations: an encoder and a projection head; networks of timm; labels."""

import dataclasses

from huggingface_hub.dataclasses import strict
from transformers import ViTMSNConfig
from transformers.activations import ACT2FN
from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from .masking import num_kept_patches

# Fields of the ViT that a network of timm does not have.
VIT_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "patch_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "qkv_bias"),
)


@strict
class PretrainingConfig(ViTMSNConfig):
    """Base of the configurations of pretraining methods.

    The fields of `ViTMSNConfig` describe a ViT encoder, by default ViT-B/16; each method adds its own.

    Raises:
        ValueError: If a value is out of range. (A value of the wrong type raises transformers'
            `StrictDataclassFieldValidationError`.)
    """

    projection_hidden_dim: int = HfArg(default=2048, help="Width of the projection head's hidden layers.")
    projection_dim: int = HfArg(default=256, help="Dimension of the projections.")
    projection_batch_norm: bool = HfArg(default=True, help="Batch normalisation in the heads.")
    batch_norm_per_resolution: bool = HfArg(
        default=True,
        help="Batch statistics of the heads for the views of each size by themselves, as in the authors' code; false: "
        "for all views together.",
    )
    patch_initializer_range: float | int | None = HfArg(
        default=None,
        help="Standard deviation of a ViT's initial patch embedding; by default sqrt(2 / inputs of a patch), for 16 "
        "pixels 0.051.",
    )
    position_initializer_range: float | int | None = HfArg(
        default=None,
        help="Standard deviation of a ViT's initial position embeddings; by default initializer_range. 1, as large as "
        "what a patch shows, lets a small encoder learn where things are from the first step.",
    )
    head_initializer_range: float | int | None = HfArg(
        default=None,
        help="Standard deviation of the heads' initial weights, with biases of 0; null: torch's own initialisation.",
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_integer("projection_dim", self.projection_dim)
        check_integer("projection_hidden_dim", self.projection_hidden_dim)
        for name in ("patch_initializer_range", "position_initializer_range", "head_initializer_range"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, remedy="MSN's authors have 0.02 in the head.")
        if getattr(self, "prediction_head", False) and self.prediction_width < 1:
            raise ValueError(
                f"The hidden width of the prediction head must be >= 1, but is {self.prediction_width}: "
                f"`prediction_hidden_dim` is {self.prediction_hidden_dim}, and a quarter of `projection_dim` "
                f"{self.projection_dim} is the default. Set `prediction_hidden_dim`."
            )

    @property
    def num_patches(self) -> int:
        """Patches of a global view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prediction_width(self) -> int:
        """Hidden width of the prediction head, in methods that have one."""
        return self.projection_dim // 4 if self.prediction_hidden_dim is None else self.prediction_hidden_dim

    def describe_method(self) -> dict[str, str | bool]:
        """Return method and variant, which an exported encoder has as `pretrained_by` in its `config.json`."""
        return {"method": self.model_type}

    def to_vit_msn_config(self) -> ViTMSNConfig:
        """Return the configuration of the encoder alone, which plain `transformers` can read."""
        own = {f.name for f in dataclasses.fields(self)} - {f.name for f in dataclasses.fields(ViTMSNConfig)}
        own |= {"model_type", "architectures", "transformers_version", "dtype"}
        if self.position_initializer_range is not None:  # for the untrained network that results are compared with
            own.remove("position_initializer_range")
        return ViTMSNConfig(**{name: value for name, value in self.to_dict().items() if name not in own})

    def _check_vit(self) -> None:
        for name in ("image_size", "patch_size"):
            check_integer(name, getattr(self, name), remedy="Images and patches are square.")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            check_integer(name, getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_number(name, getattr(self, name), minimum=0, below=1)
        check_number("initializer_range", self.initializer_range, minimum=0, remedy="A ViT has 0.02.")
        check_number("layer_norm_eps", self.layer_norm_eps, above=0)
        check_choice("hidden_act", self.hidden_act, ACT2FN)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size`, but they are {self.image_size} and "
                f"{self.patch_size}. Change one of them."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, but they are {self.hidden_size} and "
                f"{self.num_attention_heads}. ViTs have 64 dimensions per head."
            )

    def _check_masks(self) -> None:
        check_number("mask_ratio", self.mask_ratio, minimum=0, below=1, remedy="The paper has 0.15 to 0.7.")
        if num_kept_patches(self.num_patches, self.mask_ratio) < 1:
            raise ValueError(
                f"`mask_ratio` {self.mask_ratio} leaves none of the {self.num_patches} patches of an image. Lower it, "
                "or choose a smaller `patch_size`."
            )


@strict
class AnyEncoderConfig(PretrainingConfig):
    """Base of the configurations with any encoder.

    The encoder is a ViTMSN, described by the fields of `ViTMSNConfig`, or, with `timm_model`, any network of timm;
    also "paws_wide_resnet" (WideResNet-28-2) and "paws_resnet" (a widened ResNet). A ViT of timm needs
    `timm_options={"dynamic_img_size": True}` for small crops. `small_image_stem` replaces a ResNet's stem, which
    divides the sides by 4, as is usual for images of 32 pixels.
    """

    timm_model: str | None = HfArg(
        default=None, help="A timm architecture as the encoder, such as resnet50, instead of a ViT."
    )
    timm_options: dict | None = HfArg(
        default=None, help="Arguments of timm.create_model, as JSON on the command line."
    )
    small_image_stem: bool = HfArg(
        default=False, help="For timm ResNets and small images: a 3x3 stem of stride 1 without pooling."
    )
    projection_activation: str = HfArg(default="relu", help="Activation of the heads: relu or gelu.")

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.timm_model is None:
            self._check_vit()
            if self.timm_options or self.small_image_stem:
                raise ValueError(
                    f"`timm_options` and `small_image_stem` need `timm_model`, but are {self.timm_options} and "
                    f"{self.small_image_stem} without it. Set `timm_model`, or leave them out."
                )
        check_choice("projection_activation", self.projection_activation, ("relu", "gelu"))


@strict
class SemiSupervisedConfig(AnyEncoderConfig):
    """Base of [`PAWSConfig`] and [`SuNCEtConfig`]. The encoder is described as in [`AnyEncoderConfig`].

    `label_smoothing` is eps in [0, 1): a fraction eps of each support's label is spread evenly over the classes of the
    support.
    """

    temperature: float | int = HfArg(default=0.1, help="tau of the similarities.")
    label_smoothing: float | int = HfArg(default=0.0, help="Smoothing of the supports' labels, eps.")

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_number("temperature", self.temperature, above=0, remedy="The papers use 0.1.")
        check_number("label_smoothing", self.label_smoothing, minimum=0, below=1, remedy="PAWS uses 0.1.")
