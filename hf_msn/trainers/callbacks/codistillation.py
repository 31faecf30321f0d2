"""Codistillation on a Trainer: a callback that adds the distance from the other replicas to the loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ...checks import check_choice, check_integer
from ...distributed.codistillation import Codistillation, call_model, logits_of
from ...distributed.collectives import group_scope, rank, world_size
from ...distributed.falling_weight_decay import FallingWeightDecay
from ...distributed.subgroups import subgroup
from ...files import write_json
from ...models.modeling_byol import BYOLForPreTraining
from ...models.modeling_msn import MSNForPreTraining
from ...models.modeling_paws import PAWSForPreTraining
from ...models.modeling_pretraining import TargetModel
from ...models.modeling_suncet import SuNCEtForPreTraining
from .local_update import PerRankCallback, readable

logger = logging.get_logger(__name__)


class CodistillationCallback(PerRankCallback):
    """Train by [`Codistillation`] on a Trainer with [`LocalUpdateTrainerMixin`]: the ranks are replicas.

    ```python
    class CodistillationTrainer(LocalUpdateTrainerMixin, Trainer):
        pass

    trainer = CodistillationTrainer(...)
    trainer.add_callback(CodistillationCallback(trainer, exchange="checkpoints", exchange_every=2500))
    trainer.train()
    ```

    **Loss** of a micro-batch: `compute_loss` plus [`Codistillation.loss`] of the last forward pass in it, a mean over
    the micro-batches of an update. Positions with label -100 do not count; for causal language models those before.

    **Data**: with `same_batch` every replica iterates over *all* rows in the same order, so that an epoch has as many
    more updates as there are replicas. Otherwise the ranks share the rows.

    **Initial parameters**: replica r > 0 is drawn again with seed + r, after DDP has made the ranks equal. Weights of
    a checkpoint (`from_pretrained`) are kept, with a warning.

    **Evaluation** during training: each replica is evaluated on all rows. The metrics of the first replica have the
    usual names, those of replica r are `<metric>_replica_<r>`; all ranks have all of them.

    **Checkpoints** hold the first replica, and all of each rank in `sync_state_<rank>.pt`. A resumed run is exact to
    the bit. With another number of ranks, or without these files, all replicas begin with the model of the first.

    **End**: all ranks take the replica that is published. `codistillation.json` in `output_dir` records which.

    **Logged** with the loss, for this rank and since the last time: `codistillation_distance`, `codistillation_alpha`,
    `codistillation_staleness`, `sync_megabytes_sent`, `sync_seconds_waiting`. The loss includes the distance.

    Args:
        trainer (`Trainer`): The trainer that the callback is added to.
        exchange (`str`, *optional*, defaults to `"predictions"`): `"predictions"` or `"checkpoints"`.
        same_batch (`bool`, *optional*): Give all replicas the same batches. By default with predictions only; there
            `False` means that the data set does it.
        inner_size (`int`, *optional*, defaults to 1): Consecutive ranks per replica. `group` and `inner_group` of a
            `DeviceMesh` may be passed instead.
        initialization (`str`, *optional*, defaults to `"own"`): `"own"` or `"same"` initial parameters. Weights that
            were not loaded by `from_pretrained` need `"same"`.
        reinitialize (`Callable[[nn.Module], None]`, *optional*): Initialises a model in place, such as the head of a
            pretrained one. By default as its class does.
        falling_weight_decay (`bool`, *optional*, defaults to `False`): Use [`FallingWeightDecay`].
        publish (`str`, *optional*, defaults to `"first"`): The replica that the run ends with: `"first"`, or `"best"`
            by `metric_for_best_model` (by default the loss) of an evaluation after the last update.
        mask (`Callable`, *optional*): batch -> positions that count, see [`Codistillation.loss`].
        settings: Of [`Codistillation`], such as `exchange_every`, `alpha`, `temperature`, `top_k`, `predictions`.

    Raises:
        ValueError: If a setting is outside of its rule, the trainer has another callback of this kind, hides the
            labels from the model, or has a weight decay schedule besides this one.
        TypeError: If the trainer lacks the mixin, or shards the model.
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
        mask: Callable[[Any], torch.Tensor] | None = None,
        **settings: Any,
    ):
        if not hasattr(type(trainer), "per_rank_callback"):
            name = type(trainer).__name__
            raise TypeError(
                f"`trainer` must be a Trainer with LocalUpdateTrainerMixin, but is a {name}. Define `class "
                f"MyTrainer(LocalUpdateTrainerMixin, {name if isinstance(trainer, Trainer) else 'Trainer'})`."
            )
        self.same_batch = exchange == "predictions" if same_batch is None else same_batch
        self.inner_size = check_integer("inner_size", inner_size, meaning="counts the ranks of a replica")
        self.initialization = check_choice("initialization", initialization, ("own", "same"))
        self.publish = check_choice("publish", publish, ("first", "best"))
        self.reinitialize, self.falling_weight_decay, self.mask = reinitialize, falling_weight_decay, mask
        self.group, self.inner_group = settings.pop("group", None), settings.pop("inner_group", None)
        self.settings = {"exchange": exchange, **settings}
        for name, default in (("predictions", predictions_for), ("forward", forward_for)):
            if self.settings.get(name) is None:
                self.settings[name] = default(trainer.model)
        self._check(trainer)
        if inner_size > 1:
            first, place = rank() - rank() % inner_size, rank() % inner_size
            self.inner_group = subgroup(range(first, first + inner_size), name="replica")
            self.group = subgroup(range(place, world_size(), inner_size), name="replicas")
        self.replica, self.num_replicas = rank(self.group), world_size(self.group)
        # The ranks of this replica, and the place of this one among them.
        inner = self.inner_group
        self._inner_ranks, self._inner_place = (1, 0) if inner is None else (world_size(inner), rank(inner))
        self._initialized = False
        super().__init__(trainer)
        if self.num_replicas > 1:  # rank 0 would read for the other replicas
            trainer.accelerator.dataloader_config.dispatch_batches = False

    def _check(self, trainer: Trainer) -> None:
        args = trainer.args
        if trainer.compute_loss_func is not None or args.label_smoothing_factor:
            hides = "label_smoothing_factor" if trainer.compute_loss_func is None else "compute_loss_func"
            raise ValueError(
                f"`{hides}` hides the labels from the model and must not be set with codistillation, but is "
                f"{getattr(trainer, hides, args.label_smoothing_factor)!r}. Compute the loss in the model."
            )
        if args.world_size % self.inner_size:
            raise ValueError(
                f"`inner_size` must divide the number of ranks, {args.world_size}, but is {self.inner_size}. Use 1 "
                "for one replica per rank."
            )
        if self.publish == "best" and (trainer.eval_dataset is None or args.load_best_model_at_end):
            raise ValueError(
                "`publish='best'` evaluates the replicas at the end: it needs an `eval_dataset`, and no "
                f"`load_best_model_at_end`, which is {args.load_best_model_at_end}."
            )
        metric, _ = _metric_of(args)
        if self.publish == "best" and trainer.compute_metrics is None and not metric.endswith("loss"):
            raise ValueError(
                f"`publish='best'` compares the replicas by '{metric}' (`metric_for_best_model`), but an evaluation "
                "without `compute_metrics` has the loss only. Pass `compute_metrics`."
            )
        has_schedule = self.falling_weight_decay or self.settings.get("weight_decay_schedule") is not None
        if has_schedule and getattr(args, "final_weight_decay", None) is not None:
            raise ValueError(
                "The weight decay can have one schedule, but has this one and `final_weight_decay`, which is "
                f"{args.final_weight_decay}. Set `final_weight_decay` to None."
            )
        is_known = self.reinitialize is not None or isinstance(trainer.model, PreTrainedModel)
        if args.world_size > self.inner_size and self.initialization == "own" and not is_known:
            raise ValueError(
                f"A {type(trainer.model).__name__} is no PreTrainedModel, so the callback cannot draw other initial "
                "parameters for each replica. Pass `reinitialize`, or `initialization='same'`."
            )

    # Beginning and end

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Codistillation:
        settings = {**self.settings, "group": self.group, "inner_group": self.inner_group}
        if self.falling_weight_decay:
            settings["weight_decay_schedule"] = FallingWeightDecay(max(self.trainer.state.max_steps, 1))
        return Codistillation(model, optimizer, **settings)

    def begin(self) -> None:
        super().begin()
        self._distance, self._num_distances = 0.0, 0
        self._evaluated_step, self._metrics = -1, []
        self._forget_loaders()

    def _forget_loaders(self) -> None:
        """Make evaluation loaders anew, also with persistent workers: other ranks share the rows from now on."""
        vars(self.trainer).pop("_eval_dataloaders", None)

    def initialize(self) -> None:
        if self._initialized:
            return
        self._initialized, model = True, self.trainer.model
        if self.initialization == "same" or self.num_replicas == 1:
            return
        if self.reinitialize is None and origin_of(model):
            if self.trainer.is_world_process_zero():
                logger.warning(
                    f"All replicas begin with the weights of '{origin_of(model)}'. To draw the head again in each, "
                    "pass `reinitialize`."
                )
        elif self.replica > 0:
            devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(self.trainer.args.seed + self.replica)
                (self.reinitialize or reinitialize)(model)

    def record(self) -> dict[str, Any] | None:
        sync = self.sync
        if sync is None:
            return None
        schedule = "falling" if self.falling_weight_decay else sync.weight_decay_schedule
        own = {**sync._settings(), "alpha": sync.alpha, "copies_device": sync.copies_device}
        if sync.exchange == "predictions":
            del own["exchange_every"], own["transfer_steps"]
        values = {
            "replicas": self.num_replicas,
            "ranks_per_replica": self._inner_ranks,
            "same_batch": self.same_batch,
            "initialization": self.initialization,
            "publish": self.publish,
            **own,
            "weight_decay_schedule": schedule,
        }
        return {"method": "Codistillation", **readable(values)}

    def wait_for_all(self) -> None:
        if self.sync is not None:
            self.sync.wait_for_all("a log, an evaluation or a checkpoint")

    bring_to_consensus = wait_for_all

    def finish(self, error: BaseException | None = None) -> None:
        if self.sync is None:
            return
        try:
            if error is None:
                self._publish()
        except BaseException as failure:
            error = failure
            raise
        finally:
            super().finish(error)
            self._forget_loaders()

    def _publish(self) -> None:
        """Make all ranks the published replica, and record which it is."""
        args, state = self.trainer.args, self.trainer.state
        published: dict[str, Any] = {"replicas": self.num_replicas, "published": 0, "publish": self.publish}
        if self.num_replicas > 1:
            if self.publish == "best":
                published |= self._best()
            self.sync.take_replica(published["published"])
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            published["checkpoint"] = Path(state.best_model_checkpoint).name
        if state.is_world_process_zero:
            published |= {"step": state.global_step, "settings": self.record()}
            write_json(Path(args.output_dir, "codistillation.json"), published)
        self.trainer.accelerator.wait_for_everyone()

    def _best(self) -> dict[str, Any]:
        name, is_greater_better = _metric_of(self.trainer.args)
        if self._evaluated_step != self.trainer.state.global_step:
            self.trainer.evaluate()
        if name not in self._metrics[0]:
            raise ValueError(
                f"`publish='best'` compares the replicas by '{name}' (`metric_for_best_model`), but the evaluation "
                f"has {', '.join(sorted(self._metrics[0]))}. Set `metric_for_best_model` to one of them."
            )
        values = [metrics[name] for metrics in self._metrics]
        best = (max if is_greater_better else min)(range(len(values)), key=values.__getitem__)
        return {"published": best, "metric": name, "values": values}

    # In place of methods of the trainer

    def compute_loss(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        model = self.trainer.model
        if self.sync is None or not (torch.is_grad_enabled() and model.training):
            return original(*args, **kwargs)
        calls: list[tuple] = []
        # Removed after the call: a hook would be copied with the model.
        hook = model.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        try:
            result = original(*args, **kwargs)
        finally:
            hook.remove()
        if not calls:
            raise RuntimeError(
                f"`compute_loss` must call `trainer.model`, a {type(model).__name__}, but did not. Call the model "
                "that it is given."
            )
        positional, named, output = calls[-1]
        if len(positional) > 1 or (positional and named):
            raise ValueError(
                "`compute_loss` must call the model with named arguments, or with one batch, but passed "
                f"{len(positional)} arguments by position and {sorted(named)}."
            )
        batch = positional[0] if positional else {n: v for n, v in named.items() if n != "num_items_in_batch"}
        extra = self._distance_loss(output, batch)
        if self._is_normalised(kwargs.get("num_items_in_batch", args[3] if len(args) > 3 else None)):
            extra = extra / self.trainer.current_gradient_accumulation_steps
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    def _distance_loss(self, output: Any, batch: Any) -> torch.Tensor:
        if self.mask is not None:
            mask = self.mask(batch)
        else:
            mask = mask_for(self.trainer.model, batch, self.settings["predictions"](output))
        extra = self.sync.loss(output, batch, mask)
        if extra.requires_grad:  # otherwise there is no distance yet
            self._distance = self._distance + extra.detach() / self.sync.alpha_at(self.sync.steps)
            self._num_distances += 1
        return extra

    def _is_normalised(self, items: Any) -> bool:
        """Return whether the losses of the micro-batches are summed over the update instead of averaged."""
        is_scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        return self.trainer.model_accepts_loss_kwargs and items is not None if is_scaled is None else is_scaled

    def get_train_dataloader(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self.same_batch or self.num_replicas == 1:
            return original(*args, **kwargs)
        with _as_ranks(self._inner_ranks, self._inner_place):
            return original(*args, **kwargs)

    def get_eval_dataloader(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        with self._as_one_rank():
            return original(*args, **kwargs)

    def evaluation_loop(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.sync is None:
            return original(*args, **kwargs)
        with self._as_one_rank():
            output = original(*args, **kwargs)
        self.wait_for_all()
        gathered: list = [(0, output.metrics)]
        if self.num_replicas > 1:
            gathered = [None] * world_size()
            dist.all_gather_object(gathered, (self.replica, output.metrics))
        by_replica = dict(reversed(gathered))  # of each replica the first rank
        step, replicas = self.trainer.state.global_step, range(self.num_replicas)
        # Several evaluation sets follow each other.
        earlier = self._metrics if self._evaluated_step == step else [{} for _ in replicas]
        self._evaluated_step, self._metrics = step, [{**earlier[place], **by_replica[place]} for place in replicas]
        metrics = dict(by_replica[0])
        for place in replicas[1:]:
            metrics |= {f"{name}_replica_{place}": value for name, value in by_replica[place].items()}
        return output._replace(metrics=metrics)

    def _as_one_rank(self) -> AbstractContextManager:
        """Return a context in which each rank evaluates its replica on all rows."""
        return nullcontext() if self.sync is None or self.num_replicas == 1 else _as_ranks(1, rank())

    def evaluation_scope(self) -> AbstractContextManager:
        if self.sync is None or self.num_replicas == 1:
            return nullcontext()
        return group_scope(subgroup([rank()], name="alone"))

    def images_per_update(self, original: Callable, *args: Any, **kwargs: Any) -> int:
        return original(*args, **kwargs) // (self.num_replicas if self.same_batch else 1)

    def support_ranks(self, original: Callable) -> tuple[int, int]:
        is_alone = not self.same_batch or self.num_replicas == 1
        return original() if is_alone else (self._inner_place, self._inner_ranks)

    def values_to_log(self, is_training_log: bool) -> dict[str, float]:
        if self.sync is None or not is_training_log:
            return {}
        logs = {"codistillation_alpha": self.sync.alpha_at(max(self.sync.steps - 1, 0)), **self.measure_exchanges()}
        if self._num_distances:
            logs["codistillation_distance"] = float(self._distance) / self._num_distances
            self._distance, self._num_distances = 0.0, 0
        if self.sync.staleness is not None:
            logs["codistillation_staleness"] = self.sync.staleness
        return logs


def _metric_of(args: Any) -> tuple[str, bool]:
    """Return the metric that decides which replica is the best, and whether a greater value is better."""
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    return name, not name.endswith("loss") if args.greater_is_better is None else args.greater_is_better


@contextmanager
def _as_ranks(size: int, place: int) -> Iterator[None]:
    """Let accelerate shard data loaders, seed workers and gather as if this rank were at `place` of `size` ranks."""
    states = [vars(PartialState()), vars(AcceleratorState())]
    before = [dict(state) for state in states]
    for state in states:
        state.update(num_processes=size, process_index=place, distributed_type=DistributedType.NO)
    try:
        yield
    finally:
        for state, own in zip(states, before):
            state.update(own)


def predictions_for(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """Return the function output -> predictions of a model. SuNCEt and BYOL, which predict no class, are refused.

    For MSN the log-assignments of the anchors to the prototypes, for PAWS the log-probabilities of the classes of the
    anchors, for other models the `logits`.
    """
    if isinstance(model, (BYOLForPreTraining, SuNCEtForPreTraining)):
        raise ValueError(
            f"Codistillation compares predictions of classes, but {type(model).__name__} makes none. Pass "
            "`predictions`, a function of the output."
        )
    return log_assignments_of if isinstance(model, (MSNForPreTraining, PAWSForPreTraining)) else logits_of


def log_assignments_of(output: Any) -> torch.Tensor:
    """Return log p of the anchors, `(V*B, C)`."""
    p = output["anchor_probabilities"]
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def forward_for(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """Return the function (copy, batch) -> output. A copy of MSN drops the patches that the model has dropped."""
    if not isinstance(model, TargetModel):
        return call_model

    def forward(copy: nn.Module, batch: Any) -> Any:
        if model._mask_draw is not None:
            seed, drawn = model._mask_draw  # counted by the forward pass of the model
            copy._mask_draw = (seed, drawn - 1)
        return call_model(copy, batch)

    return forward


def mask_for(model: nn.Module, batch: Any, predictions: torch.Tensor) -> torch.Tensor | None:
    """Return the positions with a label, `(B, L)`, of predictions `(B, L, C)`; `None` for other predictions."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if predictions.dim() != 3 or not torch.is_tensor(labels) or labels.shape != predictions.shape[:-1]:
        return None
    counts = labels != -100
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # predicts the next label
        counts = nn.functional.pad(counts[:, 1:], (0, 1))
    return counts


def origin_of(model: nn.Module) -> str:
    """Return the checkpoint that the weights, or those of the trunk, come from; an empty string if there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "trunk_from", None) or ""


@torch.no_grad()
def reinitialize(model: PreTrainedModel) -> None:
    """Draw the trainable parameters again, as the class of the model does."""
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(fresh[name])
    if isinstance(model, TargetModel):
        model.update_target(0.0)
