"""SlowMo: momentum over the averages of local training."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_number
from .comm.flat import FlatTensors
from .local_sgd import LocalSGD
from .local_update import LocalUpdate
from .training_state import local


class SlowMo(LocalSGD):
    """Take a step of slow momentum along the average of the local steps, every `sync_every` optimizer steps.

        v <- beta * (gamma_t / gamma_prev) * v + (x0 - xbar),    xbar = mean_i x_i
        x <- x0 - alpha * v;    x0 <- x

    [arXiv 1910.00643](https://arxiv.org/abs/1910.00643), where v is the paper's gamma * u, which avoids a division by
    a learning rate of 0. The anchor x0 holds the parameters before the first local step (after entering has made the
    ranks equal, or at `sync_start_step`); v is 0 at first. gamma_t is the learning rate of the last local step of the
    period, per parameter group (1 for parameters outside of the optimizer), and gamma_prev that of the period before.
    The factor is 1 in the first period and where gamma_prev is 0.

    beta = 0 and alpha = 1 is [`LocalSGD`] to the bit. SGD with beta > 0 and alpha = 1 is block-wise model-update
    filtering (BMUF, ICASSP 2016; section 2 of arXiv 1910.00643). On one rank it is Lookahead
    ([arXiv 1907.08610](https://arxiv.org/abs/1907.08610)) with momentum.

    Memory beside the model: x0 and v, two copies of the trainable parameters, 2/n with `shard_state`, none with
    beta = 0 and alpha = 1 in full precision; during an outer step one bucket of 32 MiB, or the largest parameter if
    that is larger. v is float32 for parameters of lower precision.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps per period. The paper: 12 over Local SGD.
        slow_momentum (`float`, *optional*, defaults to 0.5): beta in [0, 1). The paper: 0.4 to 0.8.
        slow_lr (`float`, *optional*, defaults to 1.0): alpha > 0. The paper: 1 is always best.
        base_buffers (`str`, *optional*, defaults to `"maintain"`): See [`LocalUpdate`]. The paper: `"reset"` for
            Nesterov SGD, `"maintain"` for Adam.
        average (`bool`, *optional*, defaults to `True`): `False` is the paper's "noaverage": xbar is the rank's own x,
            an outer step sends nothing, and each rank has its own x0 and v. `sync()` still averages.
        shard_state (`bool`, *optional*, defaults to `False`): Each rank keeps 1/n of x0 and v: a reduce-scatter of x
            and an all-gather of the result replace the all-reduce, for the same number of bytes.
        wire_dtype (`str`, *optional*): `"bfloat16"`, `"int8"` or `"int4"`: fewer bytes per outer step, see
            [`LocalSGD`], with the anchor x0. It needs memory for one more copy of the trainable parameters. By default
            the parameters' own precision.
        base ([`Gossip`], [`OverlapGossip`] or [`LocalSGD`], *optional*): The method between the outer steps, of the
            same model, optimizer and groups: SlowMo over SGP or OSGP, for which the paper uses `sync_every=48`. SlowMo
            starts and stops it. By default the ranks take local steps only, which is the paper's SlowMo over Local SGD
            with one average per outer step; over a [`LocalSGD`] they also average every `base.sync_every` steps.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`].
        kwargs: `on_lost_rank` of [`LocalSGD`], `sync_start_step`, `inner_group` and `timeout_seconds` of
            [`LocalUpdate`].

    Raises:
        ValueError: If `slow_momentum` is outside [0, 1), `slow_lr` not over 0, `shard_state` or `wire_dtype` without
            `average` or with one another, `wire_dtype` unknown, `base` of another model, optimizer or group, or
            `on_lost_rank="continue"` with `shard_state` or a `base`, and as [`LocalUpdate`] raises.
    """

    can_be_base = False
    _acts_alone = True
    _setting_names = (*LocalSGD._setting_names, "slow_momentum", "slow_lr", "average", "shard_state")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 12,
        slow_momentum: float = 0.5,
        slow_lr: float = 1.0,
        base_buffers: str = "maintain",
        average: bool = True,
        shard_state: bool = False,
        wire_dtype: str | None = None,
        base: LocalUpdate | None = None,
        group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ):
        self.slow_momentum = check_number(
            "slow_momentum", slow_momentum, minimum=0.0, below=1.0, remedy="The paper uses 0.4 to 0.8."
        )
        self.slow_lr = check_number("slow_lr", slow_lr, above=0.0, remedy="The paper finds 1 always best.")
        if (not average) + shard_state + (wire_dtype is not None) > 1:
            raise ValueError(
                "`average=False`, `shard_state=True` and `wire_dtype` exclude one another, because each needs another "
                f"x0, but are {average}, {shard_state} and {wire_dtype!r}. Leave all but one out."
            )
        kwargs.update(sync_every=sync_every, base_buffers=base_buffers, wire_dtype=wire_dtype, group=group)
        super().__init__(model, optimizer, **kwargs)
        goes_on = "continue" in (self.on_lost_rank, getattr(base, "on_lost_rank", None))
        if goes_on and (shard_state or base is not None):
            raise ValueError(
                "`on_lost_rank='continue'` needs all of x0 and v on every rank and local steps between the outer "
                f"steps, but `shard_state` is {shard_state} and `base` {type(base).__name__}. Leave them out."
            )
        self.average, self.shard_state = average, shard_state
        self.base = base
        if base is not None:
            self._check_base(base)
        self._momenta: list[torch.Tensor] = []
        self._previous_learning_rates: list[float] | None = None

    @property
    def _only_averages(self) -> bool:
        """Whether the new x is xbar to the bit."""
        return self.slow_momentum == 0.0 and self.slow_lr == 1.0

    @property
    def _has_anchors(self) -> bool:
        return not self._only_averages or self.wire_dtype is not None

    @property
    def _num_shards(self) -> int:
        return self._exchange.size if self.shard_state else 1

    @property
    def bytes_sent(self) -> int:
        return super().bytes_sent + (0 if self.base is None else self.base.bytes_sent)

    @property
    def seconds_waiting(self) -> float:
        return super().seconds_waiting + (0.0 if self.base is None else self.base.seconds_waiting)

    @property
    def absent_ranks(self) -> list[int]:
        return super().absent_ranks if self.base is None else self.base.absent_ranks

    def _check_base(self, base: LocalUpdate) -> None:
        if not isinstance(base, LocalUpdate) or not base.can_be_base:
            raise ValueError(
                f"`base` must be a LocalSGD, a Gossip or an OverlapGossip, but is a {type(base).__name__}. Without it "
                "the ranks take local steps."
            )
        same = base.model is self.model and base.optimizer is self.optimizer
        if not same or base._place != self._place or base.sync_start_step:
            raise ValueError(
                f"`base` must have the model, optimizer and groups of SlowMo, and no `sync_start_step`, but this "
                f"{type(base).__name__} differs in one of them. Pass `sync_start_step` to SlowMo, for both."
            )

    # Forwarded to the base

    def _attach(self) -> None:
        super()._attach()
        if self.base is not None:
            self.base._attach()

    def _detach(self) -> None:
        super()._detach()
        if self.base is not None:
            self.base._detach()

    def _before_local_step(self) -> None:
        if self.base is not None:
            self.base._used_learning_rates = self._used_learning_rates
            self.base._before_local_step()

    def _after_local_step(self) -> None:
        if self.base is not None:
            self.base.steps += 1
            self.base._learning_rates = self._learning_rates
            self.base._count_local_step()

    def _meet(self, event: str) -> None:
        if self.base is not None:
            self.base._meet(event)
        super()._meet(event)

    def wait_for_all(self, event: str) -> None:
        if self.base is None:
            super().wait_for_all(event)
        else:
            self.base.wait_for_all(event)

    def _before_mean(self) -> None:
        if self.base is not None:
            self.base._before_mean()

    def _after_mean(self) -> None:
        if self.base is not None:
            self.base._after_mean()

    @torch.no_grad()
    def _begin_local_steps(self) -> None:
        self._previous_learning_rates = None
        if self.base is not None:
            self.base._begin_local_steps()
        self._clear_errors()
        if not self._has_anchors:
            return
        self._anchors = [
            self._shard(FlatTensors(bucket, multiple_of=self._num_shards).copy_in()[0])
            for bucket in self._bucket_tensors()
        ]
        if self.slow_momentum > 0.0:
            self._momenta = [
                torch.zeros_like(anchor, dtype=torch.promote_types(anchor.dtype, torch.float32))
                for anchor in self._anchors
            ]

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        if self._only_averages and not self.average:
            return
        factors = self._factors()
        if self.average:
            self._meet("an outer step")
            self._before_mean()
        for index, bucket in enumerate(self._bucket_tensors()):
            flat = FlatTensors(bucket, multiple_of=self._num_shards)
            [x] = flat.copy_in()
            part = self._exchange.mean_shard(x) if self.shard_state else x
            if self.average and not self.shard_state:
                self._mean_(index, x)
            if not self._only_averages:
                self._add_slow_momentum(index, part, factors)
            elif self._has_anchors:
                self._anchors[index].copy_(x)
            if self.shard_state:
                self._exchange.gather_(x, part)
            flat.copy_back()
        if self.average:
            self._after_mean()
        elif self.base is not None:
            self.base._after_change()
        self._previous_learning_rates = list(self._learning_rates)

    def _add_slow_momentum(self, index: int, x: torch.Tensor, factors: list[float]) -> None:
        """Replace xbar in `x`, a bucket or this rank's shard of it, by the new x."""
        x0 = self._anchors[index]
        torch.sub(x0, x, out=x)
        if self.slow_momentum > 0.0:
            v = self._momenta[index]
            start = -self._exchange.rank * v.numel() if self.shard_state else 0
            for place in self._buckets[index]:
                _, parameter, group = self._parameters[place]
                end = start + local(parameter).numel()
                factor = 1.0 if group is None else factors[group]
                v[max(start, 0) : max(end, 0)].mul_(self.slow_momentum * factor)
                start = end
            v.add_(x)
            x0.sub_(v, alpha=self.slow_lr)
        else:
            x0.sub_(x, alpha=self.slow_lr)
        x.copy_(x0)

    def _factors(self) -> list[float]:
        """Return gamma_t / gamma_prev per parameter group."""
        previous = self._previous_learning_rates or [0.0] * len(self._learning_rates)
        return [now / before if before != 0.0 else 1.0 for now, before in zip(self._learning_rates, previous)]

    def _shard(self, whole: torch.Tensor) -> torch.Tensor:
        # Copied, because a view would keep the whole buffer in memory.
        return whole.chunk(self._num_shards)[self._exchange.rank].clone() if self._num_shards > 1 else whole

    def _method_state(self) -> dict[str, Any]:
        return {
            **super()._method_state(),
            "momenta": [momentum.clone() for momentum in self._momenta],
            "previous_learning_rates": self._previous_learning_rates,
            "base": None if self.base is None else self.base.state_dict(),
            "slow": self._kinds_of_tensors,
        }

    @property
    def _kinds_of_tensors(self) -> tuple[bool, ...]:
        return self._only_averages, self.slow_momentum > 0.0, self.shard_state

    def _load_method_state(self, state: dict[str, Any]) -> None:
        here = self._kinds_of_tensors
        if tuple(state["slow"]) != here:
            raise ValueError(
                f"A state of SlowMo must have the same kinds of tensors, here (none, momentum, sharded) = {here}, "
                f"but has {tuple(state['slow'])}. Set `slow_momentum`, `slow_lr` and `shard_state` as they were."
            )
        super()._load_method_state(state)
        self._momenta = [momentum.to(self._device, copy=True) for momentum in state["momenta"]]
        self._previous_learning_rates = state["previous_learning_rates"]
        if self.base is not None:
            self.base.load_state_dict(state["base"])
