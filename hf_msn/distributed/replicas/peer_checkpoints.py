"""Other replicas' predictions from copies of them, filled with checkpoints that travel in the background."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .mail import ReplicaMail
from .peer_copies import PeerCopies
from .settings import CodistillationSettings


class PeerCheckpoints:
    """Sends checkpoints, puts those of the others to use at their step, and asks the copies.

    Args:
        settings ([`CodistillationSettings`]): When to send, and when to use what has arrived.
        mail ([`ReplicaMail`]): Started.
        copies ([`PeerCopies`]): One for each other replica.
        predict (`Callable`): (model, batch) -> predictions.
    """

    def __init__(
        self,
        settings: CodistillationSettings,
        mail: ReplicaMail,
        copies: PeerCopies,
        predict: Callable[[nn.Module, Any], torch.Tensor],
    ):
        self._settings, self._mail, self._copies, self._predict = settings, mail, copies, predict

    @property
    def snapshot_step(self) -> int | None:
        """Updates that the checkpoints in use have seen; `None` while there are none."""
        return self._copies.snapshot_step if self._copies.peers else None

    def gather(self, own: torch.Tensor, batch: Any) -> list[list[torch.Tensor]]:
        """The predictions of the copies for this replica's own batch, as [`PredictionDistance`] takes them."""
        found = []
        for peer in self._copies.peers:
            with self._copies.of(peer, batch) as (copy, its_batch):
                found.append([self._predict(copy, its_batch)])
        return found

    def after_update(self, step: int) -> None:
        """Sends and takes up what is due after so many updates."""
        if self._settings.is_snapshot_step(step):
            self._mail.post(step, self._copies.snapshot())
        due = step - self._settings.transfer_steps
        if self._settings.is_snapshot_step(due):
            self._copies.fill(due, self._mail.receive(due))
        self._mail.look()
        self._copies.keep_only(self._mail.live)

    def state(self, step: int) -> dict[str, Any]:
        """The copies in use, and the checkpoints under way after so many updates, for which it waits."""
        # What arrived is never written to: no need to copy it.
        under_way = {sent: self._mail.receive(sent, keep=True) for sent in self._settings.steps_under_way(step)}
        return {"copies": self._copies.state(), "under_way": under_way}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned.

        Raises:
            ValueError: If it is of another model.
        """
        for payloads in (state["copies"]["of"], *state["under_way"].values()):
            self._copies.check(payloads)
        self._copies.fill(state["copies"]["step"], state["copies"]["of"])
        for step, payloads in state["under_way"].items():
            self._mail.put_back(step, payloads)


def logits_of(output: Any) -> torch.Tensor:
    """The `logits` of a model's output, or the output itself if it is a tensor.

    Raises:
        ValueError: If there are none.
    """
    if torch.is_tensor(output):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"The model's output must have `logits`, but is a {type(output).__name__} without. Give `predictions`, a "
            "function of the output that returns logits or log-probabilities of shape (..., C)."
        )
    return logits


def call_model(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)` for a mapping, else `model(batch)`."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def checked_predictions(predictions: Any) -> torch.Tensor:
    """The predictions themselves.

    Raises:
        ValueError: If they are no floating-point tensor of shape `(..., C)`.
    """
    is_tensor = torch.is_tensor(predictions)
    if not is_tensor or not predictions.is_floating_point() or predictions.dim() < 1:
        kind = f"{predictions.dtype} {tuple(predictions.shape)}" if is_tensor else type(predictions).__name__
        raise ValueError(
            "`predictions` must return a tensor of floating-point logits of shape (..., C), but returned "
            f"{kind}. Give a function of the model's output that does."
        )
    return predictions
