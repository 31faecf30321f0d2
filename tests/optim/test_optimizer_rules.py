"""The optimizers of docs/optimizers.md: 12 float64 steps against the rules of their papers."""

import math

import pytest
import pytorch_optimizer
import torch

from hf_msn.optim.by_name import find_optimizer

STEPS, RATE, DECAY = 12, 0.05, 0.1


@pytest.fixture(autouse=True)
def double():
    """NovoGrad's second moment is of the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (3, 4))]


def gradient(place: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * place + step)
    return torch.randn(weights()[place].shape, generator=generator, dtype=torch.float64) / 4


# Each rule takes one step, number t from 1, of the weights w by the gradient g. s holds what it keeps.


def lion(w, g, t, s, b1=0.9, b2=0.99):  # arXiv 2302.06675, algorithm 2
    m = s.get("m", torch.zeros_like(w))
    s["m"] = b2 * m + (1 - b2) * g
    return w - RATE * ((b1 * m + (1 - b1) * g).sign() + DECAY * w)


def adam_moments(g, t, s, b1, b2):
    s["m"] = b1 * s.get("m", 0 * g) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0 * g) + (1 - b2) * g * g
    return s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)


def lamb(w, g, t, s):  # arXiv 1904.00962, algorithm 2
    m, v = adam_moments(g, t, s, 0.9, 0.999)
    u = m / (v.sqrt() + 1e-6) + DECAY * w
    return w - RATE * w.norm() / u.norm() * u


def novograd(w, g, t, s, b1=0.95, b2=0.98):  # arXiv 1905.11286, algorithm 1
    s["v"] = (g * g).sum() if t == 1 else b2 * s["v"] + (1 - b2) * (g * g).sum()
    s["m"] = b1 * s.get("m", 0 * g) + g / (s["v"].sqrt() + 1e-8) + DECAY * w
    return w - RATE * s["m"]


def mars(w, g, t, s, b1=0.95, b2=0.99, gamma=0.025):  # arXiv 2411.10438, algorithm 2, with g_0 = g_1
    c = g + gamma * b1 / (1 - b1) * (g - s.get("last", g))
    s["last"] = g
    c = c / max(c.norm().item(), 1.0)
    m, v = adam_moments(c, t, s, b1, b2)
    return w - RATE * (m / (v.sqrt() + 1e-8) + DECAY * w)


def ademamix(w, g, t, s, b3=0.9999, alpha=5.0):  # arXiv 2409.03137, algorithm 1, without schedules
    m, v = adam_moments(g, t, s, 0.9, 0.999)
    s["slow"] = b3 * s.get("slow", 0 * g) + (1 - b3) * g
    return w - RATE * ((m + alpha * s["slow"]) / (v.sqrt() + 1e-8) + DECAY * w)


def grams(w, g, t, s):  # arXiv 2412.17107, algorithm 1
    m, v = adam_moments(g, t, s, 0.9, 0.999)
    return w - RATE * (g.sign() * (m / (v.sqrt() + 1e-6)).abs() + DECAY * w)


def diffgrad(w, g, t, s):  # arXiv 1909.11015, section III; decay as in AdamW, epsilon beside sqrt(v)
    m, v = adam_moments(g, t, s, 0.9, 0.999)
    friction = 1 / (1 + torch.exp(-(s.get("last", 0 * g) - g).abs()))
    s["last"] = g
    return w - RATE * (friction * m / ((v * (1 - 0.999**t)).sqrt() + 1e-8) * math.sqrt(1 - 0.999**t) + DECAY * w)


def gravity(w, g, t, s, beta=0.9):  # arXiv 2101.09192, algorithm 1
    if t == 1:
        s["v"] = torch.empty_like(w).normal_(0.0, 0.01 / RATE)
    b = (beta * t + 1) / (t + 2)
    s["v"] = b * s["v"] + (1 - b) * g / (1 + (g * g.abs().max()) ** 2)
    return w - RATE * s["v"]


def shampoo(w, g, t, s):  # arXiv 1802.09568, algorithm 1
    def root(a):  # a^(-1/4)
        values, vectors = torch.linalg.eigh(a)
        return vectors @ torch.diag(values**-0.25) @ vectors.T

    s["l"] = s.get("l", 1e-6 * torch.eye(len(g), dtype=g.dtype)) + g @ g.T
    s["r"] = s.get("r", 1e-6 * torch.eye(g.shape[1], dtype=g.dtype)) + g.T @ g
    return w - RATE * root(s["l"]) @ g @ root(s["r"])


def nero(w, g, t, s, beta=0.999):  # arXiv 2102.07227, algorithm 1
    def constrained(w):
        w = w - w.mean(dim=1, keepdim=True)
        return w / (w.norm(dim=1, keepdim=True) + 1e-8)

    if t == 1:
        w = constrained(w)
        s["scale"] = w.norm(dim=1).mean()
    norms = g.norm(dim=1, keepdim=True)
    s["v"] = beta * s.get("v", 0 * norms) + (1 - beta) * norms**2
    return constrained(w - RATE * s["scale"] * g / ((s["v"] / (1 - beta**t)).sqrt() + 1e-8))


def soap(w, g, t, s, b1=0.95, b2=0.95):  # arXiv 2409.11321, algorithm 3; the first gradient makes the bases alone
    def statistics():
        s["l"] = b2 * s.get("l", 0) + (1 - b2) * g @ g.T
        s["r"] = b2 * s.get("r", 0) + (1 - b2) * g.T @ g

    def refreshed(a, basis, side):  # one power iteration, in the order of the eigenvalues that it estimates
        order = torch.diag(basis.T @ a @ basis).argsort(descending=True)
        s["v"] = s["v"].index_select(side, order)
        return torch.linalg.qr(a @ basis[:, order])[0]

    if t == 1:
        statistics()
        s["ql"], s["qr"] = (torch.linalg.eigh(s[side])[1].flip(1) for side in "lr")
        return w
    k = t - 1
    s["m"] = b1 * s.get("m", 0 * g) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0 * g) + (1 - b2) * (s["ql"].T @ g @ s["qr"]) ** 2
    n = s["ql"] @ (s["ql"].T @ s["m"] @ s["qr"] / (s["v"].sqrt() + 1e-8)) @ s["qr"].T
    w = w - RATE * math.sqrt(1 - b2**k) / (1 - b1**k) * n
    statistics()
    if k % 4 == 0:
        s["ql"], s["qr"] = refreshed(s["l"], s["ql"], 0), refreshed(s["r"], s["qr"], 1)
    return w - RATE * DECAY * w


def schedule_free(y, g, t, s, b1=0.9, b2=0.999):  # arXiv 2405.15682, algorithm 1, at a constant learning rate
    z, x = s.get("z", y), s.get("x", y)
    s["v"] = b2 * s.get("v", 0 * g) + (1 - b2) * g * g
    z = z - RATE * (g / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8) + DECAY * y)
    s["z"], s["x"] = z, (1 - 1 / t) * x + z / t
    return (1 - b1) * z + b1 * s["x"]


def amsgrad(w, g, t, s):  # arXiv 1904.09237, algorithm 2, with Adam's bias corrections and decay as in AdamW
    m, _ = adam_moments(g, t, s, 0.9, 0.999)
    s["max"] = torch.maximum(s.get("max", 0 * g), s["v"])
    return w - RATE * (m / ((s["max"] / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * w)


RULES = {
    "lion": (lion, "timm:lion", None),
    "lamb": (lamb, "timm:lamb", "max_grad_norm=none"),
    "novograd": (novograd, "timm:novograd", None),
    "mars": (mars, "timm:mars", "betas=(0.95, 0.99)"),
    "ademamix": (ademamix, "pytorch_optimizer:AdEMAMix", "weight_decouple=true"),
    "grams": (grams, "pytorch_optimizer:Grams", None),
    "diffgrad": (diffgrad, "pytorch_optimizer:DiffGrad", None),
    "gravity": (gravity, "pytorch_optimizer:Gravity", None),
    "shampoo": (shampoo, "pytorch_optimizer:Shampoo", None),
    "nero": (nero, "pytorch_optimizer:Nero", None),
    "soap": (soap, "pytorch_optimizer:SOAP", "precondition_frequency=4"),
    "schedule-free": (schedule_free, "schedulefree:AdamWScheduleFree", None),
    "amsgrad": (amsgrad, "torch.optim:AdamW", "amsgrad=true"),
}


def run(name: str, arguments: str | None, decay: float, rate: float = RATE) -> list[torch.Tensor]:
    cls, settings = find_optimizer(name, arguments)
    parameters = [torch.nn.Parameter(w) for w in weights()]
    optimizer = cls([{"params": parameters, "weight_decay": decay}], lr=rate, **settings)
    torch.manual_seed(0)
    for step in range(STEPS):
        for place, p in enumerate(parameters):
            p.grad = gradient(place, step)
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("rule", RULES)
def test_12_steps_equal_the_rule_of_the_paper(rule):
    take_step, name, arguments = RULES[rule]
    found = run(name, arguments, 0.0 if rule in ("gravity", "shampoo", "nero") else DECAY)
    torch.manual_seed(0)
    expected, kept = weights(), [{}, {}]
    for step in range(STEPS):
        for place, w in enumerate(expected):
            expected[place] = take_step(w, gradient(place, step), step + 1, kept[place])
    tolerance = 1e-5 if rule == "soap" else 1e-10  # its bases are of 32 bits
    for value, wanted, start in zip(found, expected, weights()):
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance)
        assert (value - start).abs().max() > 0.05


def test_dog_moves_by_distance_over_gradients():  # arXiv 2302.12022, equation 1 and algorithm 1
    found = run("dog:DoG", "reps_rel=0.01", 0.0, rate=1.0)
    w = torch.cat([value.flatten() for value in weights()])
    start, total, farthest = w, 1e-8, 0.01 * (1 + w.norm().item())
    for step in range(STEPS):
        g = torch.cat([gradient(place, step).flatten() for place in range(2)])
        total += (g * g).sum().item()
        farthest = max(farthest, (w - start).norm().item())
        w = w - farthest / math.sqrt(total) * g
    torch.testing.assert_close(torch.cat([value.flatten() for value in found]), w, rtol=0, atol=1e-10)


def test_the_refused_lamb_is_another_rule():
    parameters = [torch.nn.Parameter(w) for w in weights()]
    optimizer = pytorch_optimizer.Lamb(parameters, lr=RATE, weight_decay=DECAY)
    expected, kept = weights(), [{}, {}]
    for step in range(STEPS):
        for place, p in enumerate(parameters):
            p.grad = gradient(place, step)
            expected[place] = lamb(expected[place], p.grad.clone(), step + 1, kept[place])
        optimizer.step()
    assert (parameters[0] - expected[0]).abs().max() > 0.01
