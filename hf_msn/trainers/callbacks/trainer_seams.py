"""Where a sync callback has its part in a Trainer beyond the events, which come too late or not on every path.

A Trainer evaluates, saves and loads the best model between its events, and not only there: other callbacks do too. So
the methods themselves are wrapped, on the one trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from transformers import Trainer

from .sync_checkpoints import load_renamed_weights

if TYPE_CHECKING:
    from .sync import LocalUpdateCallback

_MARK = "_hf_msn_sync_seams"
_REPLICA_MARK = "_hf_msn_replica_seams"

# Methods of a trainer that a callback for replicas takes part in, and its own method that does it.
_REPLICA_SEAMS = {
    "compute_loss": "compute_loss",
    "get_train_dataloader": "make_train_dataloader",
    "get_eval_dataloader": "make_evaluation_dataloader",
    "get_test_dataloader": "make_evaluation_dataloader",
    "evaluation_loop": "evaluate",
    "images_per_update": "images_per_update",
    "support_ranks": "support_ranks",
}


class SyncCallback:
    """What marks a callback as the one that the seams of its trainer are for."""


def find_sync_callback(trainer: Trainer | None) -> LocalUpdateCallback | None:
    """The sync callback that was added to a trainer, if any.

    Raises:
        ValueError: If there are two.
    """
    handler = getattr(trainer, "callback_handler", None)
    found = [callback for callback in getattr(handler, "callbacks", ()) if isinstance(callback, SyncCallback)]
    if len(found) > 1:
        raise too_many(found[0], found[1])
    return found[0] if found else None


def too_many(first: SyncCallback, second: SyncCallback) -> ValueError:
    return ValueError(
        f"A trainer takes one sync callback, but has {type(first).__name__} and {type(second).__name__}. Take one off "
        "by `trainer.remove_callback`. SlowMo over a gossip is one callback: `SlowMoCallback(trainer, base=Gossip)`."
    )


def bring_to_consensus(trainer: Trainer) -> None:
    """Makes the models of all ranks equal, where a sync callback trains them locally; else nothing.

    `evaluate`, `predict` and the checkpoints of the trainer do it on their own. A callback that uses the model in
    another way calls it first, on every rank.
    """
    callback = find_sync_callback(trainer)
    if callback is not None:
        callback.bring_to_consensus()


def evaluation_scope(trainer: Trainer | None) -> AbstractContextManager:
    """Around an evaluation that shares its work out over the ranks: where they hold replicas, each does it alone."""
    scope = getattr(find_sync_callback(trainer), "evaluation_scope", nullcontext)
    return scope()


def open_seams(trainer: Trainer) -> None:
    """Wraps the methods of a trainer, once. They stay as they were while no sync callback is on it."""
    if hasattr(trainer, _MARK):
        return
    setattr(trainer, _MARK, True)
    wrap_method(trainer, "_inner_training_loop", _train)
    for name in ("evaluate", "predict", "_save_checkpoint"):
        wrap_method(trainer, name, _at_consensus)
    wrap_method(trainer, "_save_rng_state", _save_rank)
    wrap_method(trainer, "_load_from_checkpoint", _load_weights)
    wrap_method(trainer, "_load_best_model", _load_best)
    wrap_method(trainer, "log", _log)


def open_replica_seams(trainer: Trainer) -> None:
    """Wraps what is different where the ranks are replicas that stay different, once."""
    if hasattr(trainer, _REPLICA_MARK):
        return
    setattr(trainer, _REPLICA_MARK, True)

    def by_method(name: str) -> Callable:
        def around(callback, original, *args, **kwargs):
            # Another sync callback may have taken the place of the one that opened the seam.
            method = getattr(callback, name, None)
            return original(*args, **kwargs) if method is None else method(original, *args, **kwargs)

        return around

    for name, method in _REPLICA_SEAMS.items():
        if hasattr(trainer, name):
            wrap_method(trainer, name, by_method(method))


def wrap_method(trainer: Trainer, name: str, around: Callable) -> None:
    """Has `around(callback, original, *args, **kwargs)` called in place of a method while a sync callback is on it."""
    original = getattr(trainer, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        callback = find_sync_callback(trainer)
        if callback is None:
            return original(*args, **kwargs)
        return around(callback, original, *args, **kwargs)

    setattr(trainer, name, wrapped)


def _train(callback, original, *args, **kwargs):
    callbacks = callback.trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)  # a target encoder must follow what the next forward pass sees
    callback.checkpoint = kwargs.get("resume_from_checkpoint")
    try:
        return original(*args, **kwargs)
    except BaseException as error:
        callback.finish(error)
        raise


def _at_consensus(callback, original, *args, **kwargs):
    callback.bring_to_consensus()
    return original(*args, **kwargs)


def _load_best(callback, original, *args, **kwargs):
    callback.finish()
    original(*args, **kwargs)
    load_renamed_weights(callback.trainer, callback.trainer.state.best_model_checkpoint)


def _save_rank(callback, original, output_dir, *args, **kwargs):
    # Every rank comes here, with the folder, before it is renamed, pushed or counted against `save_total_limit`.
    original(output_dir, *args, **kwargs)
    callback.save(output_dir)


def _load_weights(callback, original, checkpoint, *args, **kwargs):
    original(checkpoint, *args, **kwargs)
    load_renamed_weights(callback.trainer, checkpoint)


def _log(callback, original, logs, *args, **kwargs):
    logs.update(callback.values_to_log(is_training_log="loss" in logs))  # in place, as Trainer.log does
    return original(logs, *args, **kwargs)
