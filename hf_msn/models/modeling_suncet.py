"""SimCLR + SuNCEt (arXiv 2006.10803) as a transformers model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForPreTraining
from transformers.utils import ModelOutput

from ..losses.simclr import nt_xent_loss
from ..losses.suncet import suncet_loss
from .configuration_suncet import SuNCEtConfig
from .modeling_pretraining import SemiSupervisedModel, check_support, check_two_views


@dataclass
class SuNCEtForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): Scalar, the total to minimise: the sum of the other two.
        nt_xent (`torch.Tensor`, *optional*): Scalar, the loss of the images without labels, in nats.
        suncet (`torch.Tensor`, *optional*): Scalar, the loss of the support, in nats.
        features, projections (`torch.Tensor` of shape `(2*B, D)`): Encoder and head outputs of the two views, or of
            the support if it comes alone, without gradient.
    """

    loss: torch.Tensor | None = None
    nt_xent: torch.Tensor | None = None
    suncet: torch.Tensor | None = None
    features: torch.Tensor | None = None
    projections: torch.Tensor | None = None


class SuNCEtForPreTraining(SemiSupervisedModel):
    """Encoder and projection head with the losses of SimCLR, on images without labels, and SuNCEt, on a support set.

    Either half is optional: without support it is SimCLR; without other images it is SuNCEt, which fine-tunes an
    encoder on labelled images.

    Attributes:
        encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f.
        projection_head ([`ProjectionHead`]): h.
        prediction_head ([`PredictionHead`] or `None`): Images are compared after it; for checkpoints of PAWS.
    """

    config_class = SuNCEtConfig
    config: SuNCEtConfig
    view_kinds = ("global", "support")

    def __init__(self, config: SuNCEtConfig):
        super().__init__(config)
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields):
        """As [`PretrainingModel.from_backbone`]. There is no prediction head unless `config_fields` asks for it."""
        return super().from_backbone(name_or_path, **{"prediction_head": False, **config_fields})

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        anchor_pixel_values: torch.Tensor | None = None,
        support_pixel_values: torch.Tensor | None = None,
        support_labels: torch.Tensor | None = None,
        supervised: bool = True,
    ) -> SuNCEtForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): The first view of each image.
            anchor_pixel_values (`torch.Tensor` of shape `(B, 1, C, H, W)`, *optional*): The second.
            support_pixel_values (`torch.Tensor` of shape `(S, C, H, W)`, *optional*): This rank's labelled images.
            support_labels (`torch.LongTensor` of shape `(S,)`, *optional*): Their class numbers, >= 0, in any order.
            supervised (`bool`, *optional*, defaults to `True`): Without it the support takes part in the batch
                statistics alone.

        Raises:
            ValueError: If there are neither views nor support, one is incomplete, or a shape does not fit.
        """
        if pixel_values is None and (support_pixel_values is None or not supervised):
            raise ValueError(
                "`pixel_values` and `support_pixel_values` are both None, or a support comes alone with "
                "`supervised=False`: there is no loss. Give two views, a support, or both."
            )
        groups, kinds = [], []
        if support_pixel_values is not None or support_labels is not None:
            check_support(support_pixel_values, support_labels)
            groups, kinds = [support_pixel_values], ["support"]
        if pixel_values is not None:
            check_two_views(pixel_values, anchor_pixel_values)
            groups += [pixel_values, anchor_pixel_values[:, 0]]
            kinds += ["global", "global"]
        features, *_, projections = self._apply_heads(groups, kinds)
        watched = torch.cat(features[-2:]).detach(), torch.cat(projections[-2:]).detach()
        suncet = nt_xent = None
        if support_labels is not None:
            supports, *projections = projections
            if supervised:
                suncet = suncet_loss(supports, self._label_rows(support_labels), temperature=self.config.temperature)
        if pixel_values is not None:
            nt_xent = nt_xent_loss(
                torch.cat(projections),
                temperature=self.config.temperature,
                full_gradient=self.config.full_gradient,
                tile_size=self.config.nt_xent_tile_size,
            )
        return SuNCEtForPreTrainingOutput(
            loss=sum(part for part in (nt_xent, suncet) if part is not None),
            nt_xent=None if nt_xent is None else nt_xent.detach(),
            suncet=None if suncet is None else suncet.detach(),
            features=watched[0],
            projections=watched[1],
        )


AutoConfig.register(SuNCEtConfig.model_type, SuNCEtConfig)
AutoModelForPreTraining.register(SuNCEtConfig, SuNCEtForPreTraining)
