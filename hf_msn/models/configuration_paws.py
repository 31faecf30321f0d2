"""Configuration of PAWS: what changes the forward pass. What changes over training is in `PAWSTrainingArguments`."""

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_semi_supervised import SemiSupervisedConfig


@strict
class PAWSConfig(SemiSupervisedConfig):
    r"""
    Configuration of a [`PAWSForPreTraining`] (arXiv 2104.13963). The encoder is a ViTMSN, described by the fields of
    `ViTMSNConfig`, or a network of timm: see [`SemiSupervisedConfig`] for that and for the projection head.

    Args:
        prediction_head (`bool`, *optional*, defaults to `False`):
            A second head on the projections of the anchors, as the paper has for ImageNet and not for CIFAR-10.
        prediction_hidden_dim (`int`, *optional*): Its hidden width; by default a quarter of `projection_dim`.
        sharpen_temperature (`float`, *optional*, defaults to 0.25): T of the targets, > 0.
        me_max_weight (`float`, *optional*, defaults to 1.0): Weight of the mean-entropy maximisation.

    Raises:
        ValueError: If a value breaks its rule; the message has value, rule and remedy.

    Example:

    ```python
    >>> config = PAWSConfig(timm_model="resnet50", projection_dim=2048, prediction_head=True, label_smoothing=0.1)
    ```
    """

    model_type = "paws"
    pretraining_fields: ClassVar[tuple[str, ...]] = (
        *SemiSupervisedConfig.pretraining_fields,
        "prediction_head",
        "prediction_hidden_dim",
        "sharpen_temperature",
        "me_max_weight",
    )

    prediction_head: bool = field(default=False, metadata={"help": "A prediction head on the anchors' projections."})
    prediction_hidden_dim: int | None = field(
        default=None, metadata={"help": "Its hidden width; by default a quarter of projection_dim."}
    )
    sharpen_temperature: float | int = field(default=0.25, metadata={"help": "T of the targets."})
    me_max_weight: float | int = field(default=1.0, metadata={"help": "Weight of the mean-entropy maximisation."})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_temperature("sharpen_temperature")
        self._check_at_least_0("me_max_weight")
        if self.prediction_head and self.prediction_width < 1:
            given = self.prediction_hidden_dim is not None
            raise ValueError(
                f"The prediction head needs a hidden width >= 1, but `prediction_hidden_dim` is "
                f"{self.prediction_hidden_dim if given else 'not given and a quarter of `projection_dim` '}"
                f"{'' if given else f'{self.projection_dim} is 0'}. Give `prediction_hidden_dim`, or a "
                "`projection_dim` of at least 4."
            )

    @property
    def prediction_width(self) -> int:
        """Hidden width of the prediction head."""
        return self.projection_dim // 4 if self.prediction_hidden_dim is None else self.prediction_hidden_dim
