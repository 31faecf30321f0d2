"""Wrong use of the callbacks for local training, and trainers without them."""

import pytest
import semi_supervised_runs
from launch import run_ranks
from sync_runs import make_local_trainer, make_trainer
from transformers import TrainerCallback

from hf_msn import CodistillationCallback, LocalSGDCallback, LowShotCallback, SlowMoCallback
from hf_msn.distributed.local_sgd import LocalSGD


def test_two_sync_callbacks_on_one_trainer_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    first, second = SlowMoCallback(trainer), LocalSGDCallback(trainer)
    trainer.add_callback(first)
    with pytest.raises(ValueError, match="SlowMoCallback and LocalSGDCallback"):
        LocalSGDCallback(trainer)
    trainer.add_callback(second)
    with pytest.raises(ValueError, match="SlowMoCallback and LocalSGDCallback"):
        trainer.train()
    trainer.remove_callback(second)
    trainer.train()


@pytest.mark.parametrize(
    ("callback", "settings", "words"),
    [
        (LocalSGDCallback, {"sync_every": 0}, "`sync_every`.*0"),
        (SlowMoCallback, {"base": 3}, "`base`.*int"),
        (SlowMoCallback, {"on_lost_rank": "continue", "timeout_seconds": 9.0}, "`on_lost_rank`.*'continue'"),
        (SlowMoCallback, {"base": lambda *it: LocalSGD(*it, sync_start_step=3)}, "`base`.*`sync_start_step`"),
    ],
)
def test_a_wrong_setting_is_named_before_the_training(tmp_path, callback, settings, words):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=words):
        callback(trainer, **settings)
    trainer.add_callback(callback(trainer))


@pytest.mark.parametrize(
    ("attribute", "value", "kind"),
    [("is_fsdp_enabled", True, "FSDP"), ("get_tp_size", lambda: 2, "tensor parallelism")],
)
def test_sharded_models_are_refused(tmp_path, monkeypatch, attribute, value, kind):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, attribute, value)
    with pytest.raises(TypeError, match=kind):
        SlowMoCallback(trainer)


@pytest.mark.parametrize("callback", [SlowMoCallback, CodistillationCallback])
def test_a_callback_of_another_trainer_or_added_too_late_is_refused(tmp_path, callback):
    trainer, other = make_local_trainer(tmp_path), make_local_trainer(tmp_path)
    other.add_callback(callback(trainer))
    with pytest.raises(ValueError, match="built with"):
        other.train()

    class AddLate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(callback(trainer))

    trainer.add_callback(AddLate())
    with pytest.raises(RuntimeError, match="before"):
        trainer.train()


def _on_two_ranks(rank, folder):
    paws = semi_supervised_runs.make_run(f"{folder}/paws", global_support_classes=2)
    with pytest.raises(ValueError, match=r"`support_shard`.*'classes'"):
        SlowMoCallback(paws)
    default, asked = make_trainer(folder), make_trainer(folder, ddp_find_unused_parameters=True)
    LocalSGDCallback(default)
    LocalSGDCallback(asked)
    return [
        (
            trainer.accelerator.ddp_handler.find_unused_parameters,
            trainer.args.average_tokens_across_devices,
            trainer.accelerator.dispatch_batches,
        )
        for trainer in (default, asked)
    ]


@pytest.mark.distributed
def test_arguments_that_make_ranks_wait_at_every_step_are_refused_or_turned_off(tmp_path):
    assert run_ranks(_on_two_ranks, 2, str(tmp_path)) == [[(False, False, False), (True, False, False)]] * 2


@pytest.mark.parametrize("make", [make_trainer, make_local_trainer])
def test_a_training_can_follow_one_that_failed(tmp_path, make):
    trainer = make(tmp_path)
    callback = SlowMoCallback(trainer, sync_every=2)
    trainer.add_callback(callback)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (callback.sync is None) == (make is make_local_trainer)  # no event tells a plain Trainer's callbacks
    trainer.remove_callback(Fail)
    trainer.train()
    assert callback.sync is None and trainer.state.global_step == 8


def test_something_else_in_place_of_the_trainer_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    for other in (None, trainer.model):
        for callback in (SlowMoCallback, lambda it: LowShotCallback(it, lambda model: {})):
            with pytest.raises(TypeError, match=f"`trainer` of .* but is a {type(other).__name__}"):
                callback(other)
    with pytest.raises(TypeError, match=r"`evaluator` of LowShotCallback .* None"):
        LowShotCallback(trainer, None)
