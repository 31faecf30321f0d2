"""Streaming DiLoCo against its equations, written as loops over ranks and fragments in float64."""

import copy
from contextlib import ExitStack, suppress
from functools import partial

import pytest
import torch
from launch import run_ranks
from states import resumed_in_two_ways, same

from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.diloco import DiLoCo
from hf_msn.distributed.streaming_diloco import StreamingDiLoCo

H, NUM_STEPS = 6, 15
CASES = [(0, 0.5), (1, 0.25), (3, 0.5), (5, 0.0)]  # delay and alpha; 3 and 5 steps keep two fragments on their way
PHASES = [2, 4, 6]  # steps of a period at which each of three fragments is sent
NAMES = [["0.weight", "2.bias"], ["0.bias"], ["2.weight"]]


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def make_optimizer(model):
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.05)


def take_step(model, optimizer, rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    x, y = torch.randn(5, 3, generator=generator).double(), torch.randn(5, 2, generator=generator).double() + rank
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(rank, method, num_steps=NUM_STEPS, **settings):
    model = make_model(seed=rank)  # made equal when entering
    optimizer, seen = make_optimizer(model), []
    with method(model, optimizer, sync_every=H, **settings) as sync:
        for step in range(num_steps):
            take_step(model, optimizer, rank, step)
            sync.step()
            seen.append(values(model))
    return [*seen, values(model)], sync.bytes_sent


def reference(num_ranks, delay, alpha):
    """Return x of every rank after each step and at the end."""
    models = [make_model() for _ in range(num_ranks)]
    optimizers = [make_optimizer(model) for model in models]
    x = [dict(model.named_parameters()) for model in models]
    x0 = values(models[0])
    v = dict.fromkeys(x0, 0.0)
    on_the_way, seen = {}, [[] for _ in models]
    since_sent = [0, 0, 0]

    def send(p):
        since_sent[p] = 0
        return {name: sum(x0[name] - own[name].detach() for own in x) / num_ranks for name in NAMES[p]}

    def apply(delta, weight):
        for name in delta:
            v[name] = 0.9 * v[name] + delta[name]
            x0[name] = x0[name] - 0.7 * (delta[name] + 0.9 * v[name])
            for own in x:
                own[name].data = weight * own[name].data + (1 - weight) * x0[name]

    for step in range(1, NUM_STEPS + 1):
        for rank in range(num_ranks):
            take_step(models[rank], optimizers[rank], rank, step - 1)
        since_sent = [count + 1 for count in since_sent]
        for p in range(3):
            if step % H == PHASES[p] % H:
                on_the_way[step + delay] = send(p)
        if step in on_the_way:
            apply(on_the_way.pop(step), alpha)
        for rank in range(num_ranks):
            seen[rank].append(values(models[rank]))
    for delta in on_the_way.values():
        apply(delta, alpha)
    for p in range(3):
        if since_sent[p]:
            apply(send(p), 0.0)
    for own in seen:
        own.append(dict(x0))
    return seen


def _resume(rank, wire):
    def make(seed):
        model = make_model(seed)
        optimizer = make_optimizer(model)
        settings = {"fragments": NAMES, "delay": 3, "wire_dtype": wire}
        return model, optimizer, StreamingDiLoCo(model, optimizer, sync_every=H, **settings)

    def step_of(model, optimizer, step):
        take_step(model, optimizer, rank, step)

    return resumed_in_two_ways(make, step_of, NUM_STEPS)


def _run_all(rank):
    runs = [train(rank, StreamingDiLoCo, fragments=NAMES, delay=d, mixing_alpha=a)[0] for d, a in CASES]
    one = {"num_fragments": 1, "delay": 0, "mixing_alpha": 0.0}
    pairs = [
        (train(rank, DiLoCo, steps, wire_dtype=wire), train(rank, StreamingDiLoCo, steps, **one, wire_dtype=wire))
        for steps, wire in ((15, None), (12, "int8"))
    ]
    return runs, pairs, [_resume(rank, wire) for wire in (None, "int4")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_it_follows_its_equations_has_diloco_as_a_case_and_resumes_bit_for_bit(num_ranks):
    results = run_ranks(_run_all, num_ranks)
    references = [reference(num_ranks, *case) for case in CASES]
    for rank, (runs, pairs, resumed) in enumerate(results):
        for run, expected in zip(runs, references):
            torch.testing.assert_close(run, expected[rank], rtol=1e-12, atol=1e-12)
        for diloco, streaming in pairs:
            assert same(diloco, streaming)  # bytes too
        for (straight, *others), saved in resumed:
            assert saved["sync"]["on_the_way"].keys() == {0, 1}
            assert all(same(straight, end) for end in others)
    for place in range(len(CASES)):
        assert all(same(runs[place][-1], results[0][0][place][-1]) for runs, _, _ in results)


def _sync_in_between(rank):
    model = make_model()
    optimizer = make_optimizer(model)
    with StreamingDiLoCo(model, optimizer, sync_every=H, fragments=NAMES, delay=3) as sync:
        for step in range(4):
            take_step(model, optimizer, rank, step)
            sync.step()
        sync.sync()
        consensus = values(model)
        assert not sync.state_dict()["on_the_way"]
        for step in range(4, 8):
            take_step(model, optimizer, rank, step)
            sync.step()
    return consensus, values(model)


def _two_at_once(rank):
    """Train two models in one loop, or the second one alone."""
    ends = []
    for seeds in ((1, 2), (2,)):
        models = [make_model(seed) for seed in seeds]
        optimizers = [make_optimizer(model) for model in models]
        with ExitStack() as stack:
            syncs = [
                stack.enter_context(StreamingDiLoCo(*it, sync_every=H, fragments=NAMES, delay=3))
                for it in zip(models, optimizers)
            ]
            for step in range(14):
                for model, optimizer, sync in zip(models, optimizers, syncs):
                    take_step(model, optimizer, rank, step)
                    sync.step()
        ends.append(values(models[-1]))
    return ends


def _after_an_error(rank):
    """Train after an error left transfers on their way, or go back to a state from within; or neither."""
    ends = []
    for before in ("error", "load", None):
        model = make_model()
        optimizer = make_optimizer(model)
        settings = {"sync_every": H, "fragments": NAMES, "delay": 3, "wire_dtype": "int4"}
        if before == "error":
            with suppress(FloatingPointError), StreamingDiLoCo(model, optimizer, **settings) as sync:
                for step in range(4):
                    take_step(model, optimizer, rank, step)
                    sync.step()
                raise FloatingPointError
            model = make_model()
            optimizer = make_optimizer(model)
        with StreamingDiLoCo(model, optimizer, **settings) as sync:
            if before == "load":
                saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), sync.state_dict()])
                for step in range(4):
                    take_step(model, optimizer, rank, step)
                    sync.step()
                for it, state in zip((model, optimizer, sync), saved):
                    it.load_state_dict(state)
            for step in range(14):
                take_step(model, optimizer, rank, step)
                sync.step()
        ends.append(values(model))
    return ends


