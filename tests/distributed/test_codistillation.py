"""Codistillation on real ranks, against its equation in loops over replicas, rows and classes in float64."""

import copy
import math
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from lost_ranks import run_ranks_that_are_left
from states import same, saved_and_loaded
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed import Codistillation, PeerError

B, C, D = 5, 4, 3  # rows, classes, inputs
NUM_STEPS = 9


def data(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(B, D, generator=generator).double()
    return {"x": x, "labels": torch.randint(C, (B,), generator=generator)}


class Classifier(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(D, C)
        self.double()

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels)}


def make(seed, **options):
    model = Classifier(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return model, optimizer, Codistillation(model, optimizer, **options)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def take_steps(model, optimizer, codistillation, steps, data_seed, seconds=0.0, unwrapped=None):
    """Per step: parameters before, gradients, the loss, its age and its distance."""
    seen = []
    for step in steps:
        batch, before = data(data_seed, step), values(unwrapped or model)
        output = model(**batch)
        loss = codistillation.loss(output, batch)
        staleness = codistillation.staleness
        optimizer.zero_grad()
        (output["loss"] + loss).backward()
        optimizer.step()
        gradients = {name: p.grad.clone() for name, p in (unwrapped or model).named_parameters()}
        codistillation.step()
        seen.append((before, gradients, loss.item(), staleness, codistillation.distance_of_predictions))
        time.sleep(seconds)
    return seen


# The equation


def softmax(row, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def logits_by_loops(parameters, row):
    weight, bias = parameters["linear.weight"].tolist(), parameters["linear.bias"].tolist()
    return [sum(w * x for w, x in zip(weight[c], row)) + bias[c] for c in range(C)]


def gradient_by_loops(own, peers, batch, alpha, distance="kl", temperature=1.0, top_k=None):
    """Of L(y, f_i(x)) + alpha / (n - 1) sum_j D(f_i(x), sg f_j(x)) by weight and bias of a linear f."""
    weight, bias = torch.zeros(C, D).double(), torch.zeros(C).double()
    for row, label in zip(batch["x"].tolist(), batch["labels"].tolist()):
        logits = logits_by_loops(own, row)
        by_logits = [(q - (c == label)) / B for c, q in enumerate(softmax(logits))]
        for peer in peers:
            others = logits_by_loops(peer, row)
            p, q = softmax(others, temperature), softmax(logits, temperature)
            largest = sorted(range(C), key=lambda c: -p[c])[:top_k]
            rest_p, rest_q = (sum(r[c] for c in range(C) if c not in largest) for r in (p, q))
            for c in range(C):
                if distance == "mse":
                    derivative = 2 * (logits[c] - others[c]) / C
                elif c in largest:
                    derivative = temperature * (q[c] - p[c])
                else:
                    derivative = temperature * (q[c] - rest_p * q[c] / rest_q)
                by_logits[c] += alpha / len(peers) * derivative / B
        for c in range(C):
            bias[c] += by_logits[c]
            for d in range(D):
                weight[c, d] += by_logits[c] * row[d]
    return {"linear.weight": weight, "linear.bias": bias}


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


# What it does not do


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


# Replicas of several ranks


def groups_of(rank):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "inner"))
    return {"group": mesh.get_group("replica"), "inner_group": mesh.get_group("inner")}


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


# What travels


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


# Resuming


RESUMED = [
    ({"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 2}, (4, 5, 6)),
    ({"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 2, "copies_dtype": "bfloat16"}, (7,)),
    ({"check_every": 3, "burn_in_steps": 1, "ramp_steps": 7}, (4,)),
    ({"on_lost_replica": "continue", "timeout_seconds": 20.0}, (4,)),
]


def _resume(rank):
    groups = groups_of(rank) if dist.get_world_size() == 4 else {}
    replica = rank // 2 if groups else rank
    outcomes = []
    for options, stops in RESUMED:
        data_seed = rank if "exchange_every" in options else 7 + rank % 2 * bool(groups)
        whole = make(replica, **options, **groups)
        with whole[2]:
            straight, saved = [], {}
            for step in range(10):
                if step in stops:
                    parts = (whole[0].state_dict(), whole[1].state_dict(), whole[2].state_dict())
                    saved[step] = copy.deepcopy(parts[:2]), saved_and_loaded(parts[2])
                straight += take_steps(*whole, [step], data_seed)
            end = values(whole[0])
        for step in stops:
            for started_first in (False, True):
                (weights, moments), state = saved[step]
                model, optimizer, codistillation = make(rank + 50, **options, **groups)
                if started_first:
                    codistillation.start()
                model.load_state_dict(weights)
                optimizer.load_state_dict(copy.deepcopy(moments))
                codistillation.load_state_dict(state)
                if not started_first:
                    codistillation.start()
                resumed = take_steps(model, optimizer, codistillation, range(step, 10), data_seed)
                codistillation.stop()
                outcomes.append((straight[step:], end, resumed, values(model)))
    return outcomes


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_run_goes_on_bit_for_bit_with_its_stale_copies_and_their_age(num_ranks):
    for outcomes in run_ranks(_resume, num_ranks):
        for straight, end, resumed, resumed_end in outcomes:
            assert same(straight, resumed)
            assert same(end, resumed_end)
            assert any(loss > 0 for _, _, loss, _, _ in resumed)


# What goes wrong


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


# The end of training


def _end(rank):
    model, _, codistillation = make(rank)
    with codistillation:
        own = model(**data(7, 0))["logits"].softmax(-1)
        mean = codistillation.average_predictions(own)
        accuracies = codistillation.values_of_replicas(0.5 + 0.1 * (rank == 1))
        before = values(model)
        codistillation.take_replica(accuracies.index(max(accuracies)))
        distance = codistillation.parameter_distance()
    return own.detach(), mean, accuracies, before, values(model), distance


@pytest.mark.distributed
def test_at_the_end_the_best_replica_or_the_mean_of_predictions_can_be_had():
    results = run_ranks(_end, 3)
    mean = sum(own for own, *_ in results) / 3
    for _, averaged, accuracies, _, after, distance in results:
        torch.testing.assert_close(averaged, mean)
        assert accuracies == [0.5, 0.6, 0.5]
        assert distance == 0.0
        assert all(torch.equal(after[name], results[1][3][name]) for name in after)
    assert not torch.equal(results[0][3]["linear.weight"], results[1][3]["linear.weight"])
