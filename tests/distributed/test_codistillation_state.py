"""Codistillation goes on where it stopped, and ends with one replica or the mean of all."""

import copy

import pytest
import torch
import torch.distributed as dist
from codistillation_runs import data, groups_of, make, take_steps, values
from launch import run_ranks
from states import same, saved_and_loaded

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
