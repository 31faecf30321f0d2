"""Training with little communication on any Trainer: callbacks that forward its events to a sync object."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback
from transformers.utils import logging

from ...distributed.async_gossip import AsyncGossip
from ...distributed.comm.exchange import PeerError
from ...distributed.diloco import DiLoCo
from ...distributed.gossip import Gossip
from ...distributed.local_sgd import LocalSGD
from ...distributed.local_update import LocalUpdate
from ...distributed.noloco import NoLoCo
from ...distributed.overlap_gossip import OverlapGossip
from ...distributed.slowmo import SlowMo
from ...distributed.streaming_diloco import StreamingDiLoCo
from ...distributed.topology import Topology
from .sync_state import has_weights_of, load_rank_state, load_renamed_weights, restore_rank_state, save_rank_state

logger = logging.get_logger(__name__)

# names of settings in recipes, where they differ
_NAMES = {
    "method": "async_method",
    "outer_lr": "noloco_lr",
    "outer_momentum": "noloco_momentum",
    "pull": "noloco_pull",
    "delay": "fragment_delay",
}


class PerRankCallback(TrainerCallback):
    """Base of the callbacks under which each rank of a Trainer trains parameters of its own.

    It makes a sync object when the training begins, calls `step` after every update, logs, saves and restores the
    state of each rank, and stops the sync object before the best model is loaded and before `on_train_end` of any
    other callback. `LocalUpdateTrainerMixin` calls the other methods where an event comes too late.
    """

    saves_model_of_each_rank = False
    takes_shards = False  # whether FSDP2 may shard a replica

    def __init__(self, trainer: Trainer):
        check_trainer(self, trainer)
        self.trainer = trainer
        self.sync: Any = None
        self.checkpoint: str | None = None  # set by LocalUpdateTrainerMixin
        self._saved_step = -1
        self._last_callback = _ConsensusCallback(self)
        present = find_per_rank_callback(trainer)
        if present is not None:
            raise _too_many(present, self)
        refuse_unsupported(trainer, self.takes_shards)
        # Raises for a wrong setting now, not when the training begins.
        self.make_sync(trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=1.0))
        set_arguments(trainer)
        self.begin()

    # Defined by each method

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Return the sync object of a model and its optimizer, not started."""
        raise NotImplementedError

    def settings_of(self, sync: Any) -> dict[str, str]:
        """Return the method and its settings as text. A resumed run must have the same."""
        return {"method": type(sync).__name__, **{name: repr(value) for name, value in sync._settings().items()}}

    def record(self) -> dict[str, Any] | None:
        """Return the method, under `method`, and its settings as values for JSON; `None` outside of training."""
        raise NotImplementedError

    def values_to_log(self, is_training_log: bool) -> dict[str, float]:
        """Return the values to add to a log. Every rank must call it if the log is one of the training loss."""
        return {}

    def bring_to_consensus(self) -> None:
        """Make the models of all ranks equal, if the method does so. Every rank must call it."""

    def wait_for_all(self) -> None:
        """Wait until all ranks are there, with the deadline of the method: the Trainer has a longer one."""

    def evaluation_scope(self) -> AbstractContextManager:
        """Return a context for an evaluation that shares its work over the ranks."""
        return nullcontext()

    def begin(self) -> None:
        """Prepare for a training, new or resumed."""
        self._bytes_logged, self._seconds_logged = 0, 0.0

    def initialize(self) -> None:
        """Prepare the model of a training that is not resumed."""

    def _call(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    # Called by LocalUpdateTrainerMixin in place of a method of the trainer, which is `original`.
    compute_loss = get_train_dataloader = get_eval_dataloader = evaluation_loop = _call
    images_per_update = support_ranks = _call

    # Events

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if find_per_rank_callback(trainer) is not self:
            name = type(self).__name__
            raise ValueError(
                f"{name} must be added to the trainer that it was built with, but is on another one. Use one trainer: "
                f"`trainer.add_callback({name}(trainer))`."
            )
        self.finish(RuntimeError("The training before was interrupted."))  # no event reports an error
        self._order_callbacks()
        self._saved_step = -1
        self.begin()
        sync = self.make_sync(trainer.model_wrapped, trainer.optimizer)
        saved = None
        if state.global_step > 0:
            checkpoint = self._find_checkpoint(args, state)
            load_renamed_weights(trainer, checkpoint)
            saved = load_rank_state(trainer, self.settings_of(sync), checkpoint)
        else:
            self.initialize()
        if saved is not None:
            restore_rank_state(trainer, sync, saved)
        else:
            sync.steps = state.global_step
        self.sync = sync.start()
        if state.is_world_process_zero:
            values = self.record()
            method = f"{values.pop('method')} on {args.world_size} rank{'s' if args.world_size > 1 else ''}"
            logger.info(f"{method}: {', '.join(f'{name}={value}' for name, value in values.items())}")

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.sync is None:
            raise RuntimeError(
                f"{type(self).__name__} must be on its trainer when the training begins, but was added later. Add it "
                "before `trainer.train()`."
            )
        self.sync.step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = self.values_to_log("loss" in logs)
        if values:
            logs.update(values)
            state.log_history[-1].update(values)
        if args.load_best_model_at_end and "train_runtime" in logs:  # the last event before the best model is loaded
            self.finish()

    def on_save(self, args, state, control, **kwargs):
        if not args.save_only_model and self._saved_step != state.global_step:
            self.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()
        handler = self.trainer.callback_handler
        handler.callbacks = [one for one in handler.callbacks if one is not self._last_callback]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_renamed_weights(self.trainer, state.best_model_checkpoint)

    def measure_exchanges(self) -> dict[str, float]:
        """Return what this rank has sent, and how long it has waited, since the last call."""
        sent, waited = self.sync.bytes_sent, self.sync.seconds_waiting
        values = {
            "sync_megabytes_sent": (sent - self._bytes_logged) / 1e6,
            "sync_seconds_waiting": waited - self._seconds_logged,
        }
        self._bytes_logged, self._seconds_logged = sent, waited
        return values

    # Also called by LocalUpdateTrainerMixin

    def save(self, folder: str | Path) -> None:
        """Write the state of this rank into a checkpoint."""
        if self.sync is not None:
            settings = self.settings_of(self.sync)
            save_rank_state(self.trainer, self.sync, settings, folder, self.saves_model_of_each_rank)
            self._saved_step = self.trainer.state.global_step

    def finish(self, error: BaseException | None = None) -> None:
        """Stop the sync object, if it runs. `error` is the exception that ended the training early."""
        sync, self.sync = self.sync, None
        if sync is not None:
            sync.stop(error)

    def _order_callbacks(self) -> None:
        """Move this callback behind the one that asks for evaluations and checkpoints, and a second one to the end.

        The first acts before a target encoder is updated; the second sees the requests of every other callback.
        """
        handler = self.trainer.callback_handler
        others = [one for one in handler.callbacks if one is not self and one is not self._last_callback]
        place = next((i for i, one in enumerate(others, 1) if isinstance(one, DefaultFlowCallback)), 0)
        # A new list: the handler is in a loop over the old one.
        handler.callbacks = [*others[:place], self, *others[place:], self._last_callback]

    def _find_checkpoint(self, args, state) -> Path:
        """Return the checkpoint that the Trainer resumes from. It does not tell callbacks which one it is."""
        if self.checkpoint is not None:
            return Path(self.checkpoint)
        named = args.resume_from_checkpoint
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if isinstance(named, str) and Path(named).is_dir():
            checkpoint = Path(named)
        if not has_weights_of(checkpoint, self.trainer.model):
            raise ValueError(
                f"The model was resumed at step {state.global_step} from another checkpoint than "
                f"'{checkpoint}'. Set `args.resume_from_checkpoint` to its folder, or derive the trainer "
                "from `LocalUpdateTrainerMixin`."
            )
        return checkpoint


class _ConsensusCallback(TrainerCallback):
    """Brings the ranks to consensus before an evaluation or a checkpoint that any callback asked for.

    Before a log, in which the Trainer gathers the loss, it only waits for all ranks.
    """

    def __init__(self, callback: PerRankCallback):
        self._callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self._callback.bring_to_consensus()
        elif control.should_log:
            self._callback.wait_for_all()

    on_epoch_end = on_step_end


class LocalUpdateCallback(PerRankCallback):
    """Trains by a [`LocalUpdate`] on any `transformers.Trainer`: each rank takes local steps between exchanges.

    ```python
    trainer.add_callback(SlowMoCallback(trainer, sync_every=12, slow_momentum=0.6))
    ```

    **All ranks come to consensus** before the evaluations and checkpoints of the Trainer, once per update. For another
    use of the model call [`bring_to_consensus`] on every rank, or derive the trainer from [`LocalUpdateTrainerMixin`].

    **A checkpoint** has a `sync_state_<rank>.pt` per rank. A resumed run continues bit for bit, also inside a period.
    With another number of ranks, or without these files, it starts from the consensus that the checkpoint holds.

    **Logged** with the loss, for this rank and since the last time: `sync_megabytes_sent`, `sync_seconds_waiting`. And
    `sync_consensus_distance`, measured before each consensus, with the next log.

    **Settings.** The loss is normalised by the items of the rank alone (`average_tokens_across_devices` off).
    `dispatch_batches` and DDP's search for unused parameters, for which the ranks would wait at every step, are turned
    off unless asked for explicitly.

    **Sharded replicas.** With `TrainingArguments(fsdp=True, fsdp_config={"fsdp_version": 2},
    parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=4))`, which is hybrid sharding without the
    callback, FSDP2 shards and averages gradients inside a replica only, and the method runs between the replicas. It
    holds from the making of the callback on, added or not.

    Args:
        trainer (`Trainer`): The trainer that the callback is added to.
        method_class (`Callable[..., LocalUpdate]`): Called with model, optimizer and `settings`.
        log_consensus_distance (`bool`, *optional*, defaults to `False`): Measure the consensus distance with every log
            of the loss too, which exchanges all parameters.
        settings: Settings of the method, such as `sync_every`.

    Raises:
        ValueError: If a setting is outside of its rule, `on_lost_rank` is not `"raise"`, the trainer has another sync
            callback, or its supports are split by class over several ranks.
        TypeError: If the trainer shards the model: FSDP1, DeepSpeed, tensor, sequence or context parallelism; FSDP2
            except for [`LocalSGD`], [`SlowMo`], [`DiLoCo`] and [`StreamingDiLoCo`] with a `dp_replicate_size` over 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        method_class: Callable[..., LocalUpdate],
        *,
        log_consensus_distance: bool = False,
        **settings: Any,
    ):
        if settings.get("on_lost_rank", "raise") != "raise":
            raise ValueError(
                "`on_lost_rank` must be 'raise' under a Trainer, which needs all ranks when it logs or saves, but is "
                f"{settings['on_lost_rank']!r}. Let `torchrun --max-restarts` start the ranks again from the last "
                "checkpoint, or go on without the lost ones in a loop of your own."
            )
        self.method_class, self.settings = method_class, settings
        self.takes_shards = getattr(method_class, "takes_shards", False)
        self.log_consensus_distance = log_consensus_distance
        super().__init__(trainer)

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LocalUpdate:
        return self.method_class(model, optimizer, **self._groups(), **self.settings)

    def _groups(self) -> dict[str, dist.ProcessGroup]:
        """Return the group between replicas that accelerate's FSDP2 shards."""
        if not self.trainer.is_fsdp_enabled or "group" in self.settings:
            return {}
        return {"group": shard_inside_replicas(self.trainer)}

    def settings_of(self, sync: LocalUpdate) -> dict[str, str]:
        described, base = super().settings_of(sync), getattr(sync, "base", None)
        if base is not None:
            described |= {f"base {name}": value for name, value in self.settings_of(base).items()}
        return described

    def record(self) -> dict[str, Any] | None:
        return None if self.sync is None else _record(self.sync)

    def begin(self) -> None:
        super().begin()
        self._at_consensus = True
        self._distance: float | None = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        super().on_optimizer_step(args, state, control, **kwargs)
        self._at_consensus = False
        self._require_all_ranks()

    def wait_for_all(self) -> None:
        if self.sync is not None:
            self.sync.wait_for_all("a log")

    def _require_all_ranks(self) -> None:
        if absent := self.sync.absent_ranks:
            raise PeerError(
                f"A Trainer needs all ranks, when it logs for example, but {absent} died, left or were silent for "
                f"`timeout_seconds`. See their logs, and resume from the last checkpoint. In a loop of your own "
                f"{type(self.sync).__name__} goes on without them.",
                absent,
            )

    def on_evaluate(self, args, state, control, **kwargs):
        self._warn_if_apart("evaluated")

    on_predict = on_evaluate

    def on_save(self, args, state, control, **kwargs):
        self._warn_if_apart("saved")
        super().on_save(args, state, control, **kwargs)

    def _warn_if_apart(self, use: str) -> None:
        if self.sync is not None and not self._at_consensus and self.trainer.args.world_size > 1:
            logger.warning(
                f"At step {self.trainer.state.global_step} the model was {use} before the ranks came to consensus: no "
                "event announces a direct call. Call `bring_to_consensus(trainer)` before it, or derive the trainer "
                "from `LocalUpdateTrainerMixin`."
            )

    def bring_to_consensus(self) -> None:
        if self.sync is None or self._at_consensus:
            return
        if self.trainer.args.world_size > 1:
            self._distance = self.sync.consensus_distance()
        self.sync.sync()
        self._at_consensus = True
        self._require_all_ranks()

    def values_to_log(self, is_training_log: bool) -> dict[str, float]:
        logs = {}
        if self.sync is not None and is_training_log:
            if self.log_consensus_distance and not self._at_consensus:
                self._distance = self.sync.consensus_distance()
            logs = self.measure_exchanges()
        if self._distance is not None:
            logs["sync_consensus_distance"], self._distance = self._distance, None
        return logs


class LocalSGDCallback(LocalUpdateCallback):
    """[`LocalSGD`] on any Trainer, see [`LocalUpdateCallback`]: `LocalSGDCallback(trainer, sync_every=12)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, LocalSGD, **settings)


class SlowMoCallback(LocalUpdateCallback):
    """[`SlowMo`] on any Trainer, see [`LocalUpdateCallback`].

    Args:
        trainer (`Trainer`): See [`LocalUpdateCallback`].
        base (`Callable`, *optional*): Called with model and optimizer when the training begins; returns the method
            between the outer steps: a class, `base=Gossip`, or one with settings,
            `base=partial(OverlapGossip, staleness_bound=2)`. By default SlowMo runs over Local SGD.
        settings: Settings of [`SlowMo`] (`sync_every`, `slow_momentum`, ...) and [`LocalUpdateCallback`].

    Raises:
        ValueError: If `base` cannot be called; and as [`LocalUpdateCallback`] raises.
    """

    def __init__(self, trainer: Trainer, *, base: Callable[..., LocalUpdate] | None = None, **settings: Any):
        if base is not None and not callable(base):
            raise ValueError(
                "`base` makes a sync object from (model, optimizer) and must be a class or a function, but is a "
                f"{type(base).__name__}. Set `base=Gossip`, or `base=partial(Gossip, push_sum=False)`."
            )
        self.base = base
        super().__init__(trainer, SlowMo, **settings)

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LocalUpdate:
        groups = self._groups()
        base = None if self.base is None else self.base(model, optimizer, **groups)
        return self.method_class(model, optimizer, base=base, **groups, **self.settings)


class DiLoCoCallback(LocalUpdateCallback):
    """[`DiLoCo`] on any Trainer, see [`LocalUpdateCallback`]: `DiLoCoCallback(trainer, sync_every=100)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, DiLoCo, **settings)


class StreamingDiLoCoCallback(LocalUpdateCallback):
    """[`StreamingDiLoCo`] on any Trainer, see [`LocalUpdateCallback`]: `StreamingDiLoCoCallback(trainer, delay=5)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, StreamingDiLoCo, **settings)


