"""Any vision model as a function from pixels to one vector per image."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining, PreTrainedModel

from ..checks import check_choice, check_integer
from ..data.transforms import cropped_as_in_torchvision
from ..models.configuration_pretraining import PretrainingConfig
from .weights_hash import CLS_PARAMETER, weights_sha256

FeatureSpace = Literal["backbone", "projection", "prediction"]


def load_vision_model(name: str, *, checkpoint: str | None = None, revision: str | None = None) -> nn.Module:
    """Load a model to evaluate, ready for `extract_features`.

    Args:
        name (`str`):
            - a folder or Hub id of a pretraining model, such as an `MSNForPreTraining`, whose `evaluation_encoder` is
              evaluated;
            - a folder or Hub id of any vision model of transformers, or of timm in timm's form: `AutoModel`;
            - `"timm:resnet18"`: a timm architecture with its released weights;
            - `"timm:/folder"` or `"timm:./folder"`: a folder written by `timm.models.save_for_hf`.
        checkpoint (`str`, *optional*):
            For timm architectures: a local weights file in place of the released weights, without a download.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; not for timm.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    if not name.startswith("timm:"):
        if checkpoint is not None:
            raise ValueError(
                f"`checkpoint` needs a model 'timm:ARCHITECTURE', but the model is {name!r}. Give the folder of the "
                "checkpoint as the model."
            )
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
            auto_class = AutoModelForPreTraining if isinstance(config, PretrainingConfig) else AutoModel
            model = auto_class.from_pretrained(name, revision=revision).eval()
            model.loaded_revision = revision  # for its image processor
            return model
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The model must be a folder of `save_pretrained`, a Hub id or 'timm:...', but {name!r} cannot be "
                f"loaded: {error}"
            ) from error
    name = name.removeprefix("timm:")
    if not Path(name).is_dir() and not timm.is_model(name):
        raise ValueError(
            f"'timm:{name}' must name an architecture of timm or a folder of `timm.models.save_for_hf`, but {name!r} "
            "is neither. `timm.list_models()` lists the architectures."
        )
    name = f"local-dir:{name}" if Path(name).is_dir() else name
    return timm.create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint or "").eval()


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the part of `model` whose features are evaluated.

    The `evaluation_encoder` of a model that has one, as the pretraining models of hf_msn do (MSN's is the target
    encoder); the vision tower of an image-text model; the base model under a head of transformers; a timm model
    itself, also inside of transformers' wrapper. `DistributedDataParallel` and `torch.compile` wrappers are removed.

    Raises:
        ValueError: If the model is none of these.
    """
    model = unwrapped(model)
    for part in ("evaluation_encoder", "vision_model"):
        if isinstance(getattr(model, part, None), nn.Module):
            return find_backbone(getattr(model, part))
    wrapped = getattr(model, "timm_model", model)
    if is_timm_model(wrapped):
        return wrapped
    if isinstance(model, PreTrainedModel):
        # DINOv3's base model is its stack of blocks, which takes no pixels
        for part in (model.base_model, model):
            if "pixel_values" in _arguments(part):
                return part
    raise ValueError(
        "The model must be a vision model of transformers, a timm model or hold one as `evaluation_encoder`, but is "
        f"{type(model)}. Extract the features of other models yourself, for `LowShotEvaluator.evaluate_features`."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `DistributedDataParallel` and `torch.compile`."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def evaluated_module(
    model: nn.Module, features: FeatureSpace = "backbone", num_last_layers: int = 1
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the module that features depend on, and the function (B, C, H, W) -> (B, D) that computes them with it.

    "backbone": `find_backbone(model)` and its `feature_function`. "projection": the whole model and `model.project`,
    the space in which PAWS compares images. "prediction": the whole model and `model.predict`, after its prediction
    head.

    Raises:
        ValueError: If `features` is unknown, the model lacks that head, or `num_last_layers` does not fit.
    """
    check_choice("features", features, get_args(FeatureSpace))
    if features == "backbone":
        backbone = find_backbone(model)
        return backbone, feature_function(backbone, num_last_layers)
    model = unwrapped(model)
    compute = getattr(model, "project" if features == "projection" else "predict", None)
    if compute is None or (features == "prediction" and model.prediction_head is None):
        raise ValueError(
            f"features='{features}' needs a pretraining model of hf_msn with a {features} head, but this "
            f"{type(model).__name__} has none. Use another of {', '.join(get_args(FeatureSpace))}."
        )
    if num_last_layers != 1:
        raise ValueError(
            f"`num_last_layers` must be 1 with features='{features}', but is {num_last_layers}. Use "
            "features='backbone' for more."
        )
    return model, compute


def is_timm_model(model: nn.Module) -> bool:
    """Return whether `model` has timm's interface: `forward_features`, `forward_head` and `pretrained_cfg`."""
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "pretrained_cfg"))


