"""In what precision parameters travel, and means of which only a rounded part does."""

from typing import Any

import torch

from .exchange import Exchange

_WIRE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def checked_wire_dtype(wire_dtype: str | None) -> torch.dtype | None:
    """The dtype of that name; `None` for that of the parameters.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(wire_dtype, (str, type(None))) or wire_dtype not in _WIRE_DTYPES:
        raise ValueError(
            "`wire_dtype` is the precision in which parameters are sent and must be 'float32', 'bfloat16' or None "
            f"(that of the parameters), but is {wire_dtype!r}. 'bfloat16' halves the bytes of float32."
        )
    return _WIRE_DTYPES[wire_dtype]


class RoundedMean:
    """Means over the ranks of which only what changed since a common anchor is sent, rounded, with error feedback.

        q_i = round(x_i - a + e_i),    e_i <- x_i - a + e_i - q_i,    x <- a + mean_i q_i

    What rounding took from one mean, e, is sent with the next: no error adds up. A sum on its way from rank to rank is
    rounded too, without feedback: up to 2^-8 of the change for bfloat16, alike on all ranks, which stay equal.

    Args:
        exchange ([`Exchange`]): The ranks.
        dtype (`torch.dtype`): Of what is sent.
    """

    def __init__(self, exchange: Exchange, dtype: torch.dtype):
        self._exchange, self._dtype = exchange, dtype
        self.residuals: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def mean_(self, index: int, x: torch.Tensor, anchor: torch.Tensor) -> None:
        """Replaces `x` by its mean.

        Args:
            index (`int`): Which of the buffers it is: each has its residual.
            x (`torch.Tensor` of shape `(N,)`): This rank's values.
            anchor (`torch.Tensor` of shape `(N,)`): The same on every rank.
        """
        x.sub_(anchor)
        if index in self.residuals:
            x.add_(self.residuals[index])
        sent = x.to(self._dtype)
        self.residuals[index] = x - sent
        self._exchange.mean_([sent])
        torch.add(anchor, sent, out=x)

    def state(self) -> dict[int, torch.Tensor]:
        """The residuals of this rank, copied."""
        return {index: residual.clone() for index, residual in self.residuals.items()}

    def load_state(self, state: dict[int, Any], device: torch.device) -> None:
        """Takes over the residuals that this rank saved."""
        self.residuals = {int(index): residual.to(device, copy=True) for index, residual in state.items()}
