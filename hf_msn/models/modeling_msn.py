"""Masked Siamese Networks (arXiv 2204.07141) as a transformers model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..distributed.collectives import rank
from ..losses.msn import msn_loss
from .configuration_msn import MSNConfig
from .heads import ProjectionHead
from .modeling_pretraining import PretrainingModel
from .patch_dropping import PatchDroppingViTMSNModel, draw_kept_patches


@dataclass
class MSNForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): Scalar, the total to minimise.
        cross_entropy, me_max, entropy (`torch.Tensor`): Scalars, its parts before weighting, in nats.
        target_probabilities (`torch.Tensor` of shape `(B, K)`): Sharpened assignments of the target views.
        anchor_probabilities (`torch.Tensor` of shape `(V*B, K)`): Assignments of the anchors, view-major, with
            gradient.
    """

    loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    me_max: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    target_probabilities: torch.Tensor | None = None
    anchor_probabilities: torch.Tensor | None = None


class MSNForPreTraining(PretrainingModel):
    """Online and target encoder, their projection heads and the prototypes, with the loss of MSN.

    Two calls are enough for any loop: `model(**batch).loss`, and after the optimizer step
    `model.update_target(momentum)`. All that a run needs to go on is in the state dict, the state of the mask draws
    included.

    Attributes:
        encoder, target_encoder ([`PatchDroppingViTMSNModel`]): f and its exponential moving average.
        projection_head, target_projection_head ([`ProjectionHead`]): h and its exponential moving average.
        prototypes (`nn.Parameter` of shape `(K, D)`): Learnt with the online encoder.
    """

    config_class = MSNConfig
    config: MSNConfig

    def __init__(self, config: MSNConfig):
        super().__init__(config)
        head = (
            config.hidden_size,
            config.projection_hidden_dim,
            config.projection_dim,
            config.projection_batch_norm,
        )
        self.encoder = PatchDroppingViTMSNModel(config)
        self.projection_head = ProjectionHead(*head)
        self.target_encoder = PatchDroppingViTMSNModel(config)
        self.target_projection_head = ProjectionHead(*head)
        self.prototypes = nn.Parameter(torch.empty(config.num_prototypes, config.projection_dim))
        # Seed of the masks and number of draws so far. In the state dict, so that a resumed run draws what comes next.
        self.register_buffer("mask_state", torch.zeros(2, dtype=torch.int64))
        self._mask_draw = (
            None  # the host's copy of mask_state, read lazily: reading a GPU tensor each step would stall it
        )
        self.register_load_state_dict_post_hook(_forget_mask_draw)
        self.post_init()
        self.update_target(0.0)
        self._freeze_target()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MSNForPreTraining):
            bound = self.config.projection_dim**-0.5
            init.uniform_(module.prototypes, -bound, bound)
            init.zeros_(module.mask_state)

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields) -> "MSNForPreTraining":
        """Starts from a pretrained trunk, as every pretraining model does: both encoders get its weights.

        Args:
            name_or_path (`str` or `Path`): Hub id or folder of a ViTMSN model, such as "facebook/vit-msn-small", or of
                a pretraining model of this package, whose evaluated encoder is taken.
            **config_fields: Fields of [`MSNConfig`] that differ from the trunk's or from the defaults. With another
                `image_size` the position embeddings are interpolated.

        Raises:
            ValueError: If the checkpoint is of another architecture, or a field would change the shape of the trunk.
        """
        model = super().from_backbone(name_or_path, **config_fields)
        model.update_target(0.0)
        return model

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
        batch_size = pixel_values.shape[0]
        views = [view for view in (anchor_pixel_values, focal_pixel_values) if view is not None and view.shape[1] > 0]
        if not views or any(view.ndim != 5 or view.shape[0] != batch_size for view in views):
            shapes = [
                None if view is None else tuple(view.shape) for view in (anchor_pixel_values, focal_pixel_values)
            ]
            raise ValueError(
                "MSN needs at least one anchor or focal view an image, `anchor_pixel_values` (B, V, C, H, W) or "
                f"`focal_pixel_values` (B, F, C, h, w), with B = {batch_size} as in `pixel_values`, but got {shapes}."
            )

        features = []
        if anchor_pixel_values is not None and anchor_pixel_values.shape[1] > 0:
            anchors = anchor_pixel_values.transpose(0, 1).flatten(0, 1)
            features.append(self._cls(self.encoder, anchors, self._draw_kept_patches(anchors)))
        if focal_pixel_values is not None and focal_pixel_values.shape[1] > 0:
            features.append(self._cls(self.encoder, focal_pixel_values.transpose(0, 1).flatten(0, 1)))
        anchor_projections = self.projection_head(torch.cat(features))
        with torch.no_grad():
            target_projections = self.target_projection_head(self._cls(self.target_encoder, pixel_values))

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
        )

    @property
    def evaluation_encoder(self) -> PatchDroppingViTMSNModel:
        """The encoder whose features are evaluated: the target's, as in the paper."""
        return self.target_encoder

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projections of the target: `(B, C, H, W)` -> `(B, projection_dim)`."""
        return self.target_projection_head(self._cls(self.target_encoder, pixel_values))

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """theta_target <- momentum * theta_target + (1 - momentum) * theta, for encoder and head.

        Parameters only: the running statistics of batch normalisation follow the target's own forward passes.

        Raises:
            ValueError: If `momentum` is outside [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"`momentum` must be in [0, 1], but is {momentum}. The paper goes from 0.996 to 1.")
        target = [*self.target_encoder.parameters(), *self.target_projection_head.parameters()]
        online = [*self.encoder.parameters(), *self.projection_head.parameters()]
        torch._foreach_lerp_(target, online, 1.0 - momentum)

    def _after_loading(self) -> None:
        self._freeze_target()

    def _freeze_target(self) -> None:
        self.target_encoder.requires_grad_(False)
        self.target_projection_head.requires_grad_(False)

    @torch.no_grad()
    def seed_masks(self, seed: int) -> None:
        """Starts the sequence of mask draws anew from `seed`; each rank then draws its own."""
        self.mask_state.copy_(torch.tensor([seed, 0]))
        self._mask_draw = None

    def compile_encoders(self, **kwargs) -> None:
        """`torch.compile` on both encoders, in place: the state dict stays as it is. `kwargs` go to `compile`."""
        self.encoder.compile(**kwargs)
        self.target_encoder.compile(**kwargs)

    @staticmethod
    def _cls(encoder: nn.Module, pixel_values: torch.Tensor, kept_patches: torch.Tensor | None = None) -> torch.Tensor:
        return encoder(pixel_values, kept_patches=kept_patches, cls_only=True).last_hidden_state[:, 0]

    def _draw_kept_patches(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        if self.config.mask_ratio == 0:
            return None
        if self._mask_draw is None:
            self._mask_draw = tuple(self.mask_state.tolist())
        seed, draw = self._mask_draw
        patch_size = self.config.patch_size
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        kept = draw_kept_patches(
            pixel_values.shape[0],
            num_patches,
            self.config.mask_ratio,
            seed=(seed, 0 if self.config.shared_mask else rank(), draw),
            shared=self.config.shared_mask,
        )
        if self.training:  # an evaluation in between leaves the sequence of training as it is
            self._mask_draw = (seed, draw + 1)
            self.mask_state[1].fill_(draw + 1)
        return kept.to(pixel_values.device, non_blocking=True)


def _forget_mask_draw(model: MSNForPreTraining, incompatible_keys) -> None:
    model._mask_draw = None


AutoConfig.register(MSNConfig.model_type, MSNConfig)
AutoModelForPreTraining.register(MSNConfig, MSNForPreTraining)
