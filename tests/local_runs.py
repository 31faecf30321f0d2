"""Small models and batches for the tests of local training."""

import torch
import torch.distributed as dist
from torch import nn


def groups_of(rank):
    """The groups of 4 ranks of which 0 and 1, and 2 and 3, act as one."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))
    return {"group": mesh.get_group("between"), "inner_group": mesh.get_group("inside")}


def error_of(function):
    try:
        function()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def batch(rank, step):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(100 * rank + step))


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def sgd(model, momentum=0.0):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def backward(model, optimizer, rank, step):
    optimizer.zero_grad()
    model(batch(rank, step)).square().mean().backward()


def flat(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def parameters(model):
    return flat(model.parameters())
