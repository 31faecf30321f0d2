"""Collectives of a forward pass while gradients are local."""

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from torch import nn

from hf_msn import LocalSGD, paws_loss
from hf_msn.distributed.batch_norm import CrossRankBatchNorm
from hf_msn.distributed.collectives import all_gather_cat, all_reduce_mean, rank, world_size
from hf_msn.distributed.gradient_sync import ForwardScope

pytestmark = pytest.mark.distributed


class _MeanOverRanks(nn.Module):
    """Averages its output over the ranks that `group=None` stands for, as losses do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        if x is None:
            raise ZeroDivisionError
        return all_reduce_mean(self.weight * x), world_size(), rank(), all_gather_cat(x.view(1))


def _scoped(rank_here, size):
    model, own = _MeanOverRanks(), torch.tensor(float(rank_here + 1), dtype=torch.float64)
    scope = ForwardScope(model)
    found = {"before": model(own)[0].item()}
    scope.limit_to(None)
    mean, ranks, place, gathered = model(own)
    mean.backward()  # outside of `forward`: with the group of the forward pass
    found["alone"] = (mean.item(), model.weight.grad.item(), ranks, place, gathered.tolist())
    with pytest.raises(ZeroDivisionError):
        model(None)
    found["outside"] = (all_reduce_mean(own).item(), world_size())  # also after an error in `forward`
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    scope.limit_to(pairs[rank_here // 2])
    model.weight.grad = None
    mean, ranks, place, gathered = model(own)
    mean.backward()
    found["pair"] = (mean.item(), model.weight.grad.item(), ranks, place, gathered.tolist())
    scope.lift()
    found["after"] = model(own)[0].item()
    return found


def test_collectives_of_the_forward_pass_stay_in_the_limited_group():
    for place, found in enumerate(run_ranks(_scoped, 4, 4)):
        own = place + 1.0
        pair = [1.0, 2.0] if place < 2 else [3.0, 4.0]
        mean = sum(pair) / 2
        assert found["before"] == found["after"] == 2.5
        assert found["alone"] == (own, own, 1, 0, [own])
        assert found["outside"] == (2.5, 4)
        assert found["pair"] == (mean, own, 2, place % 2, pair)  # the second is the gradient


def _normalised(rank_here):
    norm = CrossRankBatchNorm(nn.BatchNorm1d(1, eps=1e-12, affine=False, momentum=None).double())
    model = nn.Sequential(norm)
    batch = torch.tensor([[0.0], [2.0]], dtype=torch.float64) + 10 * rank_here
    scope = ForwardScope(model)
    scope.limit_to(None)
    local = model(batch).flatten().tolist()
    scope.lift()
    return local, model(batch).flatten().tolist()


def test_batch_norm_over_ranks_uses_its_own_batch_while_limited():
    for place, (local, whole) in enumerate(run_ranks(_normalised, 2)):
        assert local == pytest.approx([-1.0, 1.0], abs=1e-9)
        # All of 0, 2, 10, 12: mean 6, variance 26.
        assert whole == pytest.approx([(v - 6) / 26**0.5 for v in ([0, 2], [10, 12])[place]], abs=1e-9)


class _Supported(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 2, bias=False).double()

    def forward(self, views, supports, labels):
        z, s = self.project(views), self.project(supports)
        return paws_loss(z, s, z.detach().roll(2, 0), s.detach(), labels, num_small_crops=0, temperature=0.5).loss


def _batch(rank_here, step):
    g = torch.Generator().manual_seed(10 * step + rank_here)
    views, supports = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    return views, supports, torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]]


def _take_steps(model, place, optimizer, after_step=lambda: None):
    for step in range(3):
        optimizer.zero_grad()
        model(*_batch(place, step)).backward()
        optimizer.step()
        after_step()


def _local_paws(rank_here):
    torch.manual_seed(0)
    model = _Supported()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with LocalSGD(model, optimizer, sync_every=3) as sync:
        _take_steps(model, rank_here, optimizer, sync.step)
    return model.project.weight.detach()


def test_local_steps_of_paws_are_those_of_one_process_with_its_own_supports():
    alone = []
    for place in range(2):
        torch.manual_seed(0)
        model = _Supported()
        _take_steps(model, place, torch.optim.SGD(model.parameters(), lr=0.5))
        alone.append(model.project.weight.detach())
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    expected = (alone[0] + alone[1]) / 2
    for weight in run_ranks(_local_paws, 2):
        assert torch.allclose(weight, expected, rtol=0, atol=1e-12)
