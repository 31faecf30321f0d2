"""What codistillation is made of, in one process: distances against loops, digests, copies, settings, weight decay."""

import copy
import math
import types

import pytest
import torch

from hf_msn.distributed import Codistillation, FallingWeightDecay, LocalSGD
from hf_msn.distributed.falling_weight_decay import falling_factor
from hf_msn.distributed.replicas.batch_digest import batch_digest
from hf_msn.distributed.replicas.distances import PredictionDistance
from hf_msn.distributed.replicas.peer_copies import PeerCopies


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def softmax(row, temperature):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def kl_by_loops(own, peer, temperature, top_k=None, mask=None):
    total, count = 0.0, 0
    for i, (own_row, peer_row) in enumerate(zip(own.tolist(), peer.tolist())):
        if mask is not None and not mask[i]:
            continue
        p, q = softmax(peer_row, temperature), softmax(own_row, temperature)
        classes = sorted(range(len(p)), key=lambda c: -p[c])[:top_k]
        rest_p, rest_q = 1 - sum(p[c] for c in classes), 1 - sum(q[c] for c in classes)
        total += sum(p[c] * math.log(p[c] / q[c]) for c in classes)
        if top_k is not None:
            total += rest_p * math.log(rest_p / rest_q)
        count += 1
    return temperature**2 * total / count


def gradient_by_differences(function, at, step=1e-6):
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        there, back = at.clone(), at.clone()
        there.view(-1)[i] += step
        back.view(-1)[i] -= step
        gradient.view(-1)[i] = (function(there) - function(back)) / (2 * step)
    return gradient


# Distances


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4])
@pytest.mark.parametrize("mask", [None, [True, False, True]])
def test_the_divergence_is_that_of_loops_with_its_gradient(temperature, top_k, mask):
    own, peer = random(3, 5), random(3, 5, seed=1).requires_grad_()
    distance = PredictionDistance("kl", temperature, top_k)
    mask_tensor = None if mask is None else torch.tensor(mask)

    def value(tensor):
        return kl_by_loops(tensor, peer, temperature, top_k, mask)

    own.requires_grad_()
    result = distance(own, distance.pack(peer), mask_tensor)
    result.backward()
    assert result.item() == pytest.approx(value(own), rel=1e-12)
    torch.testing.assert_close(own.grad, gradient_by_differences(value, own.detach()), rtol=1e-6, atol=1e-8)
    assert peer.grad is None


def test_the_mean_squared_error_is_over_classes_and_positions_that_count():
    own, peer = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    distance = PredictionDistance("mse")
    counted = [(i, j) for i in range(2) for j in range(3) if mask[i, j]]
    total = sum((own[i, j, c] - peer[i, j, c]).item() ** 2 for i, j in counted for c in range(4))
    assert distance(own, distance.pack(peer), mask).item() == pytest.approx(total / 16, rel=1e-12)
    everything = (own - peer).square().sum().item() / 24
    assert distance(own, distance.pack(peer)).item() == pytest.approx(everything, rel=1e-12)


def test_what_is_masked_may_be_anything():
    own, peer = random(2, 3).requires_grad_(), random(2, 3, seed=1)
    peer[1] = float("nan")
    for distance in (PredictionDistance("kl"), PredictionDistance("mse"), PredictionDistance("kl", top_k=2)):
        own.grad = None
        result = distance(own, distance.pack(peer), torch.tensor([1, 0]))
        result.backward()
        assert result.isfinite()
        assert distance(own, distance.pack(peer), torch.tensor([0, 0])).item() == 0.0
    with pytest.raises(ValueError, match=r"of shape \(2,\), but is of \(3,\)"):
        distance(own, distance.pack(peer), torch.tensor([1, 0, 1]))


def test_equal_predictions_have_no_distance_and_log_probabilities_are_logits():
    own, peer = random(4, 6), random(4, 6, seed=1)
    for distance in (PredictionDistance("kl", 2.0), PredictionDistance("mse"), PredictionDistance("kl", top_k=3)):
        assert distance(own, distance.pack(own.clone())).item() == pytest.approx(0.0, abs=1e-15)
        assert distance(own, distance.pack(peer)).item() > 0.01
    kl = PredictionDistance("kl")
    assert kl(own, kl.pack(own.clone())).item() == 0.0
    expected = kl(own, kl.pack(peer)).item()
    assert kl(own.log_softmax(-1), kl.pack(peer.log_softmax(-1))).item() == pytest.approx(expected, rel=1e-12)


def test_top_k_sends_k_classes_and_the_rest_and_never_exaggerates():
    own, peer = random(4, 50), random(4, 50, seed=1)
    full = PredictionDistance("kl")
    whole, before = full(own, full.pack(peer)).item(), 0.0
    for k in (1, 5, 20, 49):
        distance = PredictionDistance("kl", top_k=k)
        values, classes = distance.pack(peer)
        assert values.shape == (4, k + 1)
        assert classes.shape == (4, k)
        assert classes.dtype == torch.int32
        torch.testing.assert_close(values.exp().sum(-1), torch.ones(4).double())
        value = distance(own, [values, classes]).item()
        assert before < value <= whole + 1e-12
        before = value
    assert len(PredictionDistance("kl", top_k=50).pack(peer)) == 1


