"""The base of training with little communication: local steps, and an exchange every few of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.exchange import Exchange
from .comm.flat import FlatTensors, split_into_buckets
from .local_training import active
from .local_training.gradient_sync import GradientSync, find_wrapper
from .local_training.training_state import (
    average_moments,
    compare_ranks,
    frozen_and_buffers,
    plain_optimizer,
    refuse_unsupported,
    reset_moments,
    trainable_parameters,
)

_BUCKET_BYTES = 32 * 2**20  # what an exchange needs in memory beside the model; large enough to use a network fully


class LocalUpdate:
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

    **Entering** (or `start`) checks that all ranks have the same parameters and settings, makes parameters and buffers
    those of the group's first rank, and turns the averaging of gradients off. **Leaving** without an error (or `stop`)
    takes the outer step if local steps are pending, then `sync()`s, and turns the averaging on again; with an error it
    only turns it on, because the other ranks may not be there to talk to.

    **What comes to consensus**, by `sync()`: trainable parameters, frozen parameters (an EMA target) and float buffers
    (running statistics) become their means over the ranks; integer and bool buffers those of the group's first rank;
    buffers that are not in the state dict stay. Optimizer moments become their means with `base_buffers="average"` and
    stay each rank's own otherwise. An outer step exchanges only the trainable parameters (and moments, if averaged).

    **Gradients.** Of a model in `DistributedDataParallel` they are switched off by a communication hook, so that
    accelerate's `no_sync` and `accumulate` work as ever; DDP's broadcast of buffers is off too. Give the wrapped
    model: a wrapper that is not given goes on averaging. DDP keeps the hook after leaving, when it averages as DDP
    itself does. Build DDP without `find_unused_parameters`, which makes all ranks wait for one another at every step.
    Without DDP, gradients that must be averaged (before `sync_start_step`, or over `inner_group`) are averaged before
    `optimizer.step()`, thus after clipping; a gradient scaler that skips the step on one rank only would keep the
    others waiting there, so use DDP with one.

    Args:
        model (`nn.Module`): Plain, in `DistributedDataParallel`, or compiled. Also optimized parameters that are not
            the model's take part.
        optimizer (`torch.optim.Optimizer`): Or accelerate's wrapper: calls of `step` while it accumulates don't count.
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps of a period, >= 1.
        sync_start_step (`int`, *optional*, defaults to 0): Number of first steps with averaged gradients (post-local
            SGD, [arXiv 1808.07217](https://arxiv.org/abs/1808.07217)). Periods are counted from there.
        base_buffers (`str`, *optional*, defaults to `"maintain"`): The optimizer's moments at each outer step:
            `"maintain"` leaves each rank its own, `"reset"` sets them and the step count of bias corrections to zero,
            `"average"` takes the mean over the ranks of those that all ranks have.
        group (`ProcessGroup`, *optional*): The ranks that train locally; by default all.
        inner_group (`ProcessGroup`, *optional*): Ranks that share gradients at every step and so act as one, such as
            those of a node. `group` then holds one rank of each inner group: the two dimensions of a `DeviceMesh`.
        timeout_seconds (`float`, *optional*): Deadline of one exchange, see [`Exchange`]. It must cover the lag
            between the ranks. By default the group's own deadline holds, and the error cannot name the peer.

    Raises:
        ValueError: If a setting is outside of its rule, if another sync object is active on the model or the
            optimizer, if the ranks' parameters or settings differ, or if the group's backend can't reach the tensors.
        TypeError: If model or optimizer are of FSDP, DeepSpeed or tensor parallelism, or no torch optimizer.
        PeerError: If a peer died, or did not come to an exchange before the deadline.
    """

    can_be_base = True  # under SlowMo, whose outer steps are means that all ranks take at the same step

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
        if not isinstance(sync_every, int) or isinstance(sync_every, bool) or sync_every < 1:
            raise ValueError(
                "`sync_every` counts the optimizer steps between two exchanges and must be an integer >= 1, but is "
                f"{sync_every!r}. SlowMo's paper uses 12."
            )
        if not isinstance(sync_start_step, int) or isinstance(sync_start_step, bool) or sync_start_step < 0:
            raise ValueError(
                "`sync_start_step` counts the optimizer steps before the first local one and must be an integer >= 0, "
                f"but is {sync_start_step!r}. Give 0 to train locally from the start."
            )
        if base_buffers not in ("maintain", "reset", "average"):
            raise ValueError(
                "`base_buffers` says what becomes of the optimizer's moments at an outer step and must be 'maintain', "
                f"'reset' or 'average', but is {base_buffers!r}. The SlowMo paper resets SGD's and maintains Adam's."
            )
        self._ddp, self.model = find_wrapper(model)
        self.optimizer, self._gradient_state = plain_optimizer(optimizer)
        refuse_unsupported(self.model, self.optimizer)
        self.sync_every, self.sync_start_step, self.base_buffers = sync_every, sync_start_step, base_buffers
        self._exchange = Exchange(group, timeout_seconds)
        self._inner = None if inner_group is None else Exchange(inner_group, timeout_seconds)
        self.steps = 0
        self.local_steps = 0
        self._learning_rates: list[float] = []
        self._noted: list[float] | None = None
        self._restored = False
        self._gradients: GradientSync | None = None

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has sent so far, see [`Exchange`]; without DDP's own averaging of gradients."""
        return sum(exchange.bytes_sent for exchange in self._exchanges)

    @property
    def seconds_waiting(self) -> float:
        """Seconds that this rank has spent in exchanges so far, see [`Exchange`]."""
        return sum(exchange.seconds_waiting for exchange in self._exchanges)

    def start(self) -> "LocalUpdate":
        """What entering does.

        After a `load_state_dict` the ranks are *not* made equal, so that a run goes on in the middle of a period:
        restore each rank's own parameters, buffers and optimizer state too, before or after, but after a wrapping in
        DDP, which makes the ranks equal as well.
        """
        active.require_free(self.model, self.optimizer)
        self._attach()
        if not self._restored:
            self._make_equal()
        tensors = [p for _, p, _ in self._parameters]
        self._gradients = GradientSync(self.model, self._ddp, self.optimizer, tensors, self._exchange, self._inner)
        self._step_hook = self.optimizer.register_step_pre_hook(lambda *_: self._before_any_step())
        active.take(self.model, self.optimizer)
        if self.steps < self.sync_start_step:
            self._gradients.average_over_all()
        else:
            self._gradients.keep_local()
            if not self._restored:
                self._begin_local_steps()
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """What leaving does; `error` is what ended the training early, if anything."""
        self._require_started()
        try:
            if error is None:
                if self.local_steps:
                    self._end_period()
                self.sync()
        finally:
            self._gradients.restore()
            self._gradients = None
            self._step_hook.remove()
            self._detach()
            active.give_back(self.model, self.optimizer)

    def __enter__(self) -> "LocalUpdate":
        return self.start()

    def __exit__(self, error_type, error, traceback) -> None:
        self.stop(error)

    def step(self) -> None:
        """Counts an optimizer step, and takes the outer step when `sync_every` local ones are through.

        Call it directly after `optimizer.step()`, on every rank equally often. What counts is the call: a step that a
        gradient scaler skipped on one rank counts as well, or the ranks would wait for one another.
        """
        self._require_started()
        if self._gradient_state is not None and not self._gradient_state.sync_gradients:
            return
        self.steps += 1
        # The hook has seen what the step used, a scheduler may have moved on since; a skipped step calls no hook.
        self._learning_rates = self._noted or self._current_learning_rates()
        self._noted = None
        if self.steps <= self.sync_start_step:
            if self.steps == self.sync_start_step:
                self._gradients.keep_local()
                self._begin_local_steps()
            return
        self._count_local_step()

    def sync(self) -> None:
        """Brings the whole training state to consensus by the class's rule, before an evaluation, a save, or the end.

        It takes no step of the slow momentum and does not end the period: the anchor stays, and the next outer step
        sees the local steps before and after.
        """
        self._require_started()
        self._before_mean()
        self._average_in_place([p for _, p, _ in self._parameters])
        self._after_mean()
        others = frozen_and_buffers(self.model)
        self._average_in_place([t for t in others if t.is_floating_point() or t.is_complex()])
        self._broadcast([t for t in others if not (t.is_floating_point() or t.is_complex())])
        if self.base_buffers == "average":
            self._average_moments()

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt(mean_i ||x_i - xbar||^2) over the trainable parameters, xbar their mean. Exchanges all parameters.

        Every rank of the group must call it; all get the same number. The parameters stay as they are.
        """
        self._require_started()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for bucket in self._bucket_tensors():
            own, mean = FlatTensors(bucket).copy_in(), FlatTensors(bucket).copy_in()
            self._exchange.mean_(mean)
            total += sum((x - y).abs().double().square().sum() for x, y in zip(own, mean))
        self._exchange.mean_([total])
        return total.sqrt().item()

    def state_dict(self) -> dict[str, Any]:
        """What *this rank* needs to go on bit for bit, copied. The ranks differ inside a period: save each one's."""
        return {
            "method": type(self).__name__,
            "ranks": self._place,
            "steps": self.steps,
            "local_steps": self.local_steps,
            "learning_rates": list(self._learning_rates),
            **self._method_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state that this rank saved, before `start` or after it.

        Raises:
            ValueError: If it is another method's, or another rank's, or of another number of ranks.
        """
        if state["method"] != type(self).__name__ or tuple(state["ranks"]) != self._place:
            raise ValueError(
                "A state goes on in the method, on the rank and with the number of ranks that saved it, here "
                f"{type(self).__name__} on rank, number of ranks = {self._place}, but is of {state['method']} on "
                f"{tuple(state['ranks'])}. To go on otherwise, load a model saved after `sync()`, and no state."
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

    # What a method adds.

    def _attach(self) -> None:
        """Takes up what is to be trained, and compares it with the other ranks."""
        self._parameters = trainable_parameters(self.model, self.optimizer)
        self._frozen = [p for p in self.model.parameters() if not p.requires_grad]
        self._num_groups = len(self.optimizer.param_groups)
        tensors = [p for _, p, _ in self._parameters]
        for exchange in self._exchanges:
            exchange.check_devices([*tensors, *frozen_and_buffers(self.model)])
            compare_ranks(exchange, self._description(), self._device)
        self._buckets = split_into_buckets(tensors, _BUCKET_BYTES)

    def _detach(self) -> None:
        """Lets go of what `_attach` took up; also after an error, when other ranks may not be there to talk to."""
        self._restored = False

    def _begin_local_steps(self) -> None:
        """Called when the ranks are equal, before the first local step: the place to take anchors."""

    def _before_local_step(self) -> None:
        """Called before the optimizer changes the parameters, gradients ready; not if a gradient scaler skips it."""

    def _after_local_step(self) -> None:
        """Called on every rank after every local step, before the outer step if it is the last of a period."""

    def _take_outer_step(self) -> None:
        """Called on every rank after the last local step of a period."""
        raise NotImplementedError

    def _before_mean(self) -> None:
        """Makes the plain mean of the parameters over the ranks the consensus: nothing under way, no other weights."""

    def _after_mean(self) -> None:
        """The parameters have been replaced by their mean."""

    def _after_change(self) -> None:
        """An owner has changed this rank's parameters, as an optimizer would."""

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {name: getattr(self, name) for name in ("sync_every", "sync_start_step", "base_buffers")}

    def _method_state(self) -> dict[str, Any]:
        return {}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        pass

    # What the methods use.

    @property
    def _exchanges(self) -> list[Exchange]:
        return [exchange for exchange in (self._inner, self._exchange) if exchange is not None]

    @property
    def _place(self) -> tuple[int, ...]:
        return tuple(number for exchange in self._exchanges for number in (exchange.rank, exchange.size))

    def _description(self) -> list[str]:
        """A line for everything that must be the same on all ranks."""
        lines = [f"method {type(self).__name__}"]
        lines += [f"setting {name}={value!r}" for name, value in self._settings().items()]
        lines += [f"{name} {tuple(p.shape)} {p.dtype} in group {index}" for name, p, index in self._parameters]
        return lines + [f"frozen or buffer {tuple(t.shape)} {t.dtype}" for t in frozen_and_buffers(self.model)]

    @property
    def _device(self) -> torch.device:
        return self._parameters[0][1].device

    def _bucket_tensors(self) -> list[list[torch.Tensor]]:
        return [[self._parameters[i][1] for i in bucket] for bucket in self._buckets]

    def _require_started(self) -> None:
        if self._gradients is None:
            raise RuntimeError(
                f"{type(self).__name__} must be entered before it is used, but is not active. Use it as "
                "`with ... as sync:`, or call `start()` first."
            )

    def _before_any_step(self) -> None:
        self._noted = self._current_learning_rates()
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
                "What trains must stay the same from entering to leaving, but parameters were unfrozen or added to "
                "the optimizer. Leave the sync object before that, and enter it again after."
            )
        self._take_outer_step()
        self.local_steps = 0
        if self.base_buffers == "reset":
            reset_moments(self.optimizer)
        elif self.base_buffers == "average":
            self._average_moments()

    def _average_moments(self) -> None:
        for exchange in self._exchanges:
            average_moments(self.optimizer, exchange, self._device, _BUCKET_BYTES)

    def _average_in_place(self, tensors: list[torch.Tensor]) -> None:
        for bucket in split_into_buckets(tensors, _BUCKET_BYTES):
            flat = FlatTensors([tensors[i] for i in bucket])
            for exchange in self._exchanges:
                exchange.mean_(flat.copy_in())
                flat.copy_back()

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        for bucket in split_into_buckets(tensors, _BUCKET_BYTES):
            flat = FlatTensors([tensors[i] for i in bucket])
            for exchange in self._exchanges:
                exchange.broadcast_(flat.copy_in())
                flat.copy_back()

    def _make_equal(self) -> None:
        self._broadcast([p for _, p, _ in self._parameters] + frozen_and_buffers(self.model))

    def _current_learning_rates(self) -> list[float]:
        return [float(group.get("lr", 1.0)) for group in self.optimizer.param_groups]
