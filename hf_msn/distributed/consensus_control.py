"""Consensus control: an estimate of how far the ranks are apart, and whether they should mix once more."""

import math
from collections.abc import Sequence

import torch

from ..checks import check_integer, check_number
from .comm.exchange import Exchange

_SAMPLE_SIZE = 4096  # 32 KiB on the wire


class ConsensusControl:
    """Ask for further mixings while the estimated consensus distance is over a target.

    [arXiv 2102.04828](https://arxiv.org/abs/2102.04828). See [`sampled_distance`] for the estimate.
    """

    def __init__(self, target: float | None, max_extra_rounds: int, until_step: int | None):
        if target is not None:
            meaning = "is the consensus distance over which another mixing follows"
            check_number("consensus_target", target, above=0.0, meaning=meaning)
        check_integer("max_extra_rounds", max_extra_rounds, meaning="counts further mixings per step")
        if until_step is not None:
            check_integer("consensus_until_step", until_step, meaning="counts optimizer steps with further mixings")
            if target is None:
                raise ValueError(
                    f"`consensus_until_step` needs a `consensus_target`, but is {until_step} without it. Set both or "
                    "none."
                )
        self.target, self.max_extra_rounds, self.until_step = target, max_extra_rounds, until_step
        self.sampled_distance: float | None = None

    def wants_more(
        self, extra_rounds: int, steps: int, parameters: Sequence[torch.Tensor], exchange: Exchange
    ) -> bool:
        """Return whether to mix again after `extra_rounds` at optimizer step `steps`; the same on all ranks."""
        if self.target is None or (self.until_step is not None and steps > self.until_step):
            return False
        self.sampled_distance = sampled_distance(parameters, exchange, steps)
        return self.sampled_distance > self.target and extra_rounds < self.max_extra_rounds


@torch.no_grad()
def sampled_distance(parameters: Sequence[torch.Tensor], exchange: Exchange, offset: int) -> float:
    """Estimate Xi = sqrt(mean_i ||x_i - xbar||^2) from the S of N coordinates with c = offset mod ceil(N / 4096).

        Xi^2 ~ N / S * 1/n sum_i sum_{c in S} (x_ic - xbar_c)^2

    It is exact for N <= 4096, else the standard deviation is about 2 % of Xi^2 for normal coordinates that are alike.
    All ranks get the same number, since each sums the ranks' distances in the same order. It sends at most
    8 * (4096 + n) bytes per rank in float32.
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
