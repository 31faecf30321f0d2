"""What of a model and its optimizer takes part in an exchange, and what cannot."""

from typing import Any

import torch
from torch import nn

from ..comm.exchange import Exchange
from ..comm.flat import FlatTensors, split_into_buckets

_SHARDED = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP", "DeepSpeedEngine": "DeepSpeed"}


def trainable_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, torch.Tensor, int | None]]:
    """Name, parameter and index of its parameter group of all that trains, group by group.

    Also what the optimizer has and the model has not; the index is `None` for what the optimizer has not.

    Raises:
        ValueError: If nothing trains.
    """
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found = {id(p): (name, p) for name, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            found.setdefault(id(p), (f"optimizer.param_groups[{index}][{place}]", p))
    training = [(name, p, group_of.get(key)) for key, (name, p) in found.items() if p.requires_grad]
    if not training:
        raise ValueError(
            "The model must have parameters that train, but all of its 0 trainable ones are frozen or missing. Set "
            "`requires_grad` on what should train."
        )
    last = len(optimizer.param_groups)
    return sorted(training, key=lambda entry: last if entry[2] is None else entry[2])


def frozen_and_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Frozen parameters, then the buffers that are in the state dict; each tensor once."""
    found = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), buffer)
    return list(found.values())


def plain_optimizer(optimizer: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The torch optimizer inside of accelerate's wrapper, and the wrapper's record of accumulation (or `None`).

    Raises:
        TypeError: If there is no torch optimizer.
    """
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
    """Refuses models whose parameters are not whole on every rank.

    Raises:
        TypeError: For FSDP, tensor parallelism (DTensor parameters) and DeepSpeed.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDED:
                raise TypeError(
                    "Training with little communication needs the whole model on every rank, but this one is of "
                    f"{_SHARDED[kind.__name__]} ({type(module).__name__}). Use DistributedDataParallel or no wrapper."
                )
    optimized = (p for group in optimizer.param_groups for p in group["params"])
    for parameter in (*model.parameters(), *optimized):
        if any(kind.__name__ == "DTensor" for kind in (*type(parameter).__mro__, *type(parameter.data).__mro__)):
            raise TypeError(
                "Training with little communication needs the whole model on every rank, but a parameter of shape "
                f"{tuple(parameter.shape)} is a DTensor (FSDP or tensor parallel). Use DistributedDataParallel."
            )


def moments(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """The optimizer's float tensors of a parameter's own shape, by place of the parameter and name."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (place, name): value
        for place, parameter in enumerate(places)
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
        if torch.is_tensor(value)
        and value.shape == parameter.shape
        and value.is_floating_point()
        and name not in ("step", "mu_product")  # of a scalar parameter's shape, but no moment of it
    }


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Sets the moments to zero, and what corrects their bias to where it began, as in a new optimizer."""
    for moment in moments(optimizer).values():
        moment.zero_()
    for state in optimizer.state.values():
        for name, beginning in (("step", 0.0), ("mu_product", 1.0)):
            if torch.is_tensor(state.get(name)):
                state[name].fill_(beginning)
            elif name in state:
                state[name] = type(state[name])(beginning)


def average_moments(
    optimizer: torch.optim.Optimizer, exchange: Exchange, device: torch.device, bucket_bytes: int
) -> None:
    """Replaces the moments that all ranks of `exchange` have by their means; others stay.

    A rank may lack one where a gradient scaler has skipped its steps, or a parameter had no gradient yet.
    """
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
    """Refuses ranks that describe themselves differently.

    Raises:
        ValueError: With the first line that differs and the two ranks.
    """
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
