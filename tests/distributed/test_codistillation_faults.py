"""Replicas that differ where they must not, die, or fall silent."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from codistillation_runs import data, gradient_by_loops, make, take_steps
from launch import run_ranks
from lost_ranks import run_ranks_that_are_left

from hf_msn.distributed.comm.exchange import PeerError


def _see_other_batches(rank):
    messages = []
    for options in ({}, {"on_lost_replica": "continue", "timeout_seconds": 20.0}):
        for what in ("values", "size"):
            model, _, codistillation = make(rank, **options)
            try:
                with codistillation:
                    batch = data(7, 0)
                    if rank == 2:
                        batch = data(8, 0) if what == "values" else {key: value[:2] for key, value in batch.items()}
                    codistillation.loss(model(**batch), batch)
            except ValueError as error:
                messages.append(str(error))
            dist.barrier()
    return messages


@pytest.mark.distributed
def test_other_batches_are_noticed_with_the_two_ranks_and_a_remedy():
    for messages in run_ranks(_see_other_batches, 3):
        assert len(messages) == 4
        for message in messages:
            assert "rank 0 and rank 2 differ at exchange 1" in message
            assert "Shard the data by the place inside of the replica" in message


def _differ_in_settings(rank):
    with pytest.raises(ValueError, match=r"rank 0 has `setting alpha=\[1.0.*where rank 1 has `setting alpha=\[0.5"):
        make(0, alpha=1.0 - 0.5 * rank)[2].start()
    with pytest.raises(ValueError, match=r"rank 0 has `setting temperature=1.0` where rank 1"):
        make(0, temperature=1.0 + rank)[2].start()


@pytest.mark.distributed
def test_replicas_with_other_settings_are_refused():
    run_ranks(_differ_in_settings, 2)


def _lose(rank, options, how):
    model, optimizer, codistillation = make(rank, timeout_seconds=1.5, **options)
    message, seen, started = None, [], None
    data_seed = rank if "exchange_every" in options else 7
    try:
        with codistillation:
            for step in range(16):
                if rank == 1 and step == 5:
                    if how == "exits":
                        os._exit(0)
                    time.sleep(4.0 if how == "comes back" else 60.0)
                started = started or (time.monotonic() if step == 5 else None)
                # With the one that comes back the others must still be there.
                seconds = 0.4 if how == "comes back" and rank != 1 and step >= 5 else 0.01
                seen += take_steps(model, optimizer, codistillation, [step], data_seed, seconds)
            if codistillation.settings.tolerant:
                with pytest.raises(PeerError, match=r"needs all replicas.*\[[012, ]*\] is lost"):
                    codistillation.parameter_distance()
            live = codistillation.live_replicas
            seconds = time.monotonic() - started
        return live, seen, seconds
    except PeerError as error:
        message = str(error), error.ranks
    return message, seen, time.monotonic() - started


CHECKPOINTS = {"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 1}


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, CHECKPOINTS])
@pytest.mark.parametrize("how", ["exits", "hangs"])
def test_a_dead_replica_is_named_in_time(tmp_path, options, how):
    results = run_ranks_that_are_left(_lose, 2, tmp_path, options, how, lost=[1])
    (message, ranks), seen, seconds = results[0]
    assert ranks == (1,)
    assert "rank 1" in message
    if "exchange_every" in options:
        assert ("has died: its connection closed" if how == "exits" else "been silent for") in message
    assert 5 <= len(seen) < 9
    assert seconds < 6.0


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, CHECKPOINTS])
@pytest.mark.parametrize("num_replicas, how", [(2, "exits"), (3, "exits"), (3, "hangs")])
def test_the_others_go_on_without_a_dead_replica_if_asked(tmp_path, num_replicas, options, how):
    options = {**options, "on_lost_replica": "continue"}
    results = run_ranks_that_are_left(_lose, num_replicas, tmp_path, options, how, lost=[1])
    for rank, (live, seen, seconds) in results.items():
        assert live == sorted(results)
        assert len(seen) == 16
        assert seconds < 8.0
        own, gradients, loss, staleness, _ = seen[-1]
        assert (loss > 0) == (num_replicas > 2)
        step = 15 - (staleness or 0)
        peers = [results[peer][1][step][0] for peer in results if peer != rank]
        batch = data(rank if "exchange_every" in options else 7, 15)
        torch.testing.assert_close(gradients, gradient_by_loops(own, peers, batch, 1.0), rtol=1e-9, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, CHECKPOINTS])
def test_who_was_silent_for_too_long_learns_that_the_others_went_on(options):
    results = run_ranks(_lose, 3, {**options, "on_lost_replica": "continue"}, "comes back")
    assert [live for live, *_ in results] == [[0, 2], [1], [0, 2]]
    assert [len(seen) for _, seen, _ in results] == [16] * 3
    assert results[1][2] < 1.2  # it does not wait for them until the deadline
    assert results[1][1][-1][2] == 0.0
    assert results[0][1][-1][2] > 0.0
