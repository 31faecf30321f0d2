"""DiLoCo: an optimizer of torch on the changes of local training."""

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .comm.flat import FlatTensors
from .local_sgd import LocalSGD
from .training_state import trainable_parameters

OUTER_SGD = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class DiLoCo(LocalSGD):
    """Let an outer optimizer step along the mean change of the local steps, every `sync_every` optimizer steps.

        Delta <- mean_i (x0 - x_i)
        x0 <- OuterOptimizer(x0, Delta);    x_i <- x0

    [arXiv 2311.08105](https://arxiv.org/abs/2311.08105), algorithm 1, with AdamW as `optimizer`. The anchor x0 holds
    the parameters before the first local step, each as a tensor of its own shape, and at least in float32. The outer
    optimizer takes Delta for their gradient. Its default is the paper's Nesterov SGD: v <- 0.9 v + Delta,
    x0 <- x0 - 0.7 (Delta + 0.9 v). SGD with `lr=1` and without momentum is [`LocalSGD`], and SGD with momentum is
    [`SlowMo`] at a constant learning rate, both up to rounding. On one rank it is Lookahead with an optimizer.

    Memory beside the model: x0 and the state of the outer optimizer (a copy of the parameters for SGD with momentum);
    during an outer step one more copy.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): The inner optimizer, see [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 100): Optimizer steps per period. The paper: 500.
        outer_optimizer (`Callable`, *optional*): Called with a list of parameters, returns a `torch.optim.Optimizer`
            of them: `partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)`, the default and the paper's, or
            any other that steps by gradients alone. Of a sharded model it is given the rank's shards. It is made when
            the local steps begin; from then on the attribute `outer_optimizer` has it, for a schedule of its learning
            rate.
        wire_dtype (`str`, *optional*): `"bfloat16"`, `"int8"` or `"int4"`: fewer bytes per outer step, see
            [`LocalSGD`], with the anchor x0. It needs memory for one more copy of the trainable parameters. By default
            the parameters' own precision.
        kwargs: `on_lost_rank` of [`LocalSGD`], `base_buffers`, `group` and the other arguments of [`LocalUpdate`].

    Raises:
        ValueError: If `outer_optimizer` does not return an optimizer of the parameters that it is given, needs a
            closure, cannot step parameters of the model's numbers of dimensions, or has a state that
            `torch.load(weights_only=True)` does not read; and as [`LocalSGD`] raises.
    """

    can_be_base = False
    _acts_alone = True
    _only_averages = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 100,
        outer_optimizer: Callable[[list[nn.Parameter]], Optimizer] = OUTER_SGD,
        wire_dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, optimizer, sync_every=sync_every, wire_dtype=wire_dtype, **kwargs)
        self._fragments = self._split()
        dims = {p.dim() for _, p, _ in trainable_parameters(self.model, self.optimizer)}
        self._make_outer, self._outer_settings = outer_optimizer, _try(outer_optimizer, sorted(dims))
        self._anchors: list[nn.Parameter] = []  # one for each parameter
        self._outer_optimizers: list[Optimizer] = []  # one for each fragment

    @property
    def outer_optimizer(self) -> Optimizer | None:
        """The outer optimizer, once the local steps have begun."""
        return self._outer_optimizers[0] if self._outer_optimizers else None

    def _split(self) -> list[list[int]]:
        """Return the parameters of each fragment, by their places among the trainable ones."""
        return [list(range(len(trainable_parameters(self.model, self.optimizer))))]

    def _attach(self) -> None:
        super()._attach()
        self._fragments = self._split()

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "outer_optimizer": self._outer_settings}

    @torch.no_grad()
    def _begin_local_steps(self) -> None:
        self._clear_errors()
        self._set_anchors(self._tensors)

    def _set_anchors(self, tensors: Sequence[torch.Tensor]) -> None:
        dtypes = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
        self._anchors = [nn.Parameter(t.detach().to(d, copy=True)) for t, d in zip(tensors, dtypes)]
        anchors = [[self._anchors[i] for i in fragment] for fragment in self._fragments]
        self._outer_optimizers = [self._make_outer(own) for own in anchors]

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        self._meet("an outer step")
        for index in range(len(self._buckets)):
            change = self._change(index)
            self._mean_change_(index, change.buffers[0])
            for i, (part, _) in zip(self._buckets[index], change.pairs):
                self._anchors[i].grad = part.to(self._anchors[i].dtype)
        self._step_anchors(0)
        torch._foreach_copy_(self._tensors, self._anchors)

    def _change(self, index: int) -> FlatTensors:
        """Return x0 - x of bucket number `index`."""
        flat = FlatTensors(self._bucket_tensors()[index])
        [change] = flat.copy_in()
        change.neg_()
        anchors = [self._anchors[i].to(change.dtype) for i in self._buckets[index]]
        torch._foreach_add_([part for part, _ in flat.pairs], anchors)
        return flat

    def _step_anchors(self, fragment: int) -> None:
        self._outer_optimizers[fragment].step()
        self._outer_optimizers[fragment].zero_grad()

    def _method_state(self) -> dict[str, Any]:
        return {
            **super()._method_state(),
            "anchors": [x0.detach().clone() for x0 in self._anchors],
            "outer_optimizers": [copy.deepcopy(outer.state_dict()) for outer in self._outer_optimizers],
        }

    @torch.no_grad()
    def _load_method_state(self, state: dict[str, Any]) -> None:
        anchors = self._anchors
        super()._load_method_state(state)
        if state["outer_optimizers"]:
            if self._outer_optimizers:  # the same objects, to which a schedule may refer
                torch._foreach_copy_(anchors, self._anchors)
                self._anchors = anchors
            else:
                self._set_anchors(self._anchors)
            for outer, saved in zip(self._outer_optimizers, state["outer_optimizers"]):
                outer.load_state_dict(copy.deepcopy(saved))  # a copy, because torch takes the tensors themselves


def _try(make: Callable[[list[nn.Parameter]], Optimizer], dims: Iterable[int]) -> str:
    """Take a step with parameters of these numbers of dimensions. Return name and settings of the optimizer."""
    rule = "`outer_optimizer` is called with a list of parameters and must return a torch.optim.Optimizer of them"
    remedy = "The paper: `partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)`."
    if not callable(make):
        raise ValueError(f"{rule}, but is a {type(make).__name__}. {remedy}")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        parameters = [nn.Parameter(torch.ones((2,) * dim)) for dim in dims]
        for p in parameters:
            p.grad = torch.ones_like(p)
        try:
            outer = make(parameters)
            found = {id(p) for group in outer.param_groups for p in group["params"]}
            if not isinstance(outer, Optimizer) or found != set(map(id, parameters)):
                raise TypeError("it returned another object, or one of other parameters")
            outer.step()
            saved = io.BytesIO()
            torch.save(outer.state_dict(), saved)
            saved.seek(0)
            outer.load_state_dict(torch.load(saved, weights_only=True))
        except Exception as error:
            name = getattr(make, "func", make)
            raise ValueError(
                f"{rule}, which steps by gradients alone and has a state for `weights_only=True`, but "
                f"{getattr(name, '__name__', name)} does not, for parameters of {list(dims)} dimensions: {error}. "
                f"{remedy}"
            ) from error
    settings = ", ".join(f"{name}={value!r}" for name, value in outer.defaults.items() if value)
    return f"{type(outer).__name__}({settings})"
