"""Values of collectives, and their gradients of the sum of all ranks' losses."""

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks

from hf_msn.distributed.collectives import (
    all_gather_cat,
    all_reduce_mean,
    all_reduce_sum,
    is_distributed,
    rank,
    world_size,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_and_weights(world_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return the input of each rank, and the weights of its loss on the mean and on the concatenation."""
    rows = [normal(2, 3, seed=r) for r in range(world_size)]
    on_mean = [normal(2, 3, seed=10 + r) for r in range(world_size)]
    on_all = [normal(2 * world_size, 3, seed=20 + r) for r in range(world_size)]
    return rows, on_mean, on_all


def _mean_gather_sum(this_rank, num_ranks):
    rows, on_mean, on_all = inputs_and_weights(num_ranks)
    results = {"seen": (rank(), world_size(), is_distributed())}
    for name, collective, weights in (("mean", all_reduce_mean, on_mean), ("gather", all_gather_cat, on_all)):
        # Not contiguous.
        row = rows[this_rank].T.contiguous().T.requires_grad_()
        value = collective(row)
        # Nonlinear, so that a gradient at a wrong value is found.
        (weights[this_rank] * value**2).sum().backward()
        results[name] = value.detach(), row.grad
        results[f"{name} left its input alone"] = torch.equal(row.detach(), rows[this_rank])
    row = rows[this_rank].clone().requires_grad_()
    total = all_reduce_sum(row)
    results["sum"] = total
    results["sum has no gradient and leaves its input alone"] = not total.requires_grad and torch.equal(
        row.detach(), rows[this_rank]
    )
    results["half"] = all_gather_cat(torch.full((1, 2), float(this_rank), dtype=torch.bfloat16))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [3])
def test_values_and_gradients_are_those_of_all_ranks_together(num_ranks):
    results = run_ranks(_mean_gather_sum, num_ranks, num_ranks)

    rows, on_mean, on_all = inputs_and_weights(num_ranks)
    together = [row.requires_grad_() for row in rows]
    mean = sum(together) / num_ranks
    expected_mean = torch.autograd.grad(sum((weight * mean**2).sum() for weight in on_mean), together)
    gathered = torch.cat(together)
    expected_gather = torch.autograd.grad(sum((weight * gathered**2).sum() for weight in on_all), together)
    for this_rank, result in enumerate(results):
        assert result["seen"] == (this_rank, num_ranks, True)
        torch.testing.assert_close(result["mean"], (mean.detach(), expected_mean[this_rank]), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            result["gather"], (gathered.detach(), expected_gather[this_rank]), rtol=1e-12, atol=1e-14
        )
        torch.testing.assert_close(result["sum"], sum(together).detach(), rtol=1e-12, atol=1e-14)
        assert all(flag for name, flag in result.items() if "alone" in name), result
        assert result["half"].tolist() == [[float(r)] * 2 for r in range(num_ranks)]


def _on_a_sub_group(this_rank):
    group = dist.new_group([0, 2])
    if this_rank == 1:
        return None
    row = torch.full((1, 1), float(this_rank + 1), requires_grad=True)
    gathered, mean = all_gather_cat(row, group), all_reduce_mean(row, group)
    place = dist.get_rank(group)
    ((gathered.T @ torch.tensor([[1.0], [10.0]])) * (place + 1) + 100 * mean).sum().backward()
    return gathered.flatten().tolist(), mean.item(), row.grad.item(), all_reduce_sum(row, group).item(), rank(group)


@pytest.mark.distributed
def test_collectives_of_a_group_use_its_ranks_only():
    first, outside, second = run_ranks(_on_a_sub_group, 3)
    assert outside is None
    # The losses weigh the gathered rows by (1, 10) and (2, 20), the mean by 100 each: by hand, 3 + 100 and 30 + 100.
    assert first == ([1.0, 3.0], 2.0, 103.0, 4.0, 0)
    assert second == ([1.0, 3.0], 2.0, 130.0, 4.0, 1)


def test_one_process_returns_its_input():
    row = normal(2, 3, seed=0).requires_grad_()
    assert all_reduce_mean(row) is row
    assert all_gather_cat(row) is row
    assert torch.equal(all_reduce_sum(row), row.detach())
    assert (rank(), world_size(), is_distributed()) == (0, 1, False)
