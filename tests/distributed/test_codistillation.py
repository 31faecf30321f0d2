"""Codistillation against its equation, replica by replica in float64; resumed, lost and unequal replicas."""

import copy
import datetime
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from local_runs import groups_of
from lost_ranks import run_ranks_that_are_left
from states import same, saved_and_loaded
from test_subgroups import gloo_threads
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.codistillation import Codistillation, PredictionDistance
from hf_msn.distributed.collectives import all_gather_cat
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.local_sgd import LocalSGD

B, C, D = 5, 4, 3  # rows, classes, inputs


def data(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(B, D, generator=generator).double()
    return {"x": x, "labels": torch.randint(C, (B,), generator=generator)}


class Classifier(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(D, C).double()

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits, labels)}


def make(seed, **options):
    model = Classifier(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return model, optimizer, Codistillation(model, optimizer, **options)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def take_steps(model, optimizer, codistillation, steps, data_seed, seconds=0.0, wrapped=None):
    """Per step: parameters before, gradients, codistillation loss, staleness."""
    seen = []
    for step in steps:
        batch, before = data(data_seed, step), values(model)
        output = (wrapped or model)(**batch)
        loss = codistillation.loss(output, batch)
        staleness = codistillation.staleness
        optimizer.zero_grad()
        (output["loss"] + loss).backward()
        optimizer.step()
        codistillation.step()
        seen.append((before, {name: p.grad.clone() for name, p in model.named_parameters()}, loss.item(), staleness))
        time.sleep(seconds)
    return seen


def gradient_of_the_loss(own, peers, batch, alpha, **options):
    """Gradient of L(y, f_i(x)) + alpha / (n - 1) sum_j D(f_i(x), sg f_j(x)) for weight and bias of a linear f."""

    def logits_of(parameters):
        return batch["x"] @ parameters["linear.weight"].T + parameters["linear.bias"]

    own = {name: value.clone().requires_grad_() for name, value in own.items()}
    distance = PredictionDistance(**options)
    loss = torch.nn.functional.cross_entropy(logits_of(own), batch["labels"])
    for peer in peers:
        loss = loss + alpha / len(peers) * distance(logits_of(own), distance.pack(logits_of(peer)))
    return dict(zip(own, torch.autograd.grad(loss, list(own.values()))))


KINDS = [
    {"alpha": 0.7},
    {"distance": "mse", "alpha": 0.1},
    {"temperature": 2.0, "burn_in_steps": 2, "ramp_steps": 3},
    {"top_k": 2, "temperature": 1.5},
    {"alpha": lambda step: 0.1 * step},
]
SCHEDULES = [
    {"exchange_every": 3, "transfer_steps": 2},
    {"exchange_every": 3, "transfer_steps": 0, "burn_in_steps": 1},
    {"exchange_every": 2, "transfer_steps": 2},
    {"exchange_every": 1, "transfer_steps": 1},
    {"exchange_every": 4, "copies_device": "cpu", "burn_in_steps": 3},
]
NUM_STEPS = 9


def _train_all(rank):
    by_predictions, by_checkpoints = [], []
    for kind in KINDS:
        model, optimizer, codistillation = make(rank, **kind)
        with codistillation:
            by_predictions.append(take_steps(model, optimizer, codistillation, range(5), data_seed=7))
    for schedule in SCHEDULES:
        model, optimizer, codistillation = make(rank, exchange="checkpoints", **schedule)
        with codistillation:
            # What is in use must not depend on the speed of a rank.
            steps = take_steps(model, optimizer, codistillation, range(NUM_STEPS), rank, seconds=0.01 * rank)
            by_checkpoints.append(steps)
    return by_predictions, by_checkpoints


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_gradients_are_those_of_the_equation(num_replicas):
    by_predictions, by_checkpoints = zip(*run_ranks(_train_all, num_replicas))
    for rank in range(num_replicas):
        peers = [peer for peer in range(num_replicas) if peer != rank]
        for i, kind in enumerate(KINDS):
            options = {name: kind[name] for name in ("temperature", "top_k") if name in kind}
            options["kind"] = kind.get("distance", "kl")
            for step, (own, gradients, loss, staleness) in enumerate(by_predictions[rank][i]):
                alpha = make(0, **kind)[2].alpha_at(step)
                theirs = [by_predictions[peer][i][step][0] for peer in peers]
                expected = gradient_of_the_loss(own, theirs, data(7, step), alpha, **options)
                torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
                assert (loss > 0) == (alpha > 0) and staleness is None
        for i, schedule in enumerate(SCHEDULES):
            every, first = schedule["exchange_every"], schedule.get("burn_in_steps", 0)
            transfer = schedule.get("transfer_steps", every // 10)
            sent = [step for step in range(1, NUM_STEPS) if step >= first and (step - first) % every == 0]
            for step, (own, gradients, loss, staleness) in enumerate(by_checkpoints[rank][i]):
                in_use = [s for s in sent if s + transfer <= step]
                assert staleness == (step - in_use[-1] if in_use else None), (schedule, step)
                assert in_use or loss == 0.0
                theirs = [by_checkpoints[peer][i][in_use[-1]][0] for peer in peers if in_use]
                expected = gradient_of_the_loss(own, theirs, data(rank, step), 1.0)
                torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def _train_replicas_of_two(rank):
    groups, found = groups_of(rank), {}
    for exchange in ("predictions", "checkpoints"):
        for wrapping in (None, "inner", "all"):
            data_seed = rank % 2 if exchange == "predictions" else rank
            model = Classifier(rank)  # entering makes the ranks of a replica equal
            wrapped = model
            if wrapping is not None:
                group = groups["inner_group"] if wrapping == "inner" else None
                wrapped = DistributedDataParallel(model, process_group=group)
                if wrapping == "all":
                    model.load_state_dict(Classifier(rank).state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            with Codistillation(wrapped, optimizer, exchange=exchange, exchange_every=2, **groups) as codistillation:
                seen = take_steps(model, optimizer, codistillation, range(6), data_seed, wrapped=wrapped)
            found[exchange, wrapping] = seen, data_seed
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_gradients_are_averaged_inside_a_replica_only():
    ranks = run_ranks(_train_replicas_of_two, 4)
    for case in ranks[0]:
        results, is_exact = [found[case] for found in ranks], case[0] == "predictions"
        for step in range(6):
            seen = [result[0][step] for result in results]
            for first in (0, 2):
                assert same(seen[first][:2], seen[first + 1][:2])
                in_use = step if is_exact else step // 2 * 2
                parts = []
                for rank in (first, first + 1):
                    peers = [results[(rank + 2) % 4][0][in_use][0]] if in_use or is_exact else []
                    parts.append(gradient_of_the_loss(seen[rank][0], peers, data(results[rank][1], step), 1.0))
                expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
                torch.testing.assert_close(seen[first][1], expected, rtol=1e-9, atol=1e-12)
            assert not torch.equal(seen[0][1]["linear.weight"], seen[2][1]["linear.weight"])


def _compare_costs_and_ends(rank):
    model = Classifier(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(**data(7, step))["loss"].backward()
        optimizer.step()
    alone, sent = values(model), {}
    never = {"alpha": lambda step: 0.0, "exchange": "checkpoints", "exchange_every": 2}
    for options in ({"alpha": 0.0}, {**never, "alpha": 0.0}, {"burn_in_steps": NUM_STEPS}, never):
        model, optimizer, codistillation = make(rank, **options)
        with codistillation:
            before = codistillation.bytes_sent
            seen = take_steps(model, optimizer, codistillation, range(NUM_STEPS), 7)
            assert codistillation.bytes_sent == before or options is never
        assert {loss for _, _, loss, _ in seen} == {0.0} and same(alone, values(model))
    checkpoints = {"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 1}
    for name, options in {
        "predictions": {},
        "bfloat16": {"wire_dtype": "bfloat16"},
        "top 2": {"top_k": 2},
        "checkpoints": checkpoints,
        "bfloat16 checkpoints": {**checkpoints, "copies_dtype": "bfloat16"},
    }.items():
        model, optimizer, codistillation = make(rank, **options)
        with codistillation:
            before = codistillation.bytes_sent
            seen = take_steps(model, optimizer, codistillation, range(7), rank if name.endswith("points") else 7)
            sent[name] = codistillation.bytes_sent - before
            assert seen[-1][2] > 0.0
            last = values(model)
            codistillation.take_replica(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with make(0)[2] as codistillation, torch.no_grad():  # an evaluation exchanges nothing, whatever the batches
            batch = data(rank, 0)
            assert codistillation.loss(codistillation.model(**batch), batch).item() == 0.0
    return sent, last, values(model), [str(warning.message) for warning in caught]


@pytest.mark.distributed
@pytest.mark.slow
def test_bytes_sent_replicas_alone_the_best_replica_and_equal_replicas():
    peers, parameters, digest = 2, C * D + C, 16
    results = run_ranks(_compare_costs_and_ends, 3)
    for sent, _, end, messages in results:
        assert sent == {
            "predictions": 7 * peers * (B * C * 8 + digest),
            "bfloat16": 7 * peers * (B * C * 2 + digest),
            "top 2": 7 * peers * (B * (3 * 8 + 2 * 4) + digest),
            "checkpoints": 2 * peers * parameters * 8,
            "bfloat16 checkpoints": 2 * peers * parameters * 2,
        }
        assert same(end, results[1][1])
        assert any("same parameters" in message for message in messages)
    assert not same(results[0][1], results[1][1])


def _enter_beside_a_slow_replica(rank):
    store, connect = dist.distributed_c10d._get_default_store(), dist.ProcessGroupGloo

    def connect_slowly(*args):
        group = connect(*args)
        time.sleep(1.0)
        store.set("connected", "")
        return group

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(dist, "ProcessGroupGloo", connect_slowly)
        with make(rank, exchange="checkpoints", exchange_every=2)[2]:
            return store.check(["connected"])


@pytest.mark.distributed
@pytest.mark.slow
def test_no_replica_can_leave_before_all_are_connected():
    assert run_ranks(_enter_beside_a_slow_replica, 3) == [True, True, True]


# Resuming

RESUMED = [
    ({"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 2}, (4, 5, 6)),
    ({"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 2, "copies_dtype": "bfloat16"}, (7,)),
    ({"burn_in_steps": 1, "ramp_steps": 7}, (4,)),
]


def _resume(rank):
    groups = groups_of(rank) if dist.get_world_size() == 4 else {}
    replica, outcomes = rank // 2 if groups else rank, []
    for options, stops in RESUMED:
        data_seed = rank if "exchange_every" in options else 7 + rank % 2 * bool(groups)
        model, optimizer, codistillation = make(replica, **options, **groups)
        straight, saved = [], {}
        with codistillation:
            for step in range(10):
                if step in stops:
                    parts = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                    saved[step] = *parts, saved_and_loaded(codistillation.state_dict())
                straight += take_steps(model, optimizer, codistillation, [step], data_seed)
        end = values(model)
        for stop in stops:
            for enter_first in (False, True):
                weights, moments, state = saved[stop]
                model, optimizer, codistillation = make(rank + 50, **options, **groups)
                if enter_first:
                    codistillation.start()
                model.load_state_dict(weights)
                optimizer.load_state_dict(copy.deepcopy(moments))
                codistillation.load_state_dict(state)
                if not enter_first:
                    codistillation.start()
                resumed = take_steps(model, optimizer, codistillation, range(stop, 10), data_seed)
                codistillation.stop()
                outcomes.append((straight[stop:], end, resumed, values(model)))
    return outcomes


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_resume_is_exact_to_the_bit_with_copies_in_use_and_in_transfer(num_ranks):
    for outcomes in run_ranks(_resume, num_ranks):
        for straight, end, resumed, resumed_end in outcomes:
            assert same(straight, resumed) and same(end, resumed_end)
            assert any(loss > 0 for _, _, loss, _ in resumed)


# Faults and misuse


def _differ(rank):
    messages = []
    for batch in (data(8, 0), {name: value[:2] for name, value in data(7, 0).items()}):
        model, _, codistillation = make(rank)
        batch = batch if rank == 2 else data(7, 0)
        with pytest.raises(ValueError) as error, codistillation:
            codistillation.loss(model(**batch), batch)
        messages.append(str(error.value))
    for options in ({"alpha": 1.0 - 0.5 * (rank == 2)}, {"temperature": 1.0 + (rank == 2)}):
        with pytest.raises(ValueError) as error:
            make(0, **options)[2].start()
        messages.append(str(error.value))
    model = DistributedDataParallel(Classifier(rank))
    model.register_comm_hook(None, lambda state, bucket: None)
    codistillation = Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1), exchange="checkpoints")
    threads = gloo_threads()
    with pytest.raises(ValueError, match="lambda"):
        codistillation.start()
    assert gloo_threads() == threads  # the connections of checkpoints have ended
    return messages


@pytest.mark.distributed
def test_other_batches_and_settings_are_refused_with_the_two_ranks():
    for messages in run_ranks(_differ, 3):
        assert all("rank 0" in message and "rank 2" in message for message in messages)
        assert "alpha=[1.0" in messages[2] and "alpha=[0.5" in messages[2] and "temperature=2.0" in messages[3]


def _lose(rank, options, how):
    if how == "hangs, the group's own deadline":
        deadline = {"group": dist.new_group(timeout=datetime.timedelta(seconds=1.5))}
    else:
        deadline = {"timeout_seconds": 1.5}
    model, optimizer, codistillation = make(rank, **deadline, **options)
    seen, data_seed = 0, rank if "exchange_every" in options else 7
    with pytest.raises(PeerError) as error, codistillation:
        for step in range(16):
            if step == 5:
                started = time.monotonic()
                if rank == 1:
                    os._exit(0) if how == "exits" else time.sleep(60.0)
            take_steps(model, optimizer, codistillation, [step], data_seed, seconds=0.01)
            seen += 1
    return error.value.ranks, str(error.value), seen, time.monotonic() - started


CHECKPOINTS = {"exchange": "checkpoints", "exchange_every": 3, "transfer_steps": 1}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "exits"),
        ({}, "hangs"),
        ({}, "hangs, the group's own deadline"),
        (CHECKPOINTS, "exits"),
        (CHECKPOINTS, "hangs"),
    ],
)
def test_a_lost_replica_is_named_in_time(tmp_path, options, how):
    results = run_ranks_that_are_left(_lose, 3, tmp_path, options, how, lost=[1])
    for ranks, message, seen, seconds in results.values():
        assert ranks == (1,) and "rank 1" in message
        assert 5 <= seen < 9 and seconds < 6.0


def _take_unequal_steps(rank, options):
    model, optimizer, codistillation = make(rank, **options)
    began, data_seed = time.monotonic(), rank if "exchange_every" in options else 7
    try:
        with codistillation:
            take_steps(model, optimizer, codistillation, range(10 if rank == 1 else 14), data_seed)
    except PeerError as error:
        return error.ranks, time.monotonic() - began
    return None, time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"burn_in_steps": 12}, CHECKPOINTS])
def test_a_replica_with_fewer_steps_is_named_at_once_where_others_need_it(tmp_path, options):
    results = run_ranks_that_are_left(_take_unequal_steps, 3, tmp_path, options, timeout=30.0)
    for rank, (ranks, seconds) in results.items():
        assert seconds < 4.0
        if options == {"alpha": 0.0} or (rank == 1 and options is CHECKPOINTS):
            assert ranks is None
        else:
            assert (1 in ranks) == (rank != 1)


def make_alone(**options):
    model = torch.nn.Linear(3, 2)
    return Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": float("nan")}, "alpha.*nan"),
        ({"top_k": 5, "distance": "mse"}, "top_k.*'mse'"),
        ({"top_k": 5, "exchange": "checkpoints"}, "top_k.*checkpoints.*5"),
        ({"wire_dtype": "bfloat16", "exchange": "checkpoints"}, "wire_dtype.*copies_dtype"),
        ({"transfer_steps": 11, "exchange_every": 10}, "transfer_steps.*exchange_every.*10.*11"),
    ],
)
def test_settings_outside_of_their_rule_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_alone(**options)


