"""Collectives with the gradients that data-parallel training needs.

`group=None` means the default process group where `torch.distributed` is initialised, else this process alone: every
function then returns its input, so that a loss needs no branch for the one-process case.

The gradients are those of the sum of all ranks' losses, which is what `DistributedDataParallel` averages over the
ranks. A loss that is the mean over ranks therefore gets the gradient of the concatenated batch, neither `world_size`
times too large nor too small.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# What `group=None` means at the moment, innermost last; empty for the default group.
_scopes: list[dist.ProcessGroup] = []


@contextmanager
def group_scope(group: dist.ProcessGroup) -> Iterator[None]:
    """Makes `group=None` mean `group` to the functions of this module: a loss that is not given a group follows."""
    _scopes.append(group)
    try:
        yield
    finally:
        _scopes.pop()


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group itself, that of the enclosing [`group_scope`], or `None` for the default group."""
    return _scopes[-1] if group is None and _scopes else group


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there is more than this process in `group`."""
    return world_size(group) > 1


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group`; 1 where `torch.distributed` is not initialised."""
    return dist.get_world_size(resolve_group(group)) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process' rank in `group`; 0 where `torch.distributed` is not initialised."""
    return dist.get_rank(resolve_group(group)) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum of `tensor` over the ranks, without gradient. Returns a new tensor of the same shape."""
    total = tensor.detach().clone()
    if is_distributed(group):
        dist.all_reduce(total, group=resolve_group(group))
    return total


def all_reduce_mean(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Mean of `tensor` over the ranks, with gradient.

    Args:
        tensor (`torch.Tensor`): Any shape, the same on every rank.
        group (`ProcessGroup`, *optional*): The ranks to average over.

    Returns:
        `torch.Tensor`: The mean, in the shape of `tensor`. Its backward averages the incoming gradients over ranks.
    """
    if not is_distributed(group):
        return tensor
    return _AllReduceMean.apply(tensor, resolve_group(group))


def all_gather_cat(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Concatenation of all ranks' `tensor` along dimension 0, in the order of the ranks, with gradient.

    Args:
        tensor (`torch.Tensor` of shape `(N, ...)`): The same shape on every rank.
        group (`ProcessGroup`, *optional*): The ranks to gather from.

    Returns:
        `torch.Tensor` of shape `(world_size * N, ...)`: Its backward gives each rank the sum, over all ranks, of the
        gradients that fell on its own rows.
    """
    if not is_distributed(group):
        return tensor
    return _AllGatherCat.apply(tensor, resolve_group(group))


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        mean = tensor.contiguous().clone()
        dist.all_reduce(mean, group=group)
        return mean.div_(world_size(group))

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.div_(world_size(ctx.group)), None


class _AllGatherCat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group, ctx.rows = group, tensor.shape[0]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        # gloo has no reduce-scatter for every dtype, and the supports of a batch are small: reduce all, keep our rows.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, rank(ctx.group) * ctx.rows, ctx.rows), None
