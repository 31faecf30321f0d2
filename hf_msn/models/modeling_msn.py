"""Masked Siamese Networks (arXiv 2204.07141) as a transformers model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..checks import check_number
from ..distributed.collectives import rank
from ..losses.msn import msn_loss
from .configuration_msn import MSNConfig
from .encoder import PatchDroppingViTMSNModel
from .heads import PredictionHead, ProjectionHead
from .masking import draw_kept_patches
from .modeling_pretraining import PretrainingModel


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


class MSNForPreTraining(PretrainingModel):
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
        # Seed of the masks and number of draws so far. In the state dict, so that a resumed run draws what comes next.
        self.register_buffer("mask_state", torch.zeros(2, dtype=torch.int64))
        # The host's copy of mask_state, read on demand: reading a GPU tensor at each step would stall it.
        self._mask_draw = None
        self.register_load_state_dict_post_hook(_forget_mask_draw)
        self.post_init()
        self.update_target(0.0)
        self._after_loading()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MSNForPreTraining):
            bound = self.config.projection_dim**-0.5
            init.uniform_(module.prototypes, -bound, bound)
            init.zeros_(module.mask_state)

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields) -> "MSNForPreTraining":
        """Start from a pretrained ViTMSN, as `PretrainingModel.from_backbone`: both encoders get its weights."""
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
            images = view.transpose(0, 1).flatten(0, 1)  # view-major
            kept_patches = self._draw_kept_patches(images) if name == "anchor_pixel_values" else None
            rows.append(self._cls(self.encoder, images, kept_patches))
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
        return self.target_projection_head(self._cls(self.target_encoder, pixel_values))

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """theta_target <- momentum * theta_target + (1 - momentum) * theta, for encoder and heads.

        Parameters only: the running statistics of batch normalisation follow the target's own forward passes.

        Raises:
            ValueError: If `momentum` is outside [0, 1], or the weights have 16 bits, which would lose most of a step.
        """
        check_number("momentum", momentum, minimum=0, maximum=1, remedy="The paper goes from 0.996 to 1.")
        online = [self.encoder, self.projection_head, self.prediction_head]
        target = _parameters(self._target_modules())
        if 0 < momentum < 1 and any(torch.finfo(parameter.dtype).bits < 32 for parameter in target):
            raise ValueError(
                f"The weights of the target must have at least 32 bits for a moving average, but are {target[0].dtype}"
                f": steps of 1 - momentum = {1 - momentum:.3g} would be lost to rounding. Load the model with "
                "`dtype=torch.float32`; `bf16` of the training arguments computes in 16 bits all the same."
            )
        torch._foreach_lerp_(target, _parameters(online), 1.0 - momentum)

    def _after_loading(self) -> None:
        for parameter in _parameters(self._target_modules()):
            parameter.requires_grad_(False)

    def _target_modules(self) -> list[nn.Module | None]:
        return [self.target_encoder, self.target_projection_head, self.target_prediction_head]

    @torch.no_grad()
    def seed_masks(self, seed: int) -> None:
        """Restart the sequence of mask draws from `seed`. Each rank draws its own."""
        self.mask_state.copy_(torch.tensor([seed, 0]))
        self._mask_draw = None

    def compile_encoders(self, **kwargs) -> None:
        """Compile both encoders in place: the state dict does not change. `kwargs` go to `torch.nn.Module.compile`."""
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
        if self.training:  # an evaluation does not advance the sequence
            self._mask_draw = (seed, draw + 1)
            self.mask_state[1].fill_(draw + 1)
        return kept.to(pixel_values.device, non_blocking=True)


def _parameters(modules: list[nn.Module | None]) -> list[nn.Parameter]:
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _forget_mask_draw(model: MSNForPreTraining, incompatible_keys) -> None:
    model._mask_draw = None


AutoConfig.register(MSNConfig.model_type, MSNConfig)
AutoModelForPreTraining.register(MSNConfig, MSNForPreTraining)
