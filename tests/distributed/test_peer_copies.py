"""Copies of other replicas."""

import copy
import types

import pytest
import torch

from hf_msn.distributed.replicas.peer_copies import PeerCopies


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


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_copies_predict_as_the_peers_do_in_eval_mode(device):
    model = WithEverything()
    copies = PeerCopies(model, [0, 2], device=device)
    assert copies.peers == []
    peers = {place: changed(model, place + 1) for place in (0, 2)}
    copies.fill(7, {place: PeerCopies(peer, []).snapshot() for place, peer in peers.items()})
    assert (copies.peers, copies.snapshot_step) == ([0, 2], 7)
    x = torch.randn(5, 3, requires_grad=True)
    before = copy.deepcopy(model.state_dict())
    for place, peer in peers.items():
        with copies.of(place, {"x": x}) as (module, batch):
            output = module(**batch)
        assert torch.equal(output, peer.eval()(x))
        assert not output.requires_grad
        assert module.state_dict().keys() == peer.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), peer.state_dict().values()))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    copies.keep_only({2})
    assert copies.peers == [2]


def test_copies_in_bfloat16_are_half_as_large_and_near():
    model = WithEverything()
    peer = changed(model, 1)
    whole, half = PeerCopies(model, [1]), PeerCopies(model, [1], dtype=torch.bfloat16)
    snapshots = [PeerCopies(peer, [], dtype=dtype).snapshot() for dtype in (None, torch.bfloat16)]
    counter = 8  # num_batches_tracked stays an integer
    assert snapshots[0].numel() - counter == 2 * (snapshots[1].numel() - counter)
    half.fill(1, {1: snapshots[1]})
    x = torch.randn(5, 3)
    with half.of(1, {"x": x, "rows": torch.arange(5)}) as (module, batch):
        assert module.table.dtype == torch.float32  # what is not exchanged keeps its precision
        assert batch["rows"].dtype == torch.int64
        output = module(batch["x"])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), peer.eval()(x), rtol=0.05, atol=0.1)
    with pytest.raises(ValueError, match="same `copies_dtype`"):
        whole.check({1: snapshots[1]})
    half.check({1: snapshots[1]})


def test_a_copy_calls_its_own_forward_where_the_model_s_was_wrapped():
    model = WithEverything()
    forward = model.forward.__func__
    model.forward = types.MethodType(lambda self, x: forward(self, x) + 1.0, model)  # as accelerate does it
    peer = changed(model, 1)
    copies = PeerCopies(model, [1])
    copies.fill(1, {1: PeerCopies(peer, []).snapshot()})
    x = torch.randn(5, 3)
    with copies.of(1, x) as (module, batch):
        assert torch.equal(module(batch), peer.eval()(x))
