"""Each replica's predictions for the batch that all of them hold, with a check that they do."""

from collections.abc import Mapping
from typing import Any

import torch

from ..comm.exchange import Exchange
from ..comm.wire import as_bytes, from_bytes
from .batch_digest import batch_digest
from .distances import PredictionDistance
from .mail import ReplicaMail

_REMEDY = (
    "Shard the data by the place inside of the replica, with the same seed and augmentations in all replicas, or let "
    "them exchange checkpoints (`exchange='checkpoints'`), where each has data of its own."
)


class PeerPredictions:
    """Gathers what all replicas send, over the group, or by mail where replicas may be lost.

    Args:
        exchange ([`Exchange`]): One rank of each replica.
        distance ([`PredictionDistance`]): Says what of the predictions travels.
        wire_dtype (`torch.dtype`, *optional*): See [`PredictionDistance.pack`].
        check_every (`int`): The digests of the batches are compared at each of so many occasions, the first included.
        mail ([`ReplicaMail`], *optional*): Sends by it instead of over the group. On the CPU.

    Attributes:
        occasions (`int`): Number of exchanges so far.
    """

    snapshot_step = None  # predictions are never stale

    def __init__(
        self,
        exchange: Exchange,
        distance: PredictionDistance,
        wire_dtype: torch.dtype | None,
        check_every: int,
        mail: ReplicaMail | None,
    ):
        self._exchange, self._distance, self._wire_dtype = exchange, distance, wire_dtype
        self._check_every, self._mail = check_every, mail
        self.occasions = 0

    @torch.no_grad()
    def gather(self, own: torch.Tensor, batch: Any) -> list[list[torch.Tensor]]:
        """The other replicas' predictions as [`PredictionDistance`] takes them, first replica first.

        Args:
            own (`torch.Tensor` of shape `(..., C)`): This replica's, which travel.
            batch: What they are about.

        Raises:
            ValueError: If the replicas hold different batches.
            PeerError: If a replica is lost.
        """
        packed = self._distance.pack(own, self._wire_dtype)
        digest = torch.zeros(2, dtype=torch.int64, device=packed[0].device)
        is_checked = self.occasions % self._check_every == 0
        if is_checked:
            digest = batch_digest(batch, packed[0].device)
        self.occasions += 1
        if self._mail is not None:
            return self._by_mail(packed, digest)
        return self._over_group(packed, digest, is_checked)

    def after_update(self, step: int) -> None:
        """Nothing is due after an update."""

    def state(self, step: int) -> dict[str, Any]:
        return {"occasions": self.occasions}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.occasions = state["occasions"]

    def _over_group(
        self, packed: list[torch.Tensor], digest: torch.Tensor, is_checked: bool
    ) -> list[list[torch.Tensor]]:
        if is_checked:
            # Before anything of the batch's size travels: of other sizes it would not arrive.
            self._compare(dict(enumerate(self._gather(digest))))
        gathered = [self._gather(tensor) for tensor in packed]
        return [list(parts) for place, parts in enumerate(zip(*gathered)) if place != self._exchange.rank]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        whole = tensor.new_empty(self._exchange.size * tensor.numel())
        self._exchange.gather_(whole, tensor.reshape(-1))
        return list(whole.view(self._exchange.size, *tensor.shape))

    def _by_mail(self, packed: list[torch.Tensor], digest: torch.Tensor) -> list[list[torch.Tensor]]:
        own = as_bytes([digest, *packed])
        self._mail.post(self.occasions, own)
        payloads = self._mail.receive(self.occasions)
        size = 2 * digest.element_size()
        digests = {place: payload[:size].clone().view(torch.int64) for place, payload in payloads.items()}
        self._compare({**digests, self._exchange.rank: digest.cpu()})
        for place, payload in payloads.items():
            if payload.numel() != own.numel():
                self._refuse(self._exchange.rank, place)
        return [from_bytes(payload, [digest, *packed])[1:] for payload in payloads.values()]

    def _compare(self, digests: dict[int, torch.Tensor]) -> None:
        first, *others = sorted(digests)
        rows = torch.stack([digests[place] for place in (first, *others)]).tolist()
        for place, row in zip(others, rows[1:]):
            if row != rows[0]:
                self._refuse(first, place)

    def _refuse(self, first: int, second: int) -> None:
        ranks = self._exchange.global_ranks
        raise ValueError(
            "Replicas that exchange predictions must see the same batch at every step, but those of rank "
            f"{ranks[first]} and rank {ranks[second]} differ at exchange {self.occasions}. {_REMEDY}"
        )