def feature_function(backbone: nn.Module, num_last_layers: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function (B, C, H, W) -> (B, D) that computes the features of a backbone.

    | backbone | features |
    |---|---|
    | transformers, with a [CLS] token | `hidden_states[-1][:, 0]`: of the last block, before the final LayerNorm |
    | transformers, without | `pooler_output`, flattened; else the mean of `last_hidden_state` |
    | timm | `forward_head(forward_features(x), pre_logits=True)`: the input of the classifier |

    [CLS] is before the final LayerNorm for every pre-norm model (ViTMSN, ViT, DeiT, DINOv2, DINOv3, MAE, CLIP); BEiT
    and Data2VecVision apply none to [CLS]. ViTMAE sees all patches. For images of another size than the model's,
    position embeddings are interpolated if the model supports it.

    Args:
        backbone (`nn.Module`): From `find_backbone`.
        num_last_layers (`int`, *optional*, defaults to 1):
            [CLS] of the last n blocks, concatenated from the earliest to the last: `D = n * hidden_size`.

    Raises:
        ValueError: If `num_last_layers` is not between 1 and the number of blocks, or more than 1 without [CLS].
    """
    has_cls = not is_timm_model(backbone) and any(
        CLS_PARAMETER.fullmatch(name) for name, _ in backbone.named_parameters()
    )
    check_integer("num_last_layers", num_last_layers, meaning="counts blocks", remedy="The paper uses 1.")
    if not has_cls and num_last_layers > 1:
        raise ValueError(
            f"`num_last_layers` must be 1 without a [CLS] token, as in {type(backbone).__name__}, but is "
            f"{num_last_layers}."
        )
    if is_timm_model(backbone):
        return lambda pixels: backbone.forward_head(backbone.forward_features(pixels), pre_logits=True).flatten(1)

    def transformers_features(pixels: torch.Tensor) -> torch.Tensor:
        arguments = {"pixel_values": pixels, "return_dict": True}
        if getattr(backbone.config, "model_type", None) == "vit_mae":
            # it shuffles its patches by this noise, by default from the global generator
            num_patches = pixels.shape[2] * pixels.shape[3] // backbone.config.patch_size**2
            arguments["noise"] = torch.arange(num_patches, device=pixels.device).expand(len(pixels), -1)
        if _needs_interpolation(backbone, pixels):
            arguments["interpolate_pos_encoding"] = True
        if not has_cls:
            output = backbone(**arguments)
            pooled = getattr(output, "pooler_output", None)
            if pooled is not None:
                return pooled.flatten(1)
            last = output.last_hidden_state
            return last.mean(dim=1) if last.ndim == 3 else last.flatten(2).mean(dim=2)
        blocks = backbone(**arguments, output_hidden_states=True).hidden_states[1:]
        if num_last_layers > len(blocks):
            raise ValueError(
                f"`num_last_layers` must be at most {len(blocks)}, the model's blocks, but is {num_last_layers}."
            )
        return torch.cat([block[:, 0] for block in blocks[-num_last_layers:]], dim=1)

    return transformers_features


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _needs_interpolation(backbone: PreTrainedModel, pixels: torch.Tensor) -> bool:
    trained = getattr(backbone.config, "image_size", None)
    trained = tuple(trained) if isinstance(trained, (list, tuple)) else (trained, trained)
    can = "interpolate_pos_encoding" in _arguments(backbone)
    return can and trained[0] is not None and tuple(pixels.shape[-2:]) != trained


@contextmanager
def evaluation_mode(backbone: nn.Module, device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Put a module into eval mode, without gradients, on `device`, and restore all flags and the device afterwards.

    ViTMAE, which drops patches in eval mode too, sees all of them meanwhile. Yields the device.
    """
    flags = [(module, module.training) for module in backbone.modules()]
    home = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    device = torch.device(device) if device is not None else home
    config = getattr(backbone, "config", None)
    mask_ratio = config.mask_ratio if getattr(config, "model_type", None) == "vit_mae" else None
    try:
        backbone.eval()
        backbone.to(device)
        if mask_ratio is not None:
            config.mask_ratio = 0.0
        # no_grad, not inference_mode: a table that the model caches meanwhile must still work in training
        with torch.no_grad():
            yield device
    finally:
        if mask_ratio is not None:
            config.mask_ratio = mask_ratio
        backbone.to(home)
        for module, training in flags:
            module.training = training


def resolve_image_processor(model: nn.Module) -> Any:
    """Return the image processor of a model: saved beside its weights, or a timm model's own transform.

    It is that of the same revision, if `load_vision_model` or a pretraining model's `from_pretrained` was given one.

    A pretraining model with a timm encoder was trained with other views than timm's: only a saved one is used.

    Raises:
        ValueError: If none was saved, or the model was not loaded from a checkpoint.
    """
    model, backbone = unwrapped(model), find_backbone(model)
    if model is backbone and is_timm_model(backbone):
        return timm.data.create_transform(**timm.data.resolve_model_data_config(backbone), is_training=False)
    paths = [
        getattr(part, "name_or_path", "") or getattr(getattr(part, "config", None), "_name_or_path", "")
        for part in (model, backbone)
    ]
    path = next((path for path in paths if path), None)
    remedy = (
        "Pass `image_processor=`, for example `evaluation_image_processor(image_size=...)` with the mean and standard "
        "deviation of training, or save one with the model: `image_processor.save_pretrained(folder)`."
    )
    if path is None:
        raise ValueError(f"{type(model).__name__} was not loaded from a checkpoint with an image processor. {remedy}")
    try:
        revision = getattr(model, "loaded_revision", None)
        return cropped_as_in_torchvision(AutoImageProcessor.from_pretrained(path, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(f"No image processor can be loaded from {path!r}: {error} {remedy}") from error


def describe_image_processor(image_processor: Any) -> dict[str, Any] | str:
    """Return all settings of an image processor as plain JSON types, equal for equal settings; else its `repr`."""
    if hasattr(image_processor, "to_dict"):
        return json.loads(json.dumps(image_processor.to_dict(), default=str))
    return repr(image_processor)


def checkpoint_weights_sha256(
    path: str | Path, features: FeatureSpace = "backbone", *, revision: str | None = None
) -> str:
    """Return the hash that `LowShotEvaluator` writes into its results for a checkpoint: a folder or Hub id.

    For projections and predictions the hash is that of the whole model.
    """
    return weights_sha256(evaluated_module(load_vision_model(str(path), revision=revision), features)[0])
