"""A model of this package from the networks of an original checkpoint, and such networks from a model."""

from collections.abc import Iterable, Mapping

import torch

from ...models.configuration_msn import MSNConfig
from ...models.configuration_paws import PAWSConfig
from ...models.modeling_msn import MSNForPreTraining
from ...models.modeling_paws import PAWSForPreTraining
from ...models.patch_dropping import num_kept_patches
from . import networks
from .files import OriginalCheckpoint

_SHOWN = 8
_HEADS = {"projection_head.": "fc.", "prediction_head.": "pred."}
_ALONE = "Or take the trunk alone: `export_backbone_dir` (`--export_backbone`) without an output."


def configuration_of(
    original: OriginalCheckpoint, num_attention_heads: int | None, projection_activation: str | None, heads: bool
) -> MSNConfig | PAWSConfig:
    """The configuration that the shapes of an original checkpoint ask for.

    Args:
        original ([`OriginalCheckpoint`]): As `read_original` gives it.
        num_attention_heads, projection_activation: As for [`convert_checkpoint`].
        heads (`bool`): Whether heads and prototypes are wanted. Else those of the configuration mean nothing.

    Raises:
        ValueError: If something is missing, or is not what the method has.
    """
    is_msn, weights = original.method == "msn", _evaluated(original)
    is_vit = networks.is_vit(weights)
    if is_msn and not is_vit:
        raise ValueError("MSN here has a ViT, but the trunk in the file is a ResNet. Only PAWS can have one.")
    if not is_vit and num_attention_heads is not None:
        raise ValueError("`num_attention_heads` is about ViTs, but the trunk in the file is a ResNet. Leave it out.")
    if is_msn and projection_activation == "relu":
        raise ValueError("`projection_activation` is about PAWS: the head of MSN has GELU. Leave it out.")
    fields = networks.vit_fields(weights, num_attention_heads) if is_vit else networks.resnet_fields(weights)
    if heads:
        _check_parts(original)
        fields.update(networks.head_fields(weights))
    if not is_msn:
        return PAWSConfig(**fields, projection_activation=projection_activation or "relu")
    if fields.pop("prediction_head", False):
        raise ValueError(
            "The encoder has a prediction head 'pred', but `MSNForPreTraining` has none and would compare other "
            f"vectors. {_ALONE}"
        )
    if heads:
        fields["num_prototypes"], dim = original.prototypes.shape
        if dim != fields["projection_dim"]:
            raise ValueError(
                f"The prototypes have dimension {dim}, but the projections, by 'fc.fc3.weight', "
                f"{fields['projection_dim']}. They are not of one model. {_ALONE}"
            )
    num_patches = (fields["image_size"] // fields["patch_size"]) ** 2
    if num_kept_patches(num_patches, MSNConfig.mask_ratio) < 1:
        fields["mask_ratio"] = 0.0  # the default is for more patches than this
    return MSNConfig(**fields)


def build_model(
    original: OriginalCheckpoint, config: MSNConfig | PAWSConfig, heads: bool
) -> tuple[MSNForPreTraining | PAWSForPreTraining, list[str]]:
    """The model in float32, and what of it was not in the file.

    Args:
        original ([`OriginalCheckpoint`]): As `read_original` gives it.
        config ([`MSNConfig`] or [`PAWSConfig`]): Of `configuration_of`.
        heads (`bool`): Whether heads and prototypes must be there. Else they are zero, whatever the file has.

    Raises:
        ValueError: If a tensor is missing, unexpected or of a shape that does not fit.
    """
    trunk_shapes = trunk_tensors(config)
    expected = {**trunk_shapes, **(networks.head_shapes(config, _width(config, trunk_shapes)) if heads else {})}
    made_up, found = [], {}
    for section, weights in (("target_encoder", original.target), ("encoder", original.online)):
        if weights is not None:
            if not heads:
                weights = {name: weights[name] for name in weights if not name.startswith(tuple(_HEADS.values()))}
            made_up += _check_tensors(section, weights, expected)
            found[section] = weights
    state = {}
    for section in ("target_encoder", "encoder") if isinstance(config, MSNConfig) else ("encoder",):
        weights = found.get(section)
        if weights is None:
            source, weights = next(iter(found.items()))
            made_up.append(f"{section}: starts as a copy of {source}")
        before = section.removesuffix("encoder")
        trunk = {name: weights[name] for name in trunk_shapes if name in weights}
        trunk = networks.vit_to_ours(trunk) if networks.is_vit(trunk) else trunk
        state.update({f"{section}.{name}": tensor for name, tensor in trunk.items()})
        for ours, theirs in _HEADS.items():
            head = networks.part(weights, theirs)
            state.update({f"{before}{ours}{name}": tensor for name, tensor in head.items()})
    if heads and original.prototypes is not None:
        state["prototypes"] = original.prototypes
    return _assemble(config, state), made_up


def original_state(model: MSNForPreTraining | PAWSForPreTraining, prefix: str = "") -> dict:
    """The networks of a model (and prototypes) by their original names, each with `prefix`, in memory of their own.

    Raises:
        ValueError: If the original code has no such encoder.
    """
    config, state = model.config, model.state_dict()
    is_vit = getattr(config, "timm_model", None) is None
    if is_vit and (config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6):
        raise ValueError(
            "The ViTs of the original code have GELU and a LayerNorm eps of 1e-6, but this one has `hidden_act` "
            f"{config.hidden_act!r} and `layer_norm_eps` {config.layer_norm_eps}: it would compute something else "
            "there."
        )
    names = trunk_tensors(config)
    written = {}
    for before in ("", "target_") if isinstance(model, MSNForPreTraining) else ("",):
        weights = networks.part(state, f"{before}encoder.")
        weights = networks.vit_to_original(weights, config) if is_vit else {name: weights[name] for name in names}
        for ours, theirs in _HEADS.items():
            weights.update({theirs + name: tensor for name, tensor in networks.part(state, before + ours).items()})
        # a view would be saved with the whole storage that it looks into
        written[f"{before}encoder"] = {prefix + name: tensor.cpu().clone() for name, tensor in weights.items()}
    if "prototypes" in state:
        written["prototypes"] = state["prototypes"].cpu().clone()
    return written


def trunk_tensors(config: MSNConfig | PAWSConfig) -> dict[str, tuple[int, ...]]:
    """Original name and shape of each tensor of the trunk."""
    is_vit = getattr(config, "timm_model", None) is None
    return networks.vit_shapes(config) if is_vit else networks.resnet_shapes(config)


def _evaluated(original: OriginalCheckpoint) -> Mapping[str, torch.Tensor]:
    return original.online if original.target is None else original.target


def _width(config: MSNConfig | PAWSConfig, trunk_shapes: Mapping[str, tuple[int, ...]]) -> int:
    if getattr(config, "timm_model", None) is None:
        return config.hidden_size
    last = "layer4.0.bn3.weight" if "layer4.0.bn3.weight" in trunk_shapes else "layer4.0.bn2.weight"
    return trunk_shapes[last][0]


def _check_parts(original: OriginalCheckpoint) -> None:
    if not any(name.startswith("fc.") for name in _evaluated(original)):
        raise ValueError(
            "The encoder in the file is a trunk without projection head 'fc', which a pretraining model needs and "
            f"which would have to be made up. Find the whole checkpoint. {_ALONE}"
        )
    if original.method_is_guessed:
        raise ValueError(
            "The file is the state dict of one ViT with a projection head, which may be of MSN, whose prototypes are "
            "then missing, or of PAWS. Find the whole checkpoint; or, if it is of PAWS, say so: `method='paws'` "
            f"(`--method paws`). {_ALONE}"
        )
    if original.method == "msn" and original.prototypes is None:
        raise ValueError(
            "The file has no 'prototypes', which MSN needs and which would have to be made up. Find the whole "
            f"checkpoint; if this one is of PAWS, say so: `method='paws'` (`--method paws`). {_ALONE}"
        )


def _check_tensors(
    section: str, weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Raises a `ValueError` unless names and shapes are as expected. Returns the counters that are not there."""
    counters = [name for name in expected if name not in weights and _is_counter(name)]
    missing = [name for name in expected if name not in weights and name not in counters]
    unexpected = [name for name in weights if name not in expected]
    if missing or unexpected:
        faults = [
            f"{len(names)} tensors are {kind} ({_some(names)})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"'{section}' is not the encoder that its shapes and names say: {' and '.join(faults)}. The file is not "
            "whole, or of another network."
        )
    wrong = [name for name, shape in expected.items() if name in weights and tuple(weights[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"The shapes in '{section}' do not fit each other: '{name}' has {tuple(weights[name].shape)}, but beside "
            f"the others it must have {expected[name]}; {len(wrong)} tensors in all ({_some(wrong)}). The file mixes "
            "two networks, or is of a network that this package has not."
        )
    inexact = [name for name in expected if name in weights and _is_counter(name) is weights[name].is_floating_point()]
    if inexact:
        raise ValueError(
            f"The weights in '{section}' must be floating-point numbers and the counters whole ones, but "
            f"'{inexact[0]}' is of type {weights[inexact[0]].dtype}. A quantised model cannot be converted."
        )
    return [f"{section}.{name}: 0" for name in counters]


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _assemble(config: MSNConfig | PAWSConfig, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model with these weights, made without drawing any; what `state` has not, is 0."""
    with torch.device("meta"):
        model = (MSNForPreTraining if isinstance(config, MSNConfig) else PAWSForPreTraining)(config)
    weights = {}
    for name, slot in model.state_dict().items():
        source = state.get(name)
        weights[name] = torch.zeros(slot.shape, dtype=slot.dtype, device="cpu")
        if source is not None:
            weights[name].copy_(source)
    unknown = [name for name in state if name not in weights]
    assert not unknown, f"names that the model has not: {unknown[:3]}"
    model.load_state_dict(weights, assign=True)
    model._after_loading()
    return model.eval()
