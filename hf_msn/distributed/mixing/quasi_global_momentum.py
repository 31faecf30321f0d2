"""Quasi-global momentum: momentum from what the mixed parameters did, instead of each rank's own gradients."""

from collections.abc import Iterable, Sequence

import torch


class QuasiGlobalMomentum:
    """The buffers mhat, and the two places in a step where they act ([`Gossip`] has the equations).

    Args:
        beta (`float`): Part of mhat in the gradient, in [0, 1).
        mu (`float`): Part of mhat that is kept, in [0, 1).

    Raises:
        ValueError: If one of the two is outside [0, 1).
    """

    def __init__(self, beta: float, mu: float):
        for name, value in (("beta", beta), ("mu", mu)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0.0 <= value < 1.0:
                raise ValueError(
                    "`quasi_global_momentum` is the part of the momentum that is kept, or the pair (beta, mu), and "
                    f"must be in [0, 1), but {name} is {value!r}. The paper uses 0.9."
                )
        self.beta, self.mu = float(beta), float(mu)
        self.buffers: list[torch.Tensor] = []
        self._parameters: list[list[tuple[torch.Tensor, int | None]]] = []

    @classmethod
    def from_setting(cls, setting: float | Sequence[float]) -> "QuasiGlobalMomentum":
        """From mu, which is beta too, or from the pair (beta, mu)."""
        if isinstance(setting, Sequence) and len(setting) == 2 and not isinstance(setting, str):
            return cls(*setting)
        return cls(setting, setting)

    @staticmethod
    def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
        """Refuses an optimizer whose step is not x - lr * gradient.

        Raises:
            ValueError: If it is not plain SGD.
        """
        problem = None
        if not isinstance(optimizer, torch.optim.SGD):
            problem = f"is a {type(optimizer).__name__}"
        else:
            for group in optimizer.param_groups:
                for name in ("momentum", "nesterov", "maximize"):
                    if group[name]:
                        problem = f"has {name}={group[name]!r}"
        if problem is not None:
            raise ValueError(
                "`quasi_global_momentum` takes the place of the optimizer's own momentum and needs torch.optim.SGD "
                f"with momentum=0, nesterov=False and maximize=False, but the optimizer {problem}. Give plain SGD, or "
                "leave `quasi_global_momentum` out."
            )

    def attach(self, parameters: list[list[tuple[torch.Tensor, int | None]]]) -> None:
        """Takes up parameters with the index of their group, bucket by bucket."""
        self._parameters = parameters

    def reset(self) -> None:
        """mhat = 0, in float32 for parameters of lower precision."""
        self.buffers = [
            torch.zeros(
                sum(p.numel() for p, _ in bucket),
                dtype=torch.promote_types(bucket[0][0].dtype, torch.float32),
                device=bucket[0][0].device,
            )
            for bucket in self._parameters
        ]

    @torch.no_grad()
    def add_to_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """gradient <- gradient + beta * mhat, for all that the optimizer steps on."""
        # Where a fused optimizer undoes the loss scale itself, the gradients still hold it.
        scale = getattr(optimizer, "grad_scale", None)
        factor = self.beta if scale is None else self.beta * scale
        for buffer, bucket in zip(self.buffers, self._parameters):
            parts = buffer.split([p.numel() for p, _ in bucket])
            for part, (parameter, group) in zip(parts, bucket):
                if group is None:
                    continue
                own = part.view_as(parameter) * factor
                if parameter.grad is not None:
                    parameter.grad.add_(own)
                elif bool(own.any()):
                    parameter.grad = own.to(parameter.dtype)

    @torch.no_grad()
    def update(
        self, before: Iterable[torch.Tensor], after: Iterable[torch.Tensor], learning_rates: list[float]
    ) -> None:
        """mhat <- mu * mhat + (1 - mu) * (x - x') / eta, where eta is not 0; buffers of the parameters, flat."""
        for buffer, old, new, bucket in zip(self.buffers, before, after, self._parameters):
            for group, start, end in _runs(bucket):
                if group is None or learning_rates[group] == 0.0:
                    continue
                moved = old[start:end].to(buffer.dtype) - new[start:end].to(buffer.dtype)
                buffer[start:end].mul_(self.mu).add_(moved, alpha=(1.0 - self.mu) / learning_rates[group])


def _runs(bucket: list[tuple[torch.Tensor, int | None]]) -> list[tuple[int | None, int, int]]:
    """Group, start and end of the stretches of a flat bucket that are of one parameter group."""
    runs: list[tuple[int | None, int, int]] = []
    end = 0
    for parameter, group in bucket:
        start, end = end, end + parameter.numel()
        if runs and runs[-1][0] == group:
            start = runs.pop()[1]
        runs.append((group, start, end))
    return runs
