"""Codistillation on real ranks, against its equation in loops over replicas, rows and classes in float64."""

import math
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from codistillation_runs import B, C, Classifier, D, data, gradient_by_loops, groups_of, make, take_steps, values
from launch import run_ranks
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.codistillation import Codistillation

NUM_STEPS = 9


KINDS = [
    {"alpha": 0.7},
    {"distance": "mse", "alpha": 0.1},
    {"temperature": 2.0, "burn_in_steps": 2, "ramp_steps": 3},
    {"top_k": 2, "temperature": 1.5},
    {"on_lost_replica": "continue", "timeout_seconds": 20.0},
    {"alpha": lambda step: 0.1 * step, "check_every": 3},
]


def _exchange_predictions(rank):
    results = []
    for kind in KINDS:
        model, optimizer, codistillation = make(rank, **kind)
        with codistillation:
            results.append(take_steps(model, optimizer, codistillation, range(4), data_seed=7))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_gradients_with_exchanged_predictions_are_those_of_the_equation(num_replicas):
    results = run_ranks(_exchange_predictions, num_replicas)
    for i, kind in enumerate(KINDS):
        options = {key: kind[key] for key in ("distance", "temperature", "top_k") if key in kind}
        for rank in range(num_replicas):
            for step, (own, gradients, loss, staleness, _) in enumerate(results[rank][i]):
                alpha = make(0, **kind)[2].alpha_at(step)
                peers = [results[peer][i][step][0] for peer in range(num_replicas) if peer != rank]
                expected = gradient_by_loops(own, peers, data(7, step), alpha, **options)
                torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
                assert (loss > 0) == (alpha > 0)
                assert staleness is None


SCHEDULES = [
    {"exchange_every": 3, "transfer_steps": 2},
    {"exchange_every": 3, "transfer_steps": 0, "burn_in_steps": 1},
    {"exchange_every": 2, "transfer_steps": 2},
    {"exchange_every": 1, "transfer_steps": 1},
    {"exchange_every": 4, "copies_device": "cpu", "burn_in_steps": 3},
]


