"""Push-sum on one rank: mass is split, sent and added without loss, and means are weighted."""

import pytest
import torch

from hf_msn.distributed.comm.mailbox import Message
from hf_msn.distributed.push_sum import PushSum


def make_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [((3, 2), torch.float64), ((4,), torch.float32), ((2,), torch.complex64)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape, dtype in shapes]


class Wire:
    """A mailbox that sends in float32 and keeps the messages."""

    def __init__(self):
        self.narrows, self.messages = [True, False, False], []

    def rounded(self, tensors):
        return [tensor.float().to(tensor.dtype) for tensor in tensors]

    def post(self, peer, kind, tensors, *, weight):
        self.messages.append(Message(peer, kind, weight=weight, tensors=[t.float().clone() for t in tensors]))

    def post_sum(self, peer, kind, tensors, *, weight):
        self.post(peer, kind, tensors, weight=weight)
        tensors[0].sub_(self.messages[-1].tensors[0])


@pytest.mark.parametrize("adds_up", [True, False])
def test_shares_and_rounding_errors_sum_to_the_mass_before(adds_up):
    push_sum, wire = PushSum(make_parameters()), Wire()
    before = [x.double().clone() for x in push_sum.x]
    push_sum.push([1, 2], wire, 0, adds_up=adds_up)
    assert push_sum.weight == pytest.approx(1 / 3)
    assert [message.sender for message in wire.messages] == [1, 2]
    assert (push_sum.x[0] - before[0] / 3).abs().max() > 0  # the errors of float32
    torch.testing.assert_close(push_sum.x[1].double(), before[1] / 3, rtol=1e-6, atol=0)
    push_sum.add(wire.messages)
    assert push_sum.weight == pytest.approx(1.0)
    for x, old, tolerance in zip(push_sum.x, before, (1e-15, 1e-6, 1e-6)):
        torch.testing.assert_close(x.double(), old, rtol=0, atol=tolerance)


def test_the_mean_by_messages_weights_x_averages_floats_and_takes_the_integers_of_the_first_rank():
    ranks = [PushSum(make_parameters(seed)) for seed in range(3)]
    others = [[torch.tensor([float(rank)]), torch.tensor([rank + 5])] for rank in range(3)]
    for rank, push_sum in enumerate(ranks):
        push_sum.divide(1.0 / (rank + 1))  # w = rank + 1, z as before
    z = [[t.clone() for t in make_parameters(seed)] for seed in range(3)]
    contributions = [push_sum.contribution(other) for push_sum, other in zip(ranks, others)]
    result = ranks[1].combine(contributions, others[1])
    parameters = [tensor for _, tensor in ranks[1].pairs]
    ranks[1].load(result, others[1])
    assert ranks[1].weight == 1.0
    for index, parameter in enumerate(parameters):
        real = [torch.view_as_real(v[index]) if v[index].is_complex() else v[index] for v in z]
        torch.testing.assert_close(parameter, sum((r + 1) * v for r, v in enumerate(real)) / 6)
    assert [t.item() for t in others[1]] == [1.0, 5]
