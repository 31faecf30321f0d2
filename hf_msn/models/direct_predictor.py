"""Linear predictors that are set from the correlation of their input: DirectPred and DirectCopy."""

import torch
from torch import nn

from ..checks import check_choice, check_integer, check_number
from ..distributed.collectives import all_reduce_mean
from ..losses.assignments import at_least_float32

SMALLEST_EIGENVALUE = 1e-4  # of a predictor, as in the authors' code


def direct_pred(correlation: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the predictor of DirectPred (arXiv 2102.06810, equation 18), in the normalised form of the authors' code.

    With F = U diag(s) U^T:

        W = U diag(p) U^T,  p_j = max(sqrt(s_j / max_i s_i) + eps, 1e-4)

    The paper prints p_j = sqrt(s_j) + eps max_i s_i, which differs unless max_i s_i = 1.

    Args:
        correlation (`torch.Tensor` of shape `(D, D)`): F, symmetric and positive semi-definite.
        eps (`float`): Added to each eigenvalue, >= 0.

    Returns:
        `torch.Tensor` of shape `(D, D)`: W; NaN if F is not finite.
    """
    if not correlation.isfinite().all():
        return torch.full_like(correlation, torch.nan)
    eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
    shares = eigenvalues.clamp_min(0) / _floored(eigenvalues[-1])
    return (eigenvectors * (shares.sqrt() + eps).clamp_min(SMALLEST_EIGENVALUE)) @ eigenvectors.T


def direct_copy(correlation: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the predictor of DirectCopy (arXiv 2110.04947): W = F / |F| + eps I, |F| being the spectral norm.

    The authors' code does not divide by |F|; there eps is relative to the scale of the projections. The arguments are
    those of [`direct_pred`].
    """
    if not correlation.isfinite().all():
        return torch.full_like(correlation, torch.nan)
    largest = torch.linalg.eigvalsh(correlation)[-1]
    return correlation / _floored(largest) + eps * torch.eye(
        len(correlation), dtype=correlation.dtype, device=correlation.device
    )


# The functions, with rho and eps of the papers.
RULES = {"direct_pred": (direct_pred, 0.3, 0.1), "direct_copy": (direct_copy, 0.5, 0.3)}


class InputCorrelation(nn.Module):
    """Running correlation F of the input f of a predictor, over all ranks, and the predictor that is set from it.

    Each update of the weights moves it on, with the mean over the rows that [`observe`] has seen since the last one:

        F <- rho F + (1 - rho) mean f f^T        (arXiv 2102.06810, equation 19; at first F <- mean f f^T)

    Args:
        dim (`int`): Width of the predictor, D.
        rule (`str`, *optional*): "direct_pred" or "direct_copy" also sets the predictor; by default it is trained.
        rho (`float`, *optional*): In [0, 1); by default 0.3, and 0.5 for "direct_copy".
        eps (`float`, *optional*): See [`direct_pred`]; by default 0.1, and 0.3 for "direct_copy".
        update_every (`int`, *optional*, defaults to 1): Updates from one time that the predictor is set to the next.
            The first update sets it.

    Attributes:
        correlation (`torch.Tensor` of shape `(D, D)`): F. In the state dict, as the number of updates is.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        dim: int,
        rule: str | None = None,
        *,
        rho: float | None = None,
        eps: float | None = None,
        update_every: int = 1,
    ):
        super().__init__()
        check_choice("rule", rule, (None, *RULES))
        _, default_rho, default_eps = RULES[rule or "direct_pred"]
        self.rule = rule
        self.rho = default_rho if rho is None else check_number("rho", rho, minimum=0, below=1, remedy=_REMEDY)
        self.eps = default_eps if eps is None else check_number("eps", eps, minimum=0, remedy=_REMEDY)
        self.update_every = check_integer("update_every", update_every, meaning="counts updates")
        self.register_buffer("correlation", torch.zeros(dim, dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._sum: torch.Tensor | None = None
        self._num_observed = 0

    def observe(self, rows: torch.Tensor) -> None:
        """Add a micro-batch of inputs `(..., D)`, equally many on all ranks, if it is one of training."""
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            rows = at_least_float32(rows).flatten(0, -2)
            # In the forward pass, where ranks that train locally or as replicas have groups of their own.
            moments = all_reduce_mean(rows.T @ rows / len(rows))
        self._sum = moments if self._sum is None else self._sum + moments
        self._num_observed += 1

    @torch.no_grad()
    def update(self, predictor: nn.Module) -> None:
        """Move F on, and set the weight of `predictor` if there is a rule. Call it after each optimizer step."""
        if self._sum is None:
            return
        mean, number = self._sum / self._num_observed, int(self.num_updates)
        self._sum, self._num_observed = None, 0
        self.correlation.copy_(mean if number == 0 else self.rho * self.correlation + (1 - self.rho) * mean)
        self.num_updates.add_(1)
        if self.rule is not None and number % self.update_every == 0:
            rule = RULES[self.rule][0]
            predictor.weight.copy_(rule(at_least_float32(self.correlation), self.eps))

    @torch.no_grad()
    def spectrum(self, predictor: nn.Module) -> dict[str, float]:
        """Return what is logged of F and of the weight W of a linear predictor.

        - `correlation_largest`, `correlation_smallest`: eigenvalues of F;
        - `correlation_rank`: effective rank, the exponential of the entropy of the eigenvalues over their sum;
        - `predictor_alignment`, for an `nn.Linear`: mean of |cos(u_j, W u_j)| over the eigenvectors u_j of F, weighted
          by their eigenvalues; 1 if W has the eigenvectors of F.

        Empty before the first update, and where F is not finite.
        """
        correlation = at_least_float32(self.correlation)
        if int(self.num_updates) == 0 or not correlation.isfinite().all():
            return {}
        eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
        eigenvalues = eigenvalues.clamp_min(0)
        shares = eigenvalues / _floored(eigenvalues.sum())
        values = {
            "correlation_largest": eigenvalues[-1],
            "correlation_smallest": eigenvalues[0],
            "correlation_rank": torch.special.entr(shares).sum().exp(),
        }
        if isinstance(predictor, nn.Linear):
            images = predictor.weight.to(eigenvectors.dtype) @ eigenvectors
            cosines = (eigenvectors * images).sum(dim=0).abs() / _floored(images.norm(dim=0))
            values["predictor_alignment"] = (shares * cosines).sum()
        return dict(zip(values, torch.stack([*values.values()]).tolist()))


_REMEDY = "The papers have rho 0.3 and eps 0.01 to 0.1 (DirectPred), 0.5 and 0.3 (DirectCopy)."


def _floored(number: torch.Tensor) -> torch.Tensor:
    return number.clamp_min(torch.finfo(number.dtype).tiny)
