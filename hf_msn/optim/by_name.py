"""Optimizers of other packages by name, `timm:lion` or `package.module:Class`, tried out before a run begins."""

import ast
import importlib
import inspect
import io
from collections.abc import Mapping
from typing import Any

import timm.optim
import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from ..checks import check_known, did_you_mean
from .lars import LARS

_EXTRA = ("pytorch_optimizer", "schedulefree", "dog")  # `pip install 'hf_msn[optimizers]'`
_OWN_FIELDS = {"params": "model", "lr": "learning_rate", "weight_decay": "weight_decay"}

_SECOND_PASS = "it evaluates loss and gradient several times in one step, by a closure"
_LOSS = "its step size needs the value of the loss"
_HESSIAN = "it needs a second backward pass"
_OWN_BACKWARD = "it updates inside of the backward pass, which clipping, accumulation and DDP do not survive"
# By package and class. What only needs another constructor is found when it is tried.
_REFUSED = {
    "torch": {"LBFGS": _SECOND_PASS},
    "timm": {"Adahessian": _HESSIAN},
    "schedulefree": {f"{kind}ScheduleFreeClosure": _SECOND_PASS for kind in ("AdamW", "RAdam", "SGD")},
    "pytorch_optimizer": {
        **dict.fromkeys(("SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM"), _SECOND_PASS),
        **dict.fromkeys(("AliG", "EmoNavi", "EmoLynx", "EmoFact"), _LOSS),
        **dict.fromkeys(("AdaHessian", "SophiaH"), _HESSIAN),
        **dict.fromkeys(("LOMO", "AdaLOMO"), _OWN_BACKWARD),
        "Lamb": "unlike the paper it has no bias correction, caps the norm of the weights at 10 and decays outside of "
        "the trust ratio. Give timm:lamb",
        "ScalableShampoo": "its state cannot be loaded with `weights_only=True`, so that a run could not resume. Give "
        "pytorch_optimizer:Shampoo",
    },
}
_REFUSED_OF_TRANSFORMERS = {"lomo": _OWN_BACKWARD, "adalomo": _OWN_BACKWARD}

_STEPS = 8  # of a trial; a rectified Adam (RAdam) moves after 5


def check_optimizer(args: TrainingArguments) -> None:
    """Try the optimizer that `args` name on a few small tensors.

    Raises:
        ValueError: If there is no such optimizer or argument, it cannot train by gradients alone, it does not resume
            to the bit from a state that was loaded with `weights_only=True`, or the schedule of the learning rate or
            the weight decay does not fit it.
        ImportError: If its package is not installed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if args.use_lars:
        if ":" in name or args.optim_args:
            raise ValueError(
                f"`use_lars` takes the place of `optim`, which must not be given, but is '{name}' with `optim_args` "
                f"{args.optim_args!r}. Set `use_lars` to False, or leave them out."
            )
        return
    if name in _REFUSED_OF_TRANSFORMERS:
        raise ValueError(f"`optim` must not be '{name}': {_REFUSED_OF_TRANSFORMERS[name]}. See docs/optimizers.md.")
    is_schedule_free = name.startswith("schedule_free")
    if ":" in name:
        cls, settings = find_optimizer(name, args.optim_args)
        is_schedule_free = hasattr(cls, "eval")
        _check_weight_decay(name, _try(name, cls, settings), args)
    if is_schedule_free and args.final_learning_rate != args.learning_rate:
        raise ValueError(
            f"'{name}' averages weights in place of a schedule, and `final_learning_rate` must be `learning_rate`, "
            f"{args.learning_rate:g}, but is {args.final_learning_rate:g}: a cosine. A warm-up may stay."
        )


def optimizer_class_and_settings(
    args: TrainingArguments, model: Any, momentum: float
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the keyword arguments of the optimizer that `args` name: LARS, with `use_lars`."""
    if args.use_lars:
        return LARS, {"lr": args.learning_rate, "momentum": momentum, "trust_coeff": args.lars_trust_coefficient}
    if ":" in args.optim:
        cls, settings = find_optimizer(args.optim, args.optim_args)
        return cls, {"lr": args.learning_rate, **settings}
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if args.optim.startswith("schedule_free"):
        settings.pop("warmup_steps", None)  # the schedule has one already
    return cls, settings


