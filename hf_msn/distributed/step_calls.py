"""A count of the calls of `step` against the steps of the optimizer."""

import logging
import threading
from collections.abc import Sequence

import torch

from .training_state import local

logger = logging.getLogger(__name__)


class StepCalls:
    """Find loops in which `step` of a sync object does not follow each step of its optimizer once.

    A call without an optimizer step before it is right where a gradient scaler has skipped that step: there was a
    backward pass, and gradients that `zero_grad` has not removed are not finite. A single call too few, and loops that
    change the parameters without an optimizer, are not judged.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]):
        self._name, self._parameters = name, list(parameters)
        self._taken = self._calls = self._missed = self._idle = 0
        self._is_pending = self._is_early = False
        self._had_backward = had_backward = threading.Event()  # not `self`, which holds the parameters
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self._note_step())]
        self._hooks += [p.register_post_accumulate_grad_hook(lambda _: had_backward.set()) for p in self._parameters]

    def remove(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _note_step(self) -> None:
        self._taken += 1
        self._missed += self._is_pending
        self._is_pending = True

    def note_call(self) -> None:
        """Note a call of `step`."""
        self._calls += 1
        if not self._is_pending:
            gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
            gradients = [gradient for gradient in gradients if bool(gradient.any())]
            are_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            if self._taken:
                self._idle += are_finite if gradients else not self._had_backward.is_set()
            else:
                self._is_early |= bool(gradients) and are_finite
        self._is_pending = False
        self._had_backward.clear()

    def check(self, is_last: bool = False) -> None:
        """Raise a `RuntimeError` where calls are missing or doubled; `is_last` when leaving."""
        problem = None
        if self._missed > 1 or (is_last and self._taken and not self._calls):
            problem = f"the optimizer took {self._taken} steps and `step` was called {self._calls} times"
        elif self._idle >= max(self._taken, 2):
            problem = f"`step` was called {self._calls} times for {self._taken} steps of the optimizer"
        elif self._is_early and self._is_pending:
            problem = "`step` was called before the first step of the optimizer, and not after the last one"
        if problem is not None:
            raise RuntimeError(
                f"`{self._name}.step()` counts optimizer steps and must be called once after each, but {problem}. The "
                "ranks have drifted apart: mend the loop, and go on from the last checkpoint."
            )
        if is_last and self._calls and not self._taken:
            logger.warning(
                f"`{self._name}.step()` was called {self._calls} times, but its optimizer took no step. Make it with "
                "the optimizer that trains the model."
            )
