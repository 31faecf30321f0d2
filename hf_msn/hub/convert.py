"""Checkpoints of the authors' code (`.pth.tar`) to models of this package, and back."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, safe_globals
from transformers import AutoModelForPreTraining
from transformers.utils import logging

from ..checks import check_choice, check_integer
from ..data.transforms import evaluation_image_processor
from ..evaluation.weights_hash import file_sha256
from ..files import read_json, whole_file, whole_folder, write_json
from ..models.configuration_msn import MSNConfig
from ..models.configuration_paws import PAWSConfig
from ..models.masking import num_kept_patches
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_paws import PAWSForPreTraining
from . import key_maps
from .export import write_backbone

logger = logging.get_logger(__name__)

CONVERSION_FILE = "conversion.json"
# parts of names that DistributedDataParallel and torch.compile add
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")


def convert_checkpoint(
    input_path: str | Path,
    output_dir: str | Path | None,
    num_attention_heads: int | None = None,
    *,
    method: Literal["msn", "paws"] | None = None,
    projection_activation: Literal["relu", "gelu"] | None = None,
    export_backbone_dir: str | Path | None = None,
) -> Path:
    """Convert a checkpoint of the authors' code of MSN or PAWS, with its heads and prototypes.

    The result loads with `MSNForPreTraining.from_pretrained(output_dir)` (of PAWS: `PAWSForPreTraining`). Shapes show
    the architecture: ViTs, ResNets (also widened) and WideResNets. Features and projections equal the original
    network's on square images of whole patches.

    MSN needs `prototypes` and one of `target_encoder` and `encoder`, the online network; if the file lacks one of the
    two, it is a copy of the other, with a warning. PAWS needs `encoder`. Settings that no file holds have the defaults
    of the configuration. Weights become float32. `conversion.json` records the source and its SHA-256, and what was
    kept, left out, made up and assumed.

    Args:
        input_path (`str` or `Path`): The original file, read by `torch.load(weights_only=True)`.
        output_dir (`str` or `Path`, *optional*): Folder to write, new or empty, with the paper's image processor.
            `None` writes only the export.
        num_attention_heads (`int`, *optional*): Of a ViT, whose shapes do not show it; by default the width / 64, as
            in the papers' ViT-S, B and L.
        method (`"msn"` or `"paws"`, *optional*): Needed only for a ViT whose tensors are not inside of `encoder` or
            `target_encoder`.
        projection_activation (`"relu"` or `"gelu"`, *optional*): Of the heads of PAWS, by default "relu", as for the
            paper's ResNets; shapes do not show it. MSN has GELU.
        export_backbone_dir (`str` or `Path`, *optional*): Folder to write the encoder alone to, as
            [`export_backbone`] does. This needs no heads and no prototypes in the file.

    Returns:
        `Path`: `output_dir`, or `export_backbone_dir` without it.

    Raises:
        ValueError: If the file is damaged, unsafe or of another method, tensors are missing, unexpected, not finite or
            do not fit each other, or a folder cannot be written. Nothing is left behind then.
    """
    input_path = Path(input_path).expanduser()
    check_choice("method", method, (None, "msn", "paws"))
    check_choice("projection_activation", projection_activation, (None, "relu", "gelu"))
    if num_attention_heads is not None:
        check_integer("num_attention_heads", num_attention_heads)
    places = {"output_dir": output_dir, "export_backbone_dir": export_backbone_dir}
    places = {name: Path(place).expanduser() for name, place in places.items() if place is not None}
    _check_places(places)
    with ExitStack() as stack:
        staging = {name: stack.enter_context(whole_folder(place, name)) for name, place in places.items()}
        original = _read_original(input_path, method)
        config = _configuration(original, num_attention_heads, projection_activation, heads="output_dir" in staging)
        with torch.device("meta"):  # draws no weights
            model = (MSNForPreTraining if isinstance(config, MSNConfig) else PAWSForPreTraining)(config)
        processor = evaluation_image_processor(_image_size(config))
        if "output_dir" in staging:
            made_up = _load_model(model, original, input_path)
            model.save_pretrained(staging["output_dir"])
            processor.save_pretrained(staging["output_dir"])
            given = {"num_attention_heads": num_attention_heads, "projection_activation": projection_activation}
            record = _record(input_path, original, config, made_up, given)
            write_json(staging["output_dir"] / CONVERSION_FILE, record)
        else:
            _load_encoder(model, original, input_path)
        if "export_backbone_dir" in staging:
            write_backbone(model.evaluation_encoder, config, processor, staging["export_backbone_dir"])
    return next(iter(places.values()))


def convert_to_original(
    model: MSNForPreTraining | PAWSForPreTraining | str | Path,
    output_path: str | Path,
    *,
    module_prefix: bool | None = None,
    target_only: bool | None = None,
) -> Path:
    """Write a model in the form of the authors' code, to compare it or to use it there.

    MSN: `encoder`, `target_encoder` and `prototypes`; PAWS: `encoder`; and `epoch`, if the model was converted from a
    file that had it. No optimizer's state. There and back is exact, bit for bit, except that a file of another
    precision comes back in float32.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`], `str` or `Path`): The model, or its folder or Hub id.
        output_path (`str` or `Path`): The file to write, such as "msn.pth.tar". It must not exist.
        module_prefix (`bool`, *optional*): Put `module.` before each name, as the authors' training loop saves and
            expects it. By default as in the file that the folder was converted from, otherwise not.
        target_only (`bool`, *optional*): Of MSN, leave `encoder` out, as released files do. By default as in the file
            that the folder was converted from, otherwise not.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the model is of another method or has an encoder that the authors' code lacks, or the file
            exists or cannot be written.
    """
    output_path = Path(output_path).expanduser()
    with whole_file(output_path, "output_path") as staging:
        record: Mapping[str, Any] = {}
        if isinstance(model, (str, Path)):
            file = Path(model) / CONVERSION_FILE
            record = read_json(file) if file.is_file() else {}
            try:
                model = AutoModelForPreTraining.from_pretrained(model)
            except OSError as error:
                raise ValueError(f"`model` must be a folder or Hub id of MSN or PAWS. {error}") from error
        if not isinstance(model, (MSNForPreTraining, PAWSForPreTraining)):
            raise ValueError(
                f"`model` must be an `MSNForPreTraining` or a `PAWSForPreTraining`, but is {type(model).__name__}, "
                "which the authors' code does not have."
            )
        _check_encoder_is_original(model.config)
        is_msn = isinstance(model, MSNForPreTraining)
        if target_only is None:
            target_only = is_msn and record.get("target_only") is True
        elif target_only and not is_msn:
            raise ValueError("`target_only` is True, but only MSN has a target encoder. Leave it out.")
        if module_prefix is None:
            module_prefix = record.get("module_prefix") is True
        prefix, state = "module." if module_prefix else "", model.state_dict()
        content: dict[str, Any] = {}
        for section in ["target_encoder"] * is_msn + ["encoder"] * (not target_only):
            weights = key_maps.to_theirs(state, key_maps.key_map(model, section))
            content[section] = {prefix + name: tensor for name, tensor in weights.items()}
        if is_msn:
            content["prototypes"] = state["prototypes"].cpu().clone()
        if type(record.get("epoch")) is int:
            content["epoch"] = record["epoch"]
        torch.save(content, staging)
    return output_path


@dataclass
class _Original:
    """Networks of an original file by their original names without wrappers' prefixes, heads included."""

    method: str
    networks: dict[str, dict[str, torch.Tensor]]  # "target_encoder", "encoder" (online)
    prototypes: torch.Tensor | None
    epoch: int | None
    left_out: list[str]
    module_prefix: bool
    method_is_guessed: bool

    @property
    def evaluated(self) -> dict[str, torch.Tensor]:
        return next(iter(self.networks.values()))


def _read_original(path: Path, method: str | None) -> _Original:
    content = _load_file(path)
    sections = {
        name: content[name] for name in ("target_encoder", "encoder") if isinstance(content.get(name), Mapping)
    }
    bare = not sections
    if bare:
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        sections = {"encoder": {name: tensor for name, tensor in tensors.items() if name != "epoch"}}
    networks = {name: _tensors(section) for name, section in sections.items()}
    prototypes = content.get("prototypes")
    if bare:
        prototypes = networks["encoder"].pop("prototypes", None)
    prototypes = prototypes.detach() if isinstance(prototypes, torch.Tensor) else None
    if bare and (prototypes is not None or method == "msn"):
        networks = {"target_encoder": networks["encoder"]}  # of MSN the target is released
    evaluated = next(iter(networks.values()))
    if not key_maps.is_vit(evaluated) and not key_maps.is_resnet(evaluated):
        raise ValueError(
            f"'{path}' must hold 'encoder' or 'target_encoder', or the tensors of a ViT or ResNet, to be a checkpoint "
            f"of MSN or PAWS, but holds {list(content)[:4]}."
        )
    found = "msn" if "target_encoder" in networks or prototypes is not None else "paws"
    if method == "paws" and found == "msn":
        raise ValueError(
            f"`method` is 'paws', but '{path}' has a target encoder or prototypes, as MSN has. Leave `method` out."
        )
    epoch = content.get("epoch")
    epoch = epoch.item() if isinstance(epoch, (torch.Tensor, np.generic)) else epoch
    used = {"prototypes", "epoch", *(sections["encoder"] if bare else sections)}
    return _Original(
        method=method or found,
        networks=networks,
        prototypes=prototypes,
        epoch=epoch if type(epoch) is int else None,
        left_out=[str(entry) for entry in content if entry not in used],
        module_prefix=any(str(name).startswith("module.") for section in sections.values() for name in section),
        method_is_guessed=bare and method is None and found == "paws" and key_maps.is_vit(evaluated),
    )


def _tensors(section: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a section by their names without wrappers' prefixes."""
    tensors = {str(name): value.detach() for name, value in section.items() if isinstance(value, torch.Tensor)}
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _load_file(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise ValueError(f"`input_path` must be a file, such as 'checkpoint.pth.tar', but '{path}' is not.")
    try:
        if zipfile.is_zipfile(path):  # torch does not compare checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"the checksum of '{archive.testzip()}' is wrong")
        with _only_numpy_scalars():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of torch fail in many ways on bytes that are not theirs
        reasons = re.findall(r"(?:GLOBAL|Unsupported|unrecognized)[^\n]*", str(error)) or str(error).splitlines()
        raise ValueError(
            f"'{path}' must be a file of `torch.save` with tensors, plain values and numpy scalars only, but cannot "
            f"be read, and nothing in it was executed: {type(error).__name__} {reasons[0] if reasons else ''}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"'{path}' must hold named tensors, but holds {type(content).__name__}.")
    return content


@contextmanager
def _only_numpy_scalars() -> Iterator[None]:
    """Allow numpy scalars, as the authors' loops save in losses and epochs, and nothing that other code allowed."""
    scalar = np.float64(0).__reduce__()[0]
    allowed = [np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    others = get_safe_globals()
    clear_safe_globals()
    try:
        with safe_globals(allowed):
            yield
    finally:
        add_safe_globals(others)


def _configuration(
    original: _Original, num_attention_heads: int | None, projection_activation: str | None, heads: bool
) -> MSNConfig | PAWSConfig:
    """The configuration that the shapes show; without `heads` only its encoder has a meaning."""
    is_msn, weights = original.method == "msn", original.evaluated
    is_vit = key_maps.is_vit(weights)
    if is_msn and not is_vit:
        raise ValueError("MSN has a ViT, but the file holds another encoder. Only PAWS has ResNets.")
    if not is_vit and num_attention_heads is not None:
        raise ValueError(f"`num_attention_heads` is {num_attention_heads}, but the file holds a ResNet. Leave it out.")
    if is_msn and projection_activation == "relu":
        raise ValueError("`projection_activation` is 'relu', but the heads of MSN have GELU. Leave it out.")
    fields = key_maps.vit_fields(weights, num_attention_heads) if is_vit else key_maps.resnet_fields(weights)
    if heads:
        _check_parts(original)
        fields.update(key_maps.head_fields(weights))
    if not is_msn:
        return PAWSConfig(**fields, projection_activation=projection_activation or "relu")
    if heads:
        fields["num_prototypes"] = len(original.prototypes)
    num_patches = (fields["image_size"] // fields["patch_size"]) ** 2
    if num_kept_patches(num_patches, MSNConfig.mask_ratio) < 1:
        fields["mask_ratio"] = 0.0  # the default needs more patches
    return MSNConfig(**fields)


def _check_parts(original: _Original) -> None:
    alone = "Or take the encoder alone: `export_backbone_dir` (`--export_backbone`) without an output."
    if not any(name.startswith("fc.") for name in original.evaluated):
        raise ValueError(
            f"A pretraining model needs a projection head 'fc', but the file lacks it. Find the whole checkpoint. "
            f"{alone}"
        )
    if original.method_is_guessed or (original.method == "msn" and original.prototypes is None):
        raise ValueError(
            "MSN needs 'prototypes', but the file lacks them. Find the whole checkpoint; if this one is of PAWS, pass "
            f"`method='paws'` (`--method paws`). {alone}"
        )


def _load_model(model: nn.Module, original: _Original, path: Path) -> list[str]:
    """Load all networks into a model on the meta device. Return what the file did not hold."""
    state, made_up = {}, []
    for section in ("target_encoder", "encoder") if original.method == "msn" else ("encoder",):
        weights = original.networks.get(section)
        if weights is None:
            source, weights = next(iter(original.networks.items()))
            made_up.append(f"{section}: starts as a copy of {source}")
        names = key_maps.key_map(model, section)
        unknown = {name: [f"{section}.{name}"] for name in weights if name not in names}
        state.update(key_maps.to_ours(weights, names | unknown))
    state["mask_state"] = torch.zeros(2, dtype=torch.int64)
    if original.method == "msn":
        state["prototypes"] = original.prototypes
    _load_strictly(model, state, path)
    model._after_loading()
    return made_up


def _load_encoder(model: nn.Module, original: _Original, path: Path) -> None:
    """Load the evaluated encoder alone into a model on the meta device."""
    heads = tuple(f"{head}." for head in key_maps.HEADS.values())
    weights = {name: tensor for name, tensor in original.evaluated.items() if not name.startswith(heads)}
    encoder = model.evaluation_encoder
    _load_strictly(encoder, key_maps.to_ours(weights, key_maps.encoder_key_map(encoder)), path)


def _load_strictly(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    slots = module.state_dict()
    for name, tensor in state.items():
        slot = slots.get(name)
        if slot is None:
            continue
        is_number = tensor.layout == torch.strided and tensor.is_floating_point() == slot.is_floating_point()
        if not is_number or not torch.isfinite(tensor).all():
            raise ValueError(
                f"'{name}' must be a dense tensor of finite numbers like {slot.dtype}, but in '{path}' it is "
                f"{tensor.dtype}, {tensor.layout}, or has NaN or Inf. Take another checkpoint of the run."
            )
        state[name] = tensor.to(slot.dtype, copy=True)
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"'{path}' does not fit the network that its shapes show. It is damaged, or of another network. "
            f"{str(error)[:2000]}"
        ) from None
    module.eval()


def _record(
    path: Path, original: _Original, config: MSNConfig | PAWSConfig, made_up: list[str], given: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of `conversion.json`, and log what was made up and assumed."""
    is_vit = getattr(config, "timm_model", None) is None
    assumed = []
    if is_vit and given["num_attention_heads"] is None:
        assumed.append(f"num_attention_heads: {config.num_attention_heads}, 64 dimensions each")
    if original.method == "paws" and is_vit and given["projection_activation"] is None:
        assumed.append("projection_activation: relu")
    if not is_vit and config.small_image_stem:
        assumed.append("small_image_stem: a 3x3 stem of stride 1, without pooling")
    tensors = [tensor for network in original.networks.values() for tensor in network.values()]
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    if dtypes != {"float32"}:
        made_up.append(f"float32 weights, of {' and '.join(sorted(dtypes))} in the file")
    record = {
        "source": {"file": path.name, "sha256": file_sha256(path)},
        "method": original.method,
        "architecture": key_maps.architecture_name(config),
        "heads_assumed": is_vit and given["num_attention_heads"] is None,
        "num_attention_heads": config.num_attention_heads if is_vit else None,
        "epoch": original.epoch,
        "kept": sorted(original.networks) + ["prototypes"] * (original.prototypes is not None),
        "left_out": original.left_out,
        "made_up": made_up,
        "assumed": assumed,
        "module_prefix": original.module_prefix,
        "target_only": original.method == "msn" and "encoder" not in original.networks,
    }
    for kind in ("assumed", "made_up"):
        if record[kind]:
            logger.warning(
                f"'{path.name}', {record['architecture']}: {kind.replace('_', ' ')}: {'; '.join(record[kind])}."
            )
    return record


def _image_size(config: MSNConfig | PAWSConfig) -> int:
    """Side of the images to evaluate on. A ResNet takes any: the paper's."""
    if getattr(config, "timm_model", None) is None:
        return config.image_size
    return 32 if config.small_image_stem or config.timm_model == "paws_wide_resnet" else 224


def _check_encoder_is_original(config: MSNConfig | PAWSConfig) -> None:
    if getattr(config, "timm_model", None) is None:
        if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6:
            raise ValueError(
                "The authors' ViTs have `hidden_act` 'gelu' and `layer_norm_eps` 1e-6, but this one has "
                f"{config.hidden_act!r} and {config.layer_norm_eps}: it would compute other features there."
            )
    elif config.timm_model not in key_maps.NETWORKS or set(config.timm_options or {}) - key_maps.NETWORK_OPTIONS:
        raise ValueError(
            f"The authors' code has ViTs and plain ResNets ({', '.join(key_maps.NETWORKS)}), but `timm_model` is "
            f"'{config.timm_model}' with `timm_options` {config.timm_options}."
        )


def _check_places(places: dict[str, Path]) -> None:
    if not places:
        raise ValueError("`output_dir` and `export_backbone_dir` are both None. Set one of them, or both.")
    if len(places) == 2:
        one, other = (place.resolve() for place in places.values())
        if one == other or one in other.parents or other in one.parents:
            raise ValueError(
                f"`output_dir` and `export_backbone_dir` must lie beside each other, but are '{one}' and '{other}'. "
                "Choose two folders."
            )
