"""What the configurations of all pretraining methods share: a ViTMSN encoder and a projection head."""

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTMSNConfig


@strict
class PretrainingConfig(ViTMSNConfig):
    r"""
    Base of the configurations of pretraining methods. The fields of `ViTMSNConfig` describe a ViT encoder (by default
    ViT-B/16); methods add theirs.

    Args:
        projection_hidden_dim (`int`, *optional*, defaults to 2048): Width of the projection head's two hidden layers.
        projection_dim (`int`, *optional*, defaults to 256): Dimension of the projections, D.
        projection_batch_norm (`bool`, *optional*, defaults to `True`): Batch normalisation in the heads.
        temperature (`float`, *optional*, defaults to 0.1): tau of the similarities, > 0.

    Raises:
        ValueError: If a value breaks its rule; the message has value, rule and remedy. (A value of the wrong type
            raises transformers' own `StrictDataclassFieldValidationError`.)
    """

    # Fields that a plain ViTMSNConfig does not have.
    pretraining_fields: ClassVar[tuple[str, ...]] = (
        "projection_hidden_dim",
        "projection_dim",
        "projection_batch_norm",
        "temperature",
    )

    projection_hidden_dim: int = field(
        default=2048, metadata={"help": "Width of the projection head's hidden layers."}
    )
    projection_dim: int = field(default=256, metadata={"help": "Dimension of the projections."})
    projection_batch_norm: bool = field(default=True, metadata={"help": "Batch normalisation in the heads."})
    temperature: float | int = field(default=0.1, metadata={"help": "tau of the similarities."})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("projection_dim", "projection_hidden_dim"):
            self._check_at_least_1(name)
        self._check_temperature("temperature")

    @property
    def num_patches(self) -> int:
        """Patches of a global view."""
        return (self.image_size // self.patch_size) ** 2

    def to_vit_msn_config(self) -> ViTMSNConfig:
        """The configuration of the encoder alone, which plain `transformers` can read."""
        fields = {key: value for key, value in self.to_dict().items() if key not in self.pretraining_fields}
        for key in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(key, None)
        return ViTMSNConfig(**fields)

    def _check_vit(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"`{name}` must be one number, for square images and patches, but is {value}.")
        if not 1 <= self.patch_size <= self.image_size or self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size`, at least one patch, but they are {self.image_size} "
                f"and {self.patch_size}. Change one of them."
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, but they are {self.hidden_size} and "
                f"{self.num_attention_heads}. ViTs have 64 dimensions a head."
            )

    def _check_at_least_1(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"`{name}` must be >= 1, but is {getattr(self, name)}.")

    def _check_at_least_0(self, name: str) -> None:
        if not getattr(self, name) >= 0:
            raise ValueError(f"`{name}` must be >= 0, but is {getattr(self, name)}.")

    def _check_temperature(self, name: str) -> None:
        if not getattr(self, name) > 0:
            raise ValueError(
                f"`{name}` must be > 0, but is {getattr(self, name)}. The papers have tau = 0.1 and T = 0.25."
            )
