"""Gossip resumes where it stopped."""

import pytest
import torch
from gossip_reference import (
    Lopsided,
    make_model,
    make_optimizer,
)
from gossip_runs import PLAIN, resume
from launch import run_ranks
from states import same
from topologies import Star
from torch import nn

from hf_msn.distributed.gossip import Gossip

RESUMED = [
    {"sync_every": 3},
    {"topology": Star, "sync_every": 3},
    {**PLAIN, "topology": Lopsided, "consensus_target": 0.05},
    {"push_sum": False, "wire_dtype": "bfloat16"},
]


def _resume_all(rank, n):
    return [resume(rank, case, n) for case in RESUMED]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_in_the_middle_of_a_period():
    results = run_ranks(_resume_all, 4, 4)
    for result in results:
        for case, (ends, saved) in enumerate(result):
            straight, *resumed = ends
            assert saved["sync"]["local_steps"] == [1, 1, 0, 0][case]
            assert all(same(straight, other) for other in resumed), case
    states = [result[1][1]["sync"] for result in results]
    assert len({state["push_sum_weight"] for state in states}) > 1
    assert not torch.equal(*(result[1][1]["model"]["weight"] for result in results[:2]))


def test_a_state_of_another_method_or_model_is_refused():
    model, larger = make_model(), nn.Linear(5, 2)
    optimizer, other = make_optimizer(model, 0.0), torch.optim.SGD(larger.parameters(), lr=0.1)
    sync = Gossip(model, optimizer, quasi_global_momentum=0.9).start()
    state = sync.state_dict()
    with pytest.raises(ValueError, match="quasi_global_momentum"):
        Gossip(larger, other).load_state_dict(state)
    with pytest.raises(ValueError, match="here 12 numbers, but holds 8"):
        Gossip(larger, other, quasi_global_momentum=0.9).load_state_dict(state)
