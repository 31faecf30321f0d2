import pytest
import torch
from launch import run_ranks
from torch import nn

from hf_msn import Gossip, LocalSGD, SlowMo
from hf_msn.distributed.comm.wire import decode_blocks, encode_blocks

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


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_blocks_are_rounded_to_the_nearest_multiple_of_their_scale(bits, most):
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [0.0], [1e4]])
    payload = encode_blocks(x.flatten(), bits)
    assert payload.shape == (3, 4 + 16 * bits) and payload.dtype == torch.uint8
    for block, found in zip(x.double(), decode_blocks(payload, bits).view(3, 128)):
        scale = (block.abs().max() / most).item()
        expected = [round(value / scale) * scale if scale else 0.0 for value in block.tolist()]
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0.0)


def _means_of_blocks(rank, bits):
    x = nn.Parameter(torch.zeros(SIZE))
    optimizer = torch.optim.SGD([x], lr=1.0)
    seen = []
    with LocalSGD(nn.ParameterList([x]), optimizer, sync_every=1, wire_dtype=f"int{bits}") as sync:
        sent = sync.bytes_sent
        for step in range(STEPS):
            x.grad = -_changes(rank, step)
            optimizer.step()
            sync.step()
            seen.append(x.detach().clone())
        return seen, sync.bytes_sent - sent


def _means_of_both(rank):
    return [_means_of_blocks(rank, bits) for bits in (8, 4)]


def test_means_of_blocks_have_feedback_on_both_roundings_and_the_stated_bytes():
    found = run_ranks(_means_of_both, 3)
    for place, bits in enumerate((8, 4)):
        _check_means([own[place] for own in found], bits)


def _check_means(found, bits):
    x, errors, mean_error = torch.zeros(SIZE), [torch.zeros(SIZE)] * 3, torch.zeros(128)
    exact = torch.zeros(SIZE).double()

    def rounded(values):
        return decode_blocks(encode_blocks(values, bits), bits)

    for step in range(STEPS):
        total = torch.zeros(128)
        for rank in range(3):
            change = (x + _changes(rank, step)) - x + errors[rank]
            sent = rounded(nn.functional.pad(change, (0, 128 - SIZE)))
            errors[rank] = change - sent[:SIZE]
            total = total + sent
            exact += _changes(rank, step).double() / 3
        mean = total / 3 + mean_error
        mean_error = mean - rounded(mean)
        x = x + rounded(mean)[:SIZE]
        for own in found:
            torch.testing.assert_close(own[0][step], x, rtol=0.0, atol=1e-7)
            assert torch.equal(own[0][step], found[0][0][step])
    # the error is that of one step, not of twelve: half a quantum of a change, and of a mean
    quantum = 2 * 5e-3 / (127 if bits == 8 else 7)
    assert (x.double() - exact).abs().max() < quantum < 0.2 * exact.abs().max()
    payload = 3 * (4 + 16 * bits)  # padded to a block for each rank
    assert all(own[1] == STEPS * 2 * payload * 2 // 3 for own in found)


def test_blocks_are_refused_for_complex_parameters_and_gossip():
    x = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    model, optimizer = nn.ParameterList([x]), torch.optim.SGD([x], lr=0.1)
    with pytest.warns(UserWarning, match="one rank"), pytest.raises(ValueError, match="'int8'"):
        LocalSGD(model, optimizer, wire_dtype="int8").start()
    with pytest.raises(ValueError, match="'int4'"):
        Gossip(model, optimizer, wire_dtype="int4")