def test_alpha_is_0_in_the_burn_in_then_rises_then_stays():
    codistillation = make_alone(alpha=2.0, burn_in_steps=3, ramp_steps=4)
    assert [codistillation.alpha_at(k) for k in range(9)] == [0.0] * 4 + [0.5, 1.0, 1.5, 2.0, 2.0]
    codistillation = make_alone(alpha=lambda step: step / 10, burn_in_steps=2)
    assert [codistillation.alpha_at(k) for k in range(4)] == [0.0, 0.0, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"alpha.*-1"):
        make_alone(alpha=lambda step: -1.0).alpha_at(0)


@pytest.mark.filterwarnings("ignore:.*one replica only")
def test_one_replica_trains_as_without_codistillation_and_misuse_is_refused():
    codistillation = make_alone()
    with codistillation:
        output = codistillation.model(torch.ones(2, 3))
        loss = codistillation.loss(output, None)
        assert (loss.item(), loss.requires_grad) == (0.0, False)
        codistillation.step()
        assert codistillation.staleness is codistillation.distance_of_predictions is None
        for method in (Codistillation, LocalSGD):
            with pytest.raises(ValueError):  # the model is in use
                method(codistillation.model, codistillation.optimizer).start()
        with pytest.raises(ValueError, match="logits"):
            codistillation.loss({"hidden": output}, None)
        with pytest.raises(ValueError, match="int64"):
            codistillation.loss(output.argmax(-1), None)
        state = codistillation.state_dict()
    with pytest.raises(RuntimeError, match="entered"):
        codistillation.step()
    with pytest.raises(ValueError, match=r"'checkpoints'.*'predictions'"):
        make_alone(exchange="checkpoints").load_state_dict(state)
    for name in ("steps", "initial_weight_decay"):
        with pytest.raises(ValueError, match=f"no '{name}'"):
            other = make_alone()
            other.load_state_dict({key: state[key] for key in state if key != name})
            other.start()

    class FSDPModule(torch.nn.Linear):
        pass

    model = FSDPModule(3, 2)
    with pytest.raises(TypeError):
        Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1))


