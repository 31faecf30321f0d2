"""Resuming a codistillation from its checkpoints."""

import pytest
import short_runs
from launch import run_ranks
from states import same
from sync_runs import logged, saved_states, train_whole_and_resumed, weights
from sync_runs import make_local_trainer as make_trainer
from transformers import TrainerCallback

from hf_msn import CodistillationCallback


class Last(TrainerCallback):
    """The weights of this rank after the last update, before a replica is published."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)


def of_images(folder, last, inner_size=1, **settings):
    trainer = make_trainer(folder, save_strategy="steps", save_steps=4, callbacks=[last], weight_decay=0.1)
    settings = {"inner_size": inner_size, "falling_weight_decay": True, "ramp_steps": 6, **settings}
    trainer.add_callback(CodistillationCallback(trainer, **settings))
    return trainer


def of_msn(folder, last, inner_size=1):
    trainer = short_runs.make_trainer(
        folder,
        dataset=short_runs.RandomViews(64),
        save_steps=4,
        callbacks=[last],
        gradient_accumulation_steps=2,
        model_fields={"mask_ratio": 0.5},
    )
    settings = {"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 2, "inner_size": inner_size}
    trainer.add_callback(CodistillationCallback(trainer, **settings))
    return trainer


LOGGED = ("loss", "codistillation_distance", "codistillation_staleness")
RUNS = {
    "predictions": lambda *it, **fields: of_images(*it, exchange="predictions", top_k=2, **fields),
    # At the checkpoint of update 4 the snapshots of update 2 are in use and those of update 4 in transfer.
    "checkpoints": lambda *it, **fields: of_images(
        *it, exchange="checkpoints", exchange_every=2, transfer_steps=2, **fields
    ),
    "msn": of_msn,
}


def _resume(rank, folder, inner_size, names):
    results = {}
    for name in names:
        kept: list[Last] = []

        def make(folder, name=name, kept=kept):
            kept.append(Last())
            return RUNS[name](folder, kept[-1], inner_size=inner_size)

        trainers = train_whole_and_resumed(make, f"{folder}/{name}", step=4)
        logs = [
            {key: {step: value for step, value in logged(trainer, key).items() if step > 4} for key in LOGGED}
            for trainer in trainers
        ]
        results[name] = [last.weights for last in kept], saved_states(f"{folder}/{name}", rank), logs
    return results


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "inner_size", "names"), [(2, 1, tuple(RUNS)), (4, 2, ("checkpoints",))])
def test_a_resumed_run_is_exact_to_the_bit(tmp_path, num_ranks, inner_size, names):
    results = run_ranks(_resume, num_ranks, str(tmp_path), inner_size, names, timeout=150.0)
    for name in names:
        for rank, (kept, states, logs) in enumerate(result[name] for result in results):
            assert same(*kept), (name, rank)
            assert same(*states), (name, rank)
            assert logs[0] == logs[1] and len(logs[0]["loss"]) == 4, (name, rank)
        assert not same(results[0][name][0][0], results[-1][name][0][0])
        if name == "checkpoints":  # snapshots come into use two updates old
            assert results[0][name][2][0]["codistillation_staleness"] == {5: 3, 6: 2, 7: 3, 8: 2}
