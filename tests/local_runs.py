"""Small models and batches for the tests of local training."""

import torch
from torch import nn


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
