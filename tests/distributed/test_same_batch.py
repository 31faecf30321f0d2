"""Digest of a batch, which tells whether two replicas hold the same one."""

import torch

from hf_msn.distributed.same_batch import batch_digest

CPU = torch.device("cpu")


def test_digest_depends_on_values_positions_names_dtypes_and_shapes():
    x, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
    batch = {"x": x, "labels": labels, "flag": True}
    others = [
        {**batch, "x": x[[1, 0, 2]]},
        {**batch, "x": torch.nextafter(x, x + torch.eye(3, 4))},
        {**batch, "labels": torch.tensor([1, 2, 4])},
        {**batch, "labels": torch.tensor([3, 2, 1])},
        {**batch, "labels": labels.int()},
        {**batch, "labels": labels[None]},
        {**batch, "flag": False},
        {"y": x, "labels": labels, "flag": True},
        [x, labels],
    ]
    digests = [tuple(batch_digest(b, CPU).tolist()) for b in (batch, *others)]
    assert tuple(batch_digest({"labels": labels.clone(), "flag": True, "x": x.clone()}, CPU).tolist()) == digests[0]
    assert len(set(digests)) == 1 + len(others)


def test_digest_takes_every_dtype_and_ignores_the_memory_layout():
    x = torch.randn(4, 6)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.bool, torch.complex64]
    for tensor in [x.to(dtype) for dtype in dtypes] + [torch.tensor(1.5), torch.empty(0)]:
        assert batch_digest(tensor, CPU).shape == (2,)
    assert torch.equal(batch_digest(x.T.contiguous().T, CPU), batch_digest(x, CPU))
