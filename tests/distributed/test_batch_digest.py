"""The number that tells whether two replicas hold the same batch."""

import torch
from codistillation_runs import random

from hf_msn.distributed.replicas.batch_digest import batch_digest


def test_a_digest_tells_batches_apart_by_values_places_names_and_kinds():
    batch = {"x": random(3, 4), "labels": torch.tensor([1, 2, 3]), "flag": True}
    device = torch.device("cpu")
    same = {"labels": torch.tensor([1, 2, 3]), "x": random(3, 4), "flag": True}
    swapped = {**batch, "x": random(3, 4)[[1, 0, 2]]}
    nudged = {**batch, "x": random(3, 4) + torch.eye(3, 4) * 1e-15}
    others = [
        swapped,
        nudged,
        {**batch, "labels": torch.tensor([1, 2, 4])},
        {**batch, "labels": torch.tensor([3, 2, 1])},
        {**batch, "labels": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {**batch, "labels": torch.tensor([[1, 2, 3]])},
        {**batch, "flag": False},
        {"y": batch["x"], "labels": batch["labels"], "flag": True},
        [batch["x"], batch["labels"]],
    ]
    digests = [tuple(batch_digest(b, device).tolist()) for b in (batch, *others)]
    assert tuple(batch_digest(same, device).tolist()) == digests[0]
    assert len(set(digests)) == 1 + len(others)


def test_a_digest_takes_every_kind_of_tensor_and_does_not_depend_on_the_layout():
    device = torch.device("cpu")
    x = random(4, 6)
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.bool, torch.complex64]
    for tensor in [x.to(dtype) for dtype in kinds] + [torch.tensor(1.5), torch.empty(0)]:
        assert batch_digest(tensor, device).shape == (2,)
    assert torch.equal(batch_digest(x.T.contiguous().T, device), batch_digest(x, device))
