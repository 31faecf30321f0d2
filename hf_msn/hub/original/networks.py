"""The networks of the original checkpoints: what their tensors' shapes say of the architecture, and their names.

A ViT there has timm's (deit's) names, a ResNet torchvision's; the heads sit inside of the encoder as `fc` and `pred`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import ViTMSNConfig

from ...models.configuration_semi_supervised import SemiSupervisedConfig
from ...models.trunks import build_encoder

Weights = Mapping[str, torch.Tensor]

# (original name, ours) of what has a weight and a bias; {} is the number of the block
_VIT = [("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm", "layernorm")]
_VIT_BLOCK = [
    ("blocks.{}.norm1", "layers.{}.layernorm_before"),
    ("blocks.{}.norm2", "layers.{}.layernorm_after"),
    ("blocks.{}.attn.proj", "layers.{}.attention.o_proj"),
    ("blocks.{}.mlp.fc1", "layers.{}.mlp.fc1"),
    ("blocks.{}.mlp.fc2", "layers.{}.mlp.fc2"),
]
_VIT_BARE = [("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings")]
_STATISTICS = ("running_mean", "running_var")
_KNOWN_VITS = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}
# blocks a stage, and whether a block is a bottleneck of three convolutions
_KNOWN_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_RESNET_CHANNELS = (64, 128, 256, 512)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
# options of timm.create_model that the names and shapes of the weights give back, or that training alone uses
_RESNET_OPTIONS = {"layers", "channels", "drop_rate", "drop_path_rate", "zero_init_last"}


def is_vit(weights: Weights) -> bool:
    return "pos_embed" in weights or "patch_embed.proj.weight" in weights


def is_resnet(weights: Weights) -> bool:
    return "conv1.weight" in weights and any(name.startswith("layer1.") for name in weights)


def vit_fields(weights: Weights, num_attention_heads: int | None = None) -> dict[str, Any]:
    """The fields of `ViTMSNConfig` that the shapes of a ViT's weights ask for. Shapes do not show the heads.

    Args:
        weights: The trunk, by its original names.
        num_attention_heads (`int`, *optional*): By default the width / 64.

    Raises:
        ValueError: If a tensor is missing or a shape is not one of a ViT for square images in RGB.
    """
    width, channels, patch, patch_width = _shape(weights, "patch_embed.proj.weight", 4)
    if channels != 3 or patch != patch_width:
        raise ValueError(
            f"'patch_embed.proj.weight' must take square patches of RGB images, but has shape "
            f"({width}, {channels}, {patch}, {patch_width}). This package has no encoder for other images."
        )
    num_patches = _shape(weights, "pos_embed", 3)[1] - 1
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise ValueError(
            f"'pos_embed' must be of one [CLS] and a square grid of patches, but has {num_patches + 1} positions: "
            f"{num_patches} is no square number. A ViTMSN takes square images and no further tokens."
        )
    depth = 1 + max((int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if depth < 1 or depth > len(weights):
        raise ValueError(f"A ViT has tensors 'blocks.0...' to 'blocks.11...' or so, but here are {depth} blocks.")
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": _attention_heads(width, num_attention_heads),
        "intermediate_size": _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def vit_shapes(config: ViTMSNConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the original ViT that `config` describes."""
    width, patch = config.hidden_size, config.patch_size
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (config.image_size // patch) ** 2, width),
        **_affine("patch_embed.proj", width, config.num_channels, patch, patch),
    }
    for block in range(config.num_hidden_layers):
        prefix = f"blocks.{block}."
        shapes.update(_affine(f"{prefix}norm1", width))
        shapes.update(_affine(f"{prefix}attn.qkv", 3 * width, width))
        shapes.update(_affine(f"{prefix}attn.proj", width, width))
        shapes.update(_affine(f"{prefix}norm2", width))
        shapes.update(_affine(f"{prefix}mlp.fc1", config.intermediate_size, width))
        shapes.update(_affine(f"{prefix}mlp.fc2", width, config.intermediate_size))
        if not config.qkv_bias:
            del shapes[f"{prefix}attn.qkv.bias"]
    shapes.update(_affine("norm", width))
    return shapes


