"""PAWS, predicting view assignments with support samples (arXiv 2104.13963), as a transformers model."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForPreTraining
from transformers.utils import ModelOutput

from ..losses.paws import paws_loss
from .configuration_paws import PAWSConfig
from .modeling_pretraining import SemiSupervisedModel, check_support, check_two_views


@dataclass
class PAWSForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): Scalar, the total to minimise.
        cross_entropy, me_max (`torch.Tensor`): Scalars, its parts before weighting, in nats.
        target_probabilities (`torch.Tensor` of shape `(2*B, C)`): Sharpened class predictions of the two global views,
            the targets of the first views first; C is the number of classes in the support.
        anchor_probabilities (`torch.Tensor` of shape `((2+F)*B, C)`): Class predictions of the global views and small
            crops, view-major, with gradient.
        features, projections (`torch.Tensor` of shape `(2*B, D)`): Outputs of encoder and projection head for the
            global views, without gradient.
    """

    loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    me_max: torch.Tensor | None = None
    target_probabilities: torch.Tensor | None = None
    anchor_probabilities: torch.Tensor | None = None
    features: torch.Tensor | None = None
    projections: torch.Tensor | None = None


class PAWSForPreTraining(SemiSupervisedModel):
    """Encoder, projection head and optional prediction head, with the loss of PAWS.

    `model(**batch, **support).loss` is enough for any loop; `batch` from a [`MultiViewCollator`], `support` from a
    support loader.

    Attributes:
        encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f.
        projection_head ([`ProjectionHead`]): h.
        prediction_head ([`PredictionHead`] or `None`): Anchors and their supports are compared after it, targets and
            theirs before it.
    """

    config_class = PAWSConfig
    config: PAWSConfig
    view_kinds = ("global", "focal", "support")

    def __init__(self, config: PAWSConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        anchor_pixel_values: torch.Tensor | None = None,
        focal_pixel_values: torch.Tensor | None = None,
        support_pixel_values: torch.Tensor | None = None,
        support_labels: torch.Tensor | None = None,
    ) -> PAWSForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The first global view of each image.
            anchor_pixel_values (`torch.Tensor` of shape `(B, 1, C, H, W)`): The second.
            focal_pixel_values (`torch.Tensor` of shape `(B, F, C, h, w)`, *optional*): Small crops.
            support_pixel_values (`torch.Tensor` of shape `(S, C, H, W)`): This rank's labelled images.
            support_labels (`torch.LongTensor` of shape `(S,)`): Their class numbers, >= 0, in any order.

        Raises:
            ValueError: If there are not two global views, or no support, or a shape does not fit.
        """
        check_two_views(pixel_values, anchor_pixel_values)
        check_support(support_pixel_values, support_labels)
        views = [pixel_values, anchor_pixel_values[:, 0]]
        kinds = ["support", "global", "global"]
        num_small_crops = 0 if focal_pixel_values is None else focal_pixel_values.shape[1]
        if num_small_crops:
            views += focal_pixel_values.unbind(1)
            kinds += ["focal"] * num_small_crops

        features, *outputs = self._apply_heads([support_pixel_values, *views], kinds)
        target_supports, first, second, *_ = outputs[0]
        anchor_supports, *anchors = outputs[-1]

        output = paws_loss(
            torch.cat(anchors),
            anchor_supports,
            torch.cat([second, first]),
            target_supports,
            self._label_rows(support_labels),
            num_small_crops=num_small_crops,
            temperature=self.config.temperature,
            sharpen_temperature=self.config.sharpen_temperature,
            me_max_weight=self.config.me_max_weight,
        )
        return PAWSForPreTrainingOutput(
            loss=output.loss,
            cross_entropy=output.cross_entropy.detach(),
            me_max=output.me_max.detach(),
            target_probabilities=output.target_probabilities,
            anchor_probabilities=output.anchor_probabilities,
            features=torch.cat(features[1:3]).detach(),
            projections=torch.cat([first, second]).detach(),
        )


AutoConfig.register(PAWSConfig.model_type, PAWSConfig)
AutoModelForPreTraining.register(PAWSConfig, PAWSForPreTraining)