class OverRanks(torch.nn.Module):
    """A model whose forward pass gathers over the ranks: those of its replica only, in the copies as well."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        gathered = all_gather_cat(self.linear(x))
        return {"logits": self.linear(x) - gathered.mean(0), "loss": gathered.square().mean(), "rows": len(gathered)}


def _gather_in_forward(rank):
    groups, model, rows = groups_of(rank), OverRanks(rank // 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward(module, batch):
        output = module(**batch)
        rows.append(output["rows"])
        return output

    with Codistillation(
        model, optimizer, exchange="checkpoints", exchange_every=2, forward=forward, **groups
    ) as codistillation:
        # The replicas are not in step: a gather over all ranks would hang.
        for step in range(6 if rank < 2 else 7):
            batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))}
            output = model(**batch)
            rows.append(output["rows"])
            (output["loss"] + codistillation.loss(output, batch)).backward()
            optimizer.step()
            codistillation.step()
            optimizer.zero_grad()
    return rows, model.linear.weight.detach().clone()


@pytest.mark.distributed
def test_collectives_of_the_forward_pass_stay_inside_the_replica_in_copies_too():
    results = run_ranks(_gather_in_forward, 4)
    for rank, (rows, weight) in enumerate(results):
        assert rows == [10] * (6 + 4 if rank < 2 else 7 + 5)
        assert torch.equal(weight, results[rank // 2 * 2][1])
    assert not torch.equal(results[0][1], results[2][1])
