"""The papers' own checkpoints (`.pth.tar`) to models of this package, and back."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForPreTraining
from transformers.utils import logging

from ..data.transforms import evaluation_image_processor
from ..evaluation.weights_hash import file_sha256
from ..files import whole_file, whole_folder
from ..models.configuration_msn import MSNConfig
from ..models.configuration_paws import PAWSConfig
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_paws import PAWSForPreTraining
from .export import export_backbone
from .original.files import OriginalCheckpoint, read_original
from .original.models import build_model, configuration_of, original_state
from .original.networks import resnet_name, vit_name

logger = logging.get_logger(__name__)

CONVERSION_FILE = "conversion.json"


def convert_checkpoint(
    input_path: str | Path,
    output_dir: str | Path | None,
    num_attention_heads: int | None = None,
    *,
    method: Literal["msn", "paws"] | None = None,
    projection_activation: Literal["relu", "gelu"] | None = None,
    export_backbone_dir: str | Path | None = None,
) -> Path:
    """Converts an original checkpoint of MSN or PAWS, with its heads and prototypes.

    The result loads with `MSNForPreTraining.from_pretrained(output_dir)` (of PAWS: `PAWSForPreTraining`), and its
    trunk is taken by `from_backbone`. The architecture is read from the shapes. Features, before and after the final
    LayerNorm, and projections equal the original network's, at the size of training and wherever the original can
    interpolate its position embeddings: square images of whole patches. For others the original takes the positions
    of a square, or fails, where this package interpolates to the image's own shape; and where a side is no multiple of
    the patch, the original drops the rest of the image, and this package refuses it.

    MSN: `prototypes` and one of `target_encoder` and `encoder`, the online network, are needed; where one of the two
    is not in the file, it starts as a copy of the other, with a warning. PAWS: `encoder`, a ResNet or a ViT. What
    forward does beside the networks (temperatures, masking, the weights of the loss) is in no such file and gets the
    configuration's defaults. Half and double precision become float32, which rounds only the latter. The optimizer's
    state is left out.

    Beside the weights are written `preprocessor_config.json`, the paper's evaluation transform (shortest edge to 256,
    centre crop to 224, ImageNet's normalisation, scaled to the model's size), and `conversion.json`: the source and
    its SHA-256, and what was kept, left out, made up and assumed.

    The file is read without unpickling anything but tensors and plain values: see `load_safely`.

    Args:
        input_path (`str` or `Path`): The original file.
        output_dir (`str` or `Path`, *optional*): Folder to write, new or empty. `None` writes only the export.
        num_attention_heads (`int`, *optional*): Of a ViT, whose shapes do not show it; by default the width / 64,
            which is right for the papers' ViT-S, B and L (a ViT-H has 80 dimensions a head).
        method (`"msn"` or `"paws"`, *optional*): Needed only for a ViT whose tensors are not inside of `encoder` or
            `target_encoder`.
        projection_activation (`"relu"` or `"gelu"`, *optional*): Of the heads of PAWS, by default "relu", as for the
            paper's ResNets; shapes do not show it. MSN has GELU.
        export_backbone_dir (`str` or `Path`, *optional*): Folder to write the encoder alone to, by
            [`export_backbone`]. This needs no heads and no prototypes in the file.

    Returns:
        `Path`: `output_dir`, or `export_backbone_dir` without it.

    Raises:
        ValueError: If the file is damaged, unsafe or of another method, tensors are missing, unexpected, not finite or
            do not fit each other, or a folder cannot be written. Then nothing is left behind.
    """
    input_path = Path(input_path).expanduser()
    if projection_activation not in (None, "relu", "gelu"):
        raise ValueError(f"`projection_activation` must be 'relu' or 'gelu', but is {projection_activation!r}.")
    places = {"output_dir": output_dir, "export_backbone_dir": export_backbone_dir}
    places = {name: Path(place).expanduser() for name, place in places.items() if place is not None}
    _check_places(input_path, places)
    with ExitStack() as stack:
        staging = {name: stack.enter_context(whole_folder(place, name)) for name, place in places.items()}
        original = read_original(input_path, method)
        config = configuration_of(original, num_attention_heads, projection_activation, heads="output_dir" in staging)
        model, made_up = build_model(original, config, heads="output_dir" in staging)
        processor = evaluation_image_processor(_image_size(config))
        if "output_dir" in staging:
            model.save_pretrained(staging["output_dir"])
            processor.save_pretrained(staging["output_dir"])
            record = _record(input_path, original, config, num_attention_heads, projection_activation, made_up)
            (staging["output_dir"] / CONVERSION_FILE).write_text(json.dumps(record, indent=2) + "\n")
            _tell(input_path, record)
        if "export_backbone_dir" in staging:
            export_backbone(model, staging["export_backbone_dir"], image_processor=processor)
    return next(iter(places.values()))


def convert_to_original(
    model: MSNForPreTraining | PAWSForPreTraining | str | Path,
    output_path: str | Path,
    *,
    module_prefix: bool | None = None,
    target_only: bool | None = None,
) -> Path:
    """Writes a model in the form of the original code, to be compared or used with it: the way back.

    MSN: `encoder`, `target_encoder` and `prototypes`; PAWS: `encoder`; and `epoch`, if the model was converted from a
    file that had it. No optimizer's state. Back and forth is exact, bit for bit, except that a file of another
    precision comes back in float32.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`], `str` or `Path`): The model, or its folder or Hub id.
        output_path (`str` or `Path`): The file to write, such as "msn.pth.tar". It must not exist.
        module_prefix (`bool`, *optional*): Put `module.` before each name, as the original training loop saves and
            expects it. By default as in the file that the folder was converted from, else not.
        target_only (`bool`, *optional*): Of MSN, leave `encoder` out, as released files do. By default as in the file
            that the folder was converted from, else not.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the model is of another method or has an encoder that the original code has not, or the file
            exists or cannot be written.
    """
    output_path = Path(output_path).expanduser()
    with whole_file(output_path, "output_path") as staging:
        record: Mapping[str, Any] = {}
        if isinstance(model, (str, Path)):
            record = _read_record(Path(model) / CONVERSION_FILE)
            model = _load(model)
        if not isinstance(model, (MSNForPreTraining, PAWSForPreTraining)):
            raise ValueError(
                "The original code has models of MSN and PAWS, but this is one of type "
                f"{type(model).__name__}. Give an `MSNForPreTraining` or a `PAWSForPreTraining`."
            )
        is_msn = isinstance(model, MSNForPreTraining)
        if target_only is None:
            target_only = is_msn and record.get("target_only") is True
        elif target_only and not is_msn:
            raise ValueError("`target_only` is about MSN: PAWS has one encoder. Leave it out.")
        if module_prefix is None:
            module_prefix = record.get("module_prefix") is True
        content: dict[str, Any] = original_state(model, "module." if module_prefix else "")
        if target_only:
            del content["encoder"]
        if type(record.get("epoch")) is int:
            content["epoch"] = record["epoch"]
        torch.save(content, staging)
    return output_path


def _read_record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"'{file}' is no JSON: {error}. Remove it, or convert the checkpoint again.") from error
    return record if isinstance(record, dict) else {}


def _load(name_or_path: str | Path) -> Any:
    try:
        return AutoModelForPreTraining.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model must be the folder or Hub id of a pretraining model of this package, but '{name_or_path}' "
            f"cannot be loaded: {error}"
        ) from error


def _check_places(input_path: Path, places: dict[str, Path]) -> None:
    if not places:
        raise ValueError("There is nothing to write. Give `output_dir`, `export_backbone_dir` or both.")
    resolved = {name: place.resolve() for name, place in places.items()}
    for name, place in resolved.items():
        if place == input_path.resolve():
            raise ValueError(f"`{name}` must be a folder of its own, but '{places[name]}' is the input.")
    if len(resolved) == 2:
        one, other = resolved.values()
        if one == other or one in other.parents or other in one.parents:
            raise ValueError(
                f"`output_dir` and `export_backbone_dir` must lie beside each other, but are '{places['output_dir']}' "
                f"and '{places['export_backbone_dir']}'. Choose two folders."
            )


def _image_size(config: MSNConfig | PAWSConfig) -> int:
    """Side of the images to evaluate on. A ResNet takes any: the paper's."""
    if getattr(config, "timm_model", None) is None:
        return config.image_size
    return 32 if config.small_image_stem else 224


def _record(
    input_path: Path,
    original: OriginalCheckpoint,
    config: MSNConfig | PAWSConfig,
    num_attention_heads: int | None,
    projection_activation: str | None,
    made_up: list[str],
) -> dict[str, Any]:
    """What `conversion.json` says."""
    is_vit = getattr(config, "timm_model", None) is None
    networks = {"encoder": original.online, "target_encoder": original.target}
    kept = [name for name, network in networks.items() if network is not None]
    assumed = []
    if is_vit and num_attention_heads is None:
        assumed.append(f"num_attention_heads: {config.num_attention_heads}, 64 dimensions each")
    if original.method == "paws" and is_vit and projection_activation is None:
        assumed.append("projection_activation: relu")
    if not is_vit and config.small_image_stem:
        assumed.append("small_image_stem: a 3x3 stem of stride 1, without pooling")
    if original.dtypes != ["float32"]:
        made_up = [*made_up, f"float32 weights, of {' and '.join(original.dtypes)} in the file"]
    return {
        "source": {"file": input_path.name, "sha256": file_sha256(input_path)},
        "method": original.method,
        "architecture": vit_name(config) if is_vit else resnet_name(config),
        "heads_assumed": is_vit and num_attention_heads is None,
        "num_attention_heads": config.num_attention_heads if is_vit else None,
        "epoch": original.epoch,
        "kept": kept + (["prototypes"] if original.prototypes is not None else []),
        "left_out": original.left_out,
        "made_up": made_up,
        "assumed": assumed,
        "module_prefix": original.module_prefix,
        "target_only": original.method == "msn" and original.online is None,
    }


def _tell(input_path: Path, record: Mapping[str, Any]) -> None:
    for what in ("assumed", "made_up"):
        if record[what]:
            logger.warning(
                f"'{input_path.name}', {record['architecture']}: {what.replace('_', ' ')}: {'; '.join(record[what])}."
            )
