"""Optimizers by name: what is found, what is refused, and the trial before a run."""

import sys
import types

import pytest
import timm.optim
import torch

from hf_msn import MSNTrainingArguments
from hf_msn.optim.by_name import find_optimizer
from hf_msn.optim.lars import LARS

CONSTANT = {"weight_decay": 0.1, "final_weight_decay": None}


def arguments(optim: str, optim_args: str | None = None, **fields) -> MSNTrainingArguments:
    return MSNTrainingArguments("unused", use_cpu=True, report_to="none", optim=optim, optim_args=optim_args, **fields)


class Plain(torch.optim.Optimizer):
    """Gradient descent; the cases change one thing."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"], group["weight_decay"])

    def update(self, p, lr, decay):
        p.mul_(1 - lr * decay).sub_(p.grad.sign(), alpha=lr)


class Forgetful(Plain):
    """Its momentum is not in the state dict."""

    def update(self, p, lr, decay):
        self.kept = getattr(self, "kept", {})
        self.kept[p] = self.kept.get(p, 0) + p.grad
        p.sub_(self.kept[p], alpha=lr)


class Count:
    number = 0


class Unsafe(Plain):
    """Its state has an object that `weights_only` does not load."""

    def update(self, p, lr, decay):
        self.state[p]["count"] = Count()


class NeedsClosure(Plain):
    def step(self, closure=None):
        closure()


class NeedsGraph(Plain):
    def update(self, p, lr, decay):
        torch.autograd.grad(p.grad.sum(), p)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """Let the classes above be `mine:Class`."""
    module = types.ModuleType("mine")
    vars(module).update({cls.__name__: cls for cls in (Plain, Forgetful, Unsafe, NeedsClosure, NeedsGraph, LARS)})
    monkeypatch.setitem(sys.modules, "mine", module)


def test_a_name_of_timm_has_its_defaults_there():
    assert find_optimizer("timm:lion") == (timm.optim.Lion, {})
    assert find_optimizer("timm:nlars", "trust_coeff=0.01") == (
        timm.optim.Lars,
        {"nesterov": True, "momentum": 0.9, "trust_coeff": 0.01},
    )


def test_arguments_are_read_as_in_a_call():
    text = "betas=(0.95, 0.99, 0.9999), weight_decouple=true, t_alpha_beta3=none,alpha=5,eps=1e-8"
    _, settings = find_optimizer("pytorch_optimizer:AdEMAMix", text)
    expected = {"betas": (0.95, 0.99, 0.9999), "weight_decouple": True, "t_alpha_beta3": None, "alpha": 5, "eps": 1e-8}
    assert settings == expected
    assert find_optimizer("torch.optim:AdamW", "amsgrad=no,maximize=Yes")[1] == {"amsgrad": False, "maximize": True}
    assert find_optimizer("timm:mars", "mars_type=lion")[1] == {"mars_type": "lion"}
    assert find_optimizer("mine:LARS", "nesterov=True")[1] == {"nesterov": True}  # of the base, through its **kwargs


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timm:loin", None, "loin"),
        ("torch.optim:Adamw", None, "Adamw"),
        ("torch.optim:lr_scheduler", None, "lr_scheduler"),
        ("pytorch_optimizer:AdEMAMix", "weight_decuple=true", "weight_decuple"),  # which its **kwargs would swallow
        ("timm:lion", "betas=(0.9", r"betas=\(0\.9"),
        ("timm:lion", "0.9", "0.9"),
        ("timm:lion", "lr=0.1", "lr"),
        ("timm:lion", "weight_decay=0.1", "weight_decay"),
        ("timm:lion", "betas=(0.9, 2.0)", "timm:lion"),
    ],
)
def test_what_is_not_there_is_refused_with_its_name(name, text, value):
    with pytest.raises(ValueError, match=value):
        arguments(name, text)


@pytest.mark.parametrize("name", ["adamw", "timm_lion"])
def test_a_name_without_a_colon_is_one_of_transformers(name):
    with pytest.raises(ValueError, match=name):
        arguments(name)


@pytest.mark.parametrize("root", ["pytorch_optimizer", "schedulefree", "dog"])
def test_a_missing_extra_is_named(monkeypatch, root):
    monkeypatch.setitem(sys.modules, root, None)
    with pytest.raises(ImportError, match=r"hf_msn\[optimizers\]"):
        arguments(f"{root}:DoG")
    with pytest.raises(ImportError, match="no_such_package"):
        arguments("no_such_package:Optimizer")


@pytest.mark.parametrize(
    "name",
    [
        *("torch.optim:LBFGS", "timm:adahessian", "lomo", "adalomo", "schedulefree:AdamWScheduleFreeClosure"),
        *(f"pytorch_optimizer:{name}" for name in ("SAM", "SophiaH", "AliG", "LOMO", "Lamb", "ScalableShampoo")),
        *("torch.optim:Muon", "pytorch_optimizer:Lookahead"),  # for other tensors, around an optimizer
        *(f"mine:{name}" for name in ("Forgetful", "Unsafe", "NeedsClosure", "NeedsGraph")),
    ],
)
def test_what_cannot_train_or_resume_here_is_refused_before_it_begins(name):
    with pytest.raises(ValueError, match=name):
        arguments(name, **CONSTANT)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm:lion", None),
        ("timm:lamb", None),
        ("timm:novograd", None),
        ("torch.optim:AdamW", "amsgrad=true"),
        ("pytorch_optimizer:AdEMAMix", "weight_decouple=true"),
        ("pytorch_optimizer:SOAP", None),
        ("mine:Plain", None),
        ("pytorch_optimizer:Shampoo", "preconditioning_compute_steps=20"),  # unknown: it moves at the 20th step only
    ],
)
def test_a_schedule_of_decoupled_weight_decay_is_let_through(name, text):
    assert arguments(name, text, weight_decay=0.04, final_weight_decay=0.4).optim == name


@pytest.mark.parametrize(
    "name", ["dog:DoG", "torch.optim:Adam", "torch.optim:RAdam", "pytorch_optimizer:AdEMAMix", "torch.optim:SGD"]
)
def test_a_schedule_of_l2_is_refused_and_a_constant_is_not(name):
    with pytest.raises(ValueError, match="final_weight_decay"):
        arguments(name, weight_decay=0.04, final_weight_decay=0.4)
    assert arguments(name, **CONSTANT).optim == name


@pytest.mark.parametrize("name", ["pytorch_optimizer:Nero", "pytorch_optimizer:Gravity"])
def test_weight_decay_that_has_no_effect_is_refused(name):
    with pytest.raises(ValueError, match="weight_decay"):
        arguments(name, **CONSTANT)
    assert arguments(name, weight_decay=0.0, final_weight_decay=None).optim == name


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedulefree:AdamWScheduleFree"])
def test_schedule_free_is_refused_with_a_cosine(name):
    with pytest.raises(ValueError, match="final_learning_rate"):
        arguments(name, learning_rate=0.01, final_learning_rate=0.001)
    assert arguments(name, learning_rate=0.01, final_learning_rate=0.01).optim == name


def test_lars_takes_no_other_optimizer_in_its_place():
    for optim, text in (("timm:lion", None), ("sgd", "momentum=0.9")):
        with pytest.raises(ValueError, match="use_lars"):
            arguments(optim, text, use_lars=True)


def test_the_trial_leaves_the_random_numbers_as_they_are():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    arguments("pytorch_optimizer:Gravity", weight_decay=0.0, final_weight_decay=None)
    assert torch.equal(torch.rand(2), expected)
