"""One hash for the weights of a backbone in every form: in a pretraining model, exported, under a classifier."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel, ViTMSNModel

from ..models.encoder import PatchDroppingViTMSNModel

CLS_PARAMETER = re.compile(r"(vision_model\.)?embeddings\.(cls_token|class_embedding)")
# fields of a ViTMSN's configuration that change its features without changing the shapes of its tensors
_VIT_MSN_FIELDS = (
    *("image_size", "patch_size", "num_channels"),
    *("num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias"),
)
# fields of any configuration that do not change what the weights compute
_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "transformers_version", "dtype"),
    *("id2label", "label2id", "problem_type"),
}
_NOT_STRUCTURE = {
    *("training", "num_classes", "num_labels", "grad_checkpointing", "gradient_checkpointing", "fused_attn"),
    *("inplace", "momentum", "weight_init_mode", "fix_init"),
}
# sizes of a patch embedding that follow from its grid and its patches, or that only checks of its input use
_SIZES_OF_PATCHES = {"img_size", "num_patches", "H", "W"}
_IDENTITY_IN_EVALUATION = (nn.Identity, _DropoutNd, DropPath)


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of all that the features of a module depend on: tensors, structure, configuration.

    A backbone has the same hash in a pretraining model, in its export and under a classifier: class names, the
    classifier of a timm model and training-only parts (dropout, batch statistics over ranks) do not count, nor does
    the pooler of a transformers model with a [CLS] token: no feature passes it, and a classifier is saved without it,
    so that loading initialises one at random. `find_backbone` finds the backbone in a model.
    """
    tensors = module.state_dict()
    if type(module) in (ViTMSNModel, PatchDroppingViTMSNModel):
        structure = ["vit_msn", {name: getattr(module.config, name) for name in _VIT_MSN_FIELDS}]
    else:
        left_out = _classifier_names(module) | _pooler_names(module)
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_below(name, left_out)}
        structure = list(_structure(module, left_out))
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _structure(module: nn.Module, left_out: set[str]) -> Iterator[list[Any]]:
    """Yield name, kind and settings of each part that is not the identity in evaluation."""
    for name, part in module.named_modules():
        if isinstance(part, _IDENTITY_IN_EVALUATION) or _is_below(name, left_out):
            continue
        # training on several ranks replaces the class of batch normalisation
        kind = "BatchNorm" if isinstance(part, _BatchNorm) else type(part).__name__
        if isinstance(part, PreTrainedModel):
            config = part.config.to_dict()
            yield [name, kind, {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}]
        else:
            unused = _SIZES_OF_PATCHES if "PatchEmbed" in kind else set()
            settings = {key: value for key, value in vars(part).items() if _is_setting(key, value)}
            yield [name, kind, {key: value for key, value in settings.items() if key not in unused}]


def _is_setting(name: str, value: Any) -> bool:
    if name.startswith("_") or name in _NOT_STRUCTURE or name.endswith("drop_rate"):
        return False
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(item, (bool, int, float, str)) for item in values)


def _classifier_names(module: nn.Module) -> set[str]:
    """Return the names of the classifiers of a timm model; features come before them."""
    if not (hasattr(module, "forward_head") and hasattr(module, "get_classifier")):
        return set()
    try:
        classifiers = module.get_classifier()
    except AttributeError:  # some networks have none without classes
        return set()
    classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
    return {name for name, part in module.named_modules() if any(part is classifier for classifier in classifiers)}


def _pooler_names(module: nn.Module) -> set[str]:
    """Return the name of the pooler of a model whose features are those of its [CLS] token."""
    has_cls = any(CLS_PARAMETER.fullmatch(name) for name, _ in module.named_parameters())
    return {"pooler"} if isinstance(module, PreTrainedModel) and has_cls else set()


def _is_below(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def file_sha256(file: str | Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(file, "rb") as content:
        return sha_fileobj(content).hex()
