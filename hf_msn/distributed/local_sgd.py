"""Local SGD: local steps, and the average of the parameters every few of them."""

from typing import Any

import torch
from torch import nn

from .comm.flat import FlatTensors
from .comm.wire import checked_wire_dtype
from .local_update import LocalUpdate


class LocalSGD(LocalUpdate):
    """Average the parameters over the ranks every `sync_every` optimizer steps.

        x_i <- mean_j x_j        after every `sync_every` local steps

    [arXiv 1805.09767](https://arxiv.org/abs/1805.09767); post-local with `sync_start_step`. With `sync_every=1` and
    plain SGD it is training with averaged gradients, up to rounding. On one rank it does nothing and warns. Other
    arguments, consensus and errors are those of [`LocalUpdate`].

    With a `wire_dtype` the ranks average their changes since the anchor a, the last average, with error feedback:

        q_i = round(x_i - a + e_i),    e_i <- x_i - a + e_i - q_i,    x_i <- a + mean_j q_j

    A partial sum that travels from rank to rank is rounded as well, without feedback: by up to 2^-8 of the change for
    bfloat16, equally on all ranks.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps per period.
        wire_dtype (`str`, *optional*): `"bfloat16"` halves the bytes of an average: the change since the last one is
            rounded, and the rounding error is added to the next. It needs memory for two copies of the trainable
            parameters. By default the parameters' own precision, and no memory.
        kwargs: `group` and the other arguments of [`LocalUpdate`].

    Raises:
        ValueError: If `wire_dtype` is unknown, and as [`LocalUpdate`] raises.
    """

    _only_averages = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 12,
        wire_dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, optimizer, sync_every=sync_every, **kwargs)
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._anchors: list[torch.Tensor] = []
        self._rounding_errors: dict[int, torch.Tensor] = {}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "wire_dtype": self.wire_dtype}

    def _begin_local_steps(self) -> None:
        self._rounding_errors.clear()
        if self._wire_dtype is not None:
            self._anchors = [FlatTensors(bucket).copy_in()[0] for bucket in self._bucket_tensors()]

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        self._meet("an outer step")
        for index, bucket in enumerate(self._bucket_tensors()):
            flat = FlatTensors(bucket)
            [x] = flat.copy_in()
            self._mean_(index, x)
            flat.copy_back()
            if self._wire_dtype is not None:
                self._anchors[index].copy_(x)

    def _mean_(self, index: int, x: torch.Tensor) -> None:
        """Replace x, the parameters of bucket number `index`, by their mean over the ranks."""
        if self._wire_dtype is None:
            self._exchange.mean_([x])
            return
        x.sub_(self._anchors[index])
        if index in self._rounding_errors:
            x.add_(self._rounding_errors[index])
        sent = x.to(self._wire_dtype)
        self._rounding_errors[index] = x - sent
        self._exchange.mean_([sent])
        torch.add(self._anchors[index], sent, out=x)

    def _method_state(self) -> dict[str, Any]:
        return {
            "wire_dtype": self.wire_dtype,
            "anchors": [anchor.clone() for anchor in self._anchors],
            "rounding_errors": {index: error.clone() for index, error in self._rounding_errors.items()},
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        if state["wire_dtype"] != self.wire_dtype:
            raise ValueError(
                f"`wire_dtype` must be that of the saved state, {state['wire_dtype']!r}, but is {self.wire_dtype!r}. "
                "Set the same."
            )
        self._anchors = [anchor.to(self._device, copy=True) for anchor in state["anchors"]]
        errors = state["rounding_errors"]
        self._rounding_errors = {index: error.to(self._device, copy=True) for index, error in errors.items()}
