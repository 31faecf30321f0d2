"""Codistillation on any Trainer: a callback that adds the replicas' distance to the loss."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ...distributed.codistillation import Codistillation
from ...distributed.collectives import group_scope, rank, world_size
from ...distributed.falling_weight_decay import FallingWeightDecay
from ...distributed.subgroups import subgroup
from .codistillation_rules import check_averageable, check_codistillation
from .local_update import PerRankCallback, set_arguments
from .lost_replicas import name_lost_replica
from .replica_data import rows_shared_by
from .replica_evaluation import ReplicaEvaluation
from .replica_predictions import forward_for, initialize_anew, mask_for, origin_of, predictions_for
from .replica_publishing import check_metric, publish
from .sync_record import readable

logger = logging.get_logger(__name__)


class CodistillationCallback(PerRankCallback):
    """Trains by [`Codistillation`] on a Trainer with [`LocalUpdateTrainerMixin`]: replicas teach one another.

    Example:

    ```python
    class CodistillationTrainer(LocalUpdateTrainerMixin, Trainer):
        pass

    trainer = CodistillationTrainer(...)
    trainer.add_callback(CodistillationCallback(trainer, exchange="checkpoints", exchange_every=2500))
    trainer.train()
    ```

    **The loss** of a micro-batch is `compute_loss` plus [`Codistillation.loss`] of the model's last forward pass
    in it. With gradient accumulation the distance counts as its mean over the micro-batches, however the other loss is
    normalised. A label of -100 leaves its position out of the distance, of causal language models the one before it.

    **The data.** With `same_batch` every replica goes over *all* rows in the same order, so that an epoch has as many
    more updates as there are replicas; else all ranks share them, as ever.

    **The start.** Replicas begin with parameters of their own: replica r > 0 is drawn anew with seed + r after DDP has
    made all equal. Weights from a checkpoint (`from_pretrained`) are kept, with a warning.

    **Evaluations** while training: each rank evaluates its replica on all rows. Under the usual names are the first
    replica's metrics, `<metric>_replica_<r>` are the others'; all ranks get all of them. A low-shot
    evaluation is of each rank's own replica, too; the first one's is logged.

    **A checkpoint** holds the first replica as ever, and a `sync_state_<rank>.pt` for each rank: its model, optimizer,
    schedule and scaler, and the copies of its peers. A resumed run goes on bit for bit. With another number of ranks,
    or without these files, all replicas start from the first one's model.

    **At the end** all ranks take the replica that is published, and `codistillation.json` in `output_dir` names it.
    With `publish="average"` that is the first one, and each is saved as `replica_<r>` there, one after the other
    through rank 0, for which every rank keeps its own on the CPU. [`PredictionAverage`] loads them. With
    `compute_metrics`, the average is evaluated on the `eval_dataset`, too, in one more pass: `<metric>_average`.

    **Logged** with the loss (which is the mean over the ranks, distance and all), of this rank and since the last
    time: `codistillation_distance`, `codistillation_alpha`, `codistillation_staleness`, `sync_megabytes_sent`,
    `sync_seconds_waiting`.

    Args:
        trainer (`Trainer`): The trainer that the callback is added to, with [`LocalUpdateTrainerMixin`].
        exchange (`str`, *optional*, defaults to `"predictions"`): `"predictions"` or `"checkpoints"`.
        same_batch (`bool`, *optional*): Give all replicas the same batches; by default with predictions only. With
            predictions `False` means that you do it.
        inner_size (`int`, *optional*, defaults to 1): Ranks of one replica, that follow each other. Or give `group`
            and `inner_group`, the dimensions of a `DeviceMesh`.
        initialization (`str`, *optional*, defaults to `"own"`): `"own"` or `"same"` parameters to begin with. Weights
            that were loaded in another way than `from_pretrained` need `"same"`.
        reinitialize (`Callable[[nn.Module], None]`, *optional*): Initialises a model in place, such as the head of a
            pretrained one; by default as the model's class does.
        falling_weight_decay (`bool`, *optional*, defaults to `False`): [`FallingWeightDecay`] over the training.
        publish (`str`, *optional*, defaults to `"first"`): What the run ends with: the `"first"` replica, the `"best"`
            by `metric_for_best_model` (by default the loss) of an evaluation after the last update, or the
            `"average"` of their probabilities, of models with `logits` `(..., C)` of classes.
        log_parameter_distance (`bool`, *optional*, defaults to `False`): Log `codistillation_parameter_distance` too,
            which exchanges all parameters.
        mask (`Callable`, *optional*): batch -> positions that count, see [`Codistillation.loss`].
        settings: Of [`Codistillation`], such as `exchange_every`, `alpha`, `temperature`, `top_k`, `predictions`.

    Raises:
        ValueError: If a setting is outside of its rule, the trainer has another sync callback, a loss that is computed
            outside of the model, or two weight decay schedules.
        TypeError: If the trainer shards the model.
    """

    saves_model_of_each_rank = True

    def __init__(
        self,
        trainer: Trainer,
        *,
        exchange: str = "predictions",
        same_batch: bool | None = None,
        inner_size: int = 1,
        initialization: str = "own",
        reinitialize: Callable[[nn.Module], None] | None = None,
        falling_weight_decay: bool = False,
        publish: str = "first",
        log_parameter_distance: bool = False,
        mask: Callable[[Any], torch.Tensor] | None = None,
        **settings: Any,
    ):
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"`trainer` must be the Trainer that the callback is added to, but is a {type(trainer).__name__}. "
                "Build that first: `trainer.add_callback(CodistillationCallback(trainer))`."
            )
        super().__init__(trainer)
        if not hasattr(type(trainer), "per_rank_callback"):
            raise TypeError(
                "`trainer` must have the LocalUpdateTrainerMixin, through which the callback adds to the loss, but "
                f"{type(trainer).__name__} has not. Define `class MyTrainer(LocalUpdateTrainerMixin, "
                f"{type(trainer).__name__})`."
            )
        self.settings = {"exchange": exchange, **settings}
        self.same_batch = exchange == "predictions" if same_batch is None else same_batch
        self.inner_size, self.initialization, self.reinitialize = inner_size, initialization, reinitialize
        self.falling_weight_decay, self.publish = falling_weight_decay, publish
        self.log_parameter_distance, self.mask = log_parameter_distance, mask
        self._initialized = False
        check_codistillation(self)
        if self.settings.get("predictions") is None:
            self.settings["predictions"] = predictions_for(trainer.model)
        if self.settings.get("forward") is None:
            self.settings["forward"] = forward_for(trainer.model)
        Codistillation(trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=1.0), **self._core_settings(1))
        set_arguments(trainer)
        self._clear()

    # The ranks

    def _groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """One rank of each replica, and the ranks of this replica."""
        if "group" in self.settings or "inner_group" in self.settings:
            return self.settings.get("group"), self.settings.get("inner_group")
        ranks, size, own = world_size(), self.inner_size, rank()
        if size == 1:
            return None, None
        inner = subgroup(range(own - own % size, own - own % size + size), name="replica")
        return subgroup(range(own % size, ranks, size), name="replicas"), inner

    def _inner_place(self) -> tuple[int, int]:
        """Number of ranks of this replica, and this rank's place among them."""
        _, inner = self._groups()
        return (1, 0) if inner is None else (world_size(inner), rank(inner))

    @property
    def replica(self) -> int:
        """The place of this rank's replica."""
        return rank(self._groups()[0])

    @property
    def num_replicas(self) -> int:
        return world_size(self._groups()[0])

    # From the beginning to the end

    def _core_settings(self, total_steps: int) -> dict[str, Any]:
        settings = dict(self.settings)
        if self.falling_weight_decay:
            settings["weight_decay_schedule"] = FallingWeightDecay(total_steps)
        return settings

    def _clear(self) -> None:
        self._bytes_logged, self._seconds_logged = 0, 0.0
        self._distance, self._num_distances = 0.0, 0
        self.evaluation = ReplicaEvaluation(self)
        self._evaluation_loaders: dict[str, Any] = {}
        self._is_output_checked = False

    def begin(self) -> None:
        self._clear()
        check_metric(self)

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Codistillation:
        group, inner_group = self._groups()
        settings = self._core_settings(max(self.trainer.state.max_steps, 1))
        return Codistillation(model, optimizer, **{**settings, "group": group, "inner_group": inner_group})

    def settings_of(self, sync: Codistillation) -> dict[str, str]:
        distance = {name: repr(value) for name, value in vars(sync.distance).items()}
        return {"method": "Codistillation", **sync.settings.described(), **distance}

    def record(self) -> dict[str, Any] | None:
        if self.sync is None:
            return None
        sync, of_one_exchange = (
            self.sync,
            {"checkpoints": ("exchange_every", "transfer_steps"), "predictions": ("check_every",)},
        )
        others = next(names for exchange, names in of_one_exchange.items() if exchange != sync.settings.exchange)
        own = {name: value for name, value in dataclasses.asdict(sync.settings).items() if name not in others}
        schedule = self.settings.get("weight_decay_schedule")
        if self.falling_weight_decay or isinstance(schedule, FallingWeightDecay):
            schedule = "falling"
        values = {
            "replicas": self.num_replicas,
            "ranks_per_replica": self._inner_place()[0],
            "same_batch": self.same_batch,
            "initialization": self.initialization,
            "publish": self.publish,
            **own,
            **vars(sync.distance),
            "weight_decay_schedule": schedule,
        }
        return {"method": "Codistillation", **readable(values)}

    def initialize(self) -> None:
        if not self._initialized:
            self._initialize()
        self._initialized = True

    def _initialize(self) -> None:
        """Gives each replica but the first parameters of its own, the same on all of its ranks."""
        if self.initialization == "same" or self.num_replicas == 1:
            return
        model = self.trainer.model
        if self.reinitialize is None and origin_of(model):
            if self.trainer.is_world_process_zero():
                logger.warning(
                    f"The replicas all begin with the weights of '{origin_of(model)}', and differ only by "
                    "what they see. To draw the head anew in each, give `reinitialize`, a function that does it to a "
                    "model in place."
                )
            return
        if self.replica > 0:
            devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.trainer.args.seed + self.replica)
                with torch.no_grad():
                    (self.reinitialize or initialize_anew)(model)

    def finish(self, error: BaseException | None = None) -> None:
        """Publishes a replica and stops, if it still runs; `error` is what ended the training early."""
        if self.sync is None:
            return
        try:
            if error is None:
                publish(self)
            else:
                name_lost_replica(self.sync, error)
        except BaseException as failure:
            error = failure
            raise
        finally:
            sync, self.sync = self.sync, None
            sync.stop(error)

    # Within the trainer's methods

    def compute_loss(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, and in training the distance from the other replicas."""
        model = self.trainer.model
        if self.sync is None or not (torch.is_grad_enabled() and model.training):
            return original(*args, **kwargs)
        seen: list[tuple] = []
        # Only for now: a hook would be copied along with the model.
        hook = model.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
        try:
            result = original(*args, **kwargs)
        finally:
            hook.remove()
        if not seen:
            raise RuntimeError(
                "Codistillation compares what the model returned, but `compute_loss` did not call "
                f"`trainer.model`, a {type(model).__name__}. Call the model that `compute_loss` is given."
            )
        positional, named, output = seen[-1]
        if len(positional) > 1 or (positional and named):
            raise ValueError(
                "`compute_loss` must call the model with named arguments, or with a batch alone, but gave "
                f"{len(positional)} arguments by position and {sorted(named)}. Name them all."
            )
        batch = positional[0] if positional else {n: v for n, v in named.items() if n != "num_items_in_batch"}
        extra = self._distance_loss(output, batch)
        items = kwargs.get("num_items_in_batch", args[3] if len(args) > 3 else None)
        if self._is_scaled(items):
            extra = extra / self.trainer.current_gradient_accumulation_steps
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    def _distance_loss(self, output: Any, batch: Any) -> torch.Tensor:
        if self.publish == "average" and not self._is_output_checked:
            check_averageable(self.trainer.model, output)
            self._is_output_checked = True
        if self.mask is not None:
            mask = self.mask(batch)
        else:
            mask = mask_for(self.trainer.model, batch, self.settings["predictions"](output))
        extra = self.sync.loss(output, batch, mask)
        if extra.requires_grad:  # else there was nothing to compare with
            self._distance = self._distance + extra.detach() / self.sync.alpha_at(self.sync.steps)
            self._num_distances += 1
        return extra

    def _is_scaled(self, items: Any) -> bool:
        """Whether the trainer leaves the loss of a micro-batch as it is, because it is a part of the update's."""
        told = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        return told if told is not None else self.trainer.model_accepts_loss_kwargs and items is not None

    def get_train_dataloader(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The loader of the training, over the ranks that share its rows."""
        if not self.same_batch or self.num_replicas == 1:
            return original(*args, **kwargs)
        with rows_shared_by(self.trainer, *self._inner_place(), {}):
            return original(*args, **kwargs)

    def get_eval_dataloader(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """A loader of all rows while the ranks hold different models."""
        if self.sync is None or self.num_replicas == 1:
            return original(*args, **kwargs)
        with rows_shared_by(self.trainer, 1, 0, self._evaluation_loaders):
            return original(*args, **kwargs)

    def evaluation_loop(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Each replica's own evaluation."""
        if self.sync is None:
            return original(*args, **kwargs)
        return self.evaluation.of_each(original, *args, **kwargs)

    def evaluation_scope(self) -> AbstractContextManager:
        """Keeps an evaluation of the model inside of this rank while the ranks hold different ones."""
        if self.sync is None or self.num_replicas == 1:
            return nullcontext()
        return group_scope(subgroup([rank()], name="alone"))

    def images_per_update(self, original: Callable, *args: Any, **kwargs: Any) -> int:
        """Those of one replica, where each goes over all images."""
        return original(*args, **kwargs) // (self.num_replicas if self.same_batch else 1)

    def support_ranks(self, original: Callable) -> tuple[int, int]:
        """The ranks of one replica share a support, where all replicas must have the same."""
        if not self.same_batch or self.num_replicas == 1:
            return original()
        size, place = self._inner_place()
        return place, size

    def values_to_log(self, is_training_log: bool) -> dict[str, float]:
        """What to add to a log. Every rank must call it, if it is one of the training."""
        if self.sync is None or not is_training_log:
            return {}
        sent, waited = self.sync.bytes_sent, self.sync.seconds_waiting
        logs = {
            "codistillation_alpha": self.sync.alpha_at(max(self.sync.steps - 1, 0)),
            "sync_megabytes_sent": (sent - self._bytes_logged) / 1e6,
            "sync_seconds_waiting": waited - self._seconds_logged,
        }
        self._bytes_logged, self._seconds_logged = sent, waited
        if self._num_distances:
            logs["codistillation_distance"] = float(self._distance) / self._num_distances
            self._distance, self._num_distances = 0.0, 0
        if self.sync.staleness is not None:
            logs["codistillation_staleness"] = self.sync.staleness
        if self.log_parameter_distance:
            logs["codistillation_parameter_distance"] = self.sync.parameter_distance()
        return logs