def _stop_early(rank):
    model = make_model()
    optimizer = make_optimizer(model)
    sync = StreamingDiLoCo(model, optimizer, sync_every=H, fragments=NAMES, delay=3, timeout_seconds=2.0).start()
    for step in range(9 if rank else 3):
        take_step(model, optimizer, rank, step)
        sync.step()
    return "ended"


def _named(rank):
    try:
        return _stop_early(rank)
    except PeerError as error:
        return error.ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sync_applies_what_is_on_its_way_a_missing_rank_is_named_and_two_run_at_once():
    consensus, end = zip(*run_ranks(_sync_in_between, 2))
    assert same(*consensus) and same(*end)
    assert run_ranks(_named, 2) == ["ended", (0,)]
    for both, alone in run_ranks(_two_at_once, 2):
        assert same(both, alone)
    for after_error, loaded, straight in run_ranks(_after_an_error, 2):
        assert same(after_error, straight) and same(loaded, straight)


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = torch.nn.Linear(width, width, bias=False)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width))


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Linear(3, 4)
        self.layer = torch.nn.ModuleList(Block(4) for _ in range(4))
        self.norm = torch.nn.LayerNorm(4)


def fragments_of(model, **settings):
    sync = StreamingDiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    names = [name for name, _ in model.named_parameters()]
    return [[names[i] for i in fragment] for fragment in sync._fragments]


