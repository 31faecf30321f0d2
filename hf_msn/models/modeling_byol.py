"""BYOL (arXiv 2006.07733) and SimSiam (arXiv 2011.10566) as a transformers model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..losses.byol import byol_loss
from .configuration_byol import BYOLConfig
from .direct_predictor import RULES, InputCorrelation
from .heads import PredictionHead, ProjectionHead
from .modeling_pretraining import AnyEncoderModel, TargetModel, check_two_views, names_of_shared_tensors
from .pretrained_encoders import build_encoder


@dataclass
class BYOLForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): Scalar, in [0, 8]: 2 - 2 cos both ways, see [`byol_loss`].
        features, projections (`torch.Tensor` of shape `(2*B, D)`): Outputs of the online encoder and projection head
            for the two global views, without gradient.
    """

    loss: torch.Tensor | None = None
    features: torch.Tensor | None = None
    projections: torch.Tensor | None = None


class BYOLForPreTraining(TargetModel, AnyEncoderModel):
    """Online network with a predictor, and its moving average as the target; with `ema=False` SimSiam.

    Two calls are enough for any loop: `model(**batch).loss`, and after the optimizer step
    `model.update_target(momentum)`, which also sets the predictor where it is not trained. The state dict holds
    everything that a run needs to continue.

    Attributes:
        encoder, target_encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f and its moving average. The
            online encoder is evaluated, as in the papers.
        projection_head, target_projection_head ([`ProjectionHead`]): h and its moving average. With `ema=False` there
            is no target module.
        prediction_head ([`PredictionHead`] or `nn.Linear`): The predictor, of the online network alone.
        input_correlation ([`InputCorrelation`]): F of the predictor's input.
    """

    config_class = BYOLConfig
    config: BYOLConfig

    def __init__(self, config: BYOLConfig):
        super().__init__(config)
        self.target_encoder = self.target_projection_head = None
        if not config.ema:
            self.view_kinds = ("global", "focal")
        else:
            self.target_encoder, width = build_encoder(config)
            self.target_projection_head = self._make_projection_head(width)
            if config.timm_model is not None:
                self._timm_modules |= set(self.target_encoder.modules())
            self._tied_weights_keys |= names_of_shared_tensors(self.target_encoder, "target_encoder.")
        dim = config.projection_dim
        if config.predictor == "mlp":
            settings = (config.projection_batch_norm, config.projection_activation)
            self.prediction_head = PredictionHead(dim, config.prediction_width, *settings, input_batch_norm=False)
        else:
            self.prediction_head = nn.Linear(dim, dim, bias=False)
        self.input_correlation = InputCorrelation(
            dim,
            config.predictor if config.predictor in RULES else None,
            rho=config.predictor_rho,
            eps=config.predictor_eps,
            update_every=config.predictor_update_every,
        )
        self.post_init()
        self.start_target()

    def _make_projection_head(self, width: int) -> ProjectionHead:
        layers, output_batch_norm = self.config.projection_layers, self.config.projection_output_batch_norm
        return super()._make_projection_head(width, num_layers=layers, output_batch_norm=output_batch_norm)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, InputCorrelation):
            init.zeros_(module.correlation)
            init.zeros_(module.num_updates)

    def forward(
        self,
        pixel_values: torch.Tensor,
        anchor_pixel_values: torch.Tensor | None = None,
        focal_pixel_values: torch.Tensor | None = None,
    ) -> BYOLForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): The first global view of each image.
            anchor_pixel_values (`torch.Tensor` of shape `(B, 1, C, H, W)`): The second.
            focal_pixel_values (`torch.Tensor` of shape `(B, F, C, h, w)`, *optional*): Small crops: they predict both
                global views.

        Raises:
            ValueError: If there are not two global views, or a shape does not fit.
        """
        check_two_views(pixel_values, anchor_pixel_values)
        views = [pixel_values, anchor_pixel_values[:, 0]]
        features = [self._features(self.encoder, view, "global") for view in views]
        if focal_pixel_values is not None and focal_pixel_values.shape[1]:
            features.append(self._features(self.encoder, focal_pixel_values.unbind(1), "focal"))
        projections = self._apply_head(self.projection_head, features)
        self.input_correlation.observe(torch.cat(projections))
        predictions = self._apply_head(self.prediction_head, projections)
        if self.target_encoder is None:
            first, second = projections[:2]
        else:
            with torch.no_grad():
                whole = [self._features(self.target_encoder, view, "target") for view in views]
                first, second = self._apply_head(self.target_projection_head, whole)
        return BYOLForPreTrainingOutput(
            loss=byol_loss(torch.cat(predictions), torch.cat([second, first])),
            features=torch.cat(features[:2]).detach(),
            projections=torch.cat(projections[:2]).detach(),
        )

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """As [`MSNForPreTraining.update_target`], without effect on a SimSiam; and move the predictor's F on.

        With `predictor` "direct_pred" or "direct_copy" this sets the predictor.
        """
        super().update_target(momentum)
        self.input_correlation.update(self.prediction_head)

    def _after_loading(self) -> None:
        super()._after_loading()
        if self.config.predictor in RULES:
            self.prediction_head.requires_grad_(False)


AutoConfig.register(BYOLConfig.model_type, BYOLConfig)
AutoModelForPreTraining.register(BYOLConfig, BYOLForPreTraining)
