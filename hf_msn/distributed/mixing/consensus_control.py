"""Consensus control: how far apart the ranks are, estimated cheaply, and whether they should mix more."""

import math
from collections.abc import Sequence

import torch

from ...checks import check_integer
from ..comm.exchange import Exchange

_SAMPLE_SIZE = 4096  # 32 KiB on the wire


class ConsensusControl:
    """Says after which mixings a further one follows. [`Gossip`] has the estimate and the arguments.

    Attributes:
        sampled_distance (`float` or `None`): The last estimate.

    Raises:
        ValueError: If a setting is outside of its rule.
    """

    def __init__(self, target: float | None, max_extra_rounds: int, until_step: int | None):
        is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
        if target is not None and not (is_number and 0.0 < target < math.inf):
            raise ValueError(
                "`consensus_target` is the consensus distance over which more rounds follow and must be finite and "
                f"> 0, but is {target!r}. See `consensus_distance()` of a run without it, or leave it out."
            )
        if until_step is not None and target is None:
            raise ValueError(
                "`consensus_until_step` says how long `consensus_target` holds and needs one, but is "
                f"{until_step!r} without it. Give both or none."
            )
        self.target = target
        self.max_extra_rounds = check_integer(
            "max_extra_rounds", max_extra_rounds, meaning="is the number of further mixings after one step"
        )
        self.until_step = until_step
        if until_step is not None:
            self.until_step = check_integer(
                "consensus_until_step", until_step, meaning="counts the optimizer steps with further mixings"
            )
        self.sampled_distance: float | None = None

    def wants_more(
        self, extra_rounds: int, steps: int, parameters: Sequence[torch.Tensor], exchange: Exchange
    ) -> bool:
        """Whether to mix again after `extra_rounds` extra mixings at optimizer step `steps`, alike on all ranks."""
        if self.target is None or (self.until_step is not None and steps > self.until_step):
            return False
        self.sampled_distance = sampled_distance(parameters, exchange, steps)
        return self.sampled_distance > self.target and extra_rounds < self.max_extra_rounds


@torch.no_grad()
def sampled_distance(parameters: Sequence[torch.Tensor], exchange: Exchange, offset: int) -> float:
    """The estimate of sqrt(mean_i ||x_i - xbar||^2), the same number on all ranks; exact up to 4096 coordinates.

    Args:
        parameters (`Sequence[torch.Tensor]`): This rank's, N numbers.
        exchange ([`Exchange`]): The ranks i.
        offset (`int`): Which of the ceil(N / 4096) samples to take; any number.
    """
    tensors = [torch.view_as_real(p) if p.is_complex() else p for p in parameters]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    total = sum(t.numel() for t in tensors)
    stride = math.ceil(total / _SAMPLE_SIZE)
    parts, first = [], offset % stride
    for t in tensors:
        parts.append(t.reshape(-1)[first::stride].to(dtype))
        first = (first - t.numel()) % stride
    own = torch.cat(parts)
    mean = own.clone()
    exchange.mean_([mean])
    squared = (own - mean).double().square().sum() * (total / own.numel())
    of_all = squared.new_empty(exchange.size)
    exchange.gather_(of_all, squared.view(1))
    return of_all.mean().sqrt().item()
