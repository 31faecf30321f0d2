"""Configuration of MSN: what changes the forward pass. What changes over training is in `MSNTrainingArguments`."""

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_pretraining import PretrainingConfig
from .patch_dropping import num_kept_patches


@strict
class MSNConfig(PretrainingConfig):
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
    pretraining_fields: ClassVar[tuple[str, ...]] = (
        *PretrainingConfig.pretraining_fields,
        "mask_ratio",
        "shared_mask",
        "num_prototypes",
        "sharpen_temperature",
        "use_sinkhorn",
        "me_max_weight",
        "entropy_weight",
    )

    mask_ratio: float | int = field(default=0.3, metadata={"help": "Part of the patches that each anchor loses."})
    shared_mask: bool = field(
        default=False, metadata={"help": "One mask for the whole batch and all ranks, instead of one an image."}
    )
    num_prototypes: int = field(default=1024, metadata={"help": "Number of prototypes, K."})
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
        self._check_vit()
        self._check_masking()
        self._check_at_least_1("num_prototypes")
        self._check_temperature("sharpen_temperature")
        self._check_at_least_0("me_max_weight")
        self._check_at_least_0("entropy_weight")

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
