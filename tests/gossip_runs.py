"""Ranks that start unlike and mix, for the tests of gossip."""

import torch
from gossip_reference import NUM_STEPS, make_model, make_optimizer, make_sync, take_step
from states import resumed_in_two_ways
from torch import nn

PLAIN = {"momentum": 0.0, "quasi_global_momentum": 0.9}


class Numbers(nn.Module):
    """A vector of parameters, float64 by default."""

    def __init__(self, size=5, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=dtype))


def resume(rank, case, n):
    def make(seed):
        model = make_model(seed).float()
        model.weight.data, model.bias.data = model.weight.data.double(), model.bias.data.double()
        optimizer = make_optimizer(model, case.get("momentum", 0.9))
        return model, optimizer, make_sync(model, optimizer, case, n)

    def run(model, optimizer, sync, steps):
        for step in steps:
            take_step(model, optimizer, (0.1, 0.2), rank, step)
            sync.step()

    return resumed_in_two_ways(make, run, NUM_STEPS)
