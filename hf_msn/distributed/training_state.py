"""The tensors of a model and its optimizer that take part in an exchange."""

from typing import Any

import torch
from torch import nn

from .comm.exchange import Exchange
from .comm.flat import FlatTensors, split_into_buckets

_SHARDED = {
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP",
    "DeepSpeedEngine": "DeepSpeed",
    "DTensor": "tensor parallelism",
}


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


def refuse_unsupported(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse FSDP, tensor parallelism (DTensor parameters) and DeepSpeed: every rank must have the whole model."""
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    data = [parameter.data for parameter in (*model.parameters(), *optimized)]
    for part in (*model.modules(), *data):
        for kind in type(part).__mro__:
            if kind.__name__ in _SHARDED:
                raise TypeError(
                    "Training with little communication needs the whole model on every rank, but this one is of "
                    f"{_SHARDED[kind.__name__]} ({type(part).__name__}). Use DistributedDataParallel or no wrapper."
                )


def moments(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """Return the optimizer's float tensors of the shape of their parameter, by position of the parameter and name."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (place, name): value
        for place, parameter in enumerate(places)
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
        if torch.is_tensor(value)
        and value.shape == parameter.shape
        and value.is_floating_point()
        and name not in ("step", "mu_product")  # have the shape of a scalar parameter, but are no moments
    }


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set moments to zero, and the counts that correct their bias to their first values, as in a new optimizer."""
    for moment in moments(optimizer).values():
        moment.zero_()
    for state in optimizer.state.values():
        for name, first in (("step", 0.0), ("mu_product", 1.0)):
            if torch.is_tensor(state.get(name)):
                state[name].fill_(first)
            elif name in state:
                state[name] = type(state[name])(first)


def average_moments(
    optimizer: torch.optim.Optimizer, exchange: Exchange, device: torch.device, bucket_bytes: int
) -> None:
    """Replace the moments that all ranks have by their means; a rank may lack those of a step that it skipped."""
    own = moments(optimizer)
    names = {f"{place}/{name}": value for (place, name), value in own.items()}
    texts = exchange.texts_that_differ("\n".join(names), device)
    if texts is not None:
        shared = set.intersection(*(set(text.split("\n")) for text in texts))
        names = {name: value for name, value in names.items() if name in shared}
    tensors = list(names.values())
    for bucket in split_into_buckets(tensors, bucket_bytes):
        flat = FlatTensors([tensors[i] for i in bucket])
        exchange.mean_(flat.copy_in())
        flat.copy_back()


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
