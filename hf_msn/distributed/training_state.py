"""The tensors of a model and its optimizer that take part in an exchange."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.exchange import Exchange

_SHARDED = {
    "FullyShardedDataParallel": "FSDP1",
    "FSDPModule": "FSDP2",
    "DeepSpeedEngine": "DeepSpeed",
    "DTensor": "tensor parallelism",
}

# Of each parameter, beside its moments, in the optimizers of torch (NAdam, ASGD, Rprop) and transformers (Adafactor),
# and where they begin.
_SCALARS = {"step": 0.0, "mu_product": 1.0, "mu": 1.0, "eta": 0.0, "RMS": 0.0}


def trainable_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, torch.Tensor, int | None]]:
    """Return name, tensor and index of its parameter group for each trainable parameter, group by group.

    Parameters of the optimizer that are not the model's are included. The index is `None` for those of the model that
    are not the optimizer's.
    """
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found = {id(p): (name, p) for name, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            found.setdefault(id(p), (f"optimizer.param_groups[{index}][{place}]", p))
    training = [(name, p, group_of.get(key)) for key, (name, p) in found.items() if p.requires_grad]
    if not training:
        raise ValueError("The model must have trainable parameters, but has 0. Set `requires_grad` on those to train.")
    last = len(optimizer.param_groups)
    return sorted(training, key=lambda entry: last if entry[2] is None else entry[2])


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this rank has a shard of the tensor only: a DTensor, whose class takes seconds to import."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard that this rank has, in the memory of the tensor. Do not keep it: FSDP2 may replace it."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward pass: they hide the shards and their changes."""
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()


def frozen_and_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Return the frozen parameters, then the buffers of the state dict, each tensor once."""
    found = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), buffer)
    return list(found.values())


def plain_optimizer(optimizer: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Return the torch optimizer inside of accelerate's wrapper, and the wrapper's gradient state, or `None`."""
    gradient_state = getattr(optimizer, "gradient_state", None)
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or "DeepSpeed" in type(inner).__name__:
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, or accelerate's wrapper of one, but is a "
            f"{type(inner).__name__}. DeepSpeed's optimizers exchange on their own: train without DeepSpeed."
        )
    return inner, gradient_state


def refuse_unsupported(model: nn.Module, optimizer: torch.optim.Optimizer, takes_shards: bool = False) -> None:
    """Refuse an optimizer of another model, FSDP1, tensor parallelism, DeepSpeed, and FSDP2 unless `takes_shards`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, but is a {type(model).__name__}. Pass the model itself; several "
            "modules fit into one torch.nn.ModuleList."
        )
    if takes_shards:
        reshard(model)  # the optimizer has the shards
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    data = [parameter.data for parameter in (*model.parameters(), *optimized)]
    kinds = {kind.__name__: type(part) for part in (*model.modules(), *data) for kind in type(part).__mro__}
    allowed = {"FSDPModule", "DTensor"} if takes_shards and "FSDPModule" in kinds else set()
    for kind in _SHARDED:
        if kind in kinds and kind not in allowed:
            raise TypeError(
                "Training with little communication needs the whole model on every rank, but this one is of "
                f"{_SHARDED[kind]} ({kinds[kind].__name__}). Use DistributedDataParallel, no wrapper, or in LocalSGD, "
                "SlowMo, DiLoCo and StreamingDiLoCo FSDP2: `fully_shard(model, mesh=mesh['shard'])`."
            )
    own = {id(parameter) for parameter in model.parameters()}
    if own.isdisjoint(map(id, optimized)):
        raise ValueError(
            f"An optimizer must train parameters of its model, but none of the {len(optimized)} of `optimizer` is one "
            f"of the {len(own)} of this {type(model).__name__}. Pass the model that it was made for, and make it "
            "after `fully_shard`."
        )


def shard_group(model: nn.Module, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the ranks that hold the shards of a replica, `None` for whole models. Refuse meshes that do not match."""
    sharded = [(name, p) for name, p in model.named_parameters() if is_sharded(p)]
    if not sharded:
        return None
    mesh = sharded[0][1].device_mesh
    for name, p in sharded:
        if p.device_mesh != mesh or mesh.ndim > 1 or not p.placements[0].is_shard():
            raise ValueError(
                "Inside a replica `fully_shard` must shard the parameters over one dimension of one mesh, but "
                f"`{name}` has the placements {p.placements} on {p.device_mesh}. Hybrid sharding averages over "
                "replicas at every step, and tensor parallelism splits them. Use "
                "`fully_shard(model, mesh=mesh['shard'])`."
            )
    shards = dist.get_process_group_ranks(mesh.get_group())
    between = dist.get_process_group_ranks(group or dist.group.WORLD)
    both = sorted(set(shards) & set(between))
    if len(both) > 1:
        raise ValueError(
            f"`group` must have one rank of each replica, but its ranks {both} hold shards of one. Make a mesh with "
            "`init_device_mesh(device, (replicas, shards), mesh_dim_names=('replicate', 'shard'))`, and set "
            "`group=mesh['replicate'].get_group()` and `fully_shard(model, mesh=mesh['shard'])`."
        )
    return mesh.get_group()


