"""A run with a loss or a weight that is not finite stops before that is saved."""

import pytest
import torch
from launch import run_ranks
from short_runs import RandomViews, make_trainer

from hf_msn.trainers.callbacks.non_finite import NonFiniteLossError


class NaNFrom(RandomViews):
    """Views that are NaN in the second epoch."""

    def __getitem__(self, row):
        views = super().__getitem__(row)
        if self.epoch == 1:
            views["anchor_pixel_values"].fill_(float("nan"))
        return views


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_the_stop_names_the_step_and_the_last_checkpoint(tmp_path, logging_steps):
    trainer = make_trainer(tmp_path, NaNFrom(), logging_steps=logging_steps)
    with pytest.raises(NonFiniteLossError, match=r"at step 6\..*checkpoint-3'"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.prototypes[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"weight .* after step 0\. .*no checkpoint"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("*checkpoint-*"))


def _train_with_nan_on_the_second_rank(rank, folder):
    steps = []
    for logging_steps in (100, 1):
        trainer = make_trainer(f"{folder}/{logging_steps}", RandomViews(24), logging_steps=logging_steps)
        compute_loss = trainer.compute_loss

        def poisoned(*args, compute_loss=compute_loss, trainer=trainer, **kwargs):
            loss = compute_loss(*args, **kwargs)
            return loss * float("nan") if rank == 1 and trainer.state.global_step == 4 else loss

        trainer.compute_loss = poisoned
        with pytest.raises(NonFiniteLossError, match=r"at step 5\..*checkpoint-3'"):
            trainer.train()
        steps.append(trainer.state.global_step)
    return steps


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_stop_together_at_the_next_save_or_log(tmp_path):
    assert run_ranks(_train_with_nan_on_the_second_rank, 2, str(tmp_path)) == [[6, 5], [6, 5]]
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-3", "checkpoint-3"]