class GossipCallback(LocalUpdateCallback):
    """[`Gossip`] on any Trainer, see [`LocalUpdateCallback`]: `GossipCallback(trainer, push_sum=False)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, Gossip, **settings)


class NoLoCoCallback(LocalUpdateCallback):
    """[`NoLoCo`] on any Trainer, see [`LocalUpdateCallback`]: `NoLoCoCallback(trainer, sync_every=50)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, NoLoCo, **settings)


class OverlapGossipCallback(LocalUpdateCallback):
    """[`OverlapGossip`] on any Trainer, see [`LocalUpdateCallback`]: `OverlapGossipCallback(trainer)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, OverlapGossip, **settings)


class AsyncGossipCallback(LocalUpdateCallback):
    """[`AsyncGossip`] on any Trainer, see [`LocalUpdateCallback`]: `AsyncGossipCallback(trainer)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, AsyncGossip, **settings)


def find_per_rank_callback(trainer: Trainer | None) -> PerRankCallback | None:
    """Return the [`PerRankCallback`] that was added to a trainer, or `None`. Two are refused."""
    handler = getattr(trainer, "callback_handler", None)
    found = [callback for callback in getattr(handler, "callbacks", ()) if isinstance(callback, PerRankCallback)]
    if len(found) > 1:
        raise _too_many(found[0], found[1])
    return found[0] if found else None


def bring_to_consensus(trainer: Trainer) -> None:
    """Make the models of all ranks equal, where a callback trains them locally; else do nothing.

    The Trainer does it before its own evaluations and checkpoints. A callback that uses the model in another way calls
    it first, on every rank.
    """
    callback = find_per_rank_callback(trainer)
    if callback is not None:
        callback.bring_to_consensus()


def evaluation_scope(trainer: Trainer | None) -> AbstractContextManager:
    """Return a context for an evaluation that shares its work over the ranks; replicas evaluate alone."""
    callback = find_per_rank_callback(trainer)
    return nullcontext() if callback is None else callback.evaluation_scope()


def check_trainer(callback: TrainerCallback, trainer: Any) -> None:
    """Raise a `TypeError` if the first argument of a callback is something else, such as a model."""
    if not isinstance(trainer, Trainer):
        name = type(callback).__name__
        raise TypeError(
            f"`trainer` of {name} must be a transformers.Trainer, but is a {type(trainer).__name__}. Make the trainer "
            f"first, then `trainer.add_callback({name}(trainer, ...))`."
        )


def refuse_unsupported(trainer: Trainer, takes_shards: bool = False) -> None:
    """Refuse trainers whose ranks depend on one another at every step, except FSDP2 inside replicas."""
    names = getattr(trainer.accelerator.torch_device_mesh, "mesh_dim_names", None) or ()
    in_replicas = takes_shards and trainer.accelerator.is_fsdp2 and {"dp_replicate", "dp_shard"} <= {*names}
    is_fsdp = getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_fsdp_xla_enabled", False)
    sharded = {
        "FSDP": is_fsdp and not in_replicas,
        "DeepSpeed": getattr(trainer, "is_deepspeed_enabled", False),
        "tensor parallelism": trainer.get_tp_size() > 1,
        "context parallelism": trainer.get_cp_size() > 1,
        "sequence parallelism": trainer.get_sp_size() > 1,
        "a model that is sharded as it is loaded": getattr(trainer, "is_distributed_loading_by_transformers", False),
    }
    for kind, is_used in sharded.items():
        if is_used:
            raise TypeError(
                "Training with little communication needs the whole model and batches of its own on every rank, but "
                f"this trainer uses {kind}. Train with DistributedDataParallel: `accelerate launch --multi_gpu`; or "
                "with LocalSGD, SlowMo, DiLoCo or StreamingDiLoCo over replicas that FSDP2 shards: "
                "`fsdp_config={'fsdp_version': 2}`, "
                "`parallelism_config=ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)`."
            )
    if trainer.args.world_size > 1 and getattr(trainer.args, "support_shard", None) == "classes":
        raise ValueError(
            "`support_shard` must be 'images' where the ranks train locally, but is 'classes': each rank would "
            "compare its images with its own few classes only. Set `support_shard` to 'images'."
        )


def shard_inside_replicas(trainer: Trainer) -> dist.ProcessGroup:
    """Let accelerate shard the model inside each replica, not over all as well. Return the group between replicas."""
    state = trainer.accelerator.state
    inside = copy.copy(state.parallelism_config)
    inside.dp_replicate_size = 1  # read when the model is prepared; the mesh keeps both dimensions
    state.parallelism_config = inside
    return state.device_mesh["dp_replicate"].get_group()


def set_arguments(trainer: Trainer) -> None:
    """Turn off arguments that make the ranks wait for one another, unless they were set explicitly."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.world_size == 1:
        return
    args.average_tokens_across_devices = False
    asked = {
        "ddp_find_unused_parameters": args.ddp_find_unused_parameters,
        "dispatch_batches": accelerator.dataloader_config.dispatch_batches,
    }
    for name, value in asked.items():
        if value:
            logger.warning(f"`{name}` is True: all ranks wait for one another at every step. Set it to False.")
    handler = accelerator.ddp_handler  # made from the arguments already
    if handler is not None and not asked["ddp_find_unused_parameters"]:
        args.ddp_find_unused_parameters = handler.find_unused_parameters = False
    if asked["dispatch_batches"] is None:
        accelerator.dataloader_config.dispatch_batches = args.accelerator_config.dispatch_batches = False


