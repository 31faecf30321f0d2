"""The wire format: the precision of messages, error feedback for its rounding errors, and tensors as bytes."""

from collections.abc import Sequence
from typing import Any

import torch

from ...checks import check_choice
from .exchange import Exchange

_WIRE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def checked_wire_dtype(wire_dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a `wire_dtype` argument; `None` stands for the dtype of the parameters."""
    meaning = "is the precision in which parameters are sent"
    return _WIRE_DTYPES[check_choice("wire_dtype", wire_dtype, list(_WIRE_DTYPES), meaning=meaning)]


class RoundedMean:
    """Mean over the ranks that sends only the rounded change since a common anchor, with error feedback.

        q_i = round(x_i - a + e_i),    e_i <- x_i - a + e_i - q_i,    x <- a + mean_i q_i

    The rounding error e of one mean is sent with the next one, so errors do not add up. A partial sum that travels
    from rank to rank is rounded as well, without feedback: by up to 2^-8 of the change for bfloat16, equally on all
    ranks.
    """

    def __init__(self, exchange: Exchange, dtype: torch.dtype):
        self._exchange, self._dtype = exchange, dtype
        self.residuals: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def mean_(self, index: int, x: torch.Tensor, anchor: torch.Tensor) -> None:
        """Replace `x`, buffer number `index`, by its mean over the ranks. `anchor` is the same on every rank."""
        x.sub_(anchor)
        if index in self.residuals:
            x.add_(self.residuals[index])
        sent = x.to(self._dtype)
        self.residuals[index] = x - sent
        self._exchange.mean_([sent])
        torch.add(anchor, sent, out=x)

    def state(self) -> dict[int, torch.Tensor]:
        """Return copies of this rank's residuals."""
        return {index: residual.clone() for index, residual in self.residuals.items()}

    def load_state(self, state: dict[int, Any], device: torch.device) -> None:
        """Load the residuals that `state` returned on this rank."""
        self.residuals = {int(index): residual.to(device, copy=True) for index, residual in state.items()}


def as_bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of any dtypes as one flat uint8 tensor on the CPU."""
    parts = [tensor.detach().reshape(-1).cpu().view(torch.uint8) for tensor in tensors if tensor.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def from_bytes(payload: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that [`as_bytes`] was given, with the shapes, dtypes and devices of `like`."""
    parts = payload.split([tensor.numel() * tensor.element_size() for tensor in like])
    # The copy aligns a part to its dtype.
    return [p.clone().view(t.dtype).view(t.shape).to(t.device) for p, t in zip(parts, like)]
