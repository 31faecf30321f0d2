"""The authors' checkpoints of MSN and PAWS: their names of tensors beside ours, and the architecture that shapes show.

An encoder there holds its heads: `fc` is the projection head, `pred` the prediction head. A ViT has timm's names, a
ResNet torchvision's.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import ViTMSNModel

from ..models.paws_resnets import PAWS_NETWORKS

Weights = Mapping[str, torch.Tensor]
KeyMap = dict[str, list[str]]

_VIT_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
HEADS = {"projection_head": "fc", "prediction_head": "pred"}
_KNOWN_VITS = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}
# blocks per stage, and whether a block is a bottleneck of three convolutions
_KNOWN_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
NETWORKS = (*_KNOWN_RESNETS.values(), *PAWS_NETWORKS)
# options that names and shapes show, or that only initialisation and training use
NETWORK_OPTIONS = {
    *("layers", "channels", "stem_channels", "bottleneck"),
    *("drop_rate", "drop_path_rate", "zero_init_last"),
}


def key_map(model: nn.Module, section: str) -> KeyMap:
    """Map the authors' name of each tensor of an encoder and its heads to the names whose concatenation it is."""
    encoder = encoder_key_map(getattr(model, section))
    names = {theirs: [f"{section}.{name}" for name in ours] for theirs, ours in encoder.items()}
    prefix = section.removesuffix("encoder")
    for head, short in HEADS.items():
        module = getattr(model, prefix + head)
        if module is not None:
            names.update({f"{short}.{name}": [f"{prefix}{head}.{name}"] for name in module.state_dict()})
    return names


def encoder_key_map(encoder: nn.Module) -> KeyMap:
    """The key map of an encoder without heads, in the order of the authors' code. ResNets have the same names."""
    ours = encoder.state_dict()
    if not isinstance(encoder, ViTMSNModel):
        return {name: [name] for name in ours}
    modules = {"patch_embed.proj": ["embeddings.patch_embeddings.projection"]}
    for block in range(len(encoder.layers)):
        for theirs, parts in _VIT_BLOCK.items():
            modules[f"blocks.{block}.{theirs}"] = [f"layers.{block}.{part}" for part in parts]
    modules["norm"] = ["layernorm"]
    names = {"cls_token": ["embeddings.cls_token"], "pos_embed": ["embeddings.position_embeddings"]}
    for theirs, parts in modules.items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in ours:
                names[f"{theirs}.{kind}"] = [f"{part}.{kind}" for part in parts]
    return names


def to_ours(weights: Weights, names: KeyMap) -> dict[str, torch.Tensor]:
    """Rename and split the authors' tensors. One without a name here keeps its own, for a strict load to report."""
    state = {}
    for theirs, tensor in weights.items():
        ours = names.get(theirs, [theirs])
        state.update(zip(ours, [tensor] if len(ours) == 1 else tensor.chunk(len(ours))))
    return state


def to_theirs(state: Weights, names: KeyMap) -> dict[str, torch.Tensor]:
    """Rename and join our tensors, in memory of their own."""
    return {
        theirs: (state[ours[0]].clone() if len(ours) == 1 else torch.cat([state[name] for name in ours])).cpu()
        for theirs, ours in names.items()
    }


def is_vit(weights: Weights) -> bool:
    return "pos_embed" in weights or "patch_embed.proj.weight" in weights


def is_resnet(weights: Weights) -> bool:
    return "conv1.weight" in weights and any(name.startswith("layer1.") for name in weights)