def test_a_class_that_is_ruled_out_makes_no_hole():
    own, peer = random(1, 4).requires_grad_(), random(1, 4, seed=1)
    peer[0, 2] = own.data[0, 2] = -float("inf")
    for distance in (PredictionDistance("kl"), PredictionDistance("kl", top_k=3)):
        own.grad = None
        result = distance(own, distance.pack(peer))
        result.backward()
        assert result.isfinite()
        assert own.grad[0, [0, 1, 3]].isfinite().all()


def test_half_precision_is_computed_in_single():
    own, peer = random(4, 6).bfloat16(), random(4, 6, seed=1).bfloat16()
    kl = PredictionDistance("kl")
    result = kl(own, kl.pack(peer, torch.bfloat16))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(kl_by_loops(own.double(), peer.double(), 1.0), rel=1e-5)


# Digests


def test_a_digest_tells_batches_apart_by_values_places_names_and_kinds():
    batch = {"x": random(3, 4), "labels": torch.tensor([1, 2, 3]), "flag": True}
    device = torch.device("cpu")
    same = {"labels": torch.tensor([1, 2, 3]), "x": random(3, 4), "flag": True}
    swapped = {**batch, "x": random(3, 4)[[1, 0, 2]]}
    nudged = {**batch, "x": random(3, 4) + torch.eye(3, 4) * 1e-15}
    others = [
        swapped,
        nudged,
        {**batch, "labels": torch.tensor([1, 2, 4])},
        {**batch, "labels": torch.tensor([3, 2, 1])},
        {**batch, "labels": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {**batch, "labels": torch.tensor([[1, 2, 3]])},
        {**batch, "flag": False},
        {"y": batch["x"], "labels": batch["labels"], "flag": True},
        [batch["x"], batch["labels"]],
    ]
    digests = [tuple(batch_digest(b, device).tolist()) for b in (batch, *others)]
    assert tuple(batch_digest(same, device).tolist()) == digests[0]
    assert len(set(digests)) == 1 + len(others)


def test_a_digest_takes_every_kind_of_tensor_and_does_not_depend_on_the_layout():
    device = torch.device("cpu")
    x = random(4, 6)
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.bool, torch.complex64]
    for tensor in [x.to(dtype) for dtype in kinds] + [torch.tensor(1.5), torch.empty(0)]:
        assert batch_digest(tensor, device).shape == (2,)
    assert torch.equal(batch_digest(x.T.contiguous().T, device), batch_digest(x, device))


# Copies


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


# Weight decay


def test_weight_decay_falls_by_its_factors_and_is_put_back():
    assert [falling_factor(p, (1.0, 0.1, 0.0), (0.5, 0.8)) for p in (0, 0.49, 0.5, 0.79, 0.8, 1.0)] == [
        *(1.0, 1.0),
        *(0.1, 0.1),
        *(0.0, 0.0),
    ]
    schedule = FallingWeightDecay(9)
    assert [schedule(step) for step in range(10)] == [1.0] * 3 + [0.1] * 3 + [0.0] * 4
    assert schedule(1000) == 0.0
    model = torch.nn.Linear(1, 1).double()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    sizes = []
    with pytest.warns(UserWarning, match="one replica only"):
        codistillation = Codistillation(model, optimizer, weight_decay_schedule=schedule).start()
    for _ in range(9):
        with torch.no_grad():
            model.weight.fill_(1.0)
        model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
        optimizer.step()
        codistillation.step()
        sizes.append(1.0 - model.weight.item())
    assert sizes == pytest.approx([0.05] * 3 + [0.005] * 3 + [0.0] * 3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    codistillation.stop()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_the_weight_decay_that_training_began_with_survives_a_resume():
    def make():
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.4)
        return model, optimizer, Codistillation(model, optimizer, weight_decay_schedule=FallingWeightDecay(4))

    def step(model, optimizer, codistillation):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        codistillation.step()
        return optimizer.param_groups[0]["weight_decay"]

    with pytest.warns(UserWarning, match="one replica only"):
        first = make()
        first[2].start()
        assert [step(*first) for _ in range(3)] == pytest.approx([0.4, 0.4, 0.04])
        saved, in_optimizer = first[2].state_dict(), first[1].state_dict()
        for started_first in (True, False):
            model, optimizer, codistillation = make()
            if started_first:
                codistillation.start()
            optimizer.load_state_dict(copy.deepcopy(in_optimizer))
            codistillation.load_state_dict(saved)
            if not started_first:
                codistillation.start()
            assert step(model, optimizer, codistillation) == 0.0
            codistillation.stop()
            assert optimizer.param_groups[0]["weight_decay"] == 0.4