def test_fragments_are_strided_layers_or_runs_of_equal_size():
    model = Encoder()
    strided = fragments_of(model, num_fragments=3)
    assert [{name.partition(".")[0] + name[5:7] * name.startswith("layer") for name in part} for part in strided] == [
        {"embeddings", "layer.2"},
        {"layer.0", "layer.3"},
        {"layer.1", "norm"},
    ]
    by_size = fragments_of(model, num_fragments=4, fragments="size")
    names = [name for name, _ in model.named_parameters()]
    assert [name for part in by_size for name in part] == names
    bytes_of = [sum(model.get_parameter(name).numel() for name in part) for part in by_size]
    best = min(max(map(sum, cuts)) for cuts in all_cuts([p.numel() for p in model.parameters()], 4))
    assert max(bytes_of) == best
    huge = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1000, bias=False), torch.nn.Linear(1, 1))
    assert [len(part) for part in fragments_of(huge, num_fragments=4, fragments="size")] == [2, 1, 1, 1]


def all_cuts(sizes, count):
    if count == 1:
        return [[sizes]]
    return [
        [sizes[:first], *rest]
        for first in range(1, len(sizes) - count + 2)
        for rest in all_cuts(sizes[first:], count - 1)
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"delay": 100, "num_fragments": 2}, "`delay`"),
        ({"delay": -1}, "`delay`"),
        ({"mixing_alpha": 1.0}, "`mixing_alpha`"),
        ({"num_fragments": 0}, "`num_fragments`"),
        ({"num_fragments": 5, "sync_every": 4, "delay": 0}, "`num_fragments`"),
        ({"num_fragments": 3}, "2 and `num_fragments`"),
        ({"num_fragments": 5, "fragments": "size"}, "4 and `num_fragments`"),
        ({"num_fragments": 2, "fragments": NAMES}, "`num_fragments`"),
        ({"fragments": "stride"}, "`fragments`.*Did you mean 'strided'"),
        ({"fragments": NAMES[:2]}, "leaves out 2.weight"),
        ({"fragments": [*NAMES, ["0.bias"]]}, "has twice 0.bias"),
        ({"fragments": [*NAMES, ["1.bias"]]}, "1.bias"),
        ({"fragments": [*NAMES, []]}, "empty ones 3"),
        ({"num_fragments": 2, "outer_optimizer": torch.optim.LBFGS}, "`outer_optimizer`"),
    ],
)
def test_settings_outside_of_their_rules_are_refused(settings, named):
    model = make_model()
    with pytest.raises(ValueError, match=named):
        StreamingDiLoCo(model, make_optimizer(model), **settings)


def test_a_state_of_another_number_of_fragments_is_refused():
    model = Encoder()
    optimizer = make_optimizer(model)
    with StreamingDiLoCo(model, optimizer, num_fragments=3) as sync:
        state = sync.state_dict()
    with pytest.raises(ValueError, match=r"`num_fragments` .* 3, but is 2"):
        StreamingDiLoCo(model, optimizer, num_fragments=2).load_state_dict(state)


def test_each_fragment_has_an_outer_optimizer_and_an_anchor_in_float32():
    model = Encoder().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outer = partial(torch.optim.Adam, lr=0.1)
    with StreamingDiLoCo(model, optimizer, num_fragments=2, delay=0, sync_every=4, outer_optimizer=outer) as sync:
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.125)
            optimizer.step()
            sync.step()
        assert [len(o.param_groups[0]["params"]) for o in sync.outer_optimizers] == [12, 12]
        state = sync.state_dict()
    assert {x0.dtype for x0 in state["anchors"]} == {torch.float32}
    assert [o["state"][0]["step"].item() for o in state["outer_optimizers"]] == [1, 1]
