"""PAWS and SimCLR + SuNCEt on two ranks, batch normalisation included, are those of one rank with everything."""

import pytest
import torch
from launch import run_ranks
from tiny_semi_supervised import RESNETV2, VIT, assert_same_gradients, semi_supervised_batch, tiny_paws, tiny_suncet
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.batch_norm import synchronize_batch_norm

pytestmark = pytest.mark.distributed

BATCH = 4
# Rank 0 holds other classes than rank 1; class 17 is on both.
LABELS = [99, 17, 99, 4, 17, 4]
PREDICTION = {"prediction_head": True, "prediction_hidden_dim": 4, "label_smoothing": 0.1}
MODELS = {
    "PAWS of a ViT": (tiny_paws, {**VIT, **PREDICTION}),
    "PAWS of a ResNet": (tiny_paws, {**RESNETV2, **PREDICTION}),
    "SuNCEt": (tiny_suncet, RESNETV2),
}


def whole_batch(name: str) -> dict:
    return semi_supervised_batch(BATCH, small_crops=2 if name.startswith("PAWS") else 0, labels=LABELS)


def two_passes(model, module, batch) -> dict:
    """Loss and gradients of the second pass, when the running statistics have moved once."""
    module(**batch).loss.backward()
    model.zero_grad()
    output = module(**batch)
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def _passes_of_this_rank(rank, num_ranks):
    results = {}
    for name, (make, fields) in MODELS.items():
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
    for name, (make, fields) in MODELS.items():
        model = make(**fields)
        one = two_passes(model, model, whole_batch(name))
        for checkpointed in (False, True):
            results = [rank[name, checkpointed] for rank in ranks]
            loss = sum(result["loss"] for result in results) / 2
            torch.testing.assert_close(loss, one["loss"], rtol=1e-9, atol=0, msg=name)
            for result in results:
                assert_same_gradients(result["gradients"], one["gradients"], 1e-8)
                torch.testing.assert_close(result["buffers"], one["buffers"], rtol=1e-9, atol=1e-12)
        # What the comparison is there for: a rank alone has another loss.
        part = {key: value.chunk(2)[0] for key, value in whole_batch(name).items()}
        part["support_labels"] = part["support_labels"].masked_fill(part["support_labels"] == 17, 99)
        alone = make(**fields)
        assert (two_passes(alone, alone, part)["loss"] - ranks[0][name, False]["loss"]).abs() > 1e-3
