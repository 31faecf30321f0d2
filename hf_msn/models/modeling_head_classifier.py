"""A linear classifier on the first layer of a projection head, as PAWS is fine-tuned, as a transformers model."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForPreTraining
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_pretraining import SemiSupervisedConfig
from .modeling_pretraining import SemiSupervisedModel


@strict
class HeadClassifierConfig(SemiSupervisedConfig):
    """Configuration of a [`HeadForImageClassification`]; `num_labels` counts its classes.

    The encoder and the projection head are described as in [`SemiSupervisedConfig`].
    """

    model_type = "hf_msn_head_classifier"


class HeadForImageClassification(SemiSupervisedModel):
    """Encoder, first layer of the projection head (linear, batch normalisation, activation), linear classifier.

    `finetune_classifier` makes it with `start_layer="fc1"`. After `import hf_msn.models` it loads by
    `AutoModelForImageClassification` and `pipeline`.

    Attributes:
        encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f.
        projection_head (`nn.Sequential`): `fc1`, `bn1` and `activation` of a [`ProjectionHead`].
        classifier (`nn.Linear`): From `projection_hidden_dim` to the classes.
    """

    config_class = HeadClassifierConfig
    config: HeadClassifierConfig

    def __init__(self, config: HeadClassifierConfig):
        super().__init__(config)
        layers = ((name, getattr(self.projection_head, name)) for name in ("fc1", "bn1", "activation"))
        self.projection_head = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(config.projection_hidden_dim, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Images.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): Indices of outputs, for the cross-entropy.
        """
        logits = self.classifier(self.project(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(HeadClassifierConfig.model_type, HeadClassifierConfig)
AutoModelForImageClassification.register(HeadClassifierConfig, HeadForImageClassification)
AutoModelForPreTraining.register(HeadClassifierConfig, HeadForImageClassification)  # by which hf_msn loads its models
