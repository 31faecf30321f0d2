"""Quasi-global momentum: momentum of the mixed parameters, instead of that of each rank's own gradients."""

from collections.abc import Iterable, Sequence

import torch

from ..checks import check_number
from .comm.flat import FlatTensors


class QuasiGlobalMomentum:
    """The momentum mhat of quasi-global momentum ([arXiv 2102.04761](https://arxiv.org/abs/2102.04761)).

        m = beta * mhat + g;   x' from mixing x - eta * m;   mhat <- mu * mhat + (1 - mu) * (x - x') / eta

    Args:
        setting (`float` or pair of `float`): mu, which is beta too, or (beta, mu); in [0, 1).
        optimizer (`torch.optim.Optimizer`): It must step by x - eta * gradient.

    Attributes:
        buffers (`list[torch.Tensor]`): mhat in a flat buffer per bucket, real and of at least float32.
    """

    def __init__(self, setting: float | Sequence[float], optimizer: torch.optim.Optimizer):
        is_pair = isinstance(setting, Sequence) and len(setting) == 2 and not isinstance(setting, str)
        beta, mu = setting if is_pair else (setting, setting)
        for value in (beta, mu):
            check_number(
                "quasi_global_momentum",
                value,
                minimum=0.0,
                below=1.0,
                meaning="is the part of the momentum that is kept, or the pair (beta, mu),",
                remedy="The paper uses 0.9.",
            )
        self.beta, self.mu = float(beta), float(mu)
        self.buffers: list[torch.Tensor] = []
        self._groups: list[list[int | None]] = []
        problems = [
            f"{name}={group[name]!r}"
            for group in optimizer.param_groups
            for name in ("momentum", "nesterov", "maximize")
            if group.get(name)
        ]
        if problems or not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                "`quasi_global_momentum` replaces the optimizer's own momentum and needs torch.optim.SGD with "
                "momentum=0, nesterov=False and maximize=False, but the optimizer is "
                f"{type(optimizer).__name__} {', '.join(problems)}. Use plain SGD, or leave it out."
            )

    def attach(self, buckets: list[list[tuple[torch.Tensor, int | None]]]) -> None:
        """Take parameters with the index of their parameter group, bucket by bucket."""
        self._parameters = [[parameter for parameter, _ in bucket] for bucket in buckets]
        self._groups = [[group for _, group in bucket] for bucket in buckets]

    def reset(self) -> None:
        """mhat <- 0."""
        self.buffers = [torch.zeros_like(FlatTensors(bucket, widen=True).buffers[0]) for bucket in self._parameters]

    @torch.no_grad()
    def add_to_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """g <- g + beta * mhat for each parameter of the optimizer."""
        # Where a fused optimizer undoes the loss scale itself, the gradients still hold it.
        scale = getattr(optimizer, "grad_scale", None)
        factor = self.beta if scale is None else self.beta * scale
        for buffer, bucket, groups in zip(self.buffers, self._parameters, self._groups):
            for (part, _), parameter, group in zip(_pairs(buffer, bucket), bucket, groups):
                if group is None:
                    continue
                own = part * factor
                if parameter.is_complex():
                    own = torch.view_as_complex(own)
                if parameter.grad is not None:
                    parameter.grad.add_(own)
                elif bool(own.any()):
                    parameter.grad = own.to(parameter.dtype)

    @torch.no_grad()
    def update(
        self, before: Iterable[torch.Tensor], after: Iterable[torch.Tensor], learning_rates: list[float]
    ) -> None:
        """mhat <- mu * mhat + (1 - mu) * (before - after) / eta where eta > 0; flat buffers of the parameters."""
        for buffer, old, new, bucket, groups in zip(self.buffers, before, after, self._parameters, self._groups):
            changes = _pairs(old - new, bucket)
            for (part, _), (change, _), group in zip(_pairs(buffer, bucket), changes, groups):
                if group is not None and learning_rates[group] != 0.0:
                    part.mul_(self.mu).add_(change, alpha=(1.0 - self.mu) / learning_rates[group])


def _pairs(buffer: torch.Tensor, parameters: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return FlatTensors(parameters, widen=True, buffers=[buffer]).pairs