def vit_to_ours(weights: Weights) -> dict[str, torch.Tensor]:
    """Original names -> those of `ViTMSNModel`. What is stacked as query, key, value becomes three tensors."""
    names = dict(_vit_names(weights))
    renamed = {}
    for name, tensor in weights.items():
        stacked = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if stacked:
            for part, piece in zip("qkv", tensor.chunk(3)):
                renamed[f"layers.{stacked[1]}.attention.{part}_proj.{stacked[2]}"] = piece
        else:
            renamed[names[name]] = tensor
    return renamed


def vit_to_original(weights: Weights, config: ViTMSNConfig) -> dict[str, torch.Tensor]:
    """The names of `ViTMSNModel` -> the original ones, in the original's order."""
    names = dict(_vit_names(vit_shapes(config)))
    renamed = {}
    for name in vit_shapes(config):
        stacked = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if stacked:
            ours = [f"layers.{stacked[1]}.attention.{part}_proj.{stacked[2]}" for part in "qkv"]
            renamed[name] = torch.cat([weights[part] for part in ours])
        else:
            renamed[name] = weights[names[name]]
    return renamed


def vit_name(config: ViTMSNConfig) -> str:
    size = _KNOWN_VITS.get((config.hidden_size, config.num_hidden_layers))
    size = size or f"{config.hidden_size}x{config.num_hidden_layers}"
    return f"ViT-{size}/{config.patch_size}"


def resnet_fields(weights: Weights) -> dict[str, Any]:
    """The fields of [`PAWSConfig`] that the shapes of a ResNet's weights ask for.

    A stem of 3x3 is taken for the one of small images, of stride 1 without pooling, which shapes do not show.

    Raises:
        ValueError: If it is a ResNet that timm's do not cover.
    """
    if any(".shortcut." in name for name in weights) or "conv1.bias" in weights:
        raise ValueError(
            "The trunk is a WideResNet as PAWS has for CIFAR-10, but this package has no such encoder: timm's "
            "resnetv2 has convolutions without biases, strides elsewhere and another shortcut. PAWS can be converted "
            "with ResNet or ViT trunks."
        )
    stem, _, kernel, _ = _shape(weights, "conv1.weight", 4)
    if stem != 64 or kernel not in (3, 7):
        raise ValueError(
            f"The stem must be a convolution of 64 channels, 7x7 or 3x3, as timm's ResNets have, but 'conv1.weight' "
            f"has {stem} channels and is {kernel}x{kernel}. A widened ResNet (w2, w4) cannot be converted."
        )
    blocks = [
        1 + max((int(found[1]) for name in weights if (found := re.match(rf"{stage}\.(\d+)\.", name))), default=-1)
        for stage in _STAGES
    ]
    if min(blocks) < 1 or max(blocks) > len(weights):
        raise ValueError(f"A ResNet has four stages, layer1 to layer4, but here they have {blocks} blocks.")
    channels = tuple(_shape(weights, f"{stage}.0.conv1.weight", 4)[0] for stage in _STAGES)
    bottleneck = "layer1.0.conv3.weight" in weights
    name = _KNOWN_RESNETS.get((tuple(blocks), bottleneck))
    options = {} if name else {"layers": blocks}
    if channels != _RESNET_CHANNELS:
        options["channels"] = list(channels)
    return {
        "timm_model": name or ("resnet50" if bottleneck else "resnet18"),
        "timm_options": options or None,
        "small_image_stem": kernel == 3,
    }


