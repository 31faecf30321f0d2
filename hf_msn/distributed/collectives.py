"""Collectives with the gradients that data-parallel training needs.

`group=None` means the default process group if `torch.distributed` is initialised, else this process alone. Then every
function returns its input, so that a loss needs no branch for one process.

Gradients are those of the sum of all ranks' losses, which `DistributedDataParallel` averages over the ranks. So a loss
that is the mean over ranks has the gradient of the concatenated batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Groups that `group=None` stands for, innermost last.
_scopes: list[dist.ProcessGroup] = []


@contextmanager
def group_scope(group: dist.ProcessGroup) -> Iterator[None]:
    """Make `group=None` stand for `group` in this module, also for losses that are not given a group."""
    _scopes.append(group)
    try:
        yield
    finally:
        _scopes.pop()


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group itself, that of the enclosing [`group_scope`], or `None` for the default group."""
    return _scopes[-1] if group is None and _scopes else group


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether `group` has other processes."""
    return world_size(group) > 1


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in `group`; 1 if `torch.distributed` is not initialised."""
    return dist.get_world_size(resolve_group(group)) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return the rank of this process in `group`; 0 if `torch.distributed` is not initialised."""
    return dist.get_rank(resolve_group(group)) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of `tensor` over the ranks, a new tensor without gradient."""
    total = tensor.detach().clone()
    if is_distributed(group):
        dist.all_reduce(total, group=resolve_group(group))
    return total


def all_reduce_mean(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the mean over the ranks of `tensor`, of one shape on all. The backward averages gradients too."""
    if not is_distributed(group):
        return tensor
    return _AllReduceMean.apply(tensor, resolve_group(group))


def all_gather_cat(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the tensors of all ranks, each of shape (N, ...), in the order of ranks: (world_size * N, ...).

    The backward returns to each rank the sum, over all ranks, of the gradients of its rows.
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
        # Not a reduce-scatter, which gloo has not for every dtype; the supports of a batch are small.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, rank(ctx.group) * ctx.rows, ctx.rows), None
