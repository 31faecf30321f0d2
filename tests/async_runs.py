"""Small models for the tests of asynchronous gossip."""

import time

import torch
from torch import nn

from hf_msn import AsyncGossip

METHODS = ["ad_psgd", "push_sum"]


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def targets(rank, model=None):
    generator = torch.Generator().manual_seed(100 + rank)
    model = model or make_model()
    return [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in model.parameters()]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def jump_to(model, optimizer, values):
    """One step of SGD that ends at `values`; those after it stay where they are."""
    for p, value in zip(model.parameters(), values):
        p.grad = p.detach() - value
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0


def step_of(optimizer, sync, seconds=0.0):
    optimizer.step()
    sync.step()
    time.sleep(seconds)


class Accounts(AsyncGossip):
    """Record the contribution of this rank to each sync: x, flat, its weight and the accounts of the mailbox."""

    def _record(self):
        mailbox = self._mailbox
        self.brought = flat(self._push_sum.x)
        self.account = self.weight, list(mailbox.weight_posted), list(mailbox.weight_collected)

    def _average_by_collectives(self):
        self._record()
        super()._average_by_collectives()

    def _contribution(self, others):
        self._record()
        return super()._contribution(others)
