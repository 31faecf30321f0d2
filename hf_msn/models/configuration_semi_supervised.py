"""What the configurations of the methods with a support set share: any encoder, a projection head, labels."""

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_pretraining import PretrainingConfig


@strict
class SemiSupervisedConfig(PretrainingConfig):
    r"""
    Base of [`PAWSConfig`] and [`SuNCEtConfig`]: the encoder is a ViTMSN, described by the fields of `ViTMSNConfig`,
    or, where `timm_model` is given, any network of timm.

    Args:
        timm_model (`str`, *optional*): Name of a timm architecture, such as "resnet50", to use as encoder. The fields
            of the ViT then mean nothing.
        timm_options (`dict`, *optional*): Arguments of `timm.create_model` beside the name, such as
            `{"drop_path_rate": 0.1}`. A ViT of timm needs `{"dynamic_img_size": True}` for small crops.
        small_image_stem (`bool`, *optional*, defaults to `False`):
            For a ResNet of timm: a 3x3 convolution of stride 1 without pooling in place of the stem that divides the
            sides by 4, as is usual for images of 32 pixels.
        projection_activation (`str`, *optional*, defaults to `"relu"`): "relu" or "gelu", in both heads.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            eps, in [0, 1): of a support's label, eps is spread evenly over the classes of the support.

    Raises:
        ValueError: If a value breaks its rule; the message has value, rule and remedy.
    """

    pretraining_fields: ClassVar[tuple[str, ...]] = (
        *PretrainingConfig.pretraining_fields,
        "timm_model",
        "timm_options",
        "small_image_stem",
        "projection_activation",
        "label_smoothing",
    )

    timm_model: str | None = field(
        default=None, metadata={"help": "A timm architecture as the encoder, such as resnet50, instead of a ViT."}
    )
    timm_options: dict | None = field(
        default=None, metadata={"help": "Arguments of timm.create_model, as JSON on the command line."}
    )
    small_image_stem: bool = field(
        default=False,
        metadata={"help": "For timm ResNets and small images: a 3x3 stem of stride 1 without pooling."},
    )
    projection_activation: str = field(default="relu", metadata={"help": "Activation of the heads: relu or gelu."})
    label_smoothing: float | int = field(default=0.0, metadata={"help": "Smoothing of the supports' labels, eps."})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.timm_model is None:
            self._check_vit()
        if self.timm_model is None and (self.timm_options or self.small_image_stem):
            raise ValueError("`timm_options` and `small_image_stem` are about a timm encoder. Give `timm_model` too.")
        if self.projection_activation not in ("relu", "gelu"):
            raise ValueError(
                f"`projection_activation` must be 'relu' or 'gelu', but is {self.projection_activation!r}."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1), but is {self.label_smoothing}. PAWS has 0.1; 0 turns it off."
            )
