"""Local SGD: local steps, and the average of the parameters every few of them."""

from typing import Any

import torch
from torch import nn

from .comm.flat import FlatTensors
from .comm.wire import RoundedMean, checked_wire_dtype
from .local_update import LocalUpdate


class LocalSGD(LocalUpdate):
    """Average the parameters over the ranks every `sync_every` optimizer steps.

        x_i <- mean_j x_j        after every `sync_every` local steps

    [arXiv 1805.09767](https://arxiv.org/abs/1805.09767); post-local with `sync_start_step`. With `sync_every=1` and
    plain SGD it is training with averaged gradients, up to rounding. On one rank it does nothing and warns. Other
    arguments, consensus and errors are those of [`LocalUpdate`].

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 12): Optimizer steps per period.
        wire_dtype (`str`, *optional*): `"bfloat16"` halves the bytes of an average: the change since the last one is
            rounded, and the rounding error is added to the next ([`RoundedMean`]). It needs memory for two copies of
            the trainable parameters. By default the parameters' own precision, and no memory.
        kwargs: `group` and the other arguments of [`LocalUpdate`].

    Raises:
        ValueError: If `wire_dtype` is unknown, and as [`LocalUpdate`] raises.
    """

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
        self.wire_dtype, dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._rounded = None if dtype is None else RoundedMean(self._exchange, dtype)
        self._anchors: list[torch.Tensor] = []

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "wire_dtype": self.wire_dtype}

    def _begin_local_steps(self) -> None:
        if self._rounded is not None:
            self._rounded.residuals.clear()
            self._anchors = [FlatTensors(bucket).copy_in()[0] for bucket in self._bucket_tensors()]

    def _take_outer_step(self) -> None:
        self._meet("an outer step")
        for index, bucket in enumerate(self._bucket_tensors()):
            flat = FlatTensors(bucket)
            [x] = flat.copy_in()
            if self._rounded is None:
                self._exchange.mean_([x])
            else:
                self._rounded.mean_(index, x, self._anchors[index])
                self._anchors[index].copy_(x)
            flat.copy_back()

    def _method_state(self) -> dict[str, Any]:
        if self._rounded is None:
            return {}
        return {"anchors": [anchor.clone() for anchor in self._anchors], "residuals": self._rounded.state()}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        if ("anchors" in state) != (self._rounded is not None):
            raise ValueError(
                f"`wire_dtype` must be that of the saved state, but is {self.wire_dtype!r}, and the state is of "
                f"{'a rounded average' if 'anchors' in state else 'None'}. Set the same."
            )
        if self._rounded is not None:
            self._anchors = [anchor.to(self._device, copy=True) for anchor in state["anchors"]]
            self._rounded.load_state(state["residuals"], self._device)
