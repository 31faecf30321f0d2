"""A rank that is killed in the middle of a Trainer's run: the others end at once, with its number."""

import os
import signal
import time

import pytest
from lost_ranks import run_ranks_that_are_left
from sync_runs import make_local_trainer as make_trainer
from transformers import TrainerCallback

from hf_msn import CodistillationCallback, PeerError


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(rank, folder, settings, arguments):
    trainer = make_trainer(f"{folder}/run", callbacks=[Die()], max_steps=1000, **arguments)
    trainer.add_callback(CodistillationCallback(trainer, timeout_seconds=20.0, **settings))
    started = time.monotonic()
    with pytest.raises(PeerError) as error:
        trainer.train()
    return error.value.ranks, time.monotonic() - started


CHECKPOINTS = {"exchange": "checkpoints", "exchange_every": 5, "transfer_steps": 1}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "arguments"),
    # The exchange fails, or the trainer's own at its next log.
    [({}, {}), (CHECKPOINTS, {"logging_steps": 100}), (CHECKPOINTS, {})],
    ids=["predictions", "checkpoints", "log"],
)
def test_a_killed_rank_is_named_and_nothing_hangs(tmp_path, settings, arguments):
    results = run_ranks_that_are_left(_train, 3, tmp_path, str(tmp_path), settings, arguments, lost=(2,))
    for ranks, seconds in results.values():
        assert 2 in ranks
        assert seconds < 15.0