def resnet_shapes(config: SemiSupervisedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ResNet that `config` describes; torchvision and timm name them alike.

    Raises:
        ValueError: If the encoder is another network of timm, for which the original code has none.
    """
    options = set(config.timm_options or {})
    if config.timm_model not in _KNOWN_RESNETS.values() or options - _RESNET_OPTIONS:
        raise ValueError(
            f"The original code has ViTs and plain ResNets, but the encoder is '{config.timm_model}' of timm with "
            f"`timm_options` {config.timm_options}. Only {', '.join(_KNOWN_RESNETS.values())} can be written."
        )
    with torch.device("meta"):
        encoder, _ = build_encoder(config)
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def resnet_name(config: SemiSupervisedConfig) -> str:
    known = {"resnet18": "18", "resnet34": "34", "resnet50": "50", "resnet101": "101", "resnet152": "152"}
    options = {key: value for key, value in (config.timm_options or {}).items() if key in ("layers", "channels")}
    varied = ", ".join(f"{key} {'-'.join(map(str, value))}" for key, value in options.items())
    return f"ResNet-{known[config.timm_model]}" + (f" ({varied})" if varied else "")


def head_fields(weights: Weights) -> dict[str, Any]:
    """The fields of a configuration that the shapes of the heads ask for, the prediction head's if there is one.

    Raises:
        ValueError: If there is no projection head of three layers, or the two heads differ in batch normalisation.
    """
    batch_norm = any(name.startswith("fc.bn") for name in weights)
    fields = {
        "projection_hidden_dim": _shape(weights, "fc.fc1.weight", 2)[0],
        "projection_dim": _shape(weights, "fc.fc3.weight", 2)[0],
        "projection_batch_norm": batch_norm,
    }
    if any(name.startswith("pred.") for name in weights):
        fields["prediction_head"] = True
        fields["prediction_hidden_dim"] = _shape(weights, "pred.fc1.weight", 2)[0]
        if batch_norm != any(name.startswith("pred.bn") for name in weights):
            raise ValueError(
                "Of the heads 'fc' and 'pred', one has batch normalisation and the other has none, but "
                "`projection_batch_norm` is one setting for both. Such a model cannot be held here."
            )
    return fields


def head_shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the heads `fc` and, if `config` has one, `pred`, on features of `width`."""
    hidden, dim, batch_norm = config.projection_hidden_dim, config.projection_dim, config.projection_batch_norm
    norm = _batch_norm if batch_norm else lambda name, size: {}
    shapes = {
        **_affine("fc.fc1", hidden, width),
        **norm("fc.bn1", hidden),
        **_affine("fc.fc2", hidden, hidden),
        **norm("fc.bn2", hidden),
        **_affine("fc.fc3", dim, hidden),
    }
    if getattr(config, "prediction_head", False):
        inner = config.prediction_width
        shapes.update(
            {
                **norm("pred.bn1", dim),
                **_affine("pred.fc1", inner, dim),
                **norm("pred.bn2", inner),
                **_affine("pred.fc2", dim, inner),
            }
        )
    return shapes


def part(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _vit_names(names) -> list[tuple[str, str]]:
    depth = 1 + max((int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    pairs = _VIT + [(a.format(block), b.format(block)) for block in range(depth) for a, b in _VIT_BLOCK]
    return _VIT_BARE + [(f"{a}.{kind}", f"{b}.{kind}") for a, b in pairs for kind in ("weight", "bias")]


def _attention_heads(width: int, given: int | None) -> int:
    if given is None:
        if width % 64:
            raise ValueError(
                f"The width of the ViT is {width}, which is no multiple of the usual 64 a head, and no shape shows "
                "the number of heads. Give `num_attention_heads` (`--num_attention_heads`)."
            )
        return width // 64
    if isinstance(given, bool) or not isinstance(given, int) or given < 1 or width % given:
        raise ValueError(
            f"`num_attention_heads` must be a whole number that divides the width {width} of the ViT, but is "
            f"{given!r}."
            f"{f' With 64 dimensions a head it is {width // 64}.' if width % 64 == 0 else ''}"
        )
    return given


def _shape(weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(
            f"'{name}' is missing, which shows the architecture; there are {len(weights)} tensors, first "
            f"{list(weights)[:3]}. It is no encoder of MSN or PAWS, or not a whole one."
        )
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or min(shape) < 1:
        raise ValueError(f"'{name}' must have {dimensions} dimensions, none empty, but has shape {shape}.")
    return shape


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _batch_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {
        **_affine(name, size),
        **{f"{name}.{kind}": (size,) for kind in _STATISTICS},
        f"{name}.num_batches_tracked": (),
    }