def _too_many(first: PerRankCallback, second: PerRankCallback) -> ValueError:
    return ValueError(
        f"A trainer takes one sync callback, but has {type(first).__name__} and {type(second).__name__}. Remove one "
        "by `trainer.remove_callback`. SlowMo over a gossip is one callback: `SlowMoCallback(trainer, base=Gossip)`."
    )


def readable(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have a value, as values for JSON under the names of recipes."""
    record: dict[str, Any] = {}
    for name, value in values.items():
        name = _NAMES.get(name, name)
        if isinstance(value, Topology):
            record[name] = type(value).__name__
            record |= readable({f"topology_{setting}": own for setting, own in value._settings().items()})
        elif isinstance(value, torch.dtype):
            record[name] = str(value).removeprefix("torch.")
        elif callable(value):
            record[name] = "a function"  # its address in memory says nothing
        elif value is not None:
            record[name] = value if isinstance(value, (str, int, float)) else str(value)
    return record


def _record(sync: LocalUpdate) -> dict[str, Any]:
    values = dict(sync._settings())
    target, most, until = values.pop("consensus control", (None, None, None))
    if target is not None:
        values |= {"consensus_target": target, "max_extra_rounds": most, "consensus_until_step": until}
    momentum = values.pop("quasi_global_momentum", None)
    values["quasi_global_momentum"] = momentum and momentum[0]
    if "topology" in values:  # a text there, for ranks to compare
        values["topology"] = sync.topology
    record = {"method": type(sync).__name__, **readable(values)}
    base = getattr(sync, "base", None)
    if base is not None:
        record |= {f"base {name}": value for name, value in _record(base).items()}
    return record