def _exchange_checkpoints(rank):
    results = []
    for schedule in SCHEDULES:
        model, optimizer, codistillation = make(rank, exchange="checkpoints", **schedule)
        with codistillation:
            # Ranks of unlike speed: what is in use must not depend on it.
            seconds = 0.01 * rank
            results.append(take_steps(model, optimizer, codistillation, range(NUM_STEPS), rank, seconds))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_copies_are_exactly_as_old_as_asked_and_give_the_gradients_of_the_equation(num_replicas):
    results = run_ranks(_exchange_checkpoints, num_replicas)
    for i, schedule in enumerate(SCHEDULES):
        every, start = schedule["exchange_every"], schedule.get("burn_in_steps", 0)
        transfer = schedule.get("transfer_steps", every // 10)
        sent = [s for s in range(1, NUM_STEPS) if s >= start and (s - start) % every == 0]
        for rank in range(num_replicas):
            for step, (own, gradients, loss, staleness, _) in enumerate(results[rank][i]):
                in_use = [s for s in sent if s + transfer <= step]
                assert staleness == (step - in_use[-1] if in_use else None), (schedule, step)
                if not in_use:
                    assert loss == 0.0
                peers = [results[peer][i][in_use[-1]][0] for peer in range(num_replicas) if peer != rank and in_use]
                expected = gradient_by_loops(own, peers, data(rank, step), 1.0)
                torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def _train_apart(rank):
    model = Classifier(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(**data(7, step))["loss"].backward()
        optimizer.step()
    ends = []
    for options in (
        {"alpha": 0.0},
        {"alpha": 0.0, "exchange": "checkpoints", "exchange_every": 2},
        {"burn_in_steps": NUM_STEPS},
        {"alpha": lambda step: 0.0, "exchange": "checkpoints", "exchange_every": 2},
    ):
        other, other_optimizer, codistillation = make(rank, **options)
        with codistillation:
            sent = codistillation.bytes_sent
            seen = take_steps(other, other_optimizer, codistillation, range(NUM_STEPS), 7)
            ends.append((values(other), {loss for _, _, loss, _, _ in seen}, codistillation.bytes_sent - sent))
            dist.barrier()  # leaving sends a goodbye, and is answered by one
    return values(model), ends


@pytest.mark.distributed
def test_with_alpha_zero_or_in_the_burn_in_replicas_train_apart_to_the_bit():
    for alone, ends in run_ranks(_train_apart, 2):
        for end, losses, _ in ends:
            assert losses == {0.0}
            assert all(torch.equal(alone[name], end[name]) for name in alone)
        assert [sent for _, _, sent in ends[:3]] == [0, 0, 0]


def _train_equal_replicas(rank):
    model, optimizer, codistillation = make(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codistillation.start()
    seen = take_steps(model, optimizer, codistillation, range(4), 7)
    with torch.no_grad():
        evaluated = codistillation.loss(model(**data(rank, 0)), data(rank, 0))  # other batches: not looked at
    codistillation.stop()
    return [loss for _, _, loss, _, _ in seen], [str(w.message) for w in caught], evaluated.item(), values(model)


@pytest.mark.distributed
def test_equal_replicas_have_no_extra_loss_and_are_warned_of():
    results = run_ranks(_train_equal_replicas, 2)
    for losses, messages, evaluated, end in results:
        assert losses == [0.0] * 4
        assert evaluated == 0.0
        assert any("same parameters" in message for message in messages)
        assert all(torch.equal(end[name], results[0][3][name]) for name in end)


def _train_replicas_of_two(rank, exchange, wrapping):
    groups, replica = groups_of(rank), rank // 2
    data_seed = rank % 2 if exchange == "predictions" else rank
    model = Classifier(rank)  # made equal inside of the replica when entering
    wrapped = model
    if wrapping is not None:
        wrapped = DistributedDataParallel(model, process_group=groups["inner_group"] if wrapping == "inner" else None)
        if wrapping == "all":
            model.load_state_dict(Classifier(rank).state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    with Codistillation(wrapped, optimizer, exchange=exchange, exchange_every=2, **groups) as codistillation:
        seen = take_steps(wrapped, optimizer, codistillation, range(6), data_seed, unwrapped=model)
        distance = codistillation.parameter_distance()
    return seen, distance, values(model), data_seed, replica


@pytest.mark.distributed
@pytest.mark.parametrize("exchange", ["predictions", "checkpoints"])
@pytest.mark.parametrize("wrapping", [None, "inner", "all"])
def test_gradients_are_averaged_inside_of_a_replica_only(exchange, wrapping):
    results = run_ranks(_train_replicas_of_two, 4, exchange, wrapping)
    for step in range(6):
        seen = [result[0][step] for result in results]
        for first in (0, 2):
            assert all(torch.equal(seen[first][1][name], seen[first + 1][1][name]) for name in seen[0][1])
            assert all(torch.equal(seen[first][0][name], seen[first + 1][0][name]) for name in seen[0][0])
            parts = []
            for rank in (first, first + 1):
                in_use = step if exchange == "predictions" else step // 2 * 2
                peers = [results[(rank + 2) % 4][0][in_use][0]] if in_use or exchange == "predictions" else []
                parts.append(gradient_by_loops(seen[rank][0], peers, data(results[rank][3], step), 1.0))
            expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
            torch.testing.assert_close(seen[first][1], expected, rtol=1e-9, atol=1e-12)
        assert not torch.equal(seen[0][1]["linear.weight"], seen[2][1]["linear.weight"])
    ends = [result[2] for result in results]
    square = sum((ends[0][name] - ends[2][name]).square().sum().item() / 4 for name in ends[0])
    assert results[0][1] == pytest.approx(math.sqrt(square), rel=1e-9)


def _count_bytes(rank):
    sent = {}
    for name, options in {
        "predictions": {},
        "half": {"wire_dtype": "bfloat16"},
        "top 2": {"top_k": 2},
        "checked twice": {"check_every": 2},
    }.items():
        model, optimizer, codistillation = make(rank, **options)
        with codistillation:
            before = codistillation.bytes_sent
            take_steps(model, optimizer, codistillation, range(4), 7)
            sent[name] = codistillation.bytes_sent - before
    for name, dtype in (("checkpoints", None), ("half checkpoints", "bfloat16")):
        model, optimizer, codistillation = make(
            rank, exchange="checkpoints", exchange_every=3, transfer_steps=1, copies_dtype=dtype
        )
        with codistillation:
            before = codistillation.bytes_sent
            seen = take_steps(model, optimizer, codistillation, range(7), rank)
            deadline = time.monotonic() + 10.0
            mailbox = codistillation._mail._mailbox
            while any(mailbox.num_waiting(peer) for peer in mailbox._links) and time.monotonic() < deadline:
                time.sleep(0.01)
            sent[name] = codistillation.bytes_sent - before
            dist.barrier()  # leaving sends a goodbye, and is answered by one
        assert seen[-1][4] > 0.0
    return sent


@pytest.mark.distributed
def test_bytes_on_the_wire_are_as_computed():
    peers, parameters, header, digest = 2, C * D + C, 40, 16
    for sent in run_ranks(_count_bytes, 3):
        assert sent == {
            "predictions": 4 * peers * (B * C * 8 + digest),
            "half": 4 * peers * (B * C * 2 + digest),
            "top 2": 4 * peers * (B * (3 * 8 + 2 * 4) + digest),
            "checked twice": 4 * peers * B * C * 8 + 2 * peers * digest,
            "checkpoints": 2 * peers * (parameters * 8 + header),
            "half checkpoints": 2 * peers * (parameters * 2 + header),
        }
