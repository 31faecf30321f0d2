"""A weight decay that falls during training, for codistillation."""

import dataclasses

from ..checks import check_integer


@dataclasses.dataclass(frozen=True)
class FallingWeightDecay:
    """Schedule for `weight_decay_schedule` of [`Codistillation`]: number of updates -> factor of the weight decay.

    Codistillation regularises. With the weight decay of ordinary training the replicas end about two points lower; the
    paper ([arXiv 2010.02838](https://arxiv.org/abs/2010.02838)) takes image classifiers from 1e-4 to 1e-5 to 0, which
    are the default factors. Let it fall together with the learning rate, if that falls in steps.

    Args:
        total_steps (`int`): Number of updates of the whole training, >= 1.
        factors (`tuple[float, ...]`, *optional*, defaults to `(1.0, 0.1, 0.0)`): Factors >= 0, each at most the one
            before.
        fractions (`tuple[float, ...]`, *optional*, defaults to `(1 / 3, 2 / 3)`): Fractions of the training at which
            the next factor begins; rising, in [0, 1], one fewer than factors.

    Raises:
        ValueError: If an argument is outside of its rule.
    """

    total_steps: int
    factors: tuple[float, ...] = (1.0, 0.1, 0.0)
    fractions: tuple[float, ...] = (1 / 3, 2 / 3)

    def __post_init__(self):
        check_integer("total_steps", self.total_steps, meaning="counts the updates of the whole training")
        falls = all(a >= b for a, b in zip(self.factors, self.factors[1:]))
        if not self.factors or not falls or not self.factors[-1] >= 0.0:
            raise ValueError(
                f"`factors` must be >= 0 and never rise, but are {self.factors!r}. The paper uses (1.0, 0.1, 0.0)."
            )
        rises = all(a < b for a, b in zip(self.fractions, self.fractions[1:]))
        if len(self.fractions) != len(self.factors) - 1 or not rises or not all(0 <= f <= 1 for f in self.fractions):
            raise ValueError(
                f"`fractions` must be {len(self.factors) - 1} rising numbers in [0, 1], one fewer than `factors`, but "
                f"are {self.fractions!r}."
            )

    def __call__(self, step: int) -> float:
        """Return the factor after `step` updates."""
        return self.factors[sum(step / self.total_steps >= fraction for fraction in self.fractions)]
