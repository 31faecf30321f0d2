"""Which models and optimizers a sync object is active on: two on one would undo each other's work."""

import weakref

import torch
from torch import nn

_active: "weakref.WeakSet[nn.Module | torch.optim.Optimizer]" = weakref.WeakSet()


def require_free(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a model or an optimizer that has been taken.

    Raises:
        ValueError: If a sync object is active on it.
    """
    for taken, name in ((model, "A model"), (optimizer, "An optimizer")):
        if taken in _active:
            raise ValueError(
                f"{name} takes one sync object at a time, but another one is active on this one. Leave that one "
                "(`with`, or `stop`) first, or train with one only."
            )


def take(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on a sync object is active on them."""
    _active.update((model, optimizer))


def give_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """They are free again."""
    _active.difference_update((model, optimizer))
