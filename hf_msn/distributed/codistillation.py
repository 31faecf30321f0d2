"""Codistillation: replicas that train separately and learn from each other's predictions."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_choice, check_integer, check_number
from .comm.exchange import Exchange, PeerError
from .comm.wire import checked_wire_dtype
from .gradient_sync import SyncObject, require_free
from .peer_checkpoints import PeerCheckpoints, exchanged_tensors
from .same_batch import batch_digest, compare_digests, event_digest
from .training_state import (
    compare_ranks,
    frozen_and_buffers,
    of_this_version,
    trainable_parameters,
)

_PROBED_UPDATES = (0, 1, 10, 100, 1000, 10000)  # after the burn-in, where the ranks compare alpha


class PredictionDistance:
    """D(own, peer) between predictions of shape `(..., C)`, with a gradient for the own ones only.

    With `kind="kl"`, temperature T, p = softmax(peer / T) and q = softmax(own / T), as a mean over positions:

        D = T^2 KL(p || q) = T^2 sum_c p_c (log p_c - log q_c)

    The factor T^2 keeps the scale of the gradients. Log-probabilities may be passed instead of logits.

    With `top_k`, a replica sends the k largest of its p and the log of the remaining mass. S being their classes:

        D = T^2 [ sum_{c in S} p_c (log p_c - log q_c) + p_rest (log p_rest - log q_rest) ]

    with p_rest = 1 - sum_{c in S} p_c and q_rest over the same S. It is a lower bound of the KL over all classes.

    With `kind="mse"`, as a mean over positions:

        D = 1/C sum_c (peer_c - own_c)^2

    Computed in float32, or in float64 for float64 predictions.
    """

    def __init__(self, kind: str = "kl", temperature: float = 1.0, top_k: int | None = None):
        self.kind = check_choice("distance", kind, ("kl", "mse"))
        self.temperature = check_number(
            "temperature", temperature, above=0.0, meaning="divides the logits before the softmax"
        )
        self.top_k = None if top_k is None else check_integer("top_k", top_k, meaning="counts the probabilities sent")
        if top_k is not None and kind != "kl":
            raise ValueError(f"`top_k` needs `distance='kl'`, but `distance` is {kind!r}. Leave `top_k` out.")

    @torch.no_grad()
    def pack(self, predictions: torch.Tensor, wire_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Return the tensors that a peer needs, those of floats in `wire_dtype`: the predictions, `(..., C)`.

        With `top_k` below C the log-probabilities of the k largest and of the rest, `(..., k + 1)`, and the classes,
        `(..., k)` of int32.
        """
        dtype = wire_dtype or predictions.dtype
        if self.top_k is None or self.top_k >= predictions.shape[-1]:
            return [predictions.detach().to(dtype).contiguous()]
        log_p = self._log_softmax(predictions)
        largest, classes = log_p.topk(self.top_k, dim=-1)
        return [torch.cat([largest, _log_of_rest(log_p, classes)], -1).to(dtype), classes.to(torch.int32)]

    def __call__(self, own: torch.Tensor, peer: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the distance between `own`, `(..., C)`, and the packed predictions of a peer, a scalar.

        Positions count where `mask`, `(...)`, is True (or not 0); by default all.
        """
        values = peer[0].detach().to(own.device)
        if self.kind == "mse":
            dtype = _precision(own)
            return _masked_mean((own.to(dtype) - values.to(dtype)).square().mean(-1), mask)
        log_q = self._log_softmax(own)
        if len(peer) == 1:
            log_p = self._log_softmax(values.to(log_q.dtype))
        else:
            classes = peer[1].to(own.device, torch.int64)
            log_q = torch.cat([log_q.gather(-1, classes), _log_of_rest(log_q, classes)], -1)
            log_p = values.to(log_q.dtype).log_softmax(-1)  # normalise again after rounding
        # p = 0 adds nothing, whatever q is.
        terms = torch.where(log_p > -float("inf"), log_p.exp() * (log_p - log_q), 0.0)
        return self.temperature**2 * _masked_mean(terms.sum(-1), mask)

    def _log_softmax(self, predictions: torch.Tensor) -> torch.Tensor:
        return nn.functional.log_softmax(predictions.to(_precision(predictions)) / self.temperature, dim=-1)


class Codistillation(SyncObject):
    """Train n replicas without averaging: each adds its distance from the predictions of the others to its loss.

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

    From [A Closer Look at Codistillation for Distributed Training](https://arxiv.org/abs/2010.02838). Replica i with
    predictions f_i follows the gradient of

        L(y, f_i(x)) + alpha_k / (n - 1) * sum_{j != i} D(f_i(x), sg f_j(x))

    at its k-th update, k = 0, 1, ...; sg stops the gradient and D is a [`PredictionDistance`].

    **`exchange="predictions"`**: `loss` sends the predictions for the batch, B * C numbers to each peer (with `top_k`
    B * (2k + 1)). All replicas must hold the same batch, which a digest of 16 bytes checks each time. Initialise the
    replicas differently, or they stay equal.

    **`exchange="checkpoints"`**: after update s = `burn_in_steps` + m `exchange_every`, s > 0, each replica sends its
    parameters and buffers in the background. They come into use in the copies of the peers exactly `transfer_steps`
    updates later; a rank that has not received them by then waits. Each replica has its own batches. The loss is 0
    until the first checkpoints are in use. See [`PeerCheckpoints`] for the memory.

    **Entering** (or `start`) compares shapes and settings between the ranks, and makes the ranks of an `inner_group`
    equal to its first rank. The replicas stay as they are, also on leaving (or `stop`). Gradients are averaged inside
    a replica only. DDP makes all ranks of its group equal: wrap over the inner group, or initialise after wrapping.

    Args:
        model (`nn.Module`): Plain, in `DistributedDataParallel` without `find_unused_parameters`, or compiled.
        optimizer (`torch.optim.Optimizer`): Or the wrapper of accelerate: calls of `step` during accumulation are not
            counted.
        exchange (`str`, *optional*, defaults to `"predictions"`): `"predictions"` or `"checkpoints"`.
        exchange_every (`int`, *optional*, defaults to 2500): Updates between two checkpoints, >= 1.
        transfer_steps (`int`, *optional*): Updates between sending and using a checkpoint, in [0, exchange_every]. By
            default a tenth of `exchange_every`.
        alpha (`float` or `Callable[[int], float]`, *optional*, defaults to 1.0): Weight of the distance, >= 0, or a
            function of the number of updates, the same on all ranks. A large alpha needs a smaller learning rate.
        ramp_steps (`int`, *optional*, defaults to 0): Updates over which alpha rises from 0, after the burn-in.
        burn_in_steps (`int`, *optional*, defaults to 0): First updates, with alpha 0 and without exchange.
        distance (`str`, *optional*, defaults to `"kl"`): `"kl"` or `"mse"`, see [`PredictionDistance`].
        temperature (`float`, *optional*, defaults to 1.0): Temperature of the softmax of `"kl"`, > 0.
        top_k (`int`, *optional*): Number of probabilities to send per prediction, with `exchange="predictions"` and
            `"kl"`. By default all.
        predictions (`Callable`, *optional*): output -> logits or log-probabilities `(..., C)`. By default the output's
            `logits`, or the output itself if it is a tensor.
        forward (`Callable`, *optional*): (copy, batch) -> output, for checkpoints. By default `copy(**batch)` for a
            mapping, `copy(batch)` otherwise.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, of the predictions sent. By default their own.
        copies_dtype (`str`, *optional*): `"bfloat16"` for checkpoints and copies. By default that of the model.
        copies_device (`str`, *optional*): `"cpu"` to keep copies there between forward passes.
        weight_decay_schedule (`Callable[[int], float]`, *optional*): Number of updates -> factor of the weight decay
            of each parameter group, such as [`FallingWeightDecay`]. Leaving restores the initial weight decay.
        group (`ProcessGroup`, *optional*): One rank of each replica; by default all ranks.
        inner_group (`ProcessGroup`, *optional*): The ranks of this replica; `group` and `inner_group` are dimensions
            of a `DeviceMesh`. With predictions, ranks at the same place in their replicas hold the same batch.
        timeout_seconds (`float`, *optional*): How long an exchange waits for a replica before it is reported as lost.
            It must cover the lag between replicas, evaluations included.

    Attributes:
        steps (`int`): Number of updates.
        distance_of_predictions (`float`, *optional*): The last mean of D over the peers, without alpha.

    Raises:
        ValueError: If a setting is outside of its rule, the model or the optimizer is in use by another method, the
            shapes or settings of the ranks differ, or (in `loss`) their batches do.
        TypeError: If the model or the optimizer is sharded (FSDP, DeepSpeed, tensor parallelism).
        PeerError: If a replica died, is silent for too long or, with predictions, takes fewer steps. It has its ranks.
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
        wire_dtype: str | None = None,
        copies_dtype: str | None = None,
        copies_device: str | None = None,
        weight_decay_schedule: Callable[[int], float] | None = None,
        group: dist.ProcessGroup | None = None,
        inner_group: dist.ProcessGroup | None = None,
        timeout_seconds: float | None = None,
    ):
        self.exchange = check_choice("exchange", exchange, ("predictions", "checkpoints"))
        self.exchange_every = check_integer(
            "exchange_every", exchange_every, meaning="counts updates", remedy="The paper uses 2500."
        )
        transfer_steps = exchange_every // 10 if transfer_steps is None else transfer_steps
        self.transfer_steps = check_integer("transfer_steps", transfer_steps, 0, meaning="counts updates")
        if transfer_steps > exchange_every:
            raise ValueError(
                f"`transfer_steps` must be <= `exchange_every`, here {exchange_every}, but is {transfer_steps}. Leave "
                "it out for a tenth."
            )
        self.alpha = alpha if callable(alpha) else _check_alpha(alpha)
        self.ramp_steps = check_integer("ramp_steps", ramp_steps, 0, meaning="counts updates")
        self.burn_in_steps = check_integer("burn_in_steps", burn_in_steps, 0, meaning="counts updates")
        self.distance = PredictionDistance(distance, temperature, top_k)
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self.copies_dtype = check_choice("copies_dtype", copies_dtype, (None, "bfloat16"))
        self.copies_device = check_choice("copies_device", copies_device, (None, "cpu"))
        if exchange == "checkpoints" and (top_k is not None or wire_dtype is not None):
            name, value = ("wire_dtype", wire_dtype) if top_k is None else ("top_k", top_k)
            raise ValueError(
                f"`{name}` is for predictions and must be None with `exchange='checkpoints'`, but is {value!r}. "
                "`copies_dtype='bfloat16'` halves the bytes of checkpoints."
            )
        super().__init__(model, optimizer)
        if weight_decay_schedule is not None and any("weight_decay" not in g for g in self.optimizer.param_groups):
            raise ValueError(
                "`weight_decay_schedule` needs a `weight_decay` in each parameter group of the optimizer, but "
                f"{type(self.optimizer).__name__} has a group without. Use AdamW, or leave the schedule out."
            )
        self.weight_decay_schedule = weight_decay_schedule
        self._predictions, self._forward = predictions or logits_of, forward or call_model
        self._exchange = Exchange(group, timeout_seconds)
        self._inner = None if inner_group is None else Exchange(inner_group, timeout_seconds)
        self._last_distance: torch.Tensor | None = None
        self._checkpoints: PeerCheckpoints | None = None
        self._state: dict[str, Any] | None = None  # loaded before `start`

    # Loss and step

    def alpha_at(self, step: int) -> float:
        """Return alpha_k for k = `step`: 0 in the burn-in, then rising over the ramp."""
        if step < self.burn_in_steps:
            return 0.0
        alpha = _check_alpha(self.alpha(step)) if callable(self.alpha) else self.alpha
        return alpha * (min(1.0, (step - self.burn_in_steps) / self.ramp_steps) if self.ramp_steps else 1.0)

    def loss(self, output: Any, batch: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return alpha_k / (n - 1) * sum_{j != i} D(f_i(x), sg f_j(x)), to be added to the loss.

        It is exactly 0, and nothing is exchanged, if alpha_k is 0, there is one replica, gradients are disabled, or no
        checkpoint is in use yet. With predictions all replicas must call it equally often.

        Args:
            output: The output of the model for the batch.
            batch: The input of the model, see `forward`.
            mask (`torch.Tensor` of shape `(...)`, *optional*): The positions that count, for predictions `(..., C)`;
                for a causal language model `nn.functional.pad(labels[:, 1:] != -100, (0, 1))`.

        Returns:
            `torch.Tensor`: A scalar.
        """
        self._require_started()
        own = _check_predictions(self._predictions(output))
        alpha = self.alpha_at(self.steps)
        is_off = alpha == 0.0 or self._exchange.size == 1 or not torch.is_grad_enabled()
        distances = [] if is_off else [self.distance(own, peer, mask) for peer in self._peer_predictions(own, batch)]
        if not distances:
            return torch.zeros((), device=own.device)
        mean = sum(distances) / len(distances)
        self._last_distance = mean.detach()
        return alpha * mean

    def step(self) -> None:
        """Count an update, and send or use checkpoints when they are due. Call it after `optimizer.step()`."""
        if self._count_step() and self._checkpoints is not None:
            if self._is_snapshot_step(self.steps):
                self._checkpoints.send(self.steps)
            if self._is_snapshot_step(self.steps - self.transfer_steps):
                self._checkpoints.use(self.steps - self.transfer_steps)

    def _is_snapshot_step(self, step: int) -> bool:
        if self.alpha == 0.0 or step < max(self.burn_in_steps, 1):
            return False
        return (step - self.burn_in_steps) % self.exchange_every == 0

    @torch.no_grad()
    def _peer_predictions(self, own: torch.Tensor, batch: Any) -> list[list[torch.Tensor]]:
        """Return the packed predictions of each peer for the batch, in the order of the replicas."""
        if self._checkpoints is not None:
            return [[self._predictions(output)] for output in self._checkpoints.outputs(batch, self._forward)]
        packed = self.distance.pack(own, self._wire_dtype)
        compare_digests(self._exchange, batch_digest(batch, packed[0].device))
        gathered = []
        for tensor in packed:
            flat = tensor.new_empty(self._exchange.size * tensor.numel())
            self._exchange.gather_(flat, tensor.reshape(-1))
            gathered.append(flat.view(self._exchange.size, *tensor.shape))
        return [list(parts) for place, parts in enumerate(zip(*gathered)) if place != self._exchange.rank]

    # Measures, and the end of training

    @property
    def distance_of_predictions(self) -> float | None:
        return None if self._last_distance is None else self._last_distance.item()

    @property
    def staleness(self) -> int | None:
        """Number of updates since the checkpoints in use were taken; `None` if there are none."""
        taken = None if self._checkpoints is None else self._checkpoints.step
        return None if taken is None else self.steps - taken

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has sent, see [`Exchange`], without the gradients that DDP averages."""
        return sum(part.bytes_sent for part in (*self._exchanges, self._checkpoints) if part is not None)

    @property
    def seconds_waiting(self) -> float:
        """Seconds that this rank has spent in exchanges, or waiting for checkpoints."""
        return sum(part.seconds_waiting for part in (*self._exchanges, self._checkpoints) if part is not None)

    def take_replica(self, place: int) -> None:
        """Replace parameters and buffers by those of the replica at `place`. All ranks must call it."""
        self.wait_for_all(f"replica {place}")
        take = partial(Exchange.broadcast_, place=place)
        self._exchange_in_place(take, self._own_tensors, [self._exchange])

    def wait_for_all(self, event: str) -> None:
        """Wait until all replicas come to the same event, such as a collective of others that has no deadline.

        Raises:
            PeerError: If a replica has not come after `timeout_seconds`, or comes to another event.
        """
        self._require_started()
        for exchange in self._exchanges:
            compare_digests(exchange, event_digest(event, self._device))

    # Entering and leaving

    def start(self) -> "Codistillation":
        """Enter. To resume a run, also call `load_state_dict`, before or after."""
        require_free(self.model, self.optimizer)
        parameters = trainable_parameters(self.model, self.optimizer)
        self._trained = [parameter for _, parameter, _ in parameters]
        self._device = self._trained[0].device
        groups = [] if self.weight_decay_schedule is None else self.optimizer.param_groups
        self._initial_weight_decay = [group["weight_decay"] for group in groups]
        try:
            for exchange in self._exchanges:
                exchange.check_devices(self._own_tensors)
                compare_ranks(exchange, self._description(parameters), self._device)
            if self._inner is not None and self._state is None:
                self._exchange_in_place(Exchange.broadcast_, self._own_tensors, [self._inner])
            if self._exchange.size == 1:
                warnings.warn("Codistillation has one replica only and changes nothing.", stacklevel=2)
            elif self.exchange == "checkpoints":
                inner_group = None if self._inner is None else self._inner.group
                dtype = None if self.copies_dtype is None else torch.bfloat16
                self._checkpoints = PeerCheckpoints(self.model, self._exchange, inner_group, dtype, self.copies_device)
                self._checkpoints.connect()
            elif self._state is None:
                self._warn_if_equal()
            self._add_hooks(self._trained, self._before_update)  # after the copies, which would have them too
            self._gradients.keep_local()
            if self._state is not None:
                self._restore()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """Leave. `error` is the exception that ended the training, if any: then no replica is waited for."""
        self._require_started()
        try:
            if error is None and self.exchange == "predictions" and self.alpha != 0.0:
                self.wait_for_all("the end")  # others may wait for the predictions of this rank
        except PeerError as failure:
            error = failure
            raise
        finally:
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._remove_hooks()
        self._scale_weight_decay(1.0)
        if self._checkpoints is not None:
            self._checkpoints.close(wait=error is None)
        if error is None:
            self._calls.check(is_last=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of *this rank* for a resume that is exact to the bit. Save it on each rank.

        With checkpoints it holds the copies in use, and waits for those in transfer: up to 2 (n - 1) models.
        """
        self._require_started()
        return {
            **self._origin,
            "steps": self.steps,
            "initial_weight_decay": self._initial_weight_decay,
            "checkpoints": None if self._checkpoints is None else self._checkpoints.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that this rank saved, before or after `start`.

        Raises:
            ValueError: If it is from another exchange, rank, number of ranks or model.
        """
        found = {name: state.get(name) for name in self._origin}
        if found != self._origin:
            raise ValueError(
                f"A state must come from {self._origin}, but comes from {found}. To resume otherwise, load the models "
                "only."
            )
        with of_this_version():
            self.steps, self._state = state["steps"], state
        if self._gradients is not None:
            self._restore()

    def _restore(self) -> None:
        state, self._state = self._state, None
        with of_this_version():
            self._initial_weight_decay = state["initial_weight_decay"]
            if self._checkpoints is not None:
                self._checkpoints.load_state(state["checkpoints"])

    # Internals

    @property
    def _own_tensors(self) -> list[torch.Tensor]:
        return self._trained + frozen_and_buffers(self.model)

    @property
    def _origin(self) -> dict[str, Any]:
        return {"method": type(self).__name__, "exchange": self.exchange, "ranks": list(self._place)}

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks."""
        names = ("exchange", "exchange_every", "transfer_steps", "ramp_steps", "burn_in_steps")
        return {
            **{name: getattr(self, name) for name in names},
            "alpha": [self.alpha_at(self.burn_in_steps + step) for step in _PROBED_UPDATES],
            "wire_dtype": self.wire_dtype,
            "copies_dtype": self.copies_dtype,
            "distance": self.distance.kind,
            "temperature": self.distance.temperature,
            "top_k": self.distance.top_k,
        }

    def _description(self, parameters: list[tuple[str, torch.Tensor, int | None]]) -> list[str]:
        """Return the lines that must be equal on all ranks."""
        lines = [f"setting {name}={value!r}" for name, value in self._settings().items()]
        lines += [f"{name} {tuple(p.shape)} {p.dtype} in group {index}" for name, p, index in parameters]
        return lines + [f"parameter or buffer {tuple(t.shape)} {t.dtype}" for t in exchanged_tensors(self.model)]

    def _before_update(self) -> None:
        if self.weight_decay_schedule is not None:
            self._scale_weight_decay(self.weight_decay_schedule(self.steps))

    def _scale_weight_decay(self, factor: float) -> None:
        for group, initial in zip(self.optimizer.param_groups, self._initial_weight_decay):
            group["weight_decay"] = factor * initial

    def _warn_if_equal(self) -> None:
        sums = [parameter.detach().abs().double().sum().item() for parameter in self._trained]
        if self._exchange.texts_that_differ(repr(sums), self._device) is None:
            warnings.warn(
                "All replicas have the same parameters and see the same batches: apart from dropout they stay equal "
                "and learn nothing. Initialise each with its own seed, after DDP.",
                stacklevel=3,
            )


def logits_of(output: Any) -> torch.Tensor:
    """Return the `logits` of a model output, or the output itself if it is a tensor."""
    if torch.is_tensor(output):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"The output of the model must have `logits`, but is a {type(output).__name__} without. Pass "
            "`predictions`, a function of the output that returns logits or log-probabilities of shape (..., C)."
        )
    return logits


def call_model(model: nn.Module, batch: Any) -> Any:
    """Return `model(**batch)` for a mapping, `model(batch)` otherwise."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _check_predictions(predictions: Any) -> torch.Tensor:
    if torch.is_tensor(predictions) and predictions.is_floating_point() and predictions.dim() > 0:
        return predictions
    found = (predictions.dtype, predictions.shape) if torch.is_tensor(predictions) else type(predictions).__name__
    raise ValueError(f"`predictions` must return floating-point logits of shape (..., C), but returned {found}.")


def _check_alpha(alpha: Any) -> float:
    return check_number("alpha", alpha, minimum=0.0, meaning="is the weight of the distance between replicas")


def _log_of_rest(log_p: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    # Not -inf: the gradient would be NaN if the rest has no mass.
    return log_p.scatter(-1, classes, torch.finfo(log_p.dtype).min).logsumexp(-1, keepdim=True)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(
            f"`mask` must have the shape of the predictions without the classes, {tuple(values.shape)}, but has "
            f"{tuple(mask.shape)}."
        )
    mask = mask.to(values.device).bool()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _precision(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
