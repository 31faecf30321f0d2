"""Configuration of MSN: what changes the forward pass. What changes over training is in `MSNTrainingArguments`."""

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTMSNConfig

from .patch_dropping import num_kept_patches


@strict
class MSNConfig(ViTMSNConfig):
    r"""
    Configuration of an [`MSNForPreTraining`]. The fields of `ViTMSNConfig` describe the encoder (by default ViT-B/16);
    those below describe masking, head, prototypes and loss, as in Masked Siamese Networks (arXiv 2204.07141).

    Args:
        mask_ratio (`float`, *optional*, defaults to 0.3):
            Part of the patches that each anchor loses, in [0, 1); floor(N * (1 - mask_ratio)) are kept. The paper:
            S/16 0.15, B/16 0.3, L/16 0.5, B/8 0.3, B/4 0.7, L/7 0.7. Focal views keep all.
        shared_mask (`bool`, *optional*, defaults to `False`):
            One mask for the whole batch and all ranks, as in the authors' code, instead of one an image.
        projection_hidden_dim (`int`, *optional*, defaults to 2048): Width of the projection head's two hidden layers.
        projection_dim (`int`, *optional*, defaults to 256): Dimension of projections and prototypes.
        projection_batch_norm (`bool`, *optional*, defaults to `True`): Batch normalisation in the projection head.
        num_prototypes (`int`, *optional*, defaults to 1024): K.
        temperature (`float`, *optional*, defaults to 0.1): tau of the assignments, > 0.
        sharpen_temperature (`float`, *optional*, defaults to 0.25):
            T of the targets, > 0, where `forward` is not given another.
        use_sinkhorn (`bool`, *optional*, defaults to `True`): Balance the targets over the prototypes.
        me_max_weight (`float`, *optional*, defaults to 1.0):
            lambda of the mean-entropy maximisation. The authors' recipe has 1 with Sinkhorn, the paper's best 5
            without.
        entropy_weight (`float`, *optional*, defaults to 0.0): Weight of the entropy of the single assignments.

    Raises:
        ValueError: If a value breaks its rule; the message has value, rule and remedy. (A value of the wrong type
            raises transformers' own `StrictDataclassFieldValidationError`.)
    """

    model_type = "msn"
    # Fields that a plain ViTMSNConfig does not have.
    pretraining_fields: ClassVar[tuple[str, ...]] = (
        "mask_ratio",
        "shared_mask",
        "projection_hidden_dim",
        "projection_dim",
        "projection_batch_norm",
        "num_prototypes",
        "temperature",
        "sharpen_temperature",
        "use_sinkhorn",
        "me_max_weight",
        "entropy_weight",
    )

    mask_ratio: float | int = field(default=0.3, metadata={"help": "Part of the patches that each anchor loses."})
    shared_mask: bool = field(
        default=False, metadata={"help": "One mask for the whole batch and all ranks, instead of one an image."}
    )
    projection_hidden_dim: int = field(
        default=2048, metadata={"help": "Width of the projection head's hidden layers."}
    )
    projection_dim: int = field(default=256, metadata={"help": "Dimension of projections and prototypes."})
    projection_batch_norm: bool = field(default=True, metadata={"help": "Batch normalisation in the projection head."})
    num_prototypes: int = field(default=1024, metadata={"help": "Number of prototypes, K."})
    temperature: float | int = field(default=0.1, metadata={"help": "tau of the assignments."})
    sharpen_temperature: float | int = field(
        default=0.25, metadata={"help": "T of the targets, unless it is scheduled (see training)."}
    )
    use_sinkhorn: bool = field(default=True, metadata={"help": "Balance the targets over the prototypes."})
    me_max_weight: float | int = field(
        default=1.0, metadata={"help": "lambda of the mean-entropy maximisation. Without Sinkhorn the paper has 5."}
    )
    entropy_weight: float | int = field(
        default=0.0, metadata={"help": "Weight of the entropy of the single assignments."}
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_image_and_patch_size()
        self._check_heads()
        self._check_masking()
        self._check_head_and_loss()

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

    def _check_image_and_patch_size(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"`{name}` must be one number, for square images and patches, but is {value}.")
        if not 1 <= self.patch_size <= self.image_size or self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size`, at least one patch, but they are {self.image_size} "
                f"and {self.patch_size}. Change one of them."
            )

    def _check_heads(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, but they are {self.hidden_size} and "
                f"{self.num_attention_heads}. ViTs have 64 dimensions a head."
            )

    def _check_masking(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(
                f"`mask_ratio` is the part of the patches to drop and must be in [0, 1), but is {self.mask_ratio}. "
                "The paper has 0.15 to 0.7."
            )
        if num_kept_patches(self.num_patches, self.mask_ratio) < 1:
            raise ValueError(
                f"`mask_ratio` {self.mask_ratio} leaves none of the {self.num_patches} patches of an image. Lower it, "
                "or choose a smaller `patch_size`."
            )

    def _check_head_and_loss(self) -> None:
        for name in ("num_prototypes", "projection_dim", "projection_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, but is {getattr(self, name)}.")
        for name in ("temperature", "sharpen_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, but is {getattr(self, name)}. The paper has 0.1 and 0.25.")
        for name in ("me_max_weight", "entropy_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be >= 0, but is {getattr(self, name)}.")
