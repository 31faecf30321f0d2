"""Ranks that start unlike and mix, for the tests of gossip."""

import copy

import torch
from gossip_reference import NUM_STEPS, flat, make_model, make_optimizer, make_sync, take_step
from states import saved_and_loaded
from torch import nn

PLAIN = {"momentum": 0.0, "quasi_global_momentum": 0.9}


class Numbers(nn.Module):
    """A vector of parameters, float64 by default."""

    def __init__(self, size=5, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=dtype))


def resume(rank, case, n):
    """The states after going straight on, and after going on from a save in two ways."""

    def run(model, optimizer, sync, steps):
        for step in steps:
            take_step(model, optimizer, (0.1, 0.2), rank, step)
            sync.step()
        return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}) | {
            "sync": saved_and_loaded(sync.state_dict())
        }

    def make(seed):
        model = make_model(seed).float()
        model.weight.data, model.bias.data = model.weight.data.double(), model.bias.data.double()
        optimizer = make_optimizer(model, case.get("momentum", 0.9))
        return model, optimizer, make_sync(model, optimizer, case, n)

    whole = make(0)
    whole[2].start()
    saved = run(*whole, range(4))
    straight = run(*whole, range(4, NUM_STEPS))
    whole[2].stop()
    ends = [(straight, flat(whole[0]))]
    for started_first in (False, True):
        model, optimizer, sync = make(7 + rank)
        if started_first:
            sync.start()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch takes the tensors themselves
        sync.load_state_dict(saved["sync"])
        if not started_first:
            sync.start()
        ended = run(model, optimizer, sync, range(4, NUM_STEPS))
        sync.stop()
        ends.append((ended, flat(model)))
    return ends, saved
