"""Gossip: every rank mixes its parameters with those of a few peers, instead of all with all."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_integer, check_number
from .comm.exchange import Exchange
from .comm.flat import FlatTensors
from .comm.wire import checked_wire_dtype
from .peer_update import PeerUpdate
from .push_sum import check_state_size
from .quasi_global_momentum import QuasiGlobalMomentum
from .topology import ExponentialTopology, Topology, check_topology

_SAMPLE_SIZE = 4096  # 32 KiB on the wire


class Gossip(PeerUpdate):
    """Mix the parameters with those of the peers that a topology names, after every `sync_every` optimizer steps.

    With P the column-stochastic mixing matrix of the step, and d_i the change that the optimizer subtracts on rank i:

        push-sum (SGP)     z_i = x_i / w_i;  d_i from the gradient at z_i
                           x_i <- sum_j P_ij (x_j - d_j);  w_i <- sum_j P_ij w_j;  z_i <- x_i / w_i
        D-PSGD             x_i <- sum_j P_ij x_j - d_i

    SGP ([arXiv 1811.10792](https://arxiv.org/abs/1811.10792)) works with every topology, D-PSGD
    ([arXiv 1705.09056](https://arxiv.org/abs/1705.09056)) with doubly stochastic ones. A step without mixing, where
    `sync_every` > 1, has P = I. The model's parameters are z, except inside of `optimizer.step()`, which sees x:
    weight decay acts on x. While all matrices are doubly stochastic, as those of all topologies of this package, w
    stays 1; x is then not kept apart from z, and w is not sent.

    **Consensus.** `sync()` sets all ranks to the mean of x and w to 1. Optimizer moments and the momentum of
    `quasi_global_momentum` stay local with `base_buffers="maintain"`, the default. `"reset"` and `"average"` act at
    every mixing: use them in [`SlowMo`] instead.

    **Wire precision.** A sender keeps x minus all that it sent, which includes the rounding error of its messages. So
    rounding does not change the mean over the ranks, and the error returns with the next message (error feedback). The
    ranks differ by about the wire's precision until a `sync()`.

    **Quasi-global momentum** ([`QuasiGlobalMomentum`]) helps where the ranks' data differ. eta is the learning rate of
    each parameter group; with eta = 0 mhat stays. It is added to the gradients after clipping and after the averaging
    over `inner_group`.

    Parameters below float32 are mixed in float32 and rounded afterwards. Peers are summed in a fixed order, so runs
    repeat to the bit. On one rank gossip does nothing and warns, unless there is `quasi_global_momentum`. For memory
    and faults see docs/gossip.md.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        topology ([`Topology`], *optional*): Who sends to whom, in places of `group`; its step counts the mixings. By
            default [`ExponentialTopology`]: one peer, at another distance each time.
        push_sum (`bool`, *optional*, defaults to `True`): SGP; `False` is D-PSGD.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 1): Optimizer steps between two mixings.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`; by default the dtype of the parameters.
        quasi_global_momentum (`float` or pair of `float`, *optional*): mu, which is beta too, or (beta, mu); in
            [0, 1). Needs `torch.optim.SGD` without momentum. The paper: 0.9.
        consensus_target (`float`, *optional*): Mix again while the consensus distance, as [`sampled_distance`]
            estimates it, is over this; > 0 ([arXiv 2102.04828](https://arxiv.org/abs/2102.04828)). By default there
            are no extra mixings.
        max_extra_rounds (`int`, *optional*, defaults to 8): Largest number of extra mixings per step; >= 1.
        consensus_until_step (`int`, *optional*): Number of first optimizer steps with extra mixings, >= 1; under
            SlowMo counted from its `sync_start_step`. By default there is no end.
        kwargs: `sync_start_step`, `base_buffers`, `inner_group` and `timeout_seconds` of [`LocalUpdate`].

    Attributes:
        push_sum_weight (`float`): w of this rank.
        rounds (`int`): Mixings so far, the step of the topology.
        extra_rounds (`int`): Mixings because of `consensus_target`.
        sampled_distance (`float` or `None`): Last estimate of the consensus distance.

    Raises:
        ValueError: If the topology is for another number of ranks, or not doubly stochastic with `push_sum=False`
            (where it is not known in advance: at that step), if the optimizer is not plain SGD with
            `quasi_global_momentum`, if a setting is outside of its rule; and the errors of [`LocalUpdate`].
        PeerError: If a peer died or did not come before the deadline. It names the ranks that are furthest behind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        topology: Topology | None = None,
        push_sum: bool = True,
        group: dist.ProcessGroup | None = None,
        sync_every: int = 1,
        wire_dtype: str | None = None,
        quasi_global_momentum: float | Sequence[float] | None = None,
        consensus_target: float | None = None,
        max_extra_rounds: int = 8,
        consensus_until_step: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, optimizer, sync_every=sync_every, group=group, **kwargs)
        self.push_sum = push_sum
        self.topology = ExponentialTopology(self._exchange.size) if topology is None else topology
        check_topology(self.topology, self._exchange.size, must_pair=False)
        self._stays_regular = self.topology.is_doubly_stochastic
        if not push_sum and not self._stays_regular:
            for step in range(self.topology.period or 0):
                self._require_doubly_stochastic(step)
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._momentum = None
        if quasi_global_momentum is not None:
            self._momentum = QuasiGlobalMomentum(quasi_global_momentum, self.optimizer)
        if consensus_target is not None:
            meaning = "is the consensus distance over which another mixing follows"
            check_number("consensus_target", consensus_target, above=0.0, meaning=meaning)
        check_integer("max_extra_rounds", max_extra_rounds, meaning="counts further mixings per step")
        if consensus_until_step is not None:
            meaning = "counts optimizer steps with further mixings"
            check_integer("consensus_until_step", consensus_until_step, meaning=meaning)
            if consensus_target is None:
                raise ValueError(
                    f"`consensus_until_step` needs a `consensus_target`, but is {consensus_until_step} without it. "
                    "Set both or none."
                )
        self.consensus_target, self.max_extra_rounds = consensus_target, max_extra_rounds
        self.consensus_until_step = consensus_until_step
        self._before: list[torch.Tensor] | None = None  # x before the step
        self._holds_numerators = False  # whether the parameters are x, inside of a step
        self._reset()

    def _require_doubly_stochastic(self, step: int) -> None:
        if not self.topology.is_doubly_stochastic_at(step):
            rows = [round(row, 4) for row in self.topology.mixing_matrix(step).sum(1).tolist()]
            raise ValueError(
                "With `push_sum=False` the rows of every mixing matrix must sum to 1, but those of "
                f"{self.topology!r} sum to {rows} at step {step}. Use `push_sum=True`, which takes every topology, or "
                "one that is doubly stochastic, such as RingTopology."
            )

    def _reset(self) -> None:
        self.rounds = self.extra_rounds = 0
        self.push_sum_weight = 1.0
        self.sampled_distance: float | None = None
        # x of each bucket while some rank's w is not 1; None while x is z.
        self._numerators: list[torch.Tensor] | None = None

    @property
    def _acts_alone(self) -> bool:
        return self._momentum is not None

    def _attach(self) -> None:
        super()._attach()
        self._before, self._holds_numerators = None, False
        if self._momentum is not None:
            self._momentum.attach([[self._parameters[i][1:] for i in bucket] for bucket in self._buckets])

    def _detach(self) -> None:
        super()._detach()
        self._before = None

    @torch.no_grad()
    def _begin_local_steps(self) -> None:
        self._reset()
        if self._momentum is not None:
            self._momentum.reset()

    @torch.no_grad()
    def _before_local_step(self) -> None:
        # Once only, should the optimizer step twice before `step()`.
        if self._before is None and not self._holds_numerators:
            ends_period = self.local_steps + 1 == self.sync_every
            if self._momentum is not None or (not self.push_sum and ends_period):
                self._before = self._copies()
            if self._numerators is not None:
                self._before_mean()
                self._holds_numerators = True
        if self._momentum is not None:
            self._momentum.add_to_gradients(self.optimizer)

    @torch.no_grad()
    def _after_local_step(self) -> None:
        if self._holds_numerators:
            for flat in self._flat_numerators():
                flat.copy_in()
                flat.copy_back(self.push_sum_weight)
            self._holds_numerators = False
        if self.local_steps < self.sync_every:
            self._end_step()

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        if self._exchange.size > 1:
            with self._announced_failure():
                self._mix(self._before)
                before = self.rounds
                while self._is_far_apart() and self.rounds - before < self.max_extra_rounds:
                    self._mix(None)
                self.extra_rounds += self.rounds - before
        self._end_step()

    def _is_far_apart(self) -> bool:
        """Return whether the estimated consensus distance is over the target; the same on all ranks."""
        is_over = self.consensus_until_step is not None and self.steps > self.consensus_until_step
        if self.consensus_target is None or is_over:
            return False
        self.sampled_distance = sampled_distance([p for _, p, _ in self._parameters], self._exchange, self.steps)
        return self.sampled_distance > self.consensus_target

    def _end_step(self) -> None:
        if self._momentum is not None and self._before is not None:
            self._momentum.update(self._before, self._copies(), self._learning_rates)
        self._before = None

    def _mix(self, before: list[torch.Tensor] | None) -> None:
        """Mix x once: x - d with push-sum, x `before` the step with D-PSGD; an extra round has no `before`."""
        step = self.rounds
        self.rounds += 1
        if not self._stays_regular and not self.topology.is_doubly_stochastic_at(step):
            if not self.push_sum:
                self._require_doubly_stochastic(step)
            if self._numerators is None:
                self._numerators = self._copies()
        to, sources = self._peers_of(step)
        if self._numerators is not None:
            weight = torch.tensor([self.push_sum_weight], dtype=torch.float64, device=self._device)
            for index, x in enumerate(self._numerators):
                self._mix_bucket(index, [x, weight] if index == 0 else [x], to, sources)
            self.push_sum_weight = weight.item()
            for flat in self._flat_numerators():
                flat.copy_back(self.push_sum_weight)
            return
        for index, bucket in enumerate(self._bucket_tensors()):
            flat = FlatTensors(bucket, widen=True)
            [x] = flat.copy_in()
            if self.push_sum or before is None:
                self._mix_bucket(index, [x], to, sources)
            else:
                x.sub_(before[index])
                mixed = before[index] if self._momentum is None else before[index].clone()
                self._mix_bucket(index, [mixed], to, sources)
                x.add_(mixed)
            flat.copy_back()

    def _mix_bucket(self, index: int, tensors: list[torch.Tensor], to: list[int], sources: list[int]) -> None:
        """x <- P_ii x + sum_j P_ij x_j for x of a bucket (and w after it), in place, with P_ji = 1 / (peers + 1)."""
        wire_dtype = self._wire_dtype or self._parameters[self._buckets[index][0]][1].dtype.to_real()
        shares = [(t / (len(to) + 1)).to(dtype) for t, dtype in zip(tensors, [wire_dtype, torch.float64])]
        received = {source: [torch.empty_like(share) for share in shares] for source in sources}
        self._exchange.send_and_receive(dict.fromkeys(to, shares), received)
        for place, t in enumerate(tensors):
            # The rest, instead of one more share, keeps the rounding errors of the wire.
            t.sub_(shares[place], alpha=len(to))
            for source in sources:
                t.add_(received[source][place])

    def _before_mean(self) -> None:
        for flat in self._flat_numerators():
            flat.copy_back()

    def _after_mean(self) -> None:
        self._numerators, self.push_sum_weight = None, 1.0

    @torch.no_grad()
    def _after_change(self) -> None:
        for flat in self._flat_numerators():
            flat.copy_in()[0].mul_(self.push_sum_weight)

    def _copies(self) -> list[torch.Tensor]:
        """Return the parameters of each bucket in a new flat buffer."""
        return [FlatTensors(bucket, widen=True).copy_in()[0] for bucket in self._bucket_tensors()]

    def _flat_numerators(self) -> list[FlatTensors]:
        pairs = zip(self._bucket_tensors(), self._numerators or [])
        return [FlatTensors(bucket, widen=True, buffers=[x]) for bucket, x in pairs]

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "push_sum": self.push_sum,
            "wire_dtype": self.wire_dtype,
            "consensus control": (self.consensus_target, self.max_extra_rounds, self.consensus_until_step),
            "quasi_global_momentum": self._momentum and (self._momentum.beta, self._momentum.mu),
            "topology": self.topology.description(),
        }

    def _method_state(self) -> dict[str, Any]:
        return {
            "push_sum": self.push_sum,
            "rounds": self.rounds,
            "extra_rounds": self.extra_rounds,
            "push_sum_weight": self.push_sum_weight,
            "numerators": self._numerators and [x.clone() for x in self._numerators],
            "quasi_global_momentum": self._momentum and [m.clone() for m in self._momentum.buffers],
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        here = (self.push_sum, self._momentum is not None)
        saved = (state["push_sum"], state["quasi_global_momentum"] is not None)
        if here != saved:
            raise ValueError(
                "A state of Gossip must be loaded with the settings that it was saved with, here (push_sum, "
                f"quasi_global_momentum) = {here}, but has {saved}. Use the same settings."
            )
        for name in ("numerators", "quasi_global_momentum"):
            check_state_size(f"A state of {type(self).__name__}", name, state[name], self.model, self.optimizer)
        self._reset()
        for name in ("rounds", "extra_rounds", "push_sum_weight"):
            setattr(self, name, state[name])
        if state["numerators"] is not None:
            self._numerators = [x.to(self._device, copy=True) for x in state["numerators"]]
        if self._momentum is not None:
            self._momentum.buffers = [m.to(self._device, copy=True) for m in state["quasi_global_momentum"]]


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