def name_of_optimizer(optimizer: Any) -> str:
    """Return package and class of an optimizer, such as "timm.Lion", without wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__qualname__}"


def missing_in_state(args: TrainingArguments, saved: dict[str, Any]) -> set[str]:
    """Return what the optimizer that `args` name by package keeps of parameters and a saved state does not have."""
    if args.use_lars or ":" not in args.optim:
        return set()
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(*find_optimizer(args.optim, args.optim_args), args.weight_decay)
        trial.step(0)
    here, there = (
        {name for entry in state.values() if isinstance(entry, dict) for name in entry}
        for state in (trial.optimizer.state, saved["state"])
    )
    return here - there


def show_averages(optimizer: Optimizer | None) -> None:
    """Let the model hold the averages of a schedule-free optimizer, until Trainer calls its `train` for a batch."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


def find_optimizer(
    name: str, arguments: str | None = None, own_fields: Mapping[str, str] = _OWN_FIELDS
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return an optimizer's class and its keyword arguments.

    Args:
        name (`str`): `timm:lion`, a name of `timm.optim.list_optimizers()` with its defaults there, or
            `package.module:Class`, a class that can be imported.
        arguments (`str`, *optional*): As in a call: `"betas=(0.95,0.99),amsgrad=true"`.
        own_fields (`Mapping[str, str]`, *optional*): Arguments that have a field of their own, and its name.

    Raises:
        ValueError: If there is no such class or argument, or it cannot be used here.
        ImportError: If the package is not installed.
    """
    package, _, class_name = name.partition(":")
    settings: dict[str, Any] = {}
    if package == "timm":
        check_known([class_name], timm.optim.list_optimizers(), "optimizer of timm")
        info = timm.optim.get_optimizer_info(class_name)
        try:
            cls = timm.optim.get_optimizer_class(class_name, bind_defaults=False)
        except (AssertionError, ImportError) as error:
            raise ImportError(f"`optim` '{name}' cannot be loaded: {error}.") from error
        settings = {**({"momentum": 0.9} if info.has_momentum else {}), **(info.defaults or {})}
    else:
        cls = _import(name, package, class_name)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ValueError(f"`optim` must name a subclass of torch.optim.Optimizer, but '{name}' is {cls!r:.80}.")
    reason = _REFUSED.get(cls.__module__.partition(".")[0], {}).get(cls.__name__)
    if reason is not None:
        raise ValueError(f"`optim` must not be '{name}': {reason}. See docs/optimizers.md.")
    given = _parse(arguments)
    for argument, field in own_fields.items():
        if argument in given:
            raise ValueError(f"`optim_args` must not have '{argument}', but is {arguments!r}. Set `{field}`.")
    check_known(given, names_of_settings(cls) - own_fields.keys(), f"argument of '{name}'")
    return cls, settings | given


def _import(name: str, package: str, class_name: str) -> Any:
    try:
        module = importlib.import_module(package)
    except (ImportError, ValueError) as error:
        root = package.partition(".")[0]
        remedy = "pip install 'hf_msn[optimizers]'" if root in _EXTRA else f"Install '{root}', or see PYTHONPATH"
        raise ImportError(
            f"`optim` '{name}' needs '{package}', which cannot be imported ({error}). {remedy}."
        ) from error
    if not hasattr(module, class_name):
        known = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"'{package}' has no '{class_name}', which `optim` names. {did_you_mean(class_name, known)}")
    return getattr(module, class_name)


def _parse(arguments: str | None) -> dict[str, Any]:
    """Read keyword arguments as in a call. A bare word is true (yes, on), false (no, off), none or a text."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    try:
        call = ast.parse(f"f({arguments or ''})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("each has a name")
        return {
            keyword.arg: words.get(keyword.value.id.lower(), keyword.value.id)
            if isinstance(keyword.value, ast.Name)
            else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`optim_args` must be written as in a call, betas=(0.95,0.99),amsgrad=true, but is {arguments!r}."
        ) from error


def names_of_settings(cls: type) -> set[str]:
    """Return the named parameters of a class, and of the bases that its **kwargs may reach."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            names |= {parameter.name for parameter in parameters if parameter.kind in kinds}
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names - {"self", "defaults"}


class _Trial:
    """An optimizer on a few small tensors, with gradients that are the same in each trial."""

    shapes = ((4, 3), (2, 3, 2, 2), (1, 5, 3), (4,))
    decay = 0.3

    def __init__(self, cls: type[Optimizer], settings: dict[str, Any], decay: float):
        torch.default_generator.manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(shape)) for shape in self.shapes]
        decayed, others = self.weights[:-1], self.weights[-1:]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = cls(groups, lr=1.0, **settings)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # as accelerate does

    def step(self, number: int, with_decay: bool = False) -> None:
        torch.default_generator.manual_seed(number + 1)
        for place, p in enumerate(self.weights):
            p.grad = torch.randn_like(p)
            if with_decay and place < len(self.weights) - 1:
                p.grad += self.decay * p.detach()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.optimizer.step()

    def distance(self, other: "_Trial") -> float:
        return float(sum((p - q).detach().abs().sum() for p, q in zip(self.weights, other.weights)))


def _try(name: str, cls: type[Optimizer], settings: dict[str, Any]) -> str:
    """Take a few steps, resume, and return what weight decay is: "decoupled", "l2" or "none"."""
    with torch.random.fork_rng(devices=[]):
        try:
            own = _Trial(cls, settings, _Trial.decay)
            own.step(0)
            own.step(1)
        except Exception as error:
            raise ValueError(
                f"`optim` must step by gradients alone, for tensors of every shape, but '{name}' does not: {error}"
            ) from error
        _check_resume(name, own, _Trial(cls, settings, _Trial.decay))
        start, ignored, in_gradient = (_Trial(cls, settings, 0.0) for _ in range(3))
        for step in range(3, _STEPS):
            own.step(step)
        for step in range(_STEPS):
            ignored.step(step)
            in_gradient.step(step, with_decay=True)
    effect = own.distance(ignored)
    if effect == 0 and own.distance(start) != 0:
        return "none"
    return "l2" if own.distance(in_gradient) < 0.05 * effect else "decoupled"


def _check_resume(name: str, own: _Trial, resumed: _Trial) -> None:
    """Go on with the third step, also from a saved state."""
    show_averages(own.optimizer)
    try:
        saved = io.BytesIO()
        torch.save(own.optimizer.state_dict(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        with torch.no_grad():
            for new, old in zip(resumed.weights, own.weights):
                new.copy_(old)
        resumed.optimizer.load_state_dict(state)
        resumed.step(2)
    except Exception as error:
        raise ValueError(
            f"`optim` must save a state that `torch.load(weights_only=True)` reads, but '{name}' does not, so that a "
            f"run could not resume: {error}"
        ) from error
    own.step(2)
    if own.distance(resumed) != 0:
        raise ValueError(f"`optim` must go on from its saved state as it would have, but '{name}' does not.")


def _check_weight_decay(name: str, kind: str, args: TrainingArguments) -> None:
    last = getattr(args, "final_weight_decay", None)
    if kind == "none" and (args.weight_decay or last):
        raise ValueError(
            f"'{name}' has no weight decay, but `weight_decay` is {args.weight_decay:g}"
            + (f" and `final_weight_decay` {last:g}" if last else "")
            + ". Set `weight_decay` to 0 and leave out the other (none)."
        )
    if kind == "l2" and last is not None and last != args.weight_decay:
        raise ValueError(
            f"'{name}' adds weight decay to the gradient (L2), where a schedule of it would act through the moments, "
            f"but `final_weight_decay` is {last:g} and `weight_decay` {args.weight_decay:g}. Set `final_weight_decay` "
            "to none, or choose decoupled decay where `optim_args` can (weight_decouple=true)."
        )
