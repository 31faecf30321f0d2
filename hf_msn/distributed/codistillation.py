"""Codistillation: replicas that train on their own and learn from one another's predictions."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.exchange import Exchange, PeerError
from .falling_weight_decay import ScheduledWeightDecay
from .local_training import active
from .local_training.gradient_sync import GradientSync, find_wrapper
from .local_training.training_state import (
    frozen_and_buffers,
    plain_optimizer,
    refuse_unsupported,
    trainable_parameters,
)
from .replicas.connection import find_peers, open_mail, warn_if_nothing_to_learn
from .replicas.distances import PredictionDistance
from .replicas.groups import Replicas
from .replicas.peer_checkpoints import call_model, checked_predictions, logits_of
from .replicas.peer_copies import exchanged_tensors
from .replicas.settings import CodistillationSettings


class Codistillation:
    """Trains n replicas that do not average gradients: each adds its distance from the others to its own loss.

    Example:

    ```python
    with Codistillation(model, optimizer, exchange="checkpoints", exchange_every=2500) as codistillation:
        for batch in batches:
            output = model(**batch)
            loss = output.loss + codistillation.loss(output, batch)
            loss.backward()
            optimizer.step()
            codistillation.step()
            optimizer.zero_grad()
    ```

    After [A Closer Look at Codistillation for Distributed Training](https://arxiv.org/abs/2010.02838). Replica i with
    predictions f_i takes the gradient of

        L(y, f_i(x)) + alpha_k / (n - 1) * sum_{j != i} D(f_i(x), sg f_j(x))

    at its k-th update, k = 0, 1, ...; sg: without gradient. D is a [`PredictionDistance`].

    **`exchange="predictions"`**: at each `loss` every replica sends its predictions for the batch, which all of them
    hold: B * C numbers to each peer (with `top_k` B * (2k + 1)). That the batches are the same is checked with a
    digest of 16 bytes. With equal parameters, too, and no dropout, the replicas would stay equal and learn nothing:
    initialise each with a seed of its own.

    **`exchange="checkpoints"`**: after update s = `burn_in_steps` + m `exchange_every`, s > 0, each replica sends its
    parameters and buffers in the background. They are put to use in the others' copies of it exactly `transfer_steps`
    updates later, and not before: a rank that does not have them by then waits. Each batch is the replica's own. The
    loss is 0 before the first copies are there. What it costs in memory: see [`PeerCopies`].

    **Entering** (or `start`) compares shapes and settings but leaves the replicas as they are; the ranks of an
    `inner_group` are made equal to its first one. Gradients are averaged inside of a replica only. **Leaving** (or
    `stop`) leaves them as they are again: *a model in DDP over several replicas would go on averaging gradients of
    replicas that differ*. Wrapping in DDP makes all ranks of its group equal: initialise replicas after that, or wrap
    over the inner group. Build DDP without `find_unused_parameters`.

    Args:
        model (`nn.Module`): Plain, in `DistributedDataParallel`, or compiled.
        optimizer (`torch.optim.Optimizer`): Or accelerate's wrapper: calls of `step` while it accumulates don't count.
        exchange (`str`, *optional*, defaults to `"predictions"`): `"predictions"` or `"checkpoints"`.
        exchange_every (`int`, *optional*, defaults to 2500): Updates between two checkpoints, >= 1.
        transfer_steps (`int`, *optional*): Updates from sending a checkpoint to using it, in [0, exchange_every]; by
            default a tenth of that. Copies are so old when they come into use, and `exchange_every` more at the end.
        alpha (`float` or `Callable[[int], float]`, *optional*, defaults to 1.0): Weight of the distances, >= 0, or a
            function of the number of updates so far, the same on all ranks. Strong ones need a smaller learning rate:
            on digits 10 cost 20 to 60 points, with a ramp or burn-in too, and at a fifth of the rate at most 2.
        ramp_steps (`int`, *optional*, defaults to 0): Updates over which alpha rises from 0, after the burn-in.
        burn_in_steps (`int`, *optional*, defaults to 0): First updates, without exchange and with a loss of 0.
        distance (`str`, *optional*, defaults to `"kl"`): `"kl"` or `"mse"`, see [`PredictionDistance`].
        temperature (`float`, *optional*, defaults to 1.0): Of the softmax of `"kl"`, > 0.
        top_k (`int`, *optional*): Only so many of a peer's probabilities travel; of predictions with `"kl"` only.
        predictions (`Callable`, *optional*): output -> logits or log-probabilities `(..., C)`; by default the output's
            `logits`, or the output itself if it is a tensor.
        forward (`Callable`, *optional*): (copy, batch) -> output, for checkpoints; by default `copy(**batch)`, or
            `copy(batch)` if the batch is no mapping.
        check_every (`int`, *optional*, defaults to 1): Batches are compared at every so many exchanges, >= 1.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, of predictions; by default their own.
        copies_dtype (`str`, *optional*): `"bfloat16"` for copies and what is sent; by default that of the model.
        copies_device (`str`, *optional*): `"cpu"` to keep copies there between forward passes.
        weight_decay_schedule (`Callable[[int], float]`, *optional*): Number of updates so far -> factor of each
            group's initial weight decay, such as [`FallingWeightDecay`]. Leaving puts the initial one back.
        on_lost_replica (`str`, *optional*, defaults to `"raise"`): `"continue"` goes on with the replicas that are
            left, alone if need be: 1 / (n - 1) is then of those that are there. Predictions then travel over the CPU.
        group (`ProcessGroup`, *optional*): Links the replicas, one rank of each; by default all ranks.
        inner_group (`ProcessGroup`, *optional*): The ranks of this replica. The two are the dimensions of a
            `DeviceMesh`; with predictions, ranks at the same place inside of their replicas hold the same batch.
        timeout_seconds (`float`, *optional*): How long a replica may be silent where others wait for it. It must cover
            the lag between them, evaluations too.

    Attributes:
        steps (`int`): Updates so far.
        distance_of_predictions (`float`, *optional*): The last mean of D over the peers, without alpha.

    Raises:
        ValueError: If a setting is outside of its rule, another sync object is active on the model or the optimizer,
            the ranks' shapes or settings differ, or (in `loss`) the replicas' batches do.
        TypeError: If model or optimizer are of FSDP, DeepSpeed or tensor parallelism, or no torch optimizer.
        PeerError: If a replica died or was silent for too long, and the others are not to go on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        exchange: str = "predictions",
        exchange_every: int = 2500,
        transfer_steps: int | None = None,
        alpha: float | Callable[[int], float] = 1.0,
        ramp_steps: int = 0,
        burn_in_steps: int = 0,
        distance: str = "kl",
        temperature: float = 1.0,
        top_k: int | None = None,
        predictions: Callable[[Any], torch.Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        check_every: int = 1,
        wire_dtype: str | None = None,
        copies_dtype: str | None = None,
        copies_device: str | None = None,
        weight_decay_schedule: Callable[[int], float] | None = None,
        on_lost_replica: str = "raise",
        group: dist.ProcessGroup | None = None,
        inner_group: dist.ProcessGroup | None = None,
        timeout_seconds: float | None = None,
    ):
        self.settings = CodistillationSettings(
            exchange=exchange,
            exchange_every=exchange_every,
            transfer_steps=transfer_steps,
            alpha=alpha,
            ramp_steps=ramp_steps,
            burn_in_steps=burn_in_steps,
            check_every=check_every,
            wire_dtype=wire_dtype,
            copies_dtype=copies_dtype,
            copies_device=copies_device,
            on_lost_replica=on_lost_replica,
        )
        self.distance = PredictionDistance(distance, temperature, top_k)
        self.settings.check_distance(self.distance)
        self._ddp, self.model = find_wrapper(model)
        self.optimizer, self._gradient_state = plain_optimizer(optimizer)
        refuse_unsupported(self.model, self.optimizer)
        inner = None if inner_group is None else Exchange(inner_group, timeout_seconds)
        self._replicas = Replicas(Exchange(group, timeout_seconds), inner)
        self._predictions, self._forward = predictions or logits_of, forward or call_model
        self._weight_decay = ScheduledWeightDecay(self.optimizer, weight_decay_schedule)
        self.steps = 0
        self._last_distance: torch.Tensor | None = None
        self._loaded: dict[str, Any] | None = None
        self._gradients: GradientSync | None = None
        self._mail = None
        self._peers = None

    # What there is to see

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has sent so far, see [`Exchange`] and [`ReplicaMail`]; without DDP's averaging."""
        return self._replicas.bytes_sent + (0 if self._mail is None else self._mail.bytes_sent)

    @property
    def seconds_waiting(self) -> float:
        """Seconds that this rank has spent in exchanges, or waiting for what others send."""
        return self._replicas.seconds_waiting + (0.0 if self._mail is None else self._mail.seconds_waiting)

    @property
    def distance_of_predictions(self) -> float | None:
        return None if self._last_distance is None else self._last_distance.item()

    @property
    def staleness(self) -> int | None:
        """Updates since the snapshots that the peers' copies hold; `None` while there are none."""
        snapshot_step = None if self._peers is None else self._peers.snapshot_step
        return None if snapshot_step is None else self.steps - snapshot_step

    @property
    def live_replicas(self) -> list[int]:
        """The places of the replicas that are not lost, this one's among them."""
        if self._mail is None:
            return list(range(self._replicas.size))
        return sorted({*self._mail.live, self._replicas.outer.rank})

    def look_for_lost(self, seconds: float) -> None:
        """Waits for so long at the most whether the connection to a replica closes, where they have one of their own.

        Raises:
            PeerError: If one does and the others are not to go on; with the rank.
        """
        deadline = time.monotonic() + seconds
        while self._mail is not None and time.monotonic() < deadline:
            self._mail.look(0.1)

    def alpha_at(self, step: int) -> float:
        """alpha_k for the update after `step` others."""
        return self.settings.alpha_at(step)

    def parameter_distance(self) -> float:
        """sqrt(mean_i ||x_i - xbar||^2) over the trainable parameters, xbar their mean. Exchanges all parameters.

        All ranks must call it; the replicas stay as they are.
        """
        self._require_all("The distance of parameters")
        return self._replicas.distance(self._trained)

    # For the end of training

    def values_of_replicas(self, value: float) -> list[float]:
        """Every replica's number, such as its accuracy, first replica first. All ranks must call it."""
        self._require_all("Collecting numbers")
        return self._replicas.values(value, self._trained[0].device)

    def average_predictions(self, predictions: torch.Tensor) -> torch.Tensor:
        """The mean over the replicas of any tensor, such as probabilities `(B, C)` of one batch, the same on all."""
        self._require_all("A mean of predictions")
        return self._replicas.mean(predictions)

    def take_replica(self, place: int) -> None:
        """Makes every replica the one at `place`, such as the best, to publish it. All ranks must call it."""
        self._require_all("Taking over a replica")
        self._replicas.take(place, self._state_tensors)

    # From entering to leaving

    def start(self) -> "Codistillation":
        """What entering does. To go on where a run stopped, also call `load_state_dict`, before or after."""
        active.require_free(self.model, self.optimizer)
        self._parameters = trainable_parameters(self.model, self.optimizer)
        self._replicas.compare(self._description(), self._state_tensors)
        if self._loaded is None:
            self._replicas.make_inner_equal(self._state_tensors)
        try:
            if self._replicas.size == 1:
                warnings.warn("Codistillation has one replica only: it trains as without it.", stacklevel=2)
            else:
                self._connect()
            groups = self._replicas.outer, self._replicas.inner
            gradients = GradientSync(self.model, self._ddp, self.optimizer, self._trained, *groups)
            gradients.keep_local()
            self._weight_decay.begin()
            self._step_hook = self.optimizer.register_step_pre_hook(lambda *_: self._weight_decay.set(self.steps))
            active.take(self.model, self.optimizer)
            self._gradients = gradients
            if self._loaded is not None:
                self._restore()
        except BaseException as error:  # whatever it is, the others must not wait for this replica
            if self._gradients is None:
                self._disconnect(at_once=True)
            else:
                self.stop(error)
            raise
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """What leaving does; `error` is what ended the training early, if anything."""
        self._require_started()
        self._gradients.restore()
        self._gradients = None
        self._step_hook.remove()
        active.give_back(self.model, self.optimizer)
        self._weight_decay.end()
        self._disconnect(at_once=error is not None)

    def __enter__(self) -> "Codistillation":
        return self.start()

    def __exit__(self, error_type, error, traceback) -> None:
        self.stop(error)

    # A step

    def loss(self, output: Any, batch: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
        """alpha_k / (n - 1) * sum_{j != i} D(f_i(x), sg f_j(x)), to be added to the loss.

        Exactly 0 in the burn-in, with alpha 0, on one replica, before the first copies are there, and where gradients
        are off (an evaluation): nothing is exchanged then. With predictions all replicas must call it equally often.

        Args:
            output: What the model returned for the batch.
            batch: What it was given, see `forward`.
            mask (`torch.Tensor` of shape `(...)`, *optional*): The positions that count, of predictions `(..., C)`; of
                a causal language model `nn.functional.pad(labels[:, 1:] != -100, (0, 1))`.

        Returns:
            `torch.Tensor`: A scalar.
        """
        self._require_started()
        own = checked_predictions(self._predictions(output))
        alpha = self.alpha_at(self.steps)
        is_off = alpha == 0.0 or self._peers is None or not torch.is_grad_enabled()
        distances = [] if is_off else [self.distance(own, peer, mask) for peer in self._peers.gather(own, batch)]
        if not distances:
            return torch.zeros((), device=own.device)
        mean = sum(distances) / len(distances)
        self._last_distance = mean.detach()
        return alpha * mean

    def step(self) -> None:
        """Counts an update, and sends or takes up checkpoints when it is time. Call it after `optimizer.step()`."""
        self._require_started()
        if self._gradient_state is not None and not self._gradient_state.sync_gradients:
            return
        self.steps += 1
        if self._peers is not None:
            self._peers.after_update(self.steps)

    # State

    def state_dict(self) -> dict[str, Any]:
        """What *this rank* needs to go on bit for bit, copied: save each one's.

        With checkpoints it holds the copies in use and those under way, for which it waits: up to 2 (n - 1) models.
        """
        self._require_started()
        return {
            **self._origin,
            "steps": self.steps,
            "initial_weight_decay": self._weight_decay.initial,
            "peers": None if self._peers is None else self._peers.state(self.steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state that this rank saved, before `start` or after it.

        Raises:
            ValueError: If it is of another method, exchange, rank, number of ranks or model.
        """
        found = {name: state.get(name) for name in self._origin}
        if found != self._origin:
            raise ValueError(
                "A state goes on in the method, with the exchange, on the rank and with the number of ranks that "
                f"saved it, here {self._origin}, but is of {found}. To go on otherwise, load the models, and no state."
            )
        self.steps, self._loaded = state["steps"], state
        if self._gradients is not None:
            self._restore()

    def _restore(self) -> None:
        state, self._loaded = self._loaded, None
        self._weight_decay.begin(state["initial_weight_decay"])
        if self._peers is not None:
            self._peers.load_state(state["peers"])

    # Inside

    @property
    def _origin(self) -> dict[str, Any]:
        return {"method": type(self).__name__, "exchange": self.settings.exchange, "ranks": [*self._replicas.place]}

    @property
    def _trained(self) -> list[torch.Tensor]:
        return [p for _, p, _ in self._parameters]

    @property
    def _state_tensors(self) -> list[torch.Tensor]:
        return self._trained + frozen_and_buffers(self.model)

    def _description(self) -> list[str]:
        lines = self.settings.lines() + [f"setting {name}={value!r}" for name, value in vars(self.distance).items()]
        lines += [f"{name} {tuple(p.shape)} {p.dtype} in group {index}" for name, p, index in self._parameters]
        return lines + [f"parameter or buffer {tuple(t.shape)} {t.dtype}" for t in exchanged_tensors(self.model)]

    def _connect(self) -> None:
        self._mail = None  # should connecting fail, nothing of an earlier one is left
        self._mail = open_mail(self.settings, self._replicas)
        self._peers = find_peers(
            self.settings, self._replicas, self._mail, self.model, self.distance, self._predictions_of
        )
        if self._loaded is None:
            warn_if_nothing_to_learn(self.settings, self._replicas, self._trained)

    def _predictions_of(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self._predictions(self._forward(model, batch))

    def _disconnect(self, at_once: bool) -> None:
        self._peers = None
        if self._mail is not None:
            self._mail.close(at_once)

    def _require_started(self) -> None:
        if self._gradients is None:
            raise RuntimeError(
                "Codistillation must be entered before it is used, but is not active. Use it as "
                "`with ... as codistillation:`, or call `start()` first."
            )

    def _require_all(self, what: str) -> None:
        self._require_started()
        lost = sorted(set(range(self._replicas.size)) - set(self.live_replicas))
        if lost:
            ranks = [self._replicas.outer.global_ranks[place] for place in lost]
            raise PeerError(f"{what} needs all replicas, but rank {ranks} is lost. Go on without it.", ranks)
