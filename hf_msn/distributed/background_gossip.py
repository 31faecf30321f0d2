"""The base of gossip whose messages travel in the background of training."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .comm.agreement import Agreement
from .comm.mailbox import Mailbox, Message
from .comm.membership import Membership
from .comm.wire import checked_wire_dtype
from .local_update import LocalUpdate
from .push_sum import PushSum
from .topology import Topology, check_topology
from .training_state import frozen_and_buffers

_CLOSE_SECONDS = 5.0


class BackgroundGossip(LocalUpdate):
    """Base class of [`OverlapGossip`] and [`AsyncGossip`]: x and w, a mailbox, its members and their agreements."""

    _on_silent = "pass over"  # what `sync` does where a rank is silent, see [`Agreement`]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        topology: Topology,
        wire_dtype: str | None,
        must_pair: bool = False,
        timeout_seconds: float | None,
        **kwargs: Any,
    ):
        if timeout_seconds is None:
            raise ValueError(
                "`timeout_seconds` is how long a peer may be silent and must be > 0, but is None. Choose more than "
                "the longest step takes; the default is 60."
            )
        super().__init__(model, optimizer, timeout_seconds=timeout_seconds, **kwargs)
        self.topology = topology
        check_topology(topology, self._exchange.size, must_pair=must_pair)
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._push_sum: PushSum | None = None
        self._mailbox: Mailbox | None = None
        self._is_attached, self._is_settled = False, True
        self._sent_before, self._waited_before = 0, 0.0

    @property
    def bytes_sent(self) -> int:
        now = self._mailbox.bytes_sent if self._is_attached else 0
        return super().bytes_sent + self._sent_before + now

    @property
    def seconds_waiting(self) -> float:
        now = self._peers.seconds_waiting if self._is_attached else 0.0
        return super().seconds_waiting + self._waited_before + now

    @property
    def absent_ranks(self) -> list[int]:
        absent = self._peers.lost | self._peers.silent if self._is_attached else ()
        return sorted(self._mailbox.global_ranks[peer] for peer in absent)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "topology": self.topology.description()}

    def _attach(self) -> None:
        super()._attach()
        size, seconds = self._exchange.size, self._exchange.timeout_seconds
        self._push_sum = PushSum([p for _, p, _ in self._parameters])
        self._mailbox = Mailbox(
            self._push_sum.x,
            self._exchange.group,
            wire_dtype=self._wire_dtype,
            num_numbers=3 + size,
            turn_seconds=seconds / 4,
        )
        self._peers = Membership(
            self._mailbox,
            seconds,
            receive=lambda message: self._agreement.receive(message),
            changed=self._member_changed,
            tolerant=self._inner is None,
        )
        self._agreement = Agreement(self._peers, self._receive, self._on_silent)
        self._is_attached = self._is_settled = True
        self._mailbox.start()

    def _detach(self) -> None:
        super()._detach()
        if not self._is_attached:  # entering has failed
            return
        self._is_attached = False
        self._mailbox.close(min(_CLOSE_SECONDS, self._exchange.timeout_seconds))
        self._sent_before += self._mailbox.bytes_sent
        self._waited_before += self._peers.seconds_waiting

    @torch.no_grad()
    def sync(self) -> None:
        """Wait for the other ranks; then all hold the exact mean, see the class.

        Raises:
            PeerError: Where the class says so. `sync()` can be called again.
        """
        self._require_started()
        self._calls.check()
        if self._exchange.size == 1:
            super().sync()
            return
        others = frozen_and_buffers(self.model)
        before = [t.clone() for t in others]

        def contribute() -> tuple[float, torch.Tensor]:
            for tensor, value in zip(others, before):  # collectives that failed may have averaged some
                tensor.copy_(value)
            return self._contribution(others)

        def finish(result: torch.Tensor | None) -> None:
            if result is not None:
                self._push_sum.load(result, others)
            self._settle()

        self._agreement.reach(
            self._average_by_collectives,
            contribute,
            lambda contributions: self._push_sum.combine(contributions, others),
            finish,
            self._unanswered,
        )

    def wait_for_all(self, event: str) -> None:
        LocalUpdate._meet(self, event)  # without an agreement, which would end in a mean

    def _receive(self, message: Message) -> None:
        """Take a message that is not of an agreement."""

    def _member_changed(self, peer: int) -> None:
        """React to a peer that became lost or silent, or was taken back."""

    def _unanswered(self) -> Collection[int]:
        """Return the peers that this rank waits for before it takes part in a `sync`."""
        return ()

    def _contribution(self, others: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Return this rank's part of a mean by messages: w, and x and other tensors as bytes."""
        return self._push_sum.contribution(others)

    def _average_by_collectives(self) -> None:
        """Replace the training state by its mean over all ranks; x stays, to be averaged again if this fails."""

    def _settle(self) -> None:
        """React to a mean: all ranks hold the same, and no messages are in flight."""
