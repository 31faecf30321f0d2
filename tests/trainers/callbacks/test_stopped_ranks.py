"""A rank that is stopped or killed under a Trainer: the others end with an error that names it, in time."""

import os
import signal
import time
from functools import partial

import pytest
from lost_ranks import all_pids, run_ranks_that_are_left
from sync_runs import make_local_trainer as make_trainer
from transformers import TrainerCallback

from hf_msn import AsyncGossipCallback, CodistillationCallback, OverlapGossip, OverlapGossipCallback, SlowMoCallback
from hf_msn.distributed.comm.exchange import PeerError

SECONDS = 2.0
CALLBACKS = {
    "slowmo over overlap gossip": partial(SlowMoCallback, base=partial(OverlapGossip, timeout_seconds=SECONDS)),
    "overlap gossip": OverlapGossipCallback,
    "async gossip": AsyncGossipCallback,
    "codistillation": CodistillationCallback,
    "codistillation by checkpoints": partial(CodistillationCallback, exchange="checkpoints", exchange_every=10**5),
}


class Stop(TrainerCallback):
    """Send a signal to the process of rank 2 after 10 updates of rank 0."""

    def __init__(self, pids, number):
        self.pids, self.number = pids, number

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.005)
        if state.global_step == 10 and args.process_index == 0:
            os.kill(self.pids[2], self.number)


def _train(rank, folder, name, number):
    pids = all_pids()
    trainer = make_trainer(folder, max_steps=10**6, logging_steps=50, callbacks=[Stop(pids, number)])
    trainer.add_callback(CALLBACKS[name](trainer, timeout_seconds=SECONDS))
    began = time.monotonic()
    with pytest.raises(PeerError) as caught:
        trainer.train()
    return caught.value.ranks, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGSTOP) for name in CALLBACKS),
        ("codistillation", signal.SIGKILL),
        ("codistillation by checkpoints", signal.SIGKILL),
    ],
)
def test_a_stopped_or_killed_rank_is_named_within_the_deadline(tmp_path, name, number):
    results = run_ranks_that_are_left(_train, 3, tmp_path, tmp_path / "out", name, number, lost=[2], timeout=60.0)
    for ranks, seconds in results.values():
        assert 2 in ranks
        assert seconds < 2 * SECONDS + 6.0  # starting the training, and asking the store for 3 s