def moments(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """Return the optimizer's moments, by position of the parameter and name.

    They are the tensors of its state, of any shape: of the parameter, of its rows and columns (Adafactor, Shampoo) or
    one number (NovoGrad). Those of a whole parameter group (DoG) have negative positions. Counts are none.
    """
    places = [p for group in optimizer.param_groups for p in group["params"]]
    states = {place: optimizer.state.get(parameter, {}) for place, parameter in enumerate(places)}
    settings = {"params", *optimizer.defaults}
    for index, group in enumerate(optimizer.param_groups):
        states[-1 - index] = {name: value for name, value in group.items() if name not in settings}
    found = {}
    for place, state in states.items():
        for name, value in sorted(state.items()):
            is_list = isinstance(value, (list, tuple)) and any(map(torch.is_tensor, value))
            if (is_list and place >= 0) or (torch.is_tensor(value) and value.dim() > 0 and not _has_mean(value)):
                kind = f"a list in {type(optimizer).__name__}" if is_list else f"{value.dtype}"
                raise ValueError(
                    "`base_buffers` 'reset' and 'average' need moments that are tensors of floating-point numbers, "
                    f"but `{name}` is {kind}. Use 'maintain'."
                )
            if torch.is_tensor(value) and _has_mean(value) and name not in _SCALARS:
                found[place, name] = value
    return found


def _has_mean(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set the state to that of a new optimizer: moments to zero, counts and step sizes to their first values."""
    if type(optimizer).__module__.startswith("pytorch_optimizer."):
        optimizer.state.clear()  # it makes what is missing, and not all of it begins at zero
    if hasattr(optimizer, "_first_step"):  # so does DoG
        optimizer._first_step = True
    for moment in moments(optimizer).values():
        moment.zero_()
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] *= 0
        first_values = {
            **_SCALARS,
            "eta": group.get("lr"),
            "step_size": group.get("lr"),
            "sum": group.get("initial_accumulator_value", 0.0),
        }
        for state in (optimizer.state.get(parameter, {}) for parameter in group["params"]):
            for name in first_values.keys() & state.keys():
                if torch.is_tensor(state[name]):
                    state[name].fill_(first_values[name])
                else:
                    state[name] = type(state[name])(first_values[name])


def shared_moments(optimizer: torch.optim.Optimizer, exchange: Exchange, device: torch.device) -> list[torch.Tensor]:
    """Return the moments that all ranks have; a rank may lack those of a step that it skipped."""
    own = moments(optimizer)
    names = {f"{place}/{name}": value for (place, name), value in own.items()}
    texts = exchange.texts_that_differ("\n".join(names), device)
    if texts is not None:
        shared = set.intersection(*(set(text.split("\n")) for text in texts))
        names = {name: value for name, value in names.items() if name in shared}
    return list(names.values())


@contextmanager
def of_this_version() -> Iterator[None]:
    """Say what is wrong with a state that lacks an entry which the block reads."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"A state must be one of this version of hf_msn, but has no {error}: another version saved it. Go on with "
            "that version, or load the model and no state."
        ) from error


def compare_ranks(exchange: Exchange, description: list[str], device: torch.device) -> None:
    """Check that all ranks have the same description, and name the first line that differs and its two ranks."""
    texts = exchange.texts_that_differ("\n".join(description), device)
    if texts is None:
        return
    ranks, first = exchange.global_ranks, texts[0].split("\n")
    for global_rank, text in zip(ranks, texts):
        other = text.split("\n")
        for here, there in zip([*first, "nothing more"], [*other, "nothing more"]):
            if here != there:
                raise ValueError(
                    "All ranks must train the same parameters with the same settings, but rank "
                    f"{ranks[0]} has `{here}` where rank {global_rank} has `{there}`. Build them alike."
                )
