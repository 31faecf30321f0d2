"""A mailbox that knows who of its peers is there, and how fast they take their steps."""

import logging
import time
from collections.abc import Sequence

import torch

from ..collectives import world_size
from ..mixing.step_rates import StepRates
from .mailbox import Mailbox, Message

logger = logging.getLogger(__name__)

# Kinds of messages: signs of life, mass of push-sum, question and answer of a pairwise average, and those of meetings.
PULSE, MASS, REQUEST, ANSWER, HERE, PART, DONE, ANEW = range(8)
_MEETING_NUMBERS = 4  # and one for each rank; before them, in every message: when the sender ended its last step

_MOST_PULSE_SECONDS = 0.5  # between two pulses


class WatchedMailbox(Mailbox):
    """Every message carries its sender's step count and when that step ended; who is silent sends a pulse.

    A peer is *lost* once its connection has closed, and *silent* while nothing came from it for `silence_seconds`.

    Args:
        like (`Sequence[torch.Tensor]`): See [`Mailbox`].
        group (`ProcessGroup`, *optional*): See [`Mailbox`].
        wire_dtype (`torch.dtype`, *optional*): See [`Mailbox`].
        silence_seconds (`float`): See above. Pulses are sent at least every fifth of it, if `pulse` is called.

    Attributes:
        rates ([`StepRates`]): Of all ranks.
        lost (`set[int]`): Peers that were found to be gone.
        silent (`set[int]`): Peers that were found to be silent.
    """

    def __init__(self, like: Sequence[torch.Tensor], group, wire_dtype: torch.dtype | None, silence_seconds: float):
        num_numbers = 1 + _MEETING_NUMBERS + world_size(group)
        super().__init__(like, group, wire_dtype=wire_dtype, num_numbers=num_numbers)
        self.silence_seconds = silence_seconds
        self.rates = StepRates(self.size)
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.step, self._step_ended = 0, 0.0  # 0: no step since this mailbox was made
        self._looked = self._pulsed = time.monotonic()

    def names(self, peers) -> str:
        """The peers as ranks of the default group."""
        return ", ".join(str(self.global_ranks[peer]) for peer in sorted(peers))

    @property
    def living(self) -> list[int]:
        """Peers that are not lost."""
        return [peer for peer in range(self.size) if peer != self.rank and peer not in self.lost]

    @property
    def absent(self) -> frozenset[int]:
        """Peers that are lost or silent."""
        return frozenset(self.lost | self.silent)

    @property
    def narrows(self) -> list[bool]:
        """Whether the wire's precision is below that of the tensors, for each of them."""
        return [wire != dtype for wire, dtype in zip(self.wire_dtypes, self._dtypes)]

    def rounded(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What arrives of the tensors: themselves, or copies that went through the precision of the wire."""
        return [t if t.dtype == wire else t.to(wire).to(t.dtype) for t, wire in zip(tensors, self.wire_dtypes)]

    def end_step(self, step: int) -> None:
        """This rank has taken its step `step`."""
        self.step, self._step_ended = step, time.monotonic()
        self.rates.note(self.rank, step, self._step_ended)
        self.pulse()

    def send(self, peer: int, kind: int, tensors=None, numbers: Sequence[float] = ()) -> None:
        self.post(peer, kind, tensors, step=self.step, numbers=(self._step_ended, *numbers))

    def send_sum(self, peer: int, kind: int, tensors, weight: float) -> None:
        self.post_sum(peer, kind, tensors, step=self.step, weight=weight, numbers=(self._step_ended,))

    def pulse(self) -> None:
        """Lets the peers know every now and then that this rank is there, and how far."""
        now = time.monotonic()
        if now - self._pulsed < min(_MOST_PULSE_SECONDS, self.silence_seconds / 5):
            return
        self._pulsed = now
        for peer in self.living:
            if self.num_waiting(peer) == 0:
                self.send(peer, PULSE)

    def look(self) -> list[int]:
        """Finds out who is lost or silent; returns who is newly so."""
        now = time.monotonic()
        was_away, self._looked = now - self._looked > self.silence_seconds, now
        lost = self.note_lost(self.gone)
        if was_away:  # then what the others said meanwhile may not have been read yet
            return lost
        silent = {peer for peer in self.living if now - self.last_heard[peer] > self.silence_seconds}
        newly, back, self.silent = silent - self.silent, self.silent - silent - set(lost), silent
        if newly:
            logger.warning(
                f"Nothing was heard from rank {self.names(newly)} for {self.silence_seconds} s: rank "
                f"{self.global_ranks[self.rank]} passes over it until it is heard again."
            )
        if back:
            logger.warning(f"Rank {self.names(back)} is heard again by rank {self.global_ranks[self.rank]}.")
        return [*lost, *newly]

    def note_lost(self, peers) -> list[int]:
        """Of these peers, those that were not known to be lost: they are now, with a warning."""
        newly = sorted(set(peers) - self.lost)
        self.lost.update(newly)
        self.silent -= self.lost
        for peer in newly:
            logger.warning(
                f"Rank {self.names([peer])} has {'died' if peer in self.died else 'left'}: rank "
                f"{self.global_ranks[self.rank]} goes on with the others."
            )
        return newly

    def hear_all(self) -> None:
        """Whatever was or was not heard so far, all peers are there now."""
        self.last_heard = [time.monotonic()] * self.size
        self._looked = time.monotonic()
        self.silent = set()

    def _deliver(self, message: Message) -> None:
        if message.kind >= 0 and message.numbers[0] > 0.0:
            self.rates.note(message.sender, message.step, message.numbers[0])
        if message.kind != PULSE:
            super()._deliver(message)
            return
        # Not into the inbox: between two sums it would keep them from being added up.
        with self._arrived:
            self.last_heard[message.sender] = time.monotonic()
            self._arrived.notify_all()
