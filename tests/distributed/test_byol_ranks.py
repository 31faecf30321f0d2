"""BYOL on two ranks, batch normalisation, F and W included, is that of one rank with everything."""

import pytest
import torch
from launch import run_ranks
from tiny_semi_supervised import RESNETV2, VIT, assert_same_gradients, semi_supervised_batch, tiny_byol
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.batch_norm import synchronize_batch_norm

pytestmark = pytest.mark.distributed

MODELS = {
    "BYOL": {**VIT, "predictor": "direct_pred"},
    "SimSiam of a ResNet": {**RESNETV2, "predictor": "direct_copy", "ema": False},
    "mlp": VIT,
}


def two_updates(model, module, batch) -> dict:
    for _ in range(2):
        model.zero_grad()
        output = module(**batch)
        output.loss.backward()
        model.update_target(0.9)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": output.loss.detach(), "gradients": gradients, "state": model.state_dict()}


def whole_batch(name: str) -> dict:
    batch = semi_supervised_batch(4, small_crops=2 if name == "BYOL" else 0)
    return {key: value for key, value in batch.items() if "support" not in key}


def _updates_of_this_rank(rank, num_ranks):
    results = {}
    for name, fields in MODELS.items():
        own = {key: value.chunk(num_ranks)[rank] for key, value in whole_batch(name).items()}
        model = synchronize_batch_norm(tiny_byol(**fields), torch.device("cpu"))
        results[name] = two_updates(model, DistributedDataParallel(model), own)
    return results


@pytest.mark.slow
def test_ranks_equal_one_rank_with_everything():
    ranks = run_ranks(_updates_of_this_rank, 2, 2)
    for name, fields in MODELS.items():
        model = tiny_byol(**fields)
        one = two_updates(model, model, whole_batch(name))
        loss = sum(result[name]["loss"] for result in ranks) / 2
        torch.testing.assert_close(loss, one["loss"], rtol=1e-9, atol=0, msg=name)
        for result in ranks:
            assert_same_gradients(result[name]["gradients"], one["gradients"], 1e-8)
            torch.testing.assert_close(result[name]["state"], one["state"], rtol=1e-8, atol=1e-10)
        # A rank alone has another F, so that the comparison could fail.
        part = {key: value.chunk(2)[0] for key, value in whole_batch(name).items()}
        alone = tiny_byol(**fields)
        two_updates(alone, alone, part)
        F = "input_correlation.correlation"
        assert (alone.state_dict()[F] - one["state"][F]).abs().max() > 1e-3
