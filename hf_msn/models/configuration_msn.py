"""Configuration of MSN: the settings of the forward pass. Schedules are in `MSNTrainingArguments`."""

from huggingface_hub.dataclasses import strict
from transformers.hf_argparser import HfArg

from ..checks import check_integer, check_number
from .configuration_pretraining import PretrainingConfig


@strict
class MSNConfig(PretrainingConfig):
    """Configuration of an [`MSNForPreTraining`] (arXiv 2204.07141).

    The fields of `ViTMSNConfig` describe the encoder, by default ViT-B/16; [`PretrainingConfig`] has those of the
    heads. floor(N * (1 - mask_ratio)) of an anchor's N patches are kept; focal views keep all.
    """

    model_type = "msn"

    mask_ratio: float | int = HfArg(
        default=0.3,
        help="Fraction of the patches that each anchor loses, in [0, 1). The paper: S/16 0.15, B/16 0.3, L/16 0.5, "
        "B/8 0.3, B/4 0.7, L/7 0.7.",
    )
    shared_mask: bool = HfArg(
        default=False, help="One mask for the whole batch and all ranks, instead of one per image."
    )
    num_prototypes: int = HfArg(default=1024, help="Number of prototypes, K.")
    temperature: float | int = HfArg(default=0.1, help="tau of the similarities.")
    sharpen_temperature: float | int = HfArg(
        default=0.25, help="T of the targets, unless it is scheduled (see training)."
    )
    use_sinkhorn: bool = HfArg(default=True, help="Balance the targets over the prototypes.")
    me_max_weight: float | int = HfArg(
        default=1.0, help="lambda of the mean-entropy maximisation. Without Sinkhorn the paper has 5."
    )
    entropy_weight: float | int = HfArg(default=0.0, help="Weight of the entropy of the single assignments.")
    head_initializer_range: float | int | None = HfArg(
        default=0.02,
        help="Standard deviation of the heads' initial weights, with biases of 0; null: torch's own initialisation.",
    )
    prediction_head: bool = HfArg(default=False, help="A prediction head on the anchors' projections.")
    prediction_hidden_dim: int | None = HfArg(
        default=None, help="Its hidden width; by default a quarter of projection_dim."
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_vit()
        self._check_masks()
        check_integer("num_prototypes", self.num_prototypes)
        check_number("temperature", self.temperature, above=0, remedy="The papers use 0.1.")
        check_number("sharpen_temperature", self.sharpen_temperature, above=0, remedy="The paper uses 0.25.")
        check_number("me_max_weight", self.me_max_weight, minimum=0)
        check_number("entropy_weight", self.entropy_weight, minimum=0)