# Rules


def make(**options):
    model = torch.nn.Linear(3, 2)
    return Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"exchange": "gradients"}, r"exchange.*'predictions' or 'checkpoints'.*'gradients'"),
        ({"exchange": ["predictions"]}, "exchange"),
        ({"distance": "cosine"}, "distance.*'kl'.*'mse'.*'cosine'"),
        ({"alpha": -0.5}, r"alpha.*>= 0.*-0.5"),
        ({"alpha": float("nan")}, "alpha.*nan"),
        ({"temperature": 0.0}, r"temperature.*> 0.*0.0"),
        ({"temperature": "warm"}, "temperature.*'warm'"),
        ({"top_k": 0}, "top_k.*>= 1.*0"),
        ({"top_k": 5, "distance": "mse"}, "top_k.*'mse'"),
        ({"top_k": 5, "exchange": "checkpoints"}, "top_k.*checkpoints.*5"),
        ({"wire_dtype": "bfloat16", "exchange": "checkpoints"}, "wire_dtype.*copies_dtype"),
        ({"wire_dtype": "int8"}, "wire_dtype.*'int8'"),
        ({"exchange_every": 0}, "exchange_every.*>= 1.*0"),
        ({"transfer_steps": -1}, "transfer_steps.*>= 0.*-1"),
        ({"transfer_steps": 11, "exchange_every": 10}, "transfer_steps.*11.*exchange_every=10"),
        ({"ramp_steps": 1.5}, "ramp_steps.*1.5"),
        ({"burn_in_steps": -1}, "burn_in_steps.*-1"),
        ({"check_every": 0}, "check_every.*0"),
        ({"copies_dtype": "float16"}, "copies_dtype.*'float16'"),
        ({"copies_device": "cuda"}, "copies_device.*'cpu'.*'cuda'"),
        ({"on_lost_replica": "ignore"}, "on_lost_replica.*'ignore'"),
        ({"timeout_seconds": 0}, "timeout_seconds.*> 0"),
    ],
)
def test_settings_outside_their_rules_are_refused_with_value_and_rule(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0,), "total_steps.*>= 1.*0"),
        ((10, (0.1, 1.0), (0.5,)), r"factors.*never rise.*\(0.1, 1.0\)"),
        ((10, (1.0, -0.1), (0.5,)), "factors.*>= 0"),
        ((10, (1.0, 0.1, 0.0), (0.5,)), r"fractions.*2 rising numbers.*\(0.5,\)"),
        ((10, (1.0, 0.1, 0.0), (0.8, 0.5)), "fractions.*rising"),
    ],
)
def test_schedules_outside_their_rules_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        FallingWeightDecay(*arguments)


def test_alpha_is_zero_in_the_burn_in_then_rises_then_stays():
    codistillation = make(alpha=2.0, burn_in_steps=3, ramp_steps=4)
    assert [codistillation.alpha_at(k) for k in range(9)] == [0.0] * 4 + [0.5, 1.0, 1.5, 2.0, 2.0]
    codistillation = make(alpha=lambda step: step / 10, burn_in_steps=2)
    assert [codistillation.alpha_at(k) for k in range(4)] == [0.0, 0.0, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"alpha.*-1"):
        make(alpha=lambda step: -1.0).alpha_at(0)


def test_a_sharded_model_is_refused():
    class FSDPModule(torch.nn.Linear):
        pass

    model = FSDPModule(3, 2)
    with pytest.raises(TypeError, match="whole model on every rank"):
        Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_without_weight_decay_is_no_one_to_schedule():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight_decay_schedule.*LBFGS"):
        Codistillation(model, torch.optim.LBFGS(model.parameters()), weight_decay_schedule=FallingWeightDecay(5))


def test_one_replica_trains_as_without_it_with_a_warning():
    codistillation = make()
    with pytest.warns(UserWarning, match="one replica only"), codistillation:
        output = codistillation.model(torch.ones(2, 3))
        loss = codistillation.loss(output, None)
        assert (loss.item(), loss.requires_grad) == (0.0, False)
        codistillation.step()
        assert codistillation.staleness is None
        assert codistillation.distance_of_predictions is None
        with pytest.raises(ValueError, match=r"takes one sync object at a time"):
            Codistillation(codistillation.model, codistillation.optimizer).start()
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"takes one sync object at a time"):
            LocalSGD(codistillation.model, codistillation.optimizer).start()
        with pytest.raises(ValueError, match="must have `logits`"):
            codistillation.loss({"hidden": output}, None)
        with pytest.raises(ValueError, match="floating-point logits"):
            codistillation.loss(output.argmax(-1), None)
        state = codistillation.state_dict()
    with pytest.raises(RuntimeError, match="must be entered"):
        codistillation.step()
    with pytest.raises(ValueError, match=r"'checkpoints'.*is of.*'predictions'"):
        make(exchange="checkpoints").load_state_dict(state)
