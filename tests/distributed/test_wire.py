import pytest
import torch
from torch import nn

from hf_msn import LocalSGD, SlowMo
from hf_msn.distributed.comm.exchange import Exchange
from hf_msn.distributed.comm.wire import RoundedMean, checked_wire_dtype
from tests.launch import run_ranks

pytestmark = pytest.mark.distributed
STEPS, SIZE = 12, 50


def _changes(rank, step):
    """What local training does to the parameters: tiny against them, so that rounding them would lose it."""
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100 * step + rank)) * 1e-3 + 1e-3


def _rounded_means(rank):
    rounded = RoundedMean(Exchange(), torch.bfloat16)
    x = torch.full((SIZE,), 10.0)
    for step in range(STEPS):
        anchor = x.clone()
        x = x + _changes(rank, step)
        rounded.mean_(0, x, anchor)
    return x, rounded.residuals[0]


def test_rounded_means_follow_the_equation_and_no_rounding_adds_up():
    found = run_ranks(_rounded_means, 2)
    x, e = torch.full((SIZE,), 10.0), [torch.zeros(SIZE), torch.zeros(SIZE)]
    exact = torch.full((SIZE,), 10.0, dtype=torch.float64)
    for step in range(STEPS):
        sent = []
        for rank in range(2):
            change = (x + _changes(rank, step)) - x + e[rank]
            sent.append(change.bfloat16())
            e[rank] = change - sent[rank]
        x = x + ((sent[0] + sent[1]) / 2).float()
        exact += sum(_changes(rank, step).double() for rank in range(2)) / 2
    for rank, (own, residual) in enumerate(found):
        assert torch.equal(own, x)
        assert torch.equal(residual, e[rank])
    # Twelve changes of about 1e-3 add up to 1e-2. The floats near 10 are rounded too, by up to 5e-7 each.
    assert (exact - 10).min() > 8e-3
    assert (found[0][0].double() - exact).abs().max() < 3e-5


def _train(rank, kind, steps, state, wire):
    torch.manual_seed(0)
    model = nn.Linear(SIZE, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if state is not None:
        weights, method_state = state[rank]
        model.load_state_dict(weights)
    method = {
        "local_sgd": lambda: LocalSGD(model, optimizer, sync_every=3, wire_dtype=wire),
        "slowmo": lambda: SlowMo(model, optimizer, sync_every=3, slow_momentum=0.5, wire_dtype=wire),
        "averages": lambda: SlowMo(model, optimizer, sync_every=3, slow_momentum=0.0, wire_dtype=wire),
    }[kind]()
    if state is not None:
        method.load_state_dict(method_state)
    method.start()
    sent = method.bytes_sent
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(10 * step + rank))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        method.step()
    sent = method.bytes_sent - sent
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, method.state_dict(), sent


@pytest.mark.parametrize("kind", ["local_sgd", "slowmo", "averages"])
def test_a_bfloat16_wire_halves_the_bytes_and_stays_near_full_precision(kind):
    full = run_ranks(_train, 2, kind, range(9), None, None)
    half = run_ranks(_train, 2, kind, range(9), None, "bfloat16")
    assert [run[2] for run in full] == [3 * SIZE * 4] * 2  # three means over two ranks: 2B(n-1)/n = B each
    assert [run[2] for run in half] == [3 * SIZE * 2] * 2
    assert torch.equal(half[0][0]["weight"], half[1][0]["weight"])
    difference = (half[0][0]["weight"] - full[0][0]["weight"]).abs().max()
    assert 0 < difference < 5e-3 * full[0][0]["weight"].abs().max()


@pytest.mark.parametrize("kind", ["local_sgd", "slowmo"])
def test_a_bfloat16_wire_goes_on_bit_for_bit_inside_a_period(kind):
    whole = run_ranks(_train, 2, kind, range(9), None, "bfloat16")
    first = run_ranks(_train, 2, kind, range(5), None, "bfloat16")
    then = run_ranks(_train, 2, kind, range(5, 9), [run[:2] for run in first], "bfloat16")
    for rank in range(2):
        assert torch.equal(whole[rank][0]["weight"], then[rank][0]["weight"])


def test_an_unknown_wire_dtype_is_refused():
    assert checked_wire_dtype(None) is None
    with pytest.raises(ValueError, match=r"'float32', 'bfloat16' or None .*'fp8'"):
        checked_wire_dtype("fp8")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`shard_state=True`"):
        SlowMo(model, optimizer, shard_state=True, wire_dtype="bfloat16")
