"""Training with little communication on any Trainer: callbacks that forward its events to a sync object."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ...distributed.async_gossip import AsyncGossip
from ...distributed.gossip import Gossip
from ...distributed.local_sgd import LocalSGD
from ...distributed.local_update import LocalUpdate
from ...distributed.overlap_gossip import OverlapGossip
from ...distributed.slowmo import SlowMo
from .sync_checkpoints import load_rank, restore, save_rank, settings_of
from .trainer_seams import SyncCallback, find_sync_callback, open_seams, too_many

logger = logging.get_logger(__name__)


class LocalUpdateCallback(SyncCallback, TrainerCallback):
    """Trains by a [`LocalUpdate`] on any `transformers.Trainer`: each rank for itself, and together now and then.

    Example:

    ```python
    trainer.add_callback(SlowMoCallback(trainer, sync_every=12, slow_momentum=0.6))
    trainer.train()
    ```

    The sync object is made when the training begins, counts every update (also one that a gradient scaler skipped),
    before any other callback sees it, and is stopped before the best model is loaded and before `on_train_end` of any
    other callback. **All ranks come to consensus** before `evaluate`, `predict` and every checkpoint, whoever asks for
    them, once for an update; for another use of the model call [`bring_to_consensus`] on every rank. Stopping takes
    the outer step if local steps are pending, so that the trained model is one outer step past a checkpoint of the
    last update.

    **A checkpoint** has a `sync_state_<rank>.pt` for each rank: the sync object's state, and the rank's own optimizer,
    schedule and gradient scaler. A resumed run goes on bit for bit, also inside a period. With another number of
    ranks, or from a checkpoint without these files, it starts from the consensus that the checkpoint holds, and says
    so.

    **Logged** with the loss, of this rank and since the last time: `sync_megabytes_sent`, `sync_seconds_waiting`. And
    `sync_consensus_distance`, measured before each consensus, with what is logged next.

    **Settings.** A loss normalised by the items of the rank alone (`average_tokens_across_devices` off); no batches
    sent from rank 0 (`dispatch_batches` off) and no search for unused parameters in DDP, unless asked for explicitly:
    both make the ranks wait for one another at every step.

    Args:
        trainer (`Trainer`): The trainer that the callback is added to.
        method_class (`Callable[..., LocalUpdate]`): Called with model, optimizer and `settings`.
        log_consensus_distance (`bool`, *optional*, defaults to `False`): Measure the consensus distance with every log
            of the loss too, which exchanges all parameters.
        settings: Of the method, such as `sync_every`.

    Raises:
        ValueError: If a setting is outside of its rule, the trainer has another sync callback, or its supports are
            split by class over several ranks.
        TypeError: If the trainer shards the model: FSDP, DeepSpeed, tensor, sequence or context parallelism.
    """

    def __init__(
        self,
        trainer: Trainer,
        method_class: Callable[..., LocalUpdate],
        *,
        log_consensus_distance: bool = False,
        **settings: Any,
    ):
        self.trainer, self.method_class, self.settings = trainer, method_class, settings
        self.log_consensus_distance = log_consensus_distance
        self.sync: LocalUpdate | None = None
        self.checkpoint: str | None = None
        present = find_sync_callback(trainer)
        if present is not None:
            raise too_many(present, self)
        refuse_unsupported(trainer)
        # What is wrong with a setting is said here, not when the training begins.
        self.make_sync(trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=1.0))
        set_arguments(trainer)
        open_seams(trainer)
        self._clear()

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LocalUpdate:
        """The sync object of a model and its optimizer, not started."""
        return self.method_class(model, optimizer, **self.settings)

    def _clear(self) -> None:
        self._at_consensus = True
        self._bytes_logged, self._seconds_logged = 0, 0.0
        self._distance: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if find_sync_callback(self.trainer) is not self:
            raise ValueError(
                f"A {type(self).__name__} must be added to the trainer that it was built with, but is on another one. "
                "Build it with this one: `trainer.add_callback(SlowMoCallback(trainer))`."
            )
        self._clear()
        sync = self.make_sync(self.trainer.model_wrapped, self.trainer.optimizer)
        saved = None if self.checkpoint is None else load_rank(self.trainer, sync, self.checkpoint)
        if saved is None:
            sync.steps = state.global_step  # `sync_start_step` counts the updates of the run
        else:
            restore(self.trainer, sync, saved)
        if state.is_world_process_zero:
            print(self.describe(sync), flush=True)
        self.sync = sync.start()

    def describe(self, sync: LocalUpdate) -> str:
        """What is done, in one line."""
        named = settings_of(sync)
        method, moments = named.pop("method"), named.pop("base_buffers", "'maintain'").strip("'")
        ranks = self.trainer.args.world_size
        over = f" over {named.pop('base method')}" if "base method" in named else ""
        line = f"{method}{over} on {ranks} rank{'s' if ranks > 1 else ''}: "
        # What is no argument of the constructor, such as the peers of the first steps, is long and says little.
        shown = {name: value for name, value in named.items() if name.removeprefix("base ").isidentifier()}
        line += ", ".join(f"{name}={value}" for name, value in shown.items() if value != "None")
        if sync.local_steps:
            line += f", going on after local step {sync.local_steps} of its period"
        moments = {"maintain": "stay each rank's own", "reset": "start anew", "average": "are averaged"}.get(moments)
        return (
            f"{line}. Before evaluations and checkpoints and at the end all ranks take the mean of parameters and "
            f"buffers; at an outer step optimizer moments {moments}."
        )

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.sync is None:
            raise RuntimeError(
                f"{type(self).__name__} must be on its trainer when the training begins, but was added after. Add it "
                "before `trainer.train()`."
            )
        self.sync.step()
        self._at_consensus = False

    def bring_to_consensus(self) -> None:
        """Calls `sync()`, if an update has been made since the last time. Every rank must call it."""
        if self.sync is None or self._at_consensus:
            return
        if self.trainer.args.world_size > 1:
            self._distance = self.sync.consensus_distance()
        self.sync.sync()
        self._at_consensus = True

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        """Stops the sync object, if it still runs; `error` is what ended the training early."""
        sync, self.sync = self.sync, None
        if sync is not None:
            sync.stop(error)

    def values_to_log(self, is_training_log: bool) -> dict[str, float]:
        """What to add to a log. Every rank must call it, if it is one of the training."""
        logs = {}
        if self.sync is not None and is_training_log:
            if self.log_consensus_distance and not self._at_consensus:
                self._distance = self.sync.consensus_distance()
            sent, waited = self.sync.bytes_sent, self.sync.seconds_waiting
            logs["sync_megabytes_sent"] = (sent - self._bytes_logged) / 1e6
            logs["sync_seconds_waiting"] = waited - self._seconds_logged
            self._bytes_logged, self._seconds_logged = sent, waited
        if self._distance is not None:
            logs["sync_consensus_distance"], self._distance = self._distance, None
        return logs

    def save(self, folder: str) -> None:
        """Adds this rank's file to a checkpoint."""
        if self.sync is not None:
            save_rank(self.trainer, self.sync, folder)


