"""Local steps on real ranks over gloo: local gradients, consensus, moments."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from launch import run_ranks
from local_runs import backward, batch, flat, groups_of, make_model, parameters, sgd
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.slowmo import SlowMo


def gradients(model):
    return flat(p.grad for p in model.parameters())


def _train_by_ddp_and_by_local_sgd(rank):
    def run(groups):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = sgd(model)
        sync = None
        if groups is None:
            model = DistributedDataParallel(model)
        else:
            sync = LocalSGD(model, optimizer, sync_every=1, **groups).start()
        for step in range(10):
            backward(model, optimizer, rank, step)
            optimizer.step()
            if sync is not None:
                sync.step()
        return parameters(model)

    return run(None), run({}), run(groups_of(rank))


@pytest.mark.distributed
def test_averaging_after_every_sgd_step_is_training_with_averaged_gradients():
    for by_ddp, *by_local_sgd in run_ranks(_train_by_ddp_and_by_local_sgd, 4):
        for result in by_local_sgd:
            torch.testing.assert_close(result, by_ddp, rtol=1e-5, atol=1e-6)


def _ddp_with_inner_groups(rank):
    groups, model = groups_of(rank), make_model()
    ddp = DistributedDataParallel(model)
    optimizer = sgd(model)
    own = copy.deepcopy(model)
    backward(own, sgd(own), rank, 0)
    mean = gradients(own)
    dist.all_reduce(mean, group=groups["inner_group"])
    with SlowMo(ddp, optimizer, sync_every=2, **groups) as sync:
        seen = []
        for step in range(4):
            backward(ddp, optimizer, rank, step)
            if step == 0:
                in_node = torch.allclose(gradients(model), mean / 2, atol=1e-7)
            optimizer.step()
            sync.step()
            seen.append(parameters(model))
        sync.sync()
    return in_node, seen, flat(model.buffers())


@pytest.mark.distributed
def test_inner_groups_share_gradients_at_every_step_and_outer_groups_parameters_at_outer_steps():
    results = run_ranks(_ddp_with_inner_groups, 4)
    steps = [[seen[step] for _, seen, _ in results] for step in range(4)]
    for step, (a, b, c, d) in enumerate(steps):
        assert (torch.equal(a, b), torch.equal(c, d), torch.equal(a, c)) == (True, True, step % 2 == 1)
    assert all(in_node for in_node, *_ in results)
    assert all(torch.equal(statistics, results[0][2]) for *_, statistics in results)


def _gradients_inside_and_outside(rank):
    model = make_model()
    ddp = DistributedDataParallel(model)
    optimizer = sgd(model)

    def seen(step):
        # The model is the same at each call: only the averaging differs.
        own = copy.deepcopy(model)
        backward(own, sgd(own), rank, step)
        backward(ddp, optimizer, rank, step)
        mean = gradients(own)
        dist.all_reduce(mean)
        return torch.equal(gradients(model), gradients(own)), torch.allclose(gradients(model), mean / 2, atol=1e-7)

    results = [seen(0)]
    with LocalSGD(ddp, optimizer, sync_every=2):
        results.append(seen(1))
        inside = ddp.broadcast_buffers
    results.append(seen(2))
    with SlowMo(ddp, optimizer, sync_every=2):  # reuses the hook of DDP
        results.append(seen(3))
    results.append(seen(4))
    return results, inside, ddp.broadcast_buffers


@pytest.mark.distributed
def test_gradients_of_ddp_are_local_inside_and_averaged_again_outside():
    for results, *broadcasts in run_ranks(_gradients_inside_and_outside, 2):
        assert results == [(False, True), (True, False), (False, True), (True, False), (False, True)]
        assert broadcasts == [False, True]


def _post_local(rank):
    def run(start_step, wrap=True):
        model = make_model()
        wrapped = DistributedDataParallel(model) if wrap else model
        optimizer = sgd(model, momentum=0.9)
        sync = None
        if start_step is not None:
            sync = SlowMo(wrapped, optimizer, sync_every=2, sync_start_step=start_step).start()
        seen = []
        for step in range(6):
            backward(wrapped, optimizer, rank, step)
            optimizer.step()
            if sync is not None:
                sync.step()
            seen.append((parameters(model), flat(model.buffers())))
        return seen

    return run(None), run(3), run(3, wrap=False)


@pytest.mark.distributed
def test_sync_start_step_is_ddp_until_then_and_local_after():
    results = run_ranks(_post_local, 2)
    for by_ddp, post_local, without_ddp in results:
        for step in range(3):
            assert torch.equal(by_ddp[step][0], post_local[step][0])
            assert torch.equal(by_ddp[step][1], post_local[step][1])
        assert not torch.allclose(by_ddp[3][0], post_local[3][0], atol=1e-5)
        torch.testing.assert_close(by_ddp[2][0], without_ddp[2][0], rtol=1e-5, atol=1e-6)  # gradients only
    (_, first, _), (_, second, _) = results
    equal = [torch.equal(first[step][0], second[step][0]) for step in range(6)]
    assert equal == [True, True, True, False, True, False]


def _accelerate_accumulates(rank):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*(lambda m: (m, sgd(m)))(make_model()))
    own = copy.deepcopy(accelerator.unwrap_model(model))
    own_optimizer = sgd(own)
    is_local = []
    with LocalSGD(model, optimizer, sync_every=2) as sync:
        for step in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(rank, step)).square().mean())
                optimizer.step()
                (own(batch(rank, step)).square().mean() / 2).backward()
                if step % 2:
                    own_optimizer.step()
                    own_optimizer.zero_grad()
                optimizer.zero_grad()
            if step < 3:
                is_local.append(torch.equal(parameters(model), parameters(own)))
            sync.step()
            assert sync.steps == (step + 1) // 2
        pending = sync.local_steps
    return isinstance(model, DistributedDataParallel), is_local, pending


@pytest.mark.distributed
def test_accelerate_accumulates_locally_and_only_optimizer_steps_count():
    assert run_ranks(_accelerate_accumulates, 2) == [(True, [True] * 3, 1)] * 2


class Everything(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.trained = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.target = nn.Linear(3, 4).requires_grad_(False)
        self.register_buffer("integers", torch.full((2,), rank))
        self.register_buffer("flags", torch.tensor([rank == 0, rank > 0]))
        self.register_buffer("cache", torch.full((2 + rank,), float(rank)), persistent=False)
        self.low = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.norm(self.trained(x))


def _consensus_of_everything(rank):
    torch.manual_seed(rank)
    model = Everything(rank)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    optimizer = sgd(model, momentum=0.9)
    with LocalSGD(model, optimizer, sync_every=5) as sync:
        begin = copy.deepcopy(model.state_dict())
        for step in range(2):
            backward(model, optimizer, rank, step)
            optimizer.step()
            sync.step()
        with torch.no_grad():
            model.target.weight.add_(rank)
            model.low.fill_(rank)
            model.integers.fill_(10 * rank + 1)
            model.flags.copy_(torch.tensor([rank > 0, rank == 0]))
        before = copy.deepcopy(model.state_dict())
        distance = sync.consensus_distance()
        sync.sync()
        after = copy.deepcopy(model.state_dict())
        pending, no_distance = sync.local_steps, sync.consensus_distance()
    buffer = optimizer.state[model.trained.weight]["momentum_buffer"]
    same_memory = pointers == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    return begin, before, after, pending, (distance, no_distance), buffer, model.cache, same_memory


@pytest.mark.distributed
def test_consensus_of_statistics_frozen_parameters_and_integers():
    results = run_ranks(_consensus_of_everything, 3)
    befores = [before for _, before, *_ in results]
    trained = ("trained.weight", "trained.bias", "norm.weight", "norm.bias")
    mean = {name: sum(b[name].double() for b in befores) / 3 for name in befores[0]}
    squared = sum(((b[name] - mean[name]) ** 2).sum() for b in befores for name in trained) / 3
    for rank, (begin, before, after, pending, distances, _, cache, same_memory) in enumerate(results):
        assert all(torch.equal(begin[name], results[0][0][name]) for name in begin)  # entering makes all equal
        assert begin["integers"].tolist() == [0, 0]
        for name, value in after.items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, befores[0][name]), name
        assert before["norm.running_mean"].sum() != mean["norm.running_mean"].sum()
        assert (after["integers"].tolist(), after["flags"].tolist()) == ([1, 1], [False, True])
        assert after["low"].tolist() == [1, 1, 1]
        assert cache.tolist() == [rank] * (2 + rank)  # not in the state dict, of another shape on each rank
        assert pending == 2
        assert distances == (pytest.approx(math.sqrt(squared), rel=1e-5), pytest.approx(0.0, abs=1e-6))
        assert same_memory
    assert not torch.equal(results[0][5], results[1][5])  # "maintain": momentum stays each rank's own


BASE_BUFFERS = ("maintain", "reset", "average")


def _moments(rank):
    results = {}
    for base_buffers in BASE_BUFFERS:
        model = make_model()
        optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
        state = optimizer.state
        sync = LocalSGD(model, optimizer, sync_every=2, base_buffers=base_buffers).start()
        for step in range(2):
            backward(model, optimizer, rank, step)
            if rank == 1:
                model[0].bias.grad = None  # no moment on this rank
            optimizer.step()
            before = copy.deepcopy([state[model[0].weight], state.get(model[0].bias, {})])
            if step == 0:
                sync.sync()
                after_sync = state[model[0].weight]["exp_avg"].clone()
                first = before[0]["exp_avg"]
            sync.step()
        after = copy.deepcopy([state[model[0].weight], state.get(model[0].bias, {})])
        results[base_buffers] = first, after_sync, before, after
    return results


@pytest.mark.distributed
def test_moments_are_maintained_reset_or_averaged():
    results = run_ranks(_moments, 2)
    for result in results:
        _, _, (own, _), (now, _) = result["maintain"]
        assert all(torch.equal(own[name], now[name]) for name in own)
        _, _, (own, _), (now, _) = result["reset"]
        assert own["exp_avg"].abs().sum() > 0
        assert (now["exp_avg"].abs().sum(), now["exp_avg_sq"].abs().sum()) == (0, 0)
        assert (float(now["step"]), float(now["mu_product"])) == (0, 1)  # the bias corrections begin again
        for base_buffers in ("maintain", "reset"):  # a sync changes no moments
            assert torch.equal(*result[base_buffers][:2])
    averaged = [result["average"] for result in results]
    for name in ("exp_avg", "exp_avg_sq"):
        expected = sum(before[0][name] for _, _, before, _ in averaged) / 2
        assert all(torch.equal(after[0][name], expected) for *_, after in averaged)
    _, _, (_, own), (_, now) = averaged[0]
    assert torch.equal(own["exp_avg"], now["exp_avg"])  # a moment that one rank lacks stays
    assert all(float(after[0]["step"]) == 2 for *_, after in averaged)
    mean = (averaged[0][0] + averaged[1][0]) / 2
    assert not torch.equal(averaged[0][0], mean) and all(
        torch.equal(after_sync, mean) for _, after_sync, *_ in averaged
    )
