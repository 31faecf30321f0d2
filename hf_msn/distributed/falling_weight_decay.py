"""Weight decay that falls as training goes on: codistillation regularises already."""

import dataclasses
from collections.abc import Callable, Sequence

import torch


def falling_factor(progress: float, factors: Sequence[float], fractions: Sequence[float]) -> float:
    """The factor at a progress in [0, 1]: `factors[0]` at first, `factors[i + 1]` from `fractions[i]` on."""
    return factors[sum(progress >= fraction for fraction in fractions)]


@dataclasses.dataclass(frozen=True)
class FallingWeightDecay:
    """A schedule for `weight_decay_schedule` of [`Codistillation`]: step -> factor of the initial weight decay.

    Replicas that learn from one another are regularised by that. With the weight decay of ordinary training they end
    about two points lower; the paper's image classifiers go from 1e-4 to 1e-5 to 0
    ([arXiv 2010.02838](https://arxiv.org/abs/2010.02838)), which are the factors here. When to do so is best tied to
    the learning rate: give the fractions at which that falls, if it does so in steps.

    Args:
        total_steps (`int`): Optimizer steps of the whole training, >= 1.
        factors (`tuple[float, ...]`, *optional*, defaults to `(1.0, 0.1, 0.0)`): Each >= 0, none above the last.
        fractions (`tuple[float, ...]`, *optional*, defaults to `(1 / 3, 2 / 3)`): Parts of the training after which
            the second factor, the third and so on hold; rising, in [0, 1], one fewer than factors.

    Raises:
        ValueError: If an argument is outside of its rule.
    """

    total_steps: int
    factors: tuple[float, ...] = (1.0, 0.1, 0.0)
    fractions: tuple[float, ...] = (1 / 3, 2 / 3)

    def __post_init__(self):
        if not isinstance(self.total_steps, int) or isinstance(self.total_steps, bool) or self.total_steps < 1:
            raise ValueError(
                "`total_steps` counts the optimizer steps of the whole training and must be an integer >= 1, but is "
                f"{self.total_steps!r}. With a Trainer it is `state.max_steps`."
            )
        falls = all(a >= b for a, b in zip(self.factors, self.factors[1:]))
        if not self.factors or not falls or not self.factors[-1] >= 0.0:
            raise ValueError(
                "`factors` of the initial weight decay must be >= 0 and never rise, but are "
                f"{self.factors!r}. The paper's are (1.0, 0.1, 0.0)."
            )
        rises = all(a < b for a, b in zip(self.fractions, self.fractions[1:]))
        if len(self.fractions) != len(self.factors) - 1 or not rises or not all(0 <= f <= 1 for f in self.fractions):
            raise ValueError(
                f"`fractions` must be {len(self.factors) - 1} rising numbers in [0, 1] for the {len(self.factors)} "
                f"factors, but are {self.fractions!r}. Give the part of training after which each next factor holds."
            )

    def __call__(self, step: int) -> float:
        """The factor for the update after `step` others."""
        return falling_factor(min(step / self.total_steps, 1.0), self.factors, self.fractions)


class ScheduledWeightDecay:
    """Sets the weight decay of an optimizer's groups to a factor of what it was in the beginning.

    Args:
        optimizer (`torch.optim.Optimizer`): With a `weight_decay` in each group.
        schedule (`Callable[[int], float]`, *optional*): Number of updates so far -> factor. `None` changes nothing.

    Attributes:
        initial (`list[float]`, *optional*): What each group began with; `None` before `begin`, or without a schedule.

    Raises:
        ValueError: If a group has no weight decay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float] | None):
        if schedule is not None and any("weight_decay" not in group for group in optimizer.param_groups):
            raise ValueError(
                "`weight_decay_schedule` needs an optimizer with a `weight_decay` in each of its groups, but "
                f"{type(optimizer).__name__} has a group without. Leave the schedule out, or use torch.optim.AdamW."
            )
        self._optimizer, self._schedule = optimizer, schedule
        self.initial: list[float] | None = None

    def begin(self, initial: Sequence[float] | None = None) -> None:
        """Takes `initial`, by default what the groups have now, for what they began with."""
        if self._schedule is not None:
            groups = self._optimizer.param_groups
            self.initial = [group["weight_decay"] for group in groups] if initial is None else list(initial)

    def set(self, step: int) -> None:
        """Before the update after `step` others."""
        if self.initial is None:
            return
        factor = self._schedule(step)
        for group, value in zip(self._optimizer.param_groups, self.initial):
            group["weight_decay"] = factor * value

    def end(self) -> None:
        """The groups have again what they began with."""
        for group, value in zip(self._optimizer.param_groups, self.initial or ()):
            group["weight_decay"] = value
        self.initial = None
