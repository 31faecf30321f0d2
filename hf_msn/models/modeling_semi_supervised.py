"""What PAWS and SimCLR + SuNCEt share: an encoder, a projection head, and a support set of labelled images."""

import torch
import torch.nn.functional as F
from torch import nn

from ..distributed.batch_norm import track_statistics_once
from ..distributed.collectives import all_gather_cat
from .configuration_semi_supervised import SemiSupervisedConfig
from .heads import ProjectionHead
from .modeling_pretraining import PretrainingModel
from .patch_dropping import PatchDroppingViTMSNModel
from .trunks import build_encoder


class SemiSupervisedModel(PretrainingModel):
    """Base of [`PAWSForPreTraining`] and [`SuNCEtForPreTraining`].

    Attributes:
        encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f.
        projection_head ([`ProjectionHead`]): h.
    """

    config: SemiSupervisedConfig

    def __init__(self, config: SemiSupervisedConfig):
        super().__init__(config)
        self.encoder, width = build_encoder(config)
        if config.timm_model is not None:
            for module in self.encoder.modules():
                module._is_of_timm = True
        self.projection_head = ProjectionHead(
            width,
            config.projection_hidden_dim,
            config.projection_dim,
            config.projection_batch_norm,
            config.projection_activation,
        )

    @property
    def evaluation_encoder(self) -> nn.Module:
        """The encoder whose features are evaluated: there is only one."""
        return self.encoder

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projections, in which images are compared: `(B, C, H, W)` -> `(B, projection_dim)`."""
        return self.projection_head(self._features(pixel_values))

    def compile_encoders(self, **kwargs) -> None:
        """`torch.compile` on the encoder, in place: the state dict stays as it is. `kwargs` go to `compile`."""
        self.encoder.compile(**kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        if self.config.timm_model is None:
            return super()._set_gradient_checkpointing(enable, **kwargs)
        try:
            self.encoder.set_grad_checkpointing(enable)
        except AssertionError as error:  # how timm says it
            raise ValueError(
                f"`activation_checkpointing` is on, but timm has none for {self.config.timm_model!r}. Leave it off, "
                "or take another `timm_model`."
            ) from error
        if enable:
            track_statistics_once(self.encoder)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.encoder, PatchDroppingViTMSNModel):
            return self.encoder(pixel_values, cls_only=True).last_hidden_state[:, 0]
        return self.encoder(pixel_values)

    def _project_together(self, groups: list[torch.Tensor]) -> list[torch.Tensor]:
        """Projections of several groups of images; groups of one size share a pass, and all share the head's.

        Batch normalisation in the encoder then sees all images of one size, and in the heads all images.
        """
        sizes = list(dict.fromkeys(group.shape[-2:] for group in groups))
        order = [place for size in sizes for place, group in enumerate(groups) if group.shape[-2:] == size]
        features = [
            self._features(torch.cat([group for group in groups if group.shape[-2:] == size])) for size in sizes
        ]
        parts = self.projection_head(torch.cat(features)).split([len(groups[place]) for place in order])
        return [part for _, part in sorted(zip(order, parts), key=lambda pair: pair[0])]

    def _label_rows(self, support_labels: torch.Tensor) -> torch.Tensor:
        """Smoothed one-hot rows of this rank's supports, a column for each class of the support of **all** ranks.

        With C classes in the support, a row has 1 - eps + eps / C at its class and eps / C elsewhere.
        """
        if support_labels.ndim != 1 or support_labels.is_floating_point() or support_labels.dtype == torch.bool:
            raise ValueError(
                "`support_labels` must be one class number for each support, (S,), but has shape "
                f"{tuple(support_labels.shape)} and type {support_labels.dtype}."
            )
        classes = torch.unique(all_gather_cat(support_labels))
        if classes[0] < 0:
            raise ValueError(
                f"`support_labels` must be class numbers >= 0, but one is {int(classes[0])}. Images without a label "
                "cannot be supports."
            )
        weight = self.projection_head.fc1.weight
        rows = F.one_hot(torch.searchsorted(classes, support_labels), len(classes))
        rows = rows.to(torch.promote_types(weight.dtype, torch.float32))  # a float64 model is exact to the end
        smoothing = self.config.label_smoothing
        return rows * (1 - smoothing) + smoothing / len(classes)

    @staticmethod
    def _check_views(pixel_values: torch.Tensor, anchor_pixel_values: torch.Tensor | None, method: str) -> None:
        wanted = (len(pixel_values), 1)
        if anchor_pixel_values is None or anchor_pixel_values.ndim != 5 or anchor_pixel_values.shape[:2] != wanted:
            shape = None if anchor_pixel_values is None else tuple(anchor_pixel_values.shape)
            raise ValueError(
                f"{method} needs two global views of each image: `pixel_values` (B, C, H, W) and "
                f"`anchor_pixel_values` (B, 1, C, H, W) with B = {len(pixel_values)}, but got {shape}. Set "
                "`anchor_views` of the transform to 1."
            )

    @staticmethod
    def _check_support(support_pixel_values: torch.Tensor | None, support_labels: torch.Tensor | None) -> None:
        if support_pixel_values is None or support_labels is None or len(support_pixel_values) != len(support_labels):
            shapes = [None if t is None else tuple(t.shape) for t in (support_pixel_values, support_labels)]
            raise ValueError(
                "The support needs `support_pixel_values` (S, C, H, W) and a label for each in `support_labels` (S,), "
                f"but got {shapes[0]} and {shapes[1]}. A `support_loader` gives both."
            )
        if len(support_labels) == 0:
            raise ValueError("The support is empty, but needs at least one labelled image. Label some images.")
