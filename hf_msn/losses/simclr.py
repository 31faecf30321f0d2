"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709)."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..checks import check_integer
from ..distributed.collectives import all_gather_cat, rank
from .assignments import at_least_float32, check_temperature, without_autocast


def nt_xent_loss(
    projections: torch.Tensor,
    *,
    temperature: float = 0.1,
    full_gradient: bool = True,
    tile_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the normalised temperature-scaled cross-entropy: each view has to find the other view of its image.

    With s_ij the cosine of rows i and j, and j running over the views of **all** ranks (arXiv 2002.05709, equation 1):

        loss = mean_i -log( exp(s_i,pair(i) / temperature) / sum_{j != i} exp(s_ij / temperature) )

    The gradient is that of this equation. With `full_gradient=False`, as in the authors' code of SuNCEt, it goes
    through row i alone: the rows j that it is compared with count as constants. It is then about half as long and
    points in nearly the same direction, since each pair comes up both as (i, j) and as (j, i).

    With `tile_size` the similarities are computed one square tile at a time, in the forward and again in the backward
    pass (as in arXiv 2410.17243): memory grows with the number of views, not with its square. Loss and gradient are
    the same to rounding.

    Args:
        projections (`torch.Tensor` of shape `(2*B, D)`): The first view of all images of this rank, then the second.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        full_gradient (`bool`, *optional*, defaults to `True`): Whether the compared rows get a gradient too.
        tile_size (`int`, *optional*): Rows and columns of a tile, at least 1. By default all similarities are computed
            at once: 2*B rows, and as many columns as there are views on all ranks.
        group (`ProcessGroup`, *optional*): The ranks whose views are compared; equally many on each. By default all.

    Returns:
        `torch.Tensor`: Scalar, in nats: the mean over this rank's views. The mean over ranks, and the gradient that
        `DistributedDataParallel` averages, are those of one rank with all images.

    Raises:
        ValueError: If the temperature is not above 0, `tile_size` is below 1, or the rows are not two views per image.
    """
    check_temperature("temperature", temperature)
    if tile_size is not None:
        check_integer("tile_size", tile_size, meaning="counts views", remedy="1024 takes 4 MiB in float32.")
    if projections.ndim != 2 or len(projections) == 0 or len(projections) % 2:
        raise ValueError(
            "`nt_xent_loss` takes the first views of all images, then their second views, (2*B, D), but got shape "
            f"{tuple(projections.shape)}."
        )
    num_rows = len(projections)
    with without_autocast(projections):
        queries = F.normalize(at_least_float32(projections), dim=-1)
        keys = all_gather_cat(queries if full_gradient else queries.detach(), group)
        first = rank(group) * num_rows
        if tile_size is not None:
            positives = keys[first : first + num_rows].roll(num_rows // 2, dims=0)
            total = _TiledLogSumExp.apply(queries, keys, first, temperature, tile_size)
            return (total - (queries * positives).sum(dim=-1) / temperature).mean()
        own = first + torch.arange(num_rows, device=queries.device)
        similarities = without_self(queries @ keys.T / temperature, own)
        return F.cross_entropy(similarities, own.roll(num_rows // 2))


def without_self(similarities: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Set the similarity of each row to itself, which is column `own`, so low that its exponential is 0."""
    return similarities.scatter(1, own.unsqueeze(1), torch.finfo(similarities.dtype).min / 2)


class _TiledLogSumExp(torch.autograd.Function):
    """`(M, D)`, `(N, D)` -> `(M,)`: log sum_{j != first + i} exp(q_i k_j / temperature), one tile at a time."""

    @staticmethod
    def forward(ctx, queries, keys, first, temperature, tile_size):
        ctx.first, ctx.temperature, ctx.tile_size = first, temperature, tile_size
        total = queries.new_full((len(queries),), -torch.inf)
        for rows, _, similarities in _tiles(queries, keys, first, temperature, tile_size):
            total[rows] = torch.logaddexp(total[rows], similarities.logsumexp(dim=1))
        ctx.save_for_backward(queries, keys, total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        queries, keys, total = ctx.saved_tensors
        gradient = (gradient / ctx.temperature).unsqueeze(1)
        query_gradient = torch.zeros_like(queries)
        key_gradient = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        with without_autocast(queries):
            for rows, columns, weights in _tiles(queries, keys, ctx.first, ctx.temperature, ctx.tile_size):
                weights.sub_(total[rows].unsqueeze(1)).exp_().mul_(gradient[rows])
                query_gradient[rows] += weights @ keys[columns]
                if key_gradient is not None:
                    key_gradient[columns] += weights.T @ queries[rows]
        return query_gradient, key_gradient, None, None, None


def _tiles(
    queries: torch.Tensor, keys: torch.Tensor, first: int, temperature: float, tile_size: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield rows, columns and similarities of each tile, without those of a row to itself, column `first` + row."""
    for row in range(0, len(queries), tile_size):
        for column in range(0, len(keys), tile_size):
            rows, columns = slice(row, row + tile_size), slice(column, column + tile_size)
            similarities = queries[rows] @ keys[columns].T / temperature
            similarities.diagonal(first + row - column).fill_(torch.finfo(similarities.dtype).min / 2)
            yield rows, columns, similarities
