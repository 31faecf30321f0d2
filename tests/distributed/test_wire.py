import pytest
import torch
from launch import run_ranks
from torch import nn

from hf_msn import LocalSGD, SlowMo
from hf_msn.distributed.comm.wire import checked_wire_dtype

pytestmark = pytest.mark.distributed
STEPS, SIZE = 12, 50


def _changes(rank, step):
    """Return a change of the parameters that is too small to survive their rounding."""
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100 * step + rank)) * 1e-3 + 1e-3


def _rounded_means(rank):
    x = nn.Parameter(torch.full((SIZE,), 10.0))
    optimizer = torch.optim.SGD([x], lr=1.0)
    with LocalSGD(nn.ParameterList([x]), optimizer, sync_every=1, wire_dtype="bfloat16") as sync:
        for step in range(STEPS):
            x.grad = -_changes(rank, step)
            optimizer.step()
            sync.step()
        return x.detach().clone(), sync.state_dict()["rounding_errors"][0]


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


KINDS = {
    "local_sgd": (LocalSGD, {}),
    "slowmo": (SlowMo, {"slow_momentum": 0.5}),
    "mean": (SlowMo, {"slow_momentum": 0.0}),
}


def _train(rank, kind, wire, steps, state=None):
    torch.manual_seed(0)
    model = nn.Linear(SIZE, 1, bias=False)
    make, options = KINDS[kind]
    method = make(model, torch.optim.SGD(model.parameters(), lr=0.05), sync_every=3, wire_dtype=wire, **options)
    if state is not None:
        model.load_state_dict(state[0])
        method.load_state_dict(state[1])
    method.start()
    sent = method.bytes_sent
    for step in steps:
        method.optimizer.zero_grad()
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(10 * step + rank))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        method.optimizer.step()
        method.step()
    sent = method.bytes_sent - sent
    state = {name: value.clone() for name, value in model.state_dict().items()}, method.state_dict()
    method.stop(error=ValueError())  # without the last mean
    return state, sent


def _train_all(rank):
    results = {}
    for kind in KINDS:
        first, _ = _train(rank, kind, "bfloat16", range(5))
        results[kind] = (
            _train(rank, kind, None, range(9)),
            _train(rank, kind, "bfloat16", range(9)),
            _train(rank, kind, "bfloat16", range(5, 9), first),
        )
    return results


def test_a_bfloat16_wire_halves_the_bytes_stays_near_full_precision_and_resumes_to_the_bit():
    results = run_ranks(_train_all, 2)
    for kind in KINDS:
        for rank in range(2):
            (full, _), full_bytes = results[rank][kind][0]
            (half, _), half_bytes = results[rank][kind][1]
            (resumed, _), _ = results[rank][kind][2]
            assert full_bytes == 3 * SIZE * 4  # three means over two ranks: 2B(n-1)/n = B each
            assert half_bytes == 3 * SIZE * 2
            assert torch.equal(half["weight"], results[0][kind][1][0][0]["weight"])
            assert torch.equal(half["weight"], resumed["weight"])
            difference = (half["weight"] - full["weight"]).abs().max()
            assert 0 < difference < 5e-3 * full["weight"].abs().max()


def test_an_unknown_wire_dtype_is_refused():
    assert checked_wire_dtype(None) is None
    with pytest.raises(ValueError, match="'fp8'"):
        checked_wire_dtype("fp8")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`shard_state=True`"):
        SlowMo(model, optimizer, shard_state=True, wire_dtype="bfloat16")
