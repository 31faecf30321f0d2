"""How far a replica's predictions are from another's, and what of the other's predictions has to travel for that."""

import torch
from torch import nn

DISTANCES = ("kl", "mse")


class PredictionDistance:
    """D(own, peer) between predictions of shape `(..., C)`, with a gradient for the own ones only.

    With `kind="kl"`, temperature T, p = softmax(peer / T) and q = softmax(own / T), as a mean over all positions:

        D = T^2 KL(p || q) = T^2 sum_c p_c (log p_c - log q_c)

    T^2 keeps gradients at the scale that they have with T = 1. Log-probabilities are as good as logits here.

    With `top_k` only the k largest of p travel, and the log of the rest's mass. Let S be their classes:

        D = T^2 [ sum_{c in S} p_c (log p_c - log q_c) + p_rest (log p_rest - log q_rest) ]

    with p_rest = 1 - sum_{c in S} p_c, and q_rest alike over the same S: the rest is one class, so that D is the KL of
    what is known, and never above that of all classes.

    With `kind="mse"`, as a mean over all positions:

        D = 1/C sum_c (peer_c - own_c)^2

    Computed in float32, or in float64 for predictions of that.

    Args:
        kind (`str`, *optional*, defaults to `"kl"`): `"kl"` or `"mse"`.
        temperature (`float`, *optional*, defaults to 1.0): T of `"kl"`, > 0.
        top_k (`int`, *optional*): Of `"kl"`; by default all C travel, as well if C is not larger.

    Raises:
        ValueError: If an argument is outside of its rule.
    """

    def __init__(self, kind: str = "kl", temperature: float = 1.0, top_k: int | None = None):
        if kind not in DISTANCES:
            raise ValueError(
                "`distance` is between the predictions of two replicas and must be 'kl' (Kullback-Leibler divergence) "
                f"or 'mse' (mean squared error of logits), but is {kind!r}. The usual one of distillation is 'kl'."
            )
        if not _is_number(temperature) or not 0.0 < temperature < float("inf"):
            raise ValueError(
                "`temperature` divides the logits before the softmax and must be a number > 0, but is "
                f"{temperature!r}. Give 1.0 for the predictions as they are, more to soften them."
            )
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(
                "`top_k` is the number of a peer's largest probabilities that travel and must be an integer >= 1, or "
                f"None for all, but is {top_k!r}. For language models 64 keep nearly all of the mass."
            )
        if top_k is not None and kind != "kl":
            raise ValueError(
                "`top_k` needs probabilities, of which the rest is one class, but `distance` is "
                f"{kind!r}. Give `distance='kl'`, or leave `top_k` out."
            )
        self.kind, self.temperature, self.top_k = kind, float(temperature), top_k

    @torch.no_grad()
    def pack(self, predictions: torch.Tensor, wire_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """What of a replica's predictions its peers need.

        Args:
            predictions (`torch.Tensor` of shape `(..., C)`): Logits.
            wire_dtype (`torch.dtype`, *optional*): Of the numbers; by default that of the predictions.

        Returns:
            `list[torch.Tensor]`: The predictions, `(..., C)`; with a `top_k` below C the log-probabilities of the k
            largest and of the rest, `(..., k + 1)`, and the classes, `(..., k)` of int32.
        """
        dtype = wire_dtype or predictions.dtype
        if self.top_k is None or self.top_k >= predictions.shape[-1]:
            return [predictions.detach().to(dtype).contiguous()]
        log_p = self._log_softmax(predictions)
        largest, classes = log_p.topk(self.top_k, dim=-1)
        return [torch.cat([largest, _log_of_rest(log_p, classes)], -1).to(dtype), classes.to(torch.int32)]

    def __call__(self, own: torch.Tensor, peer: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """The distance, a scalar.

        Args:
            own (`torch.Tensor` of shape `(..., C)`): This replica's predictions, with gradient.
            peer (`list[torch.Tensor]`): What `pack` made of the other's.
            mask (`torch.Tensor` of shape `(...)`, *optional*): True (or not 0) at the positions that count.
        """
        values = peer[0].detach().to(own.device)
        if self.kind == "mse":
            dtype = _precision(own)
            return _mean((own.to(dtype) - values.to(dtype)).square().mean(-1), mask)
        log_q = self._log_softmax(own)
        if len(peer) == 1:
            log_p = self._log_softmax(values.to(log_q.dtype))
        else:
            classes = peer[1].to(own.device, torch.int64)
            log_q = torch.cat([log_q.gather(-1, classes), _log_of_rest(log_q, classes)], -1)
            # Anew, for what the wire's precision took.
            log_p = values.to(log_q.dtype).log_softmax(-1)
        # A class that the peer rules out adds nothing, whatever q is.
        terms = torch.where(log_p > -float("inf"), log_p.exp() * (log_p - log_q), 0.0)
        return self.temperature**2 * _mean(terms.sum(-1), mask)

    def _log_softmax(self, predictions: torch.Tensor) -> torch.Tensor:
        return nn.functional.log_softmax(predictions.to(_precision(predictions)) / self.temperature, dim=-1)


def _log_of_rest(log_p: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    # Not minus infinity: where the rest is ruled out too, there would be no gradient.
    return log_p.scatter(-1, classes, torch.finfo(log_p.dtype).min).logsumexp(-1, keepdim=True)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(
            f"`mask` says which positions of the predictions count and must be of shape {tuple(values.shape)}, but is "
            f"of {tuple(mask.shape)}. Give one value for each position, without the dimension of the classes."
        )
    mask = mask.to(values.device).bool()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _precision(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