class LocalSGDCallback(LocalUpdateCallback):
    """[`LocalSGD`] on any Trainer, see [`LocalUpdateCallback`]: `LocalSGDCallback(trainer, sync_every=12)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, LocalSGD, **settings)


class SlowMoCallback(LocalUpdateCallback):
    """[`SlowMo`] on any Trainer, see [`LocalUpdateCallback`].

    Args:
        trainer (`Trainer`): See [`LocalUpdateCallback`].
        base (`Callable`, *optional*): Makes what happens between the outer steps from model and optimizer, which are
            there only when the training begins: a class, `base=Gossip`, or one with settings,
            `base=partial(OverlapGossip, staleness_bound=2)`. By default SlowMo over Local SGD.
        settings: Of [`SlowMo`] (`sync_every`, `slow_momentum`, ...) and [`LocalUpdateCallback`].

    Raises:
        ValueError: If `base` is a sync object and not what makes one; and what [`LocalUpdateCallback`] raises.
    """

    def __init__(self, trainer: Trainer, *, base: Callable[..., LocalUpdate] | None = None, **settings: Any):
        if base is not None and not callable(base):
            raise ValueError(
                "`base` makes a sync object from (model, optimizer) and must be a class or a function, but is a "
                f"{type(base).__name__}. Give `base=Gossip`, or `base=partial(Gossip, push_sum=False)`."
            )
        self.base = base
        super().__init__(trainer, SlowMo, **settings)

    def make_sync(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LocalUpdate:
        base = None if self.base is None else self.base(model, optimizer)
        return self.method_class(model, optimizer, base=base, **self.settings)


class GossipCallback(LocalUpdateCallback):
    """[`Gossip`] on any Trainer, see [`LocalUpdateCallback`]: `GossipCallback(trainer, push_sum=False)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, Gossip, **settings)


class OverlapGossipCallback(LocalUpdateCallback):
    """[`OverlapGossip`] on any Trainer, see [`LocalUpdateCallback`]: `OverlapGossipCallback(trainer)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, OverlapGossip, **settings)


class AsyncGossipCallback(LocalUpdateCallback):
    """[`AsyncGossip`] on any Trainer, see [`LocalUpdateCallback`]: `AsyncGossipCallback(trainer)`."""

    def __init__(self, trainer: Trainer, **settings: Any):
        super().__init__(trainer, AsyncGossip, **settings)


def refuse_unsupported(trainer: Trainer) -> None:
    """Refuses what needs the ranks to be equal. Raises as [`LocalUpdateCallback`] does."""
    sharded = {
        "FSDP": getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_fsdp_xla_enabled", False),
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
                f"this trainer uses {kind}. Train with DistributedDataParallel: `accelerate launch --multi_gpu`."
            )
    if trainer.args.world_size > 1 and getattr(trainer.args, "support_shard", None) == "classes":
        raise ValueError(
            "`support_shard` must be 'images' where the ranks train locally, but is 'classes': each rank would "
            "compare its images with the few classes that it holds, and never with the others. Set `support_shard` to "
            "'images'."
        )


def set_arguments(trainer: Trainer) -> None:
    """Turns off what makes the ranks wait for one another, unless it was asked for."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.world_size == 1:
        return
    changed = []
    if args.average_tokens_across_devices:
        args.average_tokens_across_devices = False
        changed.append("average_tokens_across_devices=False")
    handler = accelerator.ddp_handler  # made of the arguments already
    if args.ddp_find_unused_parameters:
        logger.warning(
            "`ddp_find_unused_parameters` is True: DDP makes all ranks wait for one another at every step. Set it to "
            "False if every parameter has a gradient."
        )
    elif handler is not None and handler.find_unused_parameters:
        args.ddp_find_unused_parameters = handler.find_unused_parameters = False
        changed.append("ddp_find_unused_parameters=False (give True if some parameters have no gradient)")
    if accelerator.dataloader_config.dispatch_batches:
        logger.warning(
            "`dispatch_batches` is True: rank 0 sends every batch, and all ranks wait for it. Set it to False if each "
            "rank can read the data."
        )
    elif accelerator.dataloader_config.dispatch_batches is None:
        accelerator.dataloader_config.dispatch_batches = args.accelerator_config.dispatch_batches = False
        changed.append("dispatch_batches=False")
    if changed:
        logger.info(f"For local steps: {', '.join(changed)}.")
