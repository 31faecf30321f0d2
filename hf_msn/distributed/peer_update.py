"""Base class of the methods in which a few ranks exchange parameters in step, as a topology names them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .comm.exchange import PeerError
from .comm.peer_exchange import PeerExchange
from .local_update import LocalUpdate
from .topology import Topology


class PeerUpdate(LocalUpdate):
    """Base class of [`Gossip`] and [`NoLoCo`]: a rank waits for the peers that `topology` names, not for all.

    A subclass sets `topology`, for as many ranks as the group has, and counts its steps in `rounds`. Arguments and
    errors are those of [`LocalUpdate`].
    """

    topology: Topology
    rounds: int = 0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **kwargs: Any):
        super().__init__(model, optimizer, **kwargs)
        self._exchange = PeerExchange(self._exchange.group, self._exchange.timeout_seconds)

    def _attach(self) -> None:
        super()._attach()
        self._exchange.connect()

    def _peers_of(self, step: int) -> tuple[list[int], list[int]]:
        """Return the peers that this rank sends to and receives from."""
        rank = self._exchange.rank
        return self.topology.out_peers(rank, step), sorted(self.topology.in_peers(rank, step))

    def _meet(self, event: str) -> None:
        with self._announced_failure():
            # A peer that has taken more steps mixes, and waits for this rank.
            self._exchange.announce_collective(*self._peers_of(self.rounds))
            super()._meet(event)

    @contextmanager
    def _announced_failure(self) -> Iterator[None]:
        """Let the ranks that wait for this one know of its error."""
        try:
            yield
        except PeerError as error:
            self._exchange.announce_failure(error)
            raise
