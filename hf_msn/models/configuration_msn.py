"""Configuration of MSN: the settings of the forward pass. Schedules are in `MSNTrainingArguments`."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from ..checks import check_integer, check_number
from .configuration_pretraining import PretrainingConfig
from .masking import num_kept_patches


@strict
class MSNConfig(PretrainingConfig):
    r"""
    Configuration of an [`MSNForPreTraining`] (arXiv 2204.07141). The fields of `ViTMSNConfig` describe the encoder, by
    default ViT-B/16; [`PretrainingConfig`] has those of the projection head.

    Args:
        mask_ratio (`float`, *optional*, defaults to 0.3):
            Fraction of the patches that each anchor loses, in [0, 1); floor(N * (1 - mask_ratio)) are kept. The paper:
            S/16 0.15, B/16 0.3, L/16 0.5, B/8 0.3, B/4 0.7, L/7 0.7. Focal views keep all.
        shared_mask (`bool`, *optional*, defaults to `False`):
            One mask for the whole batch and all ranks, as in the authors' code, instead of one per image.
        num_prototypes (`int`, *optional*, defaults to 1024): Number of prototypes, K.
        sharpen_temperature (`float`, *optional*, defaults to 0.25):
            T of the targets, > 0, unless `forward` receives another.
        use_sinkhorn (`bool`, *optional*, defaults to `True`): Balance the targets over the prototypes.
        me_max_weight (`float`, *optional*, defaults to 1.0):
            lambda of the mean-entropy maximisation. The authors' recipe has 1 with Sinkhorn, the paper's best 5
            without.
        entropy_weight (`float`, *optional*, defaults to 0.0): Weight of the entropy of the single assignments.
        prediction_head (`bool`, *optional*, defaults to `False`):
            A second head on the projections of the anchors, an option of the authors' code that the paper leaves off.
        prediction_hidden_dim (`int`, *optional*): Its hidden width; by default a quarter of `projection_dim`.

    Raises:
        ValueError: If a value is out of range. (A value of the wrong type raises transformers'
            `StrictDataclassFieldValidationError`.)
    """

    model_type = "msn"

    mask_ratio: float | int = HfArg(default=0.3, help="Fraction of the patches that each anchor loses.")
    shared_mask: bool = HfArg(
        default=False, help="One mask for the whole batch and all ranks, instead of one per image."
    )
    num_prototypes: int = HfArg(default=1024, help="Number of prototypes, K.")
    sharpen_temperature: float | int = HfArg(
        default=0.25, help="T of the targets, unless it is scheduled (see training)."
    )
    use_sinkhorn: bool = HfArg(default=True, help="Balance the targets over the prototypes.")
    me_max_weight: float | int = HfArg(
        default=1.0, help="lambda of the mean-entropy maximisation. Without Sinkhorn the paper has 5."
    )
    entropy_weight: float | int = HfArg(default=0.0, help="Weight of the entropy of the single assignments.")
    prediction_head: bool = HfArg(default=False, help="A prediction head on the anchors' projections.")
    prediction_hidden_dim: int | None = HfArg(
        default=None, help="Its hidden width; by default a quarter of projection_dim."
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_vit()
        check_number("mask_ratio", self.mask_ratio, minimum=0, below=1, remedy="The paper has 0.15 to 0.7.")
        if num_kept_patches(self.num_patches, self.mask_ratio) < 1:
            raise ValueError(
                f"`mask_ratio` {self.mask_ratio} leaves none of the {self.num_patches} patches of an image. Lower it, "
                "or choose a smaller `patch_size`."
            )
        check_integer("num_prototypes", self.num_prototypes)
        check_number("sharpen_temperature", self.sharpen_temperature, above=0, remedy="The paper uses 0.25.")
        check_number("me_max_weight", self.me_max_weight, minimum=0)
        check_number("entropy_weight", self.entropy_weight, minimum=0)
        self._check_prediction_head()
