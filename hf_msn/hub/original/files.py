"""What is in an original checkpoint file: whose it is, its networks, and what of it is no part of a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .networks import is_resnet, is_vit
from .safe_loading import check_tensor, load_safely

_WRAPPERS = ("state_dict", "model")
# prefixes of DistributedDataParallel and torch.compile
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")
_PROTOTYPES = re.compile(r"(module\.|_orig_mod\.)*prototypes(\.|$)")
_NOT_OURS = [
    (r"(teacher|student)(\.|$)|(.*\.)?head\.(last_layer|mlp)\.|dino_head", "a checkpoint of DINO"),
    (r"(encoder_[qk]|base_encoder|momentum_encoder)\.|(encoder_[qk]|queue|queue_ptr)$", "a checkpoint of MoCo"),
    (r"decoder_(blocks|embed|pos_embed|pred|norm)|mask_token$", "a masked autoencoder (MAE)"),
    (r"(encoder\.|target_encoder\.|vit\.)?(embeddings\.|encoder\.layer|layers\.\d)", "in the form of transformers"),
    (r"dist_token$|head_dist\.|(head|fc)\.(weight|bias)$", "a network with a linear classifier, trained with labels"),
    (r"blocks\.\d+\.ls\d|register_tokens$|reg_token$", "a checkpoint of DINOv2 or of another ViT"),
]
_FORM_REMEDY = {
    "in the form of transformers": "Load it with `from_pretrained`, or start from it with "
    "`MSNForPreTraining.from_backbone`.",
}


@dataclass
class OriginalCheckpoint:
    """
    Args:
        method (`"msn"` or `"paws"`): Whose form it has.
        method_is_guessed (`bool`): Whether it might as well be of the other one.
        online, target (`dict[str, torch.Tensor]`, *optional*): The networks by their original names, trunk and heads,
            without prefix; MSN evaluates the target, PAWS has the online network alone.
        prototypes (`torch.Tensor` of shape `(K, D)`, *optional*): Of MSN.
        epoch (`int`, *optional*): As the file says.
        left_out (`list[str]`): What else is in the file, such as the optimizer's state.
        module_prefix (`bool`): Whether the names began with `module.`.
        dtypes (`list[str]`): Those of the floating-point weights.
    """

    method: Literal["msn", "paws"]
    online: dict[str, torch.Tensor] | None
    target: dict[str, torch.Tensor] | None
    prototypes: torch.Tensor | None
    epoch: int | None = None
    left_out: list[str] = field(default_factory=list)
    module_prefix: bool = False
    dtypes: list[str] = field(default_factory=list)
    method_is_guessed: bool = False


def read_original(path: str | Path, method: Literal["msn", "paws"] | None = None) -> OriginalCheckpoint:
    """Reads an original checkpoint without running anything of it; see `load_safely`.

    Args:
        path (`str` or `Path`): The file.
        method (`"msn"` or `"paws"`, *optional*): By default it is found out: a target encoder or prototypes are
            MSN's, an encoder alone is of PAWS. A state dict that is not inside of `encoder` or `target_encoder` is of
            PAWS if it is a ResNet; for a ViT only this argument can tell.

    Raises:
        ValueError: If the file is not such a checkpoint; the message says what it seems to be.
    """
    if method not in (None, "msn", "paws"):
        raise ValueError(f"`method` must be 'msn', 'paws' or left out, but is {method!r}.")
    path = Path(path)
    content = load_safely(path)
    _check_names(content, "The checkpoint")
    epoch, left_out = content.get("epoch"), []
    for _ in _WRAPPERS:
        if {"encoder", "target_encoder"} & set(content):
            break
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        left_out += [name for name in content if name != wrapper]
        content = content[wrapper]
        _check_names(content, f"'{wrapper}'")
    epoch = content.get("epoch") if epoch is None else epoch
    if isinstance(epoch, torch.Tensor) and epoch.ndim == 0 and epoch.device.type == "cpu":
        epoch = epoch.tolist()
    sections, others = _sections(content)
    networks, prefixed = {}, False
    for name in ("encoder", "target_encoder"):
        if name in sections:
            networks[name], has_prefix = _network(name, sections[name], path)
            prefixed = prefixed or has_prefix
    prototypes = _prototypes(sections, networks, path)
    if sections.get("bare") and (prototypes is not None or method == "msn"):
        networks["target_encoder"] = networks.pop("encoder")  # of MSN the target is released

    if "target_encoder" not in networks and "encoder" not in networks:
        seems = _seems(set(content) | set(_plain_names(sections.get("", {}))))
        raise ValueError(
            f"'{path}' is no checkpoint of MSN or PAWS: it has neither 'encoder' nor 'target_encoder', nor tensors "
            f"of a ViT or ResNet, but {_first(content)}. {seems}"
        )
    found = "msn" if "target_encoder" in networks or prototypes is not None else "paws"
    if method == "paws" and found == "msn":
        raise ValueError(
            f"`method` is 'paws', but '{path}' has a target encoder or prototypes, which are MSN's. Leave `method` "
            "out."
        )
    checkpoint = OriginalCheckpoint(
        method=method or found,
        online=networks.get("encoder"),
        target=networks.get("target_encoder"),
        prototypes=prototypes,
        epoch=epoch if type(epoch) is int else None,
        left_out=[name for name in (*left_out, *others) if name != "epoch" or type(epoch) is not int],
        module_prefix=prefixed,
        method_is_guessed=method is None and found == "paws" and "bare" in sections and is_vit(networks["encoder"]),
    )
    tensors = [tensor for network in networks.values() for tensor in network.values()]
    tensors += [] if prototypes is None else [prototypes]
    checkpoint.dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()})
    return checkpoint


def _check_names(content: Any, what: str) -> None:
    if not isinstance(content, Mapping) or not content:
        kind = "is empty" if isinstance(content, Mapping) else f"holds {type(content).__name__}"
        raise ValueError(
            f"{what} must hold named tensors, or named networks such as 'encoder' and 'target_encoder', but {kind}."
        )
    strange = [name for name in content if not isinstance(name, str)]
    if strange:
        raise ValueError(
            f"{what} must have names as keys, but has {strange[0]!r}. It is no checkpoint of MSN or PAWS."
        )


def _sections(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The networks and prototypes of a file, and the names of what else it has."""
    for name in ("encoder", "target_encoder"):
        if content.get(name) is not None and not isinstance(content[name], Mapping):
            raise ValueError(
                f"'{name}' must hold named tensors, but is of type {type(content[name]).__name__}. The file is "
                "damaged, or no checkpoint of MSN or PAWS."
            )
    nested = {name: content[name] for name in ("encoder", "target_encoder") if isinstance(content.get(name), Mapping)}
    if nested:
        prototypes = {name: content[name] for name in content if _PROTOTYPES.match(name)}
        return {**nested, "prototypes": prototypes}, [name for name in content if name not in nested | prototypes]
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    others = [name for name in content if name not in tensors]
    prototypes = {name: tensors.pop(name) for name in list(tensors) if _PROTOTYPES.match(name)}
    if not prototypes and isinstance(content.get("prototypes"), Mapping):
        prototypes = {"prototypes": content["prototypes"]}
        others.remove("prototypes")
    sections = {"prototypes": prototypes, "": tensors}
    for name in ("encoder", "target_encoder"):
        below = re.compile(rf"((?:module\.|_orig_mod\.)*){name}\.")
        # what stood before stays, so that a name that is there with and without it is found
        inside = {below.sub(r"\1", key, count=1): value for key, value in tensors.items() if below.match(key)}
        if inside:
            sections[name] = inside
    if "encoder" not in sections and "target_encoder" not in sections:
        plain = _plain_names(tensors)
        if is_vit(dict.fromkeys(plain)) or is_resnet(dict.fromkeys(plain)):
            sections.update(encoder=tensors, bare=True)
    elif len(tensors) > sum(len(sections.get(name, ())) for name in ("encoder", "target_encoder")):
        inside = tuple(f"{name}." for name in ("encoder", "target_encoder"))
        others += [name for name in tensors if not _WRAPPED.sub("", name).startswith(inside)]
    return sections, others


