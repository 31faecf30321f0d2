"""Copies of a model that hold the checkpoints of peers, without processes: state is loaded instead of received."""

import copy
import types
from types import SimpleNamespace

import pytest
import torch

from hf_msn.distributed.peer_checkpoints import PeerCheckpoints, checkpoint_of


class WithEverything(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.tied = torch.nn.Linear(3, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("table", torch.full((4,), 1 / 3), persistent=False)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x) + self.tied(x))) * self.frozen + self.table.to(x.dtype)


def changed(model, seed):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*other.parameters(), other.norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        other.norm.num_batches_tracked += 7
    return other


def checkpoints_of(model, **options):
    """The checkpoints of replica 1 of 3, not connected."""
    return PeerCheckpoints(model, SimpleNamespace(size=3, rank=1, timeout_seconds=None), **options)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_copies_predict_as_their_replica_does_in_eval_mode(device):
    model = WithEverything()
    checkpoints, peers = checkpoints_of(model, device=device), [changed(model, 1), changed(model, 2)]
    x, before = torch.randn(5, 3, requires_grad=True), copy.deepcopy(model.state_dict())
    assert checkpoints.outputs(x, lambda module, batch: module(batch)) == []
    checkpoints.load_state(
        {"step": 7, "in_use": {0: checkpoint_of(peers[0]), 2: checkpoint_of(peers[1])}, "received": {}}
    )
    outputs = checkpoints.outputs(x, lambda module, batch: (module(batch), copy.deepcopy(module.state_dict())))
    for (output, state), peer in zip(outputs, peers):
        assert torch.equal(output, peer.eval()(x)) and not output.requires_grad
        assert state.keys() == peer.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in peer.state_dict().items())
    assert checkpoints.step == 7 and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_in_bfloat16_are_half_as_large_and_close():
    model = WithEverything()
    peer, counter = changed(model, 1), 8  # num_batches_tracked stays an int64
    whole, half = checkpoint_of(peer), checkpoint_of(peer, torch.bfloat16)
    assert whole.numel() - counter == 2 * (half.numel() - counter)
    checkpoints = checkpoints_of(model, dtype=torch.bfloat16)
    checkpoints.load_state({"step": 1, "in_use": {0: half, 2: half}, "received": {}})
    x, seen = torch.randn(5, 3), []

    def forward(module, batch):
        seen.append((module.table.dtype, batch["rows"].dtype, batch["x"].dtype))
        return module(batch["x"])

    output, _ = checkpoints.outputs({"x": x, "rows": torch.arange(5)}, forward)
    assert seen[0] == (torch.float32, torch.int64, torch.bfloat16)  # a buffer outside of the state dict is kept
    torch.testing.assert_close(output.float(), peer.eval()(x), rtol=0.05, atol=0.1)
    with pytest.raises(ValueError, match=f"{whole.numel()}"):
        checkpoints.load_state({"step": 1, "in_use": {0: whole, 2: whole}, "received": {}})


def test_copies_call_their_own_forward_if_that_of_the_model_was_replaced():
    model = WithEverything()
    forward = model.forward.__func__
    model.forward = types.MethodType(lambda self, x: forward(self, x) + 1.0, model)  # as accelerate does
    peer, x = changed(model, 1), torch.randn(5, 3)
    checkpoints = checkpoints_of(model)
    checkpoints.load_state({"step": 1, "in_use": {0: checkpoint_of(peer), 2: checkpoint_of(peer)}, "received": {}})
    for output in checkpoints.outputs(x, lambda module, batch: module(batch)):
        assert torch.equal(output, peer.eval()(x))
