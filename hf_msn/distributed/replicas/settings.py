"""The settings of codistillation, their rules, and what they mean at a step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from ..comm.wire import checked_wire_dtype
from .distances import PredictionDistance

_COPIES_DTYPES = {None: None, "bfloat16": torch.bfloat16}
_PROBED_STEPS = (0, 1, 10, 100, 1000, 10000)  # after the burn-in; at which alpha must be the same on all ranks


@dataclasses.dataclass(frozen=True)
class CodistillationSettings:
    """What [`Codistillation`] is given under the same names, where each is explained.

    Raises:
        ValueError: If one is outside of its rule, or two do not go together.
    """

    exchange: str
    exchange_every: int
    transfer_steps: int | None
    alpha: float | Callable[[int], float]
    ramp_steps: int
    burn_in_steps: int
    check_every: int
    wire_dtype: str | None
    copies_dtype: str | None
    copies_device: str | None
    on_lost_replica: str

    def __post_init__(self):
        _require_one_of("exchange", self.exchange, ("predictions", "checkpoints"), "what replicas send to each other")
        _require_one_of("on_lost_replica", self.on_lost_replica, ("raise", "continue"), "what the others do then")
        _require_one_of("copies_dtype", self.copies_dtype, tuple(_COPIES_DTYPES), "the precision of copies")
        _require_one_of("copies_device", self.copies_device, (None, "cpu"), "where copies rest")
        _require_count(
            "exchange_every", self.exchange_every, 1, "updates between two checkpoints", "The paper's: 2500."
        )
        _require_count("ramp_steps", self.ramp_steps, 0, "updates over which alpha rises", "Give 0 for no ramp.")
        _require_count("burn_in_steps", self.burn_in_steps, 0, "first updates without exchange", "Give 0 for none.")
        _require_count("check_every", self.check_every, 1, "exchanges per comparison of batches", "Give 1 for each.")
        if self.transfer_steps is None:
            object.__setattr__(self, "transfer_steps", self.exchange_every // 10)
        _require_count(
            "transfer_steps", self.transfer_steps, 0, "updates until a checkpoint is used", "0 waits for it."
        )
        if self.transfer_steps > self.exchange_every:
            raise ValueError(
                "`transfer_steps` must not be above `exchange_every`, or two checkpoints would be under way, but is "
                f"{self.transfer_steps} with `exchange_every={self.exchange_every}`. A tenth of it is the default."
            )
        if not callable(self.alpha):
            _require_alpha(self.alpha)
        checked_wire_dtype(self.wire_dtype)
        if self.exchange == "checkpoints" and self.wire_dtype is not None:
            raise ValueError(
                f"`wire_dtype` is of predictions that travel and must be None with `exchange='checkpoints'`, but is "
                f"{self.wire_dtype!r}. `copies_dtype='bfloat16'` halves the bytes of checkpoints."
            )

    def check_distance(self, distance: PredictionDistance) -> None:
        """Refuses a distance that does not go with the exchange.

        Raises:
            ValueError: For `top_k` with checkpoints.
        """
        if self.exchange == "checkpoints" and distance.top_k is not None:
            raise ValueError(
                "`top_k` is of predictions that travel and must be None with `exchange='checkpoints'`, but is "
                f"{distance.top_k}. Copies give all of their predictions for nothing: leave it out."
            )

    @property
    def tolerant(self) -> bool:
        """Whether to go on without lost replicas."""
        return self.on_lost_replica == "continue"

    @property
    def dtype_of_copies(self) -> torch.dtype | None:
        return _COPIES_DTYPES[self.copies_dtype]

    @property
    def device_of_copies(self) -> torch.device | None:
        return None if self.copies_device is None else torch.device(self.copies_device)

    @property
    def dtype_of_wire(self) -> torch.dtype | None:
        return checked_wire_dtype(self.wire_dtype)

    def alpha_at(self, step: int) -> float:
        """alpha_k for the update after `step` others."""
        if step < self.burn_in_steps:
            return 0.0
        alpha = self.alpha(step) if callable(self.alpha) else self.alpha
        _require_alpha(alpha)
        return float(alpha) * (min(1.0, (step - self.burn_in_steps) / self.ramp_steps) if self.ramp_steps else 1.0)

    def is_snapshot_step(self, step: int) -> bool:
        """Whether checkpoints are sent after that many updates: not before the first one, which has seen nothing."""
        if self.exchange != "checkpoints" or self.alpha == 0.0 or step < max(self.burn_in_steps, 1):
            return False
        return (step - self.burn_in_steps) % self.exchange_every == 0

    def steps_under_way(self, step: int) -> list[int]:
        """The steps of the checkpoints that have been sent after `step` updates and are not in use yet."""
        steps = range(max(step - self.transfer_steps + 1, 0), step + 1)
        return [sent for sent in steps if self.is_snapshot_step(sent)]

    def lines(self) -> list[str]:
        """What must be the same on all ranks, one in a line."""
        return [f"setting {name}={value}" for name, value in self.described().items()]

    def described(self) -> dict[str, str]:
        """The same by name, as text."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["alpha"] = [self.alpha_at(self.burn_in_steps + step) for step in _PROBED_STEPS]
        # Where copies rest is each rank's own affair.
        return {name: repr(value) for name, value in values.items() if name != "copies_device"}


def _require_one_of(name: str, value: Any, choices: tuple, meaning: str) -> None:
    if not isinstance(value, (str, type(None))) or value not in choices:
        listed = " or ".join(map(repr, choices))
        raise ValueError(f"`{name}` says {meaning} and must be {listed}, but is {value!r}. Give one of them.")


def _require_count(name: str, value: Any, least: int, meaning: str, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` counts {meaning} and must be an integer >= {least}, but is {value!r}. {remedy}")


def _require_alpha(alpha: Any) -> None:
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not (alpha >= 0.0 and math.isfinite(alpha)):
        raise ValueError(
            "`alpha` is the weight of the distance from the other replicas and must be a number >= 0, but is "
            f"{alpha!r}. The default is 1.0; 0.0 trains the replicas apart."
        )