def vit_fields(weights: Weights, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Return the fields of `ViTMSNConfig` that the shapes show. They do not show the heads: by default width / 64."""
    width, channels, patch, _ = _shape(weights, "patch_embed.proj.weight", 4)
    if num_attention_heads is None and width % 64:
        raise ValueError(
            f"The width of the ViT is {width}, not a multiple of the usual 64 per head, and no shape shows the number "
            "of heads. Set `num_attention_heads`."
        )
    return {
        "image_size": math.isqrt(_shape(weights, "pos_embed", 3)[1] - 1) * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": _count(weights, "blocks"),
        "num_attention_heads": width // 64 if num_attention_heads is None else num_attention_heads,
        "intermediate_size": _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def resnet_fields(weights: Weights) -> dict[str, Any]:
    """Return the fields of [`PAWSConfig`] that the shapes of a ResNet's weights show.

    A 3x3 stem is assumed to be that of small images, of stride 1 without pooling, which shapes do not show.
    """
    stem, _, kernel, _ = _shape(weights, "conv1.weight", 4)
    stages = sorted({found[1] for name in weights if (found := re.match(r"(layer\d)\.", name))})
    options = {
        "layers": [_count(weights, stage) for stage in stages],
        "channels": [_shape(weights, f"{stage}.0.conv1.weight", 4)[0] for stage in stages],
    }
    if "conv1.bias" in weights:
        return {"timm_model": "paws_wide_resnet", "timm_options": {**options, "stem_channels": stem}}
    bottleneck = "layer1.0.conv3.weight" in weights
    if stem != 64:
        name, options = "paws_resnet", {**options, "stem_channels": stem, "bottleneck": bottleneck}
    else:
        known = _KNOWN_RESNETS.get((tuple(options["layers"]), bottleneck))
        name = known or ("resnet50" if bottleneck else "resnet18")
        if known:
            del options["layers"]
        if options["channels"] == [64, 128, 256, 512]:
            del options["channels"]
    return {"timm_model": name, "timm_options": options or None, "small_image_stem": kernel == 3}


def head_fields(weights: Weights) -> dict[str, Any]:
    """Return the fields of a configuration that the shapes of the heads show."""
    fields = {
        "projection_hidden_dim": _shape(weights, "fc.fc1.weight", 2)[0],
        "projection_dim": _shape(weights, "fc.fc3.weight", 2)[0],
        "projection_batch_norm": "fc.bn1.weight" in weights,
    }
    if "pred.fc1.weight" in weights:
        fields.update(prediction_head=True, prediction_hidden_dim=_shape(weights, "pred.fc1.weight", 2)[0])
    return fields


def architecture_name(config: Any) -> str:
    """Return a name as in the papers: "ViT-S/16", "ResNet-50", "WideResNet-28-2"."""
    if getattr(config, "timm_model", None) is None:
        size = _KNOWN_VITS.get((config.hidden_size, config.num_hidden_layers))
        return f"ViT-{size or f'{config.hidden_size}x{config.num_hidden_layers}'}/{config.patch_size}"
    options = {**PAWS_NETWORKS.get(config.timm_model, {}), **(config.timm_options or {})}
    if config.timm_model == "paws_wide_resnet":
        depth, widening = 2 * sum(options["layers"]) + 4, options["channels"][0] / options["stem_channels"]
        return f"WideResNet-{depth}-{widening:g}"
    name, widening = config.timm_model, options.pop("stem_channels", 64) / 64
    if name == "paws_resnet":
        name = _KNOWN_RESNETS.get((tuple(options["layers"]), options.pop("bottleneck")), "")
    variations = [f"{key} {'-'.join(map(str, options[key]))}" for key in ("layers", "channels") if key in options]
    variations = [f"w{widening:g}"] if widening != 1 else variations
    return f"ResNet-{name.removeprefix('resnet')}" + (f" ({', '.join(variations)})" if variations else "")


def _count(weights: Weights, prefix: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{prefix}.")})


def _shape(weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(weights[name].shape) if name in weights else None
    if shape is None or len(shape) != dimensions or min(shape) < 1:
        raise ValueError(
            f"'{name}' shows the architecture and must have {dimensions} dimensions, but "
            f"{f'has shape {shape}' if shape else 'is missing'}. The file is not a whole encoder of MSN or PAWS."
        )
    return shape
