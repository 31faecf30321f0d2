"""A plainly written training step of MSN in float32: the baseline of step.py.

Eager attention, one mask for the whole batch, log(softmax), loops over parameters, as in research code of 2022.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q @ k.transpose(-2, -1)) * self.scale
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden_dim: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Map images `(B, C, H, W)` to [CLS] `(B, D)`; `kept` has the indices of the patches that all images keep."""

    def __init__(self, config):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, images, kept=None):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self._positions(images.shape[-1] // self.patch_embed.kernel_size[0])
        if kept is not None:
            x = torch.cat([x[:, :1], x[:, 1:].index_select(1, kept)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int):
        own = math.isqrt(self.pos_embed.shape[1] - 1)
        if own == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Network(nn.Module):
    """Encoder, projection head and, in the online network alone, prototypes."""

    def __init__(self, config, prototypes: bool):
        super().__init__()
        hidden = config.projection_hidden_dim
        self.encoder = VisionTransformer(config)
        self.head = nn.Sequential(
            *(nn.Linear(config.hidden_size, hidden), nn.BatchNorm1d(hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU()),
            nn.Linear(hidden, config.projection_dim),
        )
        self.prototypes = (
            nn.Parameter(torch.zeros(config.num_prototypes, config.projection_dim)) if prototypes else None
        )

    def forward(self, anchors, focals=None, kept=None):
        projections = [self.head(self.encoder(anchors, kept))]  # a forward pass per resolution
        if focals is not None:
            projections.append(self.head(self.encoder(focals)))
        return torch.cat(projections), self.prototypes


def plain_msn_loss(anchors, targets, prototypes, config):
    prototypes = F.normalize(prototypes)
    probabilities = torch.softmax(F.normalize(anchors) @ prototypes.T / config.temperature, dim=1)
    with torch.no_grad():
        targets = torch.softmax(F.normalize(targets) @ prototypes.T / config.temperature, dim=1) ** (
            1 / config.sharpen_temperature
        )
        targets /= targets.sum(dim=1, keepdim=True)
        targets = targets.repeat(len(anchors) // len(targets), 1)
    cross_entropy = -(targets * torch.log(probabilities)).sum(dim=1).mean()
    mean = probabilities.mean(dim=0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        over_ranks = mean.detach().clone()
        dist.all_reduce(over_ranks)
        mean = mean + (over_ranks / dist.get_world_size() - mean.detach())  # DDP takes the mean of the gradients
    return cross_entropy + config.me_max_weight * (math.log(len(mean)) + (mean * torch.log(mean)).sum())


class PlainStep:
    """Model, optimizer and one training step, with the weights of an `MSNForPreTraining` without Sinkhorn."""

    def __init__(self, model):
        device = model.prototypes.device
        self.config = model.config
        self.online = Network(model.config, prototypes=True)
        self.target = Network(model.config, prototypes=False)
        weights = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
        self.online.load_state_dict(_plain_weights(weights, "encoder.", "projection_head."))
        self.target.load_state_dict(_plain_weights(weights, "target_encoder.", "target_projection_head."))
        self.online.to(device), self.target.to(device).requires_grad_(False)
        decayed = [p for name, p in self.online.named_parameters() if p.ndim > 1 and name != "prototypes"]
        others = [p for name, p in self.online.named_parameters() if p.ndim == 1 or name == "prototypes"]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
        self.clipped = [p for name, p in self.online.named_parameters() if name != "prototypes"]
        self.parallel = self.online
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.parallel = DistributedDataParallel(self.online)

    def loss(self, views: dict[str, torch.Tensor], mask_ratio: float) -> torch.Tensor:
        config = self.config
        anchors = torch.cat(views["anchor_pixel_values"].unbind(1))
        focals = torch.cat(views["focal_pixel_values"].unbind(1)) if "focal_pixel_values" in views else None
        kept = None
        if mask_ratio:
            num_kept = int(config.num_patches * (1 - mask_ratio))
            kept = torch.randperm(config.num_patches)[:num_kept].to(anchors.device)
        anchors, prototypes = self.parallel(anchors, focals, kept)
        with torch.no_grad():
            targets, _ = self.target(views["pixel_values"])
        return plain_msn_loss(anchors, targets, prototypes, config)

    def step(
        self, views, *, learning_rate: float, weight_decay: float, max_grad_norm: float, momentum: float
    ) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        loss = self.loss(views, self.config.mask_ratio)
        loss.backward()
        nn.utils.clip_grad_norm_(self.clipped, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.clipped):
                target.data.mul_(momentum).add_((1 - momentum) * online.data)
        return float(loss.detach())


def _plain_weights(weights: dict[str, torch.Tensor], encoder: str, head: str) -> dict[str, torch.Tensor]:
    """Return the weights of one network under the names of this file, with query, key and value joined."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(encoder):
            name = name.removeprefix(encoder)
            for old, new in _ENCODER_NAMES:
                name = name.replace(old, new)
            renamed["encoder." + name] = tensor
        elif name.startswith(head):
            for position, old in enumerate(("fc1", "bn1", "", "fc2", "bn2", "", "fc3")):
                name = name.replace(f"{head}{old}.", f"head.{position}.") if old else name
            renamed[name] = tensor
        elif name == "prototypes" and encoder == "encoder.":
            renamed[name] = tensor
    for query in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[query.replace("q_proj", "qkv")] = torch.cat(parts)
    return renamed


_ENCODER_NAMES = (
    ("embeddings.patch_embeddings.projection", "patch_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layers.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("o_proj", "proj"),
    ("mlp.", ""),
)
