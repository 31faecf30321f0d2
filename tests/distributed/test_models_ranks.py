"""Models on two ranks, batch normalisation and BYOL's F and W included, are those of one rank with everything."""

import pytest
import torch
from launch import run_ranks
from tiny_semi_supervised import (
    RESNETV2,
    VIT,
    assert_same_gradients,
    semi_supervised_batch,
    tiny_byol,
    tiny_paws,
    tiny_suncet,
)
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.batch_norm import synchronize_batch_norm

pytestmark = pytest.mark.distributed

# Rank 0 holds other classes than rank 1; class 17 is on both.
LABELS = [99, 17, 99, 4, 17, 4]
PREDICTION = {"prediction_head": True, "prediction_hidden_dim": 4, "label_smoothing": 0.1}
MODELS = {  # with the number of small crops
    "PAWS of a ViT": (tiny_paws, {**VIT, **PREDICTION}, 2),
    "PAWS of a ResNet": (tiny_paws, {**RESNETV2, **PREDICTION}, 2),
    "SuNCEt": (tiny_suncet, RESNETV2, 0),
    "BYOL": (tiny_byol, {**VIT, "predictor": "direct_pred"}, 2),
    "SimSiam of a ResNet": (tiny_byol, {**RESNETV2, "predictor": "direct_copy", "ema": False}, 0),
    "BYOL with an MLP": (tiny_byol, VIT, 0),
}


def whole_batch(name: str) -> dict:
    make, _, small_crops = MODELS[name]
    batch = semi_supervised_batch(4, small_crops=small_crops, labels=LABELS)
    return {key: value for key, value in batch.items() if make is not tiny_byol or "support" not in key}


def two_passes(model, module, batch) -> dict:
    """Loss and gradients of the second pass, when running statistics and target have moved once."""
    for _ in range(2):
        model.zero_grad()
        output = module(**batch)
        output.loss.backward()
        if hasattr(model, "update_target"):
            model.update_target(0.9)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": output.loss.detach(), "gradients": gradients, "state": model.state_dict()}


def _passes_of_this_rank(rank, num_ranks):
    results = {}
    for name, (make, fields, _) in MODELS.items():
        own = {key: value.chunk(num_ranks)[rank] for key, value in whole_batch(name).items()}
        for checkpointed in (False, True):
            model = synchronize_batch_norm(make(**fields), torch.device("cpu"))
            if checkpointed:
                model.activation_checkpointing_enable()
            results[name, checkpointed] = two_passes(model, DistributedDataParallel(model), own)
    return results


@pytest.mark.slow
def test_ranks_equal_one_rank_with_everything():
    ranks = run_ranks(_passes_of_this_rank, 2, 2)
    for name, (make, fields, _) in MODELS.items():
        model = make(**fields)
        one = two_passes(model, model, whole_batch(name))
        for checkpointed in (False, True):
            results = [rank[name, checkpointed] for rank in ranks]
            loss = sum(result["loss"] for result in results) / 2
            torch.testing.assert_close(loss, one["loss"], rtol=1e-9, atol=0, msg=name)
            for result in results:
                assert_same_gradients(result["gradients"], one["gradients"], 1e-8)
                torch.testing.assert_close(result["state"], one["state"], rtol=1e-8, atol=1e-10)
        # The comparison can fail: a rank alone has another loss, or another F.
        part = {key: value.chunk(2)[0] for key, value in whole_batch(name).items()}
        if "support_labels" in part:
            part["support_labels"] = part["support_labels"].masked_fill(part["support_labels"] == 17, 99)
        alone = make(**fields)
        by_rank = two_passes(alone, alone, part)
        F = "input_correlation.correlation"
        apart = by_rank["state"][F] - one["state"][F] if make is tiny_byol else by_rank["loss"] - loss
        assert apart.abs().max() > 1e-3