def _network(section: str, weights: Mapping[str, Any], path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    _check_names(weights, f"'{section}'")
    plain: dict[str, torch.Tensor] = {}
    file_size = path.stat().st_size
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"'{section}' must hold tensors, but '{name}' is of type {type(tensor).__name__}.")
        short = _WRAPPED.sub("", name)
        if short in plain:
            raise ValueError(
                f"'{section}' has '{short}' twice: once with 'module.' before it, once without. Remove one of them."
            )
        plain[short] = torch.Tensor.detach(tensor)  # also without the attributes that a file can give to a tensor
    if not is_vit(plain) and not is_resnet(plain):
        raise ValueError(f"'{section}' of '{path}' is neither a ViT nor a ResNet: {_first(plain)}. {_seems(plain)}")
    if seems := _seems(plain):
        raise ValueError(f"'{section}' of '{path}' is no encoder of MSN or PAWS. {seems}")
    for name, tensor in plain.items():
        check_tensor(f"{section}.{name}", tensor, file_size)
    return plain, any(_WRAPPED.match(name) for name in weights)


def _prototypes(sections: Mapping[str, Any], networks: Mapping[str, dict], path: Path) -> torch.Tensor | None:
    """The prototypes, beside the networks or inside of one, as a tensor, a parameter or the weight of a layer."""
    found: dict[str, Any] = {}
    for name, value in sections.get("prototypes", {}).items():
        inner = value if isinstance(value, Mapping) else {"": value}
        found.update({f"{name}.{key}".rstrip("."): tensor for key, tensor in inner.items()})
    for section, network in networks.items():
        for name in [name for name in network if name.split(".")[0] == "prototypes"]:
            found[f"{section}.{name}"] = network.pop(name)
    tensors = {name: value for name, value in found.items() if value is not None}
    if not tensors:
        return None
    name, tensor = next(iter(tensors.items()))
    if len(tensors) > 1 or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or min(tensor.shape) < 1:
        shapes = {name: tuple(getattr(value, "shape", ())) or type(value).__name__ for name, value in tensors.items()}
        raise ValueError(f"The prototypes must be one tensor of shape (K, D), but '{path}' has {shapes}.")
    tensor = torch.Tensor.detach(tensor)
    check_tensor(name, tensor, path.stat().st_size)
    if not tensor.is_floating_point():
        raise ValueError(
            f"'{name}' must be floating-point numbers, but is of type {tensor.dtype}. A quantised model cannot be "
            "converted."
        )
    return tensor


def _plain_names(weights: Mapping[str, Any]) -> list[str]:
    return [_WRAPPED.sub("", name) for name in weights]


def _seems(names) -> str:
    for pattern, kind in _NOT_OURS:
        found = next((name for name in names if re.match(pattern, name)), None)
        if found is not None:
            remedy = _FORM_REMEDY.get(kind, "Its heads mean nothing to MSN or PAWS.")
            return f"By '{found}' it seems to be {kind}. {remedy}"
    return ""


def _first(names) -> str:
    names = list(names)
    return f"{len(names)} entries, first {names[:4]}"
