"""The gradient cache on two ranks: the gradients of plain DistributedDataParallel, averaged once per update."""

import copy

import pytest
import torch
from launch import run_ranks
from tiny import tiny_batch, tiny_model
from tiny_semi_supervised import RESNETV2, VIT, assert_same_gradients, semi_supervised_batch, tiny_paws, tiny_suncet
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hf_msn import GradientCache
from hf_msn.distributed.batch_norm import synchronize_batch_norm

pytestmark = pytest.mark.distributed

LABELS = [99, 17, 99, 4, 17, 4]
MODELS = {
    "msn": lambda: tiny_model(use_sinkhorn=True, initializer_range=0.2).double(),
    "paws": lambda: tiny_paws(**VIT),
    "suncet": lambda: tiny_suncet(**VIT, nt_xent_tile_size=3),
    "batch norm": lambda: tiny_paws(**RESNETV2),  # in the encoder: over the chunks of both ranks
}


def batch_of(name: str, rank: int) -> dict:
    if name == "msn":
        return {key: views.double() for key, views in tiny_batch(batch_size=5, seed=rank).items()}
    return semi_supervised_batch(5, small_crops=2 * (name != "suncet"), seed=rank, labels=LABELS)


def accumulate(name: str, rank: int, chunk_size: int | None) -> dict:
    """Two micro-batches, of which the second is reduced. Returns gradients, buffers and the number of reductions."""
    model = synchronize_batch_norm(MODELS[name](), torch.device("cpu"))
    ddp, buckets = DistributedDataParallel(model), []
    ddp.register_comm_hook(None, lambda state, bucket: buckets.append(1) or allreduce_hook(state, bucket))
    for first in (True, False):
        batch = batch_of(name, rank + 2 * first)
        sync = ddp.no_sync() if first else torch.enable_grad()
        with sync:
            if chunk_size is None:
                ddp(**batch).loss.backward()
            else:
                with GradientCache(ddp, chunk_size) as cache:
                    cache.backward(batch)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "buffers": dict(model.named_buffers()), "reductions": len(buckets)}


def _steps_of_this_rank(rank):
    return {(name, size): accumulate(name, rank, size) for name in MODELS for size in (None, 3)}


def test_gradients_and_reductions_are_those_of_plain_ddp():
    for result in run_ranks(_steps_of_this_rank, 2):
        for name in MODELS:
            plain, cached = result[name, None], result[name, 3]
            assert cached["reductions"] == plain["reductions"] == 1
            if name == "batch norm":  # not exact, but it went through, alike on both ranks
                assert copy.copy(cached["gradients"]).keys() == plain["gradients"].keys()
                continue
            assert_same_gradients(cached["gradients"], plain["gradients"], 1e-12)
            torch.testing.assert_close(cached["buffers"], plain["buffers"], rtol=1e-12, atol=1e-12)
