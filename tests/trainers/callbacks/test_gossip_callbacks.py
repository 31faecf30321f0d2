"""The gossip methods on a plain Trainer: consensus, resume, and SlowMo over them."""

from functools import partial

import pytest
from launch import run_ranks
from states import same
from sync_runs import Snapshots, logged, make_trainer, train_whole_and_resumed, weights

import hf_msn
from hf_msn import SlowMoCallback

CASES = {
    "push_sum": ("Gossip", {}),
    "d_psgd": ("Gossip", {"push_sum": False, "sync_every": 2}),
    "overlap": ("OverlapGossip", {"deterministic": True}),
    "async": ("AsyncGossip", {}),
}


def make_run(folder, case, over_slowmo, **arguments):
    name, settings = CASES[case]
    trainer = make_trainer(folder, save_strategy="steps", save_steps=3, **arguments)
    if over_slowmo:
        base = partial(getattr(hf_msn, name), **settings)
        trainer.add_callback(SlowMoCallback(trainer, sync_every=4, slow_momentum=0.5, base=base))
    else:
        trainer.add_callback(getattr(hf_msn, f"{name}Callback")(trainer, **settings))
    return trainer


def _run_and_resume(rank, folder, cases, over_slowmo):
    results = {}
    for case in cases:
        snapshots = Snapshots()
        make = partial(make_run, case=case, over_slowmo=over_slowmo, callbacks=[snapshots])
        trainers = train_whole_and_resumed(make, f"{folder}/{case}", step=6)
        results[case] = {
            "snapshots": snapshots.taken,
            "weights": [weights(trainer.model) for trainer in trainers],
            "losses": [logged(trainer, "loss") for trainer in trainers],
        }
    return results


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "over_slowmo"), [(2, True), (3, False)])
def test_gossip_is_at_consensus_in_checkpoints_and_resumes_bit_for_bit(tmp_path, num_ranks, over_slowmo):
    cases = ["push_sum", "overlap"] if over_slowmo else list(CASES)
    results = run_ranks(_run_and_resume, num_ranks, str(tmp_path), cases, over_slowmo, timeout=120.0)
    for case in cases:
        first = results[0][case]
        for result in (result[case] for result in results):
            for (event, step, own), (_, _, other) in zip(first["snapshots"], result["snapshots"]):
                assert event == "step" or same(own, other), (case, event, step)
            assert all(same(own, other) for own, other in zip(first["weights"], result["weights"])), case
            assert len(result["losses"][1]) == 8, case
            if case != "async":  # its mixing depends on the order of arrival
                assert same(*result["weights"]) and result["losses"][0] == result["losses"][1], case
