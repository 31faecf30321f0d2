"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..distributed.collectives import all_gather_cat, rank
from .assignments import at_least_float32, check_temperature, without_autocast


def nt_xent_loss(
    projections: torch.Tensor,
    *,
    temperature: float = 0.1,
    full_gradient: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the normalised temperature-scaled cross-entropy: each view has to find the other view of its image.

    With s_ij the cosine of rows i and j, and j running over the views of **all** ranks (arXiv 2002.05709, equation 1):

        loss = mean_i -log( exp(s_i,pair(i) / temperature) / sum_{j != i} exp(s_ij / temperature) )

    The gradient is that of this equation. With `full_gradient=False`, as in the authors' code of SuNCEt, it goes
    through row i alone: the rows j that it is compared with count as constants. It is then about half as long and
    points in nearly the same direction, since each pair comes up both as (i, j) and as (j, i).

    Args:
        projections (`torch.Tensor` of shape `(2*B, D)`): The first view of all images of this rank, then the second.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        full_gradient (`bool`, *optional*, defaults to `True`): Whether the compared rows get a gradient too.
        group (`ProcessGroup`, *optional*): The ranks whose views are compared; equally many on each. By default all.

    Returns:
        `torch.Tensor`: Scalar, in nats: the mean over this rank's views. The mean over ranks, and the gradient that
        `DistributedDataParallel` averages, are those of one rank with all images.

    Raises:
        ValueError: If the temperature is not above 0, or the rows are not two views per image.
    """
    check_temperature("temperature", temperature)
    if projections.ndim != 2 or len(projections) == 0 or len(projections) % 2:
        raise ValueError(
            "`nt_xent_loss` takes the first views of all images, then their second views, (2*B, D), but got shape "
            f"{tuple(projections.shape)}."
        )
    num_rows = len(projections)
    with without_autocast(projections):
        queries = F.normalize(at_least_float32(projections), dim=-1)
        keys = all_gather_cat(queries if full_gradient else queries.detach(), group)
        own = rank(group) * num_rows + torch.arange(num_rows, device=queries.device)
        similarities = without_self(queries @ keys.T / temperature, own)
        return F.cross_entropy(similarities, own.roll(num_rows // 2))


def without_self(similarities: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Set the similarity of each row to itself, which is column `own`, so low that its exponential is 0."""
    return similarities.scatter(1, own.unsqueeze(1), torch.finfo(similarities.dtype).min / 2)
