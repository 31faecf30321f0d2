"""Masked Siamese Networks (arXiv 2204.07141) as a transformers model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..losses.msn import msn_loss
from .configuration_msn import MSNConfig
from .encoder import PatchDroppingViTMSNModel
from .heads import PredictionHead, ProjectionHead
from .modeling_pretraining import TargetModel


@dataclass
class MSNForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): Scalar, the total to minimise.
        cross_entropy, me_max, entropy (`torch.Tensor`): Scalars, its parts before weighting, in nats.
        target_probabilities (`torch.Tensor` of shape `(B, K)`): Sharpened assignments of the target views.
        anchor_probabilities (`torch.Tensor` of shape `(V*B, K)`): Assignments of the anchors, view-major, with
            gradient.
        features, projections (`torch.Tensor` of shape `(B, D)`): Outputs of the online encoder and its heads for the
            first anchor, else focal, view, without gradient.
    """

    loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    me_max: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    target_probabilities: torch.Tensor | None = None
    anchor_probabilities: torch.Tensor | None = None
    features: torch.Tensor | None = None
    projections: torch.Tensor | None = None


class MSNForPreTraining(TargetModel):
    """Online and target encoder, their projection heads and the prototypes, with the loss of MSN.

    Two calls are enough for any loop: `model(**batch).loss`, and after the optimizer step
    `model.update_target(momentum)`. The state dict holds everything that a run needs to continue, the state of the
    mask draws included.

    Attributes:
        encoder, target_encoder ([`PatchDroppingViTMSNModel`]): f and its exponential moving average.
        projection_head, target_projection_head ([`ProjectionHead`]): h and its exponential moving average.
        prediction_head, target_prediction_head ([`PredictionHead`] or `None`): The anchors are compared after it, the
            targets before it: the average is kept only because checkpoints of the authors hold it.
        prototypes (`nn.Parameter` of shape `(K, D)`): Trained with the online encoder.
    """

    config_class = MSNConfig
    config: MSNConfig

    def __init__(self, config: MSNConfig):
        super().__init__(config)
        batch_norm, dim = config.projection_batch_norm, config.projection_dim
        head = (config.hidden_size, config.projection_hidden_dim, dim, batch_norm)
        self.encoder = PatchDroppingViTMSNModel(config)
        self.projection_head = ProjectionHead(*head)
        self.target_encoder = PatchDroppingViTMSNModel(config)
        self.target_projection_head = ProjectionHead(*head)
        self.prediction_head = self.target_prediction_head = None
        if config.prediction_head:
            self.prediction_head = PredictionHead(dim, config.prediction_width, batch_norm, "gelu")
            self.target_prediction_head = PredictionHead(dim, config.prediction_width, batch_norm, "gelu")
        self.prototypes = nn.Parameter(torch.empty(config.num_prototypes, dim))
        self.post_init()
        self.start_target()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MSNForPreTraining):
            bound = self.config.projection_dim**-0.5
            init.uniform_(module.prototypes, -bound, bound)

    def forward(
        self,
        pixel_values: torch.Tensor,
        anchor_pixel_values: torch.Tensor | None = None,
        focal_pixel_values: torch.Tensor | None = None,
        sharpen_temperature: float | None = None,
    ) -> MSNForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The target view of each image.
            anchor_pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`, *optional*): Anchor views, masked here.
            focal_pixel_values (`torch.Tensor` of shape `(B, F, C, h, w)`, *optional*): Small anchor views, not masked.
            sharpen_temperature (`float`, *optional*): T of the targets, by default the configuration's.

        Raises:
            ValueError: If there is neither an anchor nor a focal view, or a shape does not fit.
        """
        given = {"anchor_pixel_values": anchor_pixel_values, "focal_pixel_values": focal_pixel_values}
        views = {name: view for name, view in given.items() if view is not None and view.shape[1] > 0}
        batch_size = len(pixel_values)
        if not views or any(view.ndim != 5 or len(view) != batch_size for view in views.values()):
            raise ValueError(
                "MSN needs at least one anchor or focal view per image, `anchor_pixel_values` (B, V, C, H, W) or "
                f"`focal_pixel_values` (B, F, C, h, w), with B = {batch_size} as in `pixel_values`, but got "
                f"{[None if view is None else tuple(view.shape) for view in given.values()]}."
            )

        rows = []
        for name, view in views.items():
            kind = "global" if name == "anchor_pixel_values" else "focal"
            rows.append(self._features(self.encoder, view.unbind(1), kind))  # view-major
        features = rows[0][:batch_size].detach()
        if len({view.shape[-2:] for view in views.values()}) == 1:
            rows = [torch.cat(rows)]
        rows = self._apply_head(self.projection_head, rows)
        if self.prediction_head is not None:
            rows = self._apply_head(self.prediction_head, rows)
        anchor_projections = torch.cat(rows)
        with torch.no_grad():
            target_projections = self.project(pixel_values)

        output = msn_loss(
            anchor_projections,
            target_projections,
            self.prototypes,
            temperature=self.config.temperature,
            sharpen_temperature=self.config.sharpen_temperature
            if sharpen_temperature is None
            else sharpen_temperature,
            use_sinkhorn=self.config.use_sinkhorn,
            me_max_weight=self.config.me_max_weight,
            entropy_weight=self.config.entropy_weight,
        )
        return MSNForPreTrainingOutput(
            loss=output.loss,
            cross_entropy=output.cross_entropy.detach(),
            me_max=output.me_max.detach(),
            entropy=output.entropy.detach(),
            target_probabilities=output.target_probabilities,
            anchor_probabilities=output.anchor_probabilities,
            features=features,
            projections=anchor_projections[:batch_size].detach(),
        )

    @property
    def evaluation_encoder(self) -> PatchDroppingViTMSNModel:
        """The encoder whose features are evaluated: the target's, as in the paper."""
        return self.target_encoder

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projections of the target: `(B, C, H, W)` -> `(B, projection_dim)`."""
        return self.target_projection_head(self._features(self.target_encoder, pixel_values, "target"))


AutoConfig.register(MSNConfig.model_type, MSNConfig)
AutoModelForPreTraining.register(MSNConfig, MSNForPreTraining)
