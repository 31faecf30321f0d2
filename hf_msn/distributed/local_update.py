"""Base class of local training: steps on each rank alone, and an exchange every few of them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_choice, check_integer
from .comm.exchange import Exchange
from .comm.flat import FlatTensors, split_into_buckets
from .gradient_sync import SyncObject, require_free
from .training_state import (
    compare_ranks,
    frozen_and_buffers,
    is_sharded,
    local,
    of_this_version,
    reset_moments,
    reshard,
    shard_group,
    shared_moments,
    trainable_parameters,
)


class LocalUpdate(SyncObject):
    """Base class of the methods that train on each rank alone and exchange parameters every `sync_every` steps.

    Example:

    ```python
    with SlowMo(model, optimizer, sync_every=12, slow_momentum=0.6) as sync:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            sync.step()
            scheduler.step()
            optimizer.zero_grad()
    ```

    **Entering** (or `start`) checks that all ranks have the same parameters and settings, broadcasts parameters and
    buffers from the group's first rank, and turns the averaging of gradients off. **Leaving** without an error (or
    `stop`) takes the outer step if local steps are pending, calls `sync()`, and turns the averaging on again. With an
    error it only turns it on, because other ranks may be gone.

    **Consensus**: `sync()` replaces trainable parameters, frozen parameters (an EMA target) and float buffers (running
    statistics) by their means over the ranks, and integer and bool buffers by those of the group's first rank. Buffers
    that are not in the state dict stay. Optimizer moments become their means with `base_buffers="average"`. An outer
    step exchanges only trainable parameters, and moments if they are averaged.

    **Gradients.** In `DistributedDataParallel` a communication hook turns their averaging off, and DDP's broadcast of
    buffers is off too. Without DDP, gradients that must be averaged (before `sync_start_step`, or over `inner_group`)
    are averaged before `optimizer.step()`, thus after clipping. See docs/communication.md.

    Args:
        model (`nn.Module`): Plain, in `DistributedDataParallel`, or compiled. Parameters of the optimizer that are not
            the model's take part too. For [`LocalSGD`], [`SlowMo`], [`DiLoCo`] and [`StreamingDiLoCo`] also sharded
            inside each replica, `fully_shard(model, mesh=mesh["shard"])`: each rank exchanges its shards over
            `group=mesh["replicate"].get_group()`.
        optimizer (`torch.optim.Optimizer`): Or accelerate's wrapper, whose steps during accumulation do not count.
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps per period, >= 1.
        sync_start_step (`int`, *optional*, defaults to 0): Number of first steps with averaged gradients (post-local
            SGD, [arXiv 1808.07217](https://arxiv.org/abs/1808.07217)). The first period begins after them.
        base_buffers (`str`, *optional*, defaults to `"maintain"`): The optimizer's moments at an outer step:
            `"maintain"` leaves each rank its own, `"reset"` sets them and the step count of bias corrections to zero,
            `"average"` takes the mean over the ranks of those that all ranks have.
        group (`ProcessGroup`, *optional*): The ranks that train locally; by default all.
        inner_group (`ProcessGroup`, *optional*): Ranks that average gradients at every step and act as one, such as
            those of a node. `group` then has one rank of each inner group: the two dimensions of a `DeviceMesh`. For
            a model that `fully_shard` has sharded it is the ranks that hold the shards, by default.
        timeout_seconds (`float`, *optional*): Deadline of one exchange, see [`Exchange`]. It must cover the lag
            between the ranks. By default the group's deadline holds, and the error cannot name the missing rank.

    Raises:
        ValueError: If a setting is outside of its rule, the optimizer is of another model, or is schedule-free and
            not all of its weights are averaged, another sync object runs on the model or the optimizer, the ranks'
            parameters or settings differ, the group's backend cannot reach the tensors, or the mesh of a sharded
            model does not match `group`: hybrid sharding, or several shards of one replica in `group`.
        TypeError: If model or optimizer are of FSDP1, DeepSpeed or tensor parallelism, or no torch optimizer, or the
            method does not take a sharded model.
        RuntimeError: At an outer step, a `sync()` or when leaving, if `step` was not called once after each
            `optimizer.step()`.
        PeerError: If a peer died, did not arrive at an exchange before the deadline, or is at another one, because it
            has taken another number of steps.
    """

    can_be_base = True  # of SlowMo, whose outer steps are means that all ranks take at the same step
    takes_shards = False  # whether FSDP2 may shard a replica
    _only_averages = False  # whether nothing but means moves parameters and moments
    _acts_alone = False  # whether one rank alone trains otherwise than without the method
    _setting_names: tuple[str, ...] = ("sync_every", "sync_start_step", "base_buffers")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 12,
        sync_start_step: int = 0,
        base_buffers: str = "maintain",
        group: dist.ProcessGroup | None = None,
        inner_group: dist.ProcessGroup | None = None,
        timeout_seconds: float | None = None,
    ):
        remedy = "SlowMo's paper uses 12."
        self.sync_every = check_integer("sync_every", sync_every, meaning="counts optimizer steps", remedy=remedy)
        self.sync_start_step = check_integer("sync_start_step", sync_start_step, 0, meaning="counts optimizer steps")
        self.base_buffers = check_choice("base_buffers", base_buffers, ("maintain", "reset", "average"))
        super().__init__(model, optimizer, self.takes_shards)
        if hasattr(self.optimizer, "eval") and not (self._only_averages and self.base_buffers == "average"):
            raise ValueError(
                f"The two sets of weights of a schedule-free optimizer must move together, but {type(self).__name__} "
                f"with `base_buffers` '{self.base_buffers}' moves one. Use LocalSGD with 'average'."
            )
        self._exchange = Exchange(group, timeout_seconds)
        inner_group = self._inner_group(inner_group)
        self._inner = None if inner_group is None else Exchange(inner_group, timeout_seconds)
        self.local_steps = 0
        self._learning_rates: list[float] = []
        self._used_learning_rates: list[float] | None = None
        self._restored = False

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has sent, see [`Exchange`], without DDP's averaging of gradients."""
        return sum(exchange.bytes_sent for exchange in self._exchanges)

    @property
    def seconds_waiting(self) -> float:
        """Seconds that this rank has spent in exchanges, see [`Exchange`]."""
        return sum(exchange.seconds_waiting for exchange in self._exchanges)

    @property
    def absent_ranks(self) -> list[int]:
        """Global ranks that this rank goes on without, because they are lost or silent."""
        return []

    def start(self) -> "LocalUpdate":
        """Enter.

        After `load_state_dict` the ranks are *not* made equal, so that a run resumes inside a period. Restore the
        parameters, buffers and optimizer state of each rank too, before or after `start`, but after DDP has wrapped
        the model, because DDP makes the ranks equal.
        """
        if not self._acts_alone and all(exchange.size == 1 for exchange in self._exchanges):
            warnings.warn(f"{type(self).__name__} has one rank only: it trains as without it.", stacklevel=2)
        require_free(self.model, self.optimizer)
        try:
            self._attach()
            tensors = [p for _, p, _ in self._parameters]
            if not self._restored:
                self._exchange_in_place(Exchange.broadcast_, tensors + frozen_and_buffers(self.model))
            self._add_hooks(tensors, self._before_any_step)
            if self.steps < self.sync_start_step:
                self._gradients.average_over_all()
            else:
                self._gradients.keep_local()
                if not self._restored:
                    self._begin_local_steps()
        except BaseException:
            self._leave()
            raise
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """Leave. `error` is the exception that ended the training early, if any."""
        self._require_started()
        try:
            if error is None:
                self._calls.check(is_last=True)
                if self._is_pending:
                    self._end_period()
                self.sync()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._remove_hooks()
        self._detach()

    def step(self) -> None:
        """Count an optimizer step, and take the outer step after `sync_every` local ones.

        Call it directly after `optimizer.step()`, on every rank equally often, also after a step that a gradient
        scaler skipped on one rank.
        """
        if not self._count_step():
            return
        # A scheduler may have moved on since the hook of the step; a skipped step calls no hook.
        self._learning_rates = self._used_learning_rates or self._current_learning_rates()
        self._used_learning_rates = None
        if self.steps <= self.sync_start_step:
            if self.steps == self.sync_start_step:
                self._gradients.keep_local()
                self._begin_local_steps()
            return
        if self.local_steps + 1 == self.sync_every:
            self._calls.check()
        self._count_local_step()

    def sync(self) -> None:
        """Bring the training state to consensus by the class's rule, before an evaluation, a save or the end.

        It is no step of the slow momentum and does not end the period: the anchor stays, and the next outer step
        covers the local steps before and after.
        """
        self._require_started()
        self._calls.check()
        reshard(self.model)
        self._together("a sync", self._sync)

    def _sync(self) -> None:
        self._meet("a sync")
        self._before_mean()
        self._average_all()
        self._after_mean()

    def _average_all(self) -> None:
        """Replace parameters, frozen parameters and buffers by their means, and moments if they are averaged."""
        others = frozen_and_buffers(self.model)
        has_mean = [t.is_floating_point() or t.is_complex() for t in others]
        self._exchange_in_place(Exchange.mean_, [p for _, p, _ in self._parameters])
        self._exchange_in_place(Exchange.mean_, [t for t, use_mean in zip(others, has_mean) if use_mean])
        self._exchange_in_place(Exchange.broadcast_, [t for t, use_mean in zip(others, has_mean) if not use_mean])
        if self.base_buffers == "average":
            self._average_moments()

    def consensus_distance(self) -> float:
        """Return sqrt(mean_i ||x_i - xbar||^2) over the trainable parameters, with xbar their mean over the ranks.

        It exchanges all parameters and does not change them. Every rank of the group must call it.
        """
        self._require_started()

        def distance() -> float:
            self._meet("the consensus distance")
            return self._distance_by_collectives()

        return self._together("the consensus distance", distance, changes=False)

    @torch.no_grad()
    def _distance_by_collectives(self) -> float:
        whole, sharded = torch.zeros(2, dtype=torch.float64, device=self._device)
        for bucket, tensors in zip(self._buckets, self._bucket_tensors()):
            mean = FlatTensors(tensors)
            self._exchange.mean_(mean.copy_in())
            for index, (y, x) in zip(bucket, mean.pairs):
                total = sharded if is_sharded(self._parameters[index][1]) else whole
                total += (x - y).abs().double().square().sum()
        if self._is_sharded:
            self._inner.mean_([sharded])
            sharded *= self._inner.size
        total = whole + sharded
        self._exchange.mean_([total])
        return total.sqrt().item()

    def wait_for_all(self, event: str) -> None:
        """Wait until all ranks come to the same event, such as a collective of others that has no deadline.

        Raises:
            PeerError: If a rank has not come after `timeout_seconds`, or comes to another event.
        """
        self._together(event, lambda: self._meet(event), changes=False)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state of *this rank*. The ranks differ inside a period: save that of each."""
        return {
            "method": type(self).__name__,
            "ranks": self._place,
            "steps": self.steps,
            "local_steps": self.local_steps,
            "learning_rates": list(self._learning_rates),
            **self._method_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that this rank saved, before or after `start`.

        Raises:
            ValueError: If it is of another method, rank or number of ranks.
        """
        with of_this_version():
            if state["method"] != type(self).__name__ or tuple(state["ranks"]) != self._place:
                raise ValueError(
                    f"A state must be of this method, rank and number of ranks, here {type(self).__name__} on rank, "
                    f"number of ranks = {self._place}, but is of {state['method']} on {tuple(state['ranks'])}. "
                    "Otherwise load a model saved after `sync()`, and no state."
                )
            self.steps, self.local_steps = state["steps"], state["local_steps"]
            self._learning_rates = list(state["learning_rates"])
            self._load_method_state(state)
        if self._gradients is None:
            self._restored = True
        elif self.steps < self.sync_start_step:
            self._gradients.average_over_all()
        else:
            self._gradients.keep_local()

    # Defined by a method

    def _attach(self) -> None:
        """Collect the parameters that train, and compare them with those of the other ranks."""
        reshard(self.model)
        self._parameters = trainable_parameters(self.model, self.optimizer)
        self._frozen = [p for p in self.model.parameters() if not p.requires_grad]
        self._num_groups = len(self.optimizer.param_groups)
        if not self._restored:
            self.local_steps = 0  # an error may have ended a period early, and not on all ranks
        for exchange in self._exchanges:
            exchange.check_devices([*self._tensors, *frozen_and_buffers(self.model)])
            compare_ranks(exchange, self._description(), self._device)
        if self._is_sharded:
            shards = [f"{name} {tuple(local(p).shape)}" for name, p, _ in self._parameters]
            own = f"shard {self._inner.rank} of {self._inner.size}"
            compare_ranks(self._exchange, [own, *shards], self._device)
        self._buckets = split_into_buckets(self._tensors)

    def _detach(self) -> None:
        """Release what `_attach` collected. After an error other ranks may be gone."""
        self._restored = False

    def _begin_local_steps(self) -> None:
        """Take anchors: the ranks are equal, and local steps follow."""

    def _before_local_step(self) -> None:
        """Called before each local step of the optimizer, unless a gradient scaler skips it. Gradients are ready."""

    def _after_local_step(self) -> None:
        """Called after each local step, on every rank, before an outer step."""

    def _take_outer_step(self) -> None:
        """Called after the last local step of a period, on every rank."""
        raise NotImplementedError

    @property
    def _is_pending(self) -> bool:
        """Whether an outer step is due when leaving."""
        return self.local_steps > 0

    def _together(self, event: str, operation: Callable[[], Any], changes: bool = True) -> Any:
        """Run an operation in which the ranks exchange, and which `changes` parameters or state unless told."""
        return operation()

    def _meet(self, event: str) -> None:
        """Called before the ranks exchange. Raise a `PeerError` where another rank comes to another event."""
        for exchange in self._exchanges:
            exchange.meet(event, self.steps, self._device)

    def _before_mean(self) -> None:
        """Prepare an unweighted average: no messages in flight, parameters hold x rather than x / w."""

    def _after_mean(self) -> None:
        """Called after the parameters were replaced by their means."""

    def _after_change(self) -> None:
        """Called after SlowMo changed the parameters of this rank alone."""

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be the same on all ranks and in a resumed run."""
        return {name: getattr(self, name) for name in self._setting_names}

    def _method_state(self) -> dict[str, Any]:
        return {}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        pass

    # Used by the methods

    def _description(self) -> list[str]:
        """Return one line for each thing that must be the same on all ranks."""
        lines = [f"method {type(self).__name__}"]
        lines += [f"setting {name}={value!r}" for name, value in self._settings().items()]
        lines += [f"{name} {tuple(p.shape)} {p.dtype} in group {index}" for name, p, index in self._parameters]
        return lines + [f"frozen or buffer {tuple(t.shape)} {t.dtype}" for t in frozen_and_buffers(self.model)]

    @property
    def _device(self) -> torch.device:
        return next(p for group in self.optimizer.param_groups for p in group["params"]).device

    def _inner_group(self, inner_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """Return the group that acts as one rank: for a sharded model the ranks that hold the shards."""
        shards = shard_group(self.model, self._exchange.group)
        self._is_sharded = shards is not None
        if shards is None:
            return inner_group
        ranks, here = (dist.get_process_group_ranks(group) for group in (inner_group or shards, shards))
        if ranks != here:
            raise ValueError(
                f"`inner_group` of a sharded model must be the ranks that hold its shards, {here}, but is {ranks}. "
                "Leave it out."
            )
        return shards

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """The trainable parameters, of sharded ones the shards."""
        return [local(p) for _, p, _ in self._parameters]

    def _bucket_tensors(self) -> list[list[torch.Tensor]]:
        tensors = self._tensors
        return [[tensors[i] for i in bucket] for bucket in self._buckets]

    def _before_any_step(self) -> None:
        self._used_learning_rates = self._current_learning_rates()
        if self.steps >= self.sync_start_step:
            self._before_local_step()

    def _count_local_step(self) -> None:
        self.local_steps += 1
        self._after_local_step()
        if self.local_steps == self.sync_every:
            self._end_period()

    def _end_period(self) -> None:
        if len(self.optimizer.param_groups) != self._num_groups or any(p.requires_grad for p in self._frozen):
            raise RuntimeError(
                "The trainable parameters must not change between entering and leaving, but some were unfrozen or "
                "added to the optimizer. Leave before, and enter again after."
            )
        self._together("an outer step", self._outer_step)
        self.local_steps = 0
        if self.base_buffers == "reset":
            reset_moments(self.optimizer)

    def _outer_step(self) -> None:
        self._take_outer_step()
        if self.base_buffers == "average":
            self._average_moments()

    def _average_moments(self) -> None:
        for exchange in self._exchanges:
            moments = shared_moments(self.optimizer, exchange, self._device)
            self._exchange_in_place(Exchange.mean_, moments, [exchange])

    def _current_learning_rates(self) -> list[float]:
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        return [1.0 if rate is None else float(rate) for rate in rates]  # Adafactor may choose its own
