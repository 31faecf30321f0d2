"""Configuration of PAWS: the settings of the forward pass. Schedules are in `PAWSTrainingArguments`."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from ..checks import check_number
from .configuration_pretraining import SemiSupervisedConfig


@strict
class PAWSConfig(SemiSupervisedConfig):
    """Configuration of a [`PAWSForPreTraining`] (arXiv 2104.13963).

    The encoder is a ViTMSN, described by the fields of `ViTMSNConfig`, or a network of timm: see
    [`AnyEncoderConfig`], also for the projection head. The paper has a prediction head for ImageNet, none for
    CIFAR-10.
    """

    model_type = "paws"

    prediction_head: bool = HfArg(default=False, help="A prediction head on the anchors' projections.")
    prediction_hidden_dim: int | None = HfArg(
        default=None, help="Its hidden width; by default a quarter of projection_dim."
    )
    sharpen_temperature: float | int = HfArg(default=0.25, help="T of the targets.")
    me_max_weight: float | int = HfArg(default=1.0, help="Weight of the mean-entropy maximisation.")

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_number("sharpen_temperature", self.sharpen_temperature, above=0, remedy="The paper uses 0.25.")
        check_number("me_max_weight", self.me_max_weight, minimum=0)
