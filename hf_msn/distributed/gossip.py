"""Gossip: every rank mixes its parameters with those of a few peers, instead of all with all."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.flat import FlatTensors
from .comm.peer_exchange import PeerExchange
from .comm.wire import checked_wire_dtype
from .local_training.training_state import trainable_parameters
from .local_update import LocalUpdate
from .mixing.consensus_control import ConsensusControl
from .mixing.quasi_global_momentum import QuasiGlobalMomentum
from .topology import ExponentialTopology, Topology


class Gossip(LocalUpdate):
    """Mixes the parameters with those of the peers that a topology names, after every `sync_every` optimizer steps.

    With P the step's column-stochastic mixing matrix, and d_i what the optimizer's step subtracts on rank i:

        push-sum (SGP)     z_i = x_i / w_i;  d_i from the gradient at z_i
                           x_i <- sum_j P_ij (x_j - d_j);  w_i <- sum_j P_ij w_j;  z_i <- x_i / w_i
        D-PSGD             x_i <- sum_j P_ij x_j - d_i

    SGP is [arXiv 1811.10792](https://arxiv.org/abs/1811.10792) and takes every topology, D-PSGD
    ([arXiv 1705.09056](https://arxiv.org/abs/1705.09056)) only doubly stochastic ones. A step without mixing, where
    `sync_every` > 1, has P = I. The model's parameters are z at all times but inside of `optimizer.step()`, which
    sees x: a weight decay takes its part of x, which is w times that of z. As long as all w are 1 and the matrix is
    doubly stochastic, as those of all topologies of this package are, w stays 1: x is not kept apart and w not sent.

    **Consensus.** `sync()` is the mean of the x, to which all ranks contributed alike, and w is 1 again. Optimizer
    moments, and that of `quasi_global_momentum`, stay each rank's own with `base_buffers="maintain"`, the default;
    `"reset"` and `"average"` act at every mixing, so use them under [`SlowMo`] rather than here.

    **Wire precision.** What is rounded off for the wire stays with the sender: its own share is x minus all that it
    sent. So the mean over the ranks is kept as without rounding, and the error comes back with the next message
    (error feedback). The ranks still differ by about the wire's precision until a `sync()`.

    **Quasi-global momentum** ([arXiv 2102.04761](https://arxiv.org/abs/2102.04761)) helps where the ranks' data
    differ, also on one rank. eta is the learning rate of each parameter group; with eta = 0 mhat stays. The momentum
    is added to the gradients after a clipping, and after an inner group's averaging:

        m = beta * mhat + g;   x' from mixing x - eta * m;   mhat <- mu * mhat + (1 - mu) * (x - x') / eta

    **Consensus control** ([arXiv 2102.04828](https://arxiv.org/abs/2102.04828)): after a mixing, further ones follow
    while Xi = sqrt(mean_i ||x_i - xbar||^2) is over `consensus_target`. Xi is estimated from S of the N coordinates,
    every ceil(N / 4096)-th, other ones at each optimizer step:

        Xi^2 ~ N / S * 1/n sum_i sum_{c in S} (x_ic - xbar_c)^2

    which is exact for N <= 4096; the standard deviation is about 2 % of Xi^2 for normal coordinates that are alike. An
    estimate sends at most 8 * (4096 + n) bytes from each rank in float32: the mean of the sample, and the ranks'
    distances, which all ranks sum in the same order, so that they decide alike.

    **Memory and bytes.** A mixing needs, beside the model, one bucket of 32 MiB (or the largest parameter) for x, one
    for what is sent and one for each peer heard. x apart from z, x before the step (D-PSGD, `quasi_global_momentum`)
    and mhat cost the size of the trainable parameters each. Each peer sent to costs the trainable parameters in
    `wire_dtype`, and 8 bytes for w where it is sent. Peers are summed in a fixed order: a run repeats to the bit.
    Parameters below float32 are mixed in float32 and rounded after it, where they lose mass by their own precision.

    On one rank it is a no-op and says so, unless there is `quasi_global_momentum`.

    Example:

    ```python
    with Gossip(model, optimizer, topology=ExponentialTopology(dist.get_world_size())) as sync:
        ...
        optimizer.step()
        sync.step()
    ```

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        topology ([`Topology`], *optional*): Who sends to whom, in places of `group`; its step counts the mixings. By
            default [`ExponentialTopology`]: one peer, at another distance each time.
        push_sum (`bool`, *optional*, defaults to `True`): SGP; `False` is D-PSGD.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 1): Optimizer steps between two mixings.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`; by default that of the parameters.
        quasi_global_momentum (`float` or pair of `float`, *optional*): mu, which is beta too, or (beta, mu); in
            [0, 1). Needs `torch.optim.SGD` without momentum. The paper: 0.9.
        consensus_target (`float`, *optional*): > 0. By default there are no extra mixings.
        max_extra_rounds (`int`, *optional*, defaults to 8): Extra mixings after one step, at most; >= 1.
        consensus_until_step (`int`, *optional*): Number of first optimizer steps with extra mixings (>= 1; with SlowMo
            and a `sync_start_step` counted from there); the paper finds them worth it early in training. By default
            there is no end.
        kwargs: `sync_start_step`, `base_buffers`, `inner_group` and `timeout_seconds` of [`LocalUpdate`].

    Attributes:
        push_sum_weight (`float`): w of this rank.
        rounds (`int`): Mixings so far, the step of the topology.
        extra_rounds (`int`): Those of them that `consensus_target` asked for.
        sampled_distance (`float` or `None`): The last estimate of Xi.

    Raises:
        ValueError: If the topology is for another number of ranks, or not doubly stochastic with `push_sum=False`
            (where it is not known in advance: at that step), if the optimizer is not plain SGD with
            `quasi_global_momentum`, if a setting is outside of its rule; and what [`LocalUpdate`] raises.
        PeerError: If a peer died or did not come before the deadline. Named are the ranks that are furthest behind.
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
        self._exchange = PeerExchange(group, self._exchange.timeout_seconds)
        self.push_sum = push_sum
        if topology is None:
            topology = ExponentialTopology(self._exchange.size)
        self.topology = topology
        self._check_topology()
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._momentum = None
        if quasi_global_momentum is not None:
            self._momentum = QuasiGlobalMomentum.from_setting(quasi_global_momentum)
            self._momentum.check_optimizer(self.optimizer)
        self._control = ConsensusControl(consensus_target, max_extra_rounds, consensus_until_step)
        self._before: list[torch.Tensor] | None = None
        self._holds_numerators = False
        self._start_anew()

    def _check_topology(self) -> None:
        n = self._exchange.size
        if not isinstance(self.topology, Topology) or self.topology.world_size != n:
            raise ValueError(
                f"`topology` must be a Topology for the {n} ranks of the group, but is {self.topology!r}. Make it "
                f"with `world_size={n}`, or leave it out."
            )
        self._stays_regular = self.topology.is_doubly_stochastic
        if not self.push_sum and not self._stays_regular and self.topology.period is not None:
            step = next(s for s in range(self.topology.period) if not self.topology.is_doubly_stochastic_at(s))
            raise self._not_doubly_stochastic(step)

    def _not_doubly_stochastic(self, step: int) -> ValueError:
        rows = [round(row, 4) for row in self.topology.mixing_matrix(step).sum(1).tolist()]
        return ValueError(
            "With `push_sum=False` the rows of every mixing matrix must sum to 1, but those of "
            f"{self.topology!r} sum to {rows} at step {step}. Give `push_sum=True`, which takes every topology, or "
            "one that is doubly stochastic, such as RingTopology."
        )

    def _start_anew(self) -> None:
        self.rounds = self.extra_rounds = 0
        self.push_sum_weight = 1.0
        self._control.sampled_distance = None
        # x of each bucket while some rank's w is not 1; None while x is z.
        self._numerators: list[torch.Tensor] | None = None

    @property
    def sampled_distance(self) -> float | None:
        """The last estimate of the consensus distance that `consensus_target` asked for."""
        return self._control.sampled_distance

    def start(self) -> "Gossip":
        if all(exchange.size == 1 for exchange in self._exchanges) and self._momentum is None:
            warnings.warn("Gossip has one rank only: it trains as without it.", stacklevel=2)
        return super().start()

    def _attach(self) -> None:
        super()._attach()
        self._exchange.connect()
        self._before, self._holds_numerators = None, False
        if self._momentum is not None:
            self._momentum.attach([[self._parameters[i][1:] for i in bucket] for bucket in self._buckets])

    def _detach(self) -> None:
        super()._detach()
        self._before = None

    @torch.no_grad()
    def _begin_local_steps(self) -> None:
        self._start_anew()
        self.local_steps = 0
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
            for index in range(len(self._buckets)):
                self._numerators[index] = self._copy(index)
            self._holds_numerators = False
            self._write_quotients()
        if self.local_steps < self.sync_every:
            self._end_step()

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        if self._exchange.size > 1:
            self._mix(self._before)
            parameters = [p for _, p, _ in self._parameters]
            before = self.rounds
            while self._control.wants_more(self.rounds - before, self.steps, parameters, self._exchange):
                self._mix(None)
            self.extra_rounds += self.rounds - before
        self._end_step()

    def _end_step(self) -> None:
        if self._momentum is not None and self._before is not None:
            now = (self._copy(index) for index in range(len(self._buckets)))
            self._momentum.update(self._before, now, self._learning_rates)
        self._before = None

    def _mix(self, before: list[torch.Tensor] | None) -> None:
        """One round; of what the parameters were `before` the step for D-PSGD, where that is not `None`."""
        step, rank = self.rounds, self._exchange.rank
        self.rounds += 1
        if not self._stays_regular and not self.topology.is_doubly_stochastic_at(step):
            if not self.push_sum:
                raise self._not_doubly_stochastic(step)
            if self._numerators is None:
                self._numerators = self._copies()
        to, sources = self.topology.out_peers(rank, step), sorted(self.topology.in_peers(rank, step))
        if self._numerators is not None:
            weight = torch.tensor([self.push_sum_weight], dtype=torch.float64, device=self._device)
            for index, x in enumerate(self._numerators):
                self._mix_bucket(index, [x, weight] if index == 0 else [x], to, sources)
            self.push_sum_weight = weight.item()
            self._write_quotients()
            return
        for index in range(len(self._buckets)):
            x = self._copy(index)
            if self.push_sum or before is None:
                self._mix_bucket(index, [x], to, sources)
            else:
                x.sub_(before[index])
                mixed = before[index] if self._momentum is None else before[index].clone()
                self._mix_bucket(index, [mixed], to, sources)
                x.add_(mixed)
            self._write(index, x)

    def _mix_bucket(self, index: int, tensors: list[torch.Tensor], to: list[int], sources: list[int]) -> None:
        """x <- P_ii x + sum_j P_ij x_j for a bucket's buffer (and w behind it), in place."""
        x, *weight = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        wire_dtype = self._wire_dtype or self._parameters[self._buckets[index][0]][1].dtype.to_real()
        shares = [(t / (len(to) + 1)).to(dtype) for t, dtype in zip([x, *weight], [wire_dtype, torch.float64])]
        received = {source: [torch.empty_like(share) for share in shares] for source in sources}
        self._exchange.send_and_receive(dict.fromkeys(to, shares), received)
        for place, t in enumerate([x, *weight]):
            # What is left, and not one more share: nothing gets lost to the wire's precision.
            t.sub_(shares[place], alpha=len(to))
            for source in sources:
                t.add_(received[source][place])

    def _before_mean(self) -> None:
        for index, x in enumerate(self._numerators or []):
            self._write(index, x)

    def _after_mean(self) -> None:
        self._numerators, self.push_sum_weight = None, 1.0

    @torch.no_grad()
    def _after_change(self) -> None:
        if self._numerators is not None:
            self._numerators = [z.mul_(self.push_sum_weight) for z in self._copies()]

    def _write_quotients(self) -> None:
        for index, x in enumerate(self._numerators):
            self._write(index, x / self.push_sum_weight)

    def _copy(self, index: int) -> torch.Tensor:
        """A bucket's parameters in a new flat buffer, at least in float32."""
        [buffer] = FlatTensors(self._bucket_tensors()[index]).copy_in()
        return buffer.to(torch.promote_types(buffer.dtype, torch.float32))

    def _copies(self) -> list[torch.Tensor]:
        return [self._copy(index) for index in range(len(self._buckets))]

    @torch.no_grad()
    def _write(self, index: int, buffer: torch.Tensor) -> None:
        """Into the parameters of a bucket."""
        bucket = self._bucket_tensors()[index]
        parts = buffer.split([p.numel() for p in bucket])
        torch._foreach_copy_(bucket, [part.view(p.shape) for part, p in zip(parts, bucket)])

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "push_sum": self.push_sum,
            "wire_dtype": self.wire_dtype,
            "consensus control": (self._control.target, self._control.max_extra_rounds, self._control.until_step),
            "quasi_global_momentum": self._momentum and (self._momentum.beta, self._momentum.mu),
            "topology": self.topology.description(),
        }

    def _method_state(self) -> dict[str, Any]:
        return {
            "push_sum": self.push_sum,
            "rounds": self.rounds,
            "extra_rounds": self.extra_rounds,
            "push_sum_weight": self.push_sum_weight,
            "numerators": None if self._numerators is None else [x.clone() for x in self._numerators],
            "quasi_global_momentum": None if self._momentum is None else [m.clone() for m in self._momentum.buffers],
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        here = (self.push_sum, self._momentum is not None)
        saved = (state["push_sum"], state["quasi_global_momentum"] is not None)
        if here != saved:
            raise ValueError(
                "A state of Gossip must have been saved with the same method, here (push_sum, quasi_global_momentum) "
                f"= {here}, but has {saved}. Give the settings that it was saved with."
            )
        self._check_sizes(state)
        device = next(p for group in self.optimizer.param_groups for p in group["params"]).device
        self._start_anew()
        for name in ("rounds", "extra_rounds", "push_sum_weight"):
            setattr(self, name, state[name])
        if state["numerators"] is not None:
            self._numerators = [x.to(device, copy=True) for x in state["numerators"]]
        if self._momentum is not None:
            self._momentum.buffers = [m.to(device, copy=True) for m in state["quasi_global_momentum"]]

    def _check_sizes(self, state: dict[str, Any]) -> None:
        need = sum(p.numel() for _, p, _ in trainable_parameters(self.model, self.optimizer))
        for name in ("numerators", "quasi_global_momentum"):
            have = sum(buffer.numel() for buffer in state[name] or [])
            if state[name] and have != need:
                raise ValueError(
                    f"A state of Gossip must hold {name} of every trainable parameter, here {need} numbers, but holds "
                    f"{have}. Load the state of the same model with the same parameters frozen."
                )
