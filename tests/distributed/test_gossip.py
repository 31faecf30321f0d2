"""Gossip against loops over mixing matrices in float64; real ranks over gloo."""

import pytest
import torch
from gossip_reference import (
    NUM_STEPS,
    WITH_ZEROS,
    Lopsided,
    reference,
    train,
)
from launch import run_ranks
from topologies import Star

from hf_msn.distributed import (
    ExponentialTopology,
    local_update,
)

PLAIN = {"momentum": 0.0, "quasi_global_momentum": 0.9}
CASES = {
    "sgp": {},
    "sgp, more peers later": {"topology": lambda n: ExponentialTopology(n, {0: 1, 3: min(2, n - 1)})},
    "sgp, irregular": {"topology": Lopsided},
    "sgp, all to one and one to all": {"topology": Star},
    "sgp, every third step": {"sync_every": 3},
    "sgp, irregular, every third step": {"topology": Lopsided, "sync_every": 3, "rates": WITH_ZEROS},
    "sgp, sync": {"topology": Lopsided, "sync_after": 4},
    "sgp, zeros": {"rates": WITH_ZEROS},
    "d-psgd": {"push_sum": False},
    "d-psgd, exponential": {"push_sum": False, "topology": ExponentialTopology, "rates": WITH_ZEROS},
    "d-psgd, every third step": {"push_sum": False, "sync_every": 3},
    "bfloat16": {"wire_dtype": "bfloat16"},
    "bfloat16, irregular": {"wire_dtype": "bfloat16", "topology": Star},
    "bfloat16, d-psgd": {"wire_dtype": "bfloat16", "push_sum": False},
    "qgm": {**PLAIN},
    "qgm, pair and zeros": {**PLAIN, "quasi_global_momentum": (0.5, 0.8), "rates": WITH_ZEROS},
    "qgm, irregular": {**PLAIN, "topology": Lopsided},
    "qgm, d-psgd, every third step": {**PLAIN, "push_sum": False, "sync_every": 3},
    "extra rounds": {"consensus_target": 0.05, "max_extra_rounds": 3, "consensus_until_step": 6},
    "extra rounds, irregular": {"consensus_target": 0.05, "topology": Lopsided},
    "extra rounds, d-psgd": {"consensus_target": 0.1, "push_sum": False},
}


def _train_all_cases(rank, n):
    results = {name: train(rank, case, n) for name, case in CASES.items()}
    local_update._BUCKET_BYTES = 1  # a bucket for each tensor
    small = {name: train(rank, CASES[name], n) for name in ("sgp", "sgp, irregular", "d-psgd", "qgm")}
    return results, small


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_variant_follows_its_equations_on_every_rank_at_every_step(n):
    results, small = zip(*run_ranks(_train_all_cases, n, n))
    for name, case in CASES.items():
        expected, _ = reference(n, case)
        for rank in range(n):
            torch.testing.assert_close(
                results[rank][name], expected[rank], rtol=1e-9, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}"
            )
            torch.testing.assert_close(small[rank].get(name, expected[rank]), expected[rank], rtol=1e-9, atol=1e-11)
        assert all(torch.equal(r[name][NUM_STEPS], results[0][name][NUM_STEPS]) for r in results), name
