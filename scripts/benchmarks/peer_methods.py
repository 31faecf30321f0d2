"""Methods of lightly and stable-pretraining on our encoder, for `accuracy.py`.

Heads, masks and losses are those of the library, with its defaults for what our recipe does not name. Encoder and
initial weights, views, AdamW, schedules, clipping and moving average are ours for all, so that a difference is one of
the method.
"""

from dataclasses import replace

import torch
from torch import nn

from hf_msn.cli.methods import METHODS, Method
from hf_msn.models.modeling_msn import MSNForPreTraining, MSNForPreTrainingOutput
from hf_msn.trainers.msn_trainer import MSNTrainer


class PeerModel(MSNForPreTraining):
    """Our encoder and its moving average with the heads and the loss of another library, on two global views."""

    def __init__(self, config):
        super().__init__(config)
        self.build()
        self.start_target()

    def build(self) -> None:
        """Make the heads and the loss."""
        raise NotImplementedError

    def compare(self, target: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of two views (B, C, H, W), and features and projections of the anchor or of both."""
        raise NotImplementedError

    def forward(self, pixel_values, anchor_pixel_values, **unused) -> MSNForPreTrainingOutput:
        loss, features, projections = self.compare(pixel_values, anchor_pixel_values[:, 0])
        return MSNForPreTrainingOutput(loss=loss, features=features.detach(), projections=projections.detach())

    def widths(self) -> tuple[int, int, int]:
        """Return the input, hidden and output width of a head."""
        return self.config.hidden_size, self.config.projection_hidden_dim, self.config.projection_dim


class LightlyMSN(PeerModel):
    def build(self):
        from lightly.loss import MSNLoss
        from lightly.models.modules.heads import MSNProjectionHead
        from lightly.models.utils import random_token_mask

        self.projection_head, self.target_projection_head = (MSNProjectionHead(*self.widths()) for _ in range(2))
        self.criterion = MSNLoss(sinkhorn_iterations=3 if self.config.use_sinkhorn else 0)
        self.draw_mask = random_token_mask

    def compare(self, target, anchor):
        tokens = 1 + (anchor.shape[-1] // self.config.patch_size) ** 2
        kept, _ = self.draw_mask((len(anchor), tokens), mask_ratio=self.config.mask_ratio, device=anchor.device)
        kept = kept[:, 1:] - 1  # the [CLS], which comes first, is no patch
        features = self._encode(self.encoder, [anchor], kept, patch_size=None)
        projections = self.projection_head(features)
        with torch.no_grad():
            targets = self.project(target)
        loss = self.criterion(projections, targets, self.prototypes, self.config.sharpen_temperature)
        return loss, features, projections


class LightlySimCLR(PeerModel):
    def build(self):
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.projection_head, self.target_projection_head = SimCLRProjectionHead(*self.widths()), None
        self.criterion = NTXentLoss()

    @property
    def evaluation_encoder(self):
        return self.encoder

    def compare(self, target, anchor):
        features = self._features(self.encoder, [target, anchor])
        projections = self.projection_head(features)
        return self.criterion(*projections.chunk(2)), features, projections


class LightlyDINO(PeerModel):
    def build(self):
        from lightly.loss import DINOLoss
        from lightly.models.modules.heads import DINOProjectionHead

        outputs = self.config.num_prototypes
        self.projection_head, self.target_projection_head = (
            DINOProjectionHead(*self.widths(), outputs) for _ in range(2)
        )
        self.criterion = DINOLoss(outputs)

    def compare(self, target, anchor):
        features = self._features(self.encoder, [target, anchor])
        projections = self.projection_head(features)
        with torch.no_grad():
            targets = self.target_projection_head(self._features(self.target_encoder, [target, anchor]))
        return self.criterion(list(targets.chunk(2)), list(projections.chunk(2))), features, projections


class StablePretrainingMSN(PeerModel):
    def build(self):
        from stable_pretraining.methods.msn import MSN

        _, hidden, width = self.widths()
        self.method = MSN(
            InTimmForm(self.encoder),
            projector_hidden_dim=hidden,
            projector_bottleneck_dim=width,
            n_prototypes=self.config.num_prototypes,
            mask_ratio=self.config.mask_ratio,
            image_size=self.config.image_size,
        )
        self.target_encoder = self.method.backbone.teacher.encoder
        self.projection_head = self.target_projection_head = None

    def _online_and_target(self):
        if not hasattr(self, "method"):
            return super()._online_and_target()
        return [(part.student, part.teacher) for part in (self.method.backbone, self.method.projector)]

    def compare(self, target, anchor):
        output = self.method(view1=anchor, view2=target)
        return output.loss, output.embedding, output.student_logits


class InTimmForm(nn.Module):
    """Our encoder with the names of the parts of timm's VisionTransformer."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    @property
    def cls_token(self):
        return self.encoder.embeddings.cls_token

    @property
    def pos_embed(self):
        return self.encoder.embeddings.position_embeddings

    def patch_embed(self, images):
        return self.encoder.embeddings.patch_embeddings(images)

    def pos_drop(self, tokens):
        return self.encoder.embeddings.dropout(tokens)

    def blocks(self, tokens):
        for layer in self.encoder.layers:
            tokens = layer(tokens)
        return tokens

    def norm(self, tokens):
        return self.encoder.layernorm(tokens)

    def forward_features(self, images):
        return self.encoder(images).last_hidden_state


PEERS = {
    "lightly:msn": LightlyMSN,
    "lightly:simclr": LightlySimCLR,
    "lightly:dino": LightlyDINO,
    "stable_pretraining:msn": StablePretrainingMSN,
}


def method_of_peer(name: str) -> Method:
    """Return a peer's method: `MSNTrainer` for its model, whose outputs have no prototypes to log."""

    class PeerTrainer(MSNTrainer):
        model_class = PEERS[name]

        def values_to_log(self, outputs):
            return {}

    return replace(METHODS["msn"], trainer=PeerTrainer)
