"""Meetings of ranks that take their steps each at its own pace, some of which may have died."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..comm.exchange import PeerError
from ..comm.flat import FlatTensors
from ..comm.mailbox import Message
from ..comm.watched_mailbox import ANEW, DONE, HERE, PART, WatchedMailbox

_LOOK_SECONDS = 0.05
_AWAY_SECONDS = 5.0
_VALUE, _FLAGS = 4, 5  # places in a message's numbers, after the step's time, number, attempt and part


class MetAgainError(Exception):
    """A rank was lost, or another one has begun this meeting anew: so does this rank."""


class Meeting:
    """Where all living ranks come together, each after its own number of steps.

    A meeting has a number, which goes up when it is over, and attempts, because ranks may be lost in it. In each
    attempt every rank says that it is here, whom it takes for living, and whether collectives work. Connections are
    first in, first out: what a rank has sent before it was here has then arrived. All go on when all say the same. Who
    waits serves the others: `serve` is called with each message that is not of a meeting.

    Args:
        mailbox ([`WatchedMailbox`]): Started.
        serve (`Callable`): Called with each other message.
        part_from (`Callable`): Called with each peer that is found to be lost.

    Attributes:
        seconds_waiting (`float`): Spent in here.
    """

    def __init__(self, mailbox: WatchedMailbox, serve: Callable[[Message], None], part_from: Callable[[int], None]):
        self._mailbox, self._serve, self._part_from = mailbox, serve, part_from
        self._number = self._attempt = 0
        self._began = 0.0  # before it came to the meeting this rank did not listen
        self._heard: dict[tuple[int, int, int, int], dict[int, Message]] = {}
        self.collectives_work = True
        self.seconds_waiting = 0.0

    @property
    def num_living(self) -> int:
        """With this rank."""
        return len(self._mailbox.living) + 1

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first one that lives."""
        return all(peer > self._mailbox.rank for peer in self._mailbox.living)

    def hold(
        self,
        unanswered: Callable[[], Collection[int]],
        by_collectives: Callable[[], Any],
        by_messages: Callable[[], Any],
    ) -> Any:
        """Meets, and returns what one of the two returns: they may be called again, if a rank is lost meanwhile.

        Args:
            unanswered (`Callable`): Peers that this rank waits for before it says that it is here.
            by_collectives (`Callable`): Called if all ranks are here.
            by_messages (`Callable`): Called if some are lost, or collectives have failed before.

        Raises:
            PeerError: If a rank is silent. It can be called again.
        """
        self._began = time.monotonic()
        while True:
            try:
                result, is_good = None, True
                self.wait_until(unanswered)
                if not self.agree():
                    result = by_messages()
                else:
                    try:
                        result = by_collectives()
                    except PeerError:
                        is_good = self.collectives_work = False
                self.end(is_good)
                return result
            except MetAgainError:
                continue

    def wait_until(self, missing: Callable[[], Collection[int]], *, is_required: bool = True) -> None:
        """Serves until `missing()`, peers that are waited for, is empty; without those that are lost meanwhile.

        Raises:
            PeerError: If one of them is silent for `silence_seconds`; if not `is_required` it is not waited for.
        """
        mailbox, started = self._mailbox, time.monotonic()
        seen, patience = started, 0.0
        try:
            while True:
                gone = mailbox.gone  # before it collects: the last words of a peer count
                for message in mailbox.collect(patience):
                    self.take(message)
                self._lose(gone & set(missing()))
                patience = _LOOK_SECONDS
                late = [peer for peer in missing() if peer not in mailbox.lost]
                if not late:
                    return
                now = time.monotonic()
                if now - seen > _AWAY_SECONDS:  # this rank was stopped itself, and knows nothing of the others
                    self._began = now
                seen = now
                seconds = mailbox.silence_seconds
                silent = [peer for peer in late if now - max(self._began, mailbox.last_heard[peer]) > seconds]
                if silent and not is_required and len(silent) == len(late):
                    return
                if silent and is_required:
                    self._attempt += 1
                    for peer in mailbox.living:  # the silent one would otherwise go on with this attempt, alone
                        mailbox.send(peer, ANEW, None, (self._number, self._attempt))
                    raise PeerError(
                        f"All living ranks must come to a `sync`, but rank {mailbox.names(silent)} was silent for "
                        f"{seconds} s (`timeout_seconds`), as rank {mailbox.global_ranks[mailbox.rank]} noticed: it "
                        "hangs, is stopped, or takes longer than that for a step. See its log; to wait on, `sync()` "
                        "again.",
                        [mailbox.global_ranks[peer] for peer in silent],
                    )
                mailbox.pulse()
        finally:
            self.seconds_waiting += time.monotonic() - started

    def gather(
        self, kind: int, *, part: int = 0, value: float = 0.0, tensors=None, is_required: bool = True
    ) -> dict[int, Message]:
        """Sends to all living ranks, and returns what they send, by rank; of those that are lost perhaps nothing.

        Raises:
            MetAgainError: If another rank has begun anew.
        """
        mailbox, key = self._mailbox, (kind, self._number, self._attempt, part)
        flags = [float(peer not in mailbox.lost) for peer in range(mailbox.size)]
        for peer in mailbox.living:
            mailbox.send(peer, kind, tensors, (self._number, self._attempt, part, value, *flags))
        heard = self._heard.setdefault(key, {})

        def missing() -> list[int]:
            latest = max((attempt for _, number, attempt, _ in self._heard if number == self._number), default=0)
            if latest > self._attempt:
                self._attempt = latest
                raise MetAgainError
            return [peer for peer in mailbox.living if peer not in heard]

        self.wait_until(missing, is_required=is_required)
        return heard

    def agree(self) -> bool:
        """Returns when all living ranks are here and agree on who lives: whether all do and collectives work.

        Raises:
            MetAgainError: If they don't agree yet.
        """
        mailbox = self._mailbox
        flags = [float(peer not in mailbox.lost) for peer in range(mailbox.size)]
        heard = self.gather(HERE, value=float(self.collectives_work))
        views = [message.numbers[_FLAGS : _FLAGS + mailbox.size] for message in heard.values()]
        unseen = {peer for view in views for peer, flag in enumerate(view) if not flag}
        if mailbox.rank in unseen:
            others = [peer for peer, message in heard.items() if not message.numbers[_FLAGS + mailbox.rank]]
            raise PeerError(
                f"All living ranks must reach one another, but rank {mailbox.names(others)} has lost rank "
                f"{mailbox.global_ranks[mailbox.rank]} and goes on without it. Go on from the last checkpoint.",
                [mailbox.global_ranks[peer] for peer in others],
            )
        # A peer that one has lost is lost for all, even where only one connection has failed.
        self._lose(unseen)
        if flags != [float(peer == mailbox.rank or peer in heard) for peer in range(mailbox.size)] or any(
            list(view) != flags for view in views
        ):
            self.begin_anew()
        works = [message.numbers[_VALUE] for message in heard.values()]
        return self.collectives_work and all(works) and all(flags)

    def begin_anew(self) -> None:
        """Next attempt.

        Raises:
            MetAgainError: Always.
        """
        self._attempt += 1
        raise MetAgainError

    def end(self, is_good: bool) -> None:
        """The end of an attempt: good for all that live, or it is made anew.

        Raises:
            MetAgainError: If some rank has failed.
        """
        # A silent rank has nothing to add: all that it had to give is here, or somebody has failed.
        heard = self.gather(DONE, value=float(is_good), is_required=False)
        if not is_good or any(not message.numbers[_VALUE] for message in heard.values()):
            self.begin_anew()
        self._number, self._attempt = self._number + 1, 0
        self._heard = {key: found for key, found in self._heard.items() if key[1] >= self._number}

    def sum_(self, tensors: Sequence[torch.Tensor], first_part: int = 0, *, weight: float = 1.0) -> tuple[float, int]:
        """Replaces tensors like the mailbox's by their sums over the living, to the same bits on all.

        They are sent in parts, each of the precision of the wire: what that takes from one is in the next.

        Returns:
            `tuple`: The sum of the ranks' `weight`, and the number of the next part.

        Raises:
            MetAgainError: If a rank was lost meanwhile.
        """
        mailbox = self._mailbox
        rests, totals = [t.clone() for t in tensors], [torch.zeros_like(t) for t in tensors]
        num_parts = max(-(-_bits(t.dtype) // _bits(wire)) for t, wire in zip(tensors, mailbox.wire_dtypes))
        total_weight = 0.0
        for part in range(first_part, first_part + num_parts):
            sent = [rest.to(wire).to(rest.dtype) for rest, wire in zip(rests, mailbox.wire_dtypes)]
            members = mailbox.living
            heard = self.gather(PART, part=part, value=weight, tensors=sent)
            if set(members) != set(heard):
                self.begin_anew()
            total_weight = 0.0
            for place in range(mailbox.size):
                if place != mailbox.rank and place not in heard:
                    continue
                theirs = sent if place == mailbox.rank else heard[place].tensors
                total_weight += weight if place == mailbox.rank else heard[place].numbers[_VALUE]
                for total, tensor in zip(totals, theirs):
                    total.add_(tensor.to(total.device))
            for message in heard.values():
                mailbox.recycle(message)
            for rest, tensor in zip(rests, sent):
                rest.sub_(tensor)
        for tensor, total in zip(tensors, totals):
            tensor.copy_(total)
        return total_weight, first_part + num_parts

    def sum_any_(self, values: torch.Tensor, like: Sequence[torch.Tensor], first_part: int) -> None:
        """Replaces `values`, of shape `(N,)` and float64, by their sums over the living, in pieces that fit a message.

        Args:
            values (`torch.Tensor`): The same number on all ranks.
            like (`Sequence[torch.Tensor]`): What the mailbox's messages are like.
            first_part (`int`): As for `sum_`.
        """
        for piece in values.split(max(like[0].numel(), 1)):
            padded = [torch.zeros(t.numel(), dtype=torch.float64, device=t.device) for t in like]
            padded[0][: len(piece)] = piece
            _, first_part = self.sum_(padded, first_part)
            piece.copy_(padded[0][: len(piece)])

    def _lose(self, peers: Collection[int]) -> None:
        for peer in self._mailbox.note_lost(peers):
            self._part_from(peer)

    def take(self, message: Message) -> None:
        """Keeps a message of this meeting or of the next, and passes on others."""
        if message.kind not in (HERE, PART, DONE, ANEW):
            self._serve(message)
            return
        number, attempt, part = (int(n) for n in message.numbers[1:4])
        if number >= self._number:
            self._heard.setdefault((message.kind, number, attempt, part), {})[message.sender] = message


@torch.no_grad()
def average_by_messages(
    meeting: Meeting,
    parameters: FlatTensors,
    x: Sequence[torch.Tensor],
    weight: float,
    others: Sequence[torch.Tensor],
) -> None:
    """Sets parameters to sum_i x_i / sum_i w_i over the living, other tensors to their means, on all to the same bits.

    Args:
        meeting ([`Meeting`]): At which all living ranks have agreed.
        parameters ([`FlatTensors`]): Whose buffers are like `x`.
        x (`Sequence[torch.Tensor]`): This rank's; it stays.
        weight (`float`): This rank's w.
        others (`Sequence[torch.Tensor]`): Float tensors are averaged, others become those of the first living rank.

    Raises:
        MetAgainError: If a rank was lost meanwhile; some of the tensors may have changed.
    """
    for total, own in zip(parameters.buffers, x):
        total.copy_(own)
    total_weight, part = meeting.sum_(parameters.buffers, weight=weight)
    for total in parameters.buffers:
        total.div_(total_weight)
    is_first, num_living = meeting.is_first, meeting.num_living
    # What is no float is that of the first rank: the others add zeros.
    values = [_as_reals(t) if _is_float(t) or is_first else torch.zeros_like(_as_reals(t)) for t in others]
    if values:
        sums = torch.cat([value.reshape(-1) for value in values])
        meeting.sum_any_(sums, x, part)
        for t, total in zip(others, sums.split([value.numel() for value in values])):
            total = total / num_living if _is_float(t) else total
            (torch.view_as_real(t) if t.is_complex() else t).copy_(total.view(_as_reals(t).shape))
    parameters.copy_back()


@torch.no_grad()
def distance_by_messages(meeting: Meeting, parameters: FlatTensors) -> float:
    """sqrt(mean_i ||z_i - zbar||^2) over the living; the parameters stay.

    Raises:
        MetAgainError: If a rank was lost meanwhile.
    """
    own = [z.clone() for z in parameters.copy_in()]
    _, part = meeting.sum_(parameters.buffers)
    pairs = zip(own, parameters.buffers)
    square = sum((z - total / meeting.num_living).abs().double().square().sum() for z, total in pairs)
    squares = square.reshape(1).clone()
    meeting.sum_any_(squares, own, part)
    return (squares / meeting.num_living).sqrt().item()


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _as_reals(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().cpu()


def _bits(dtype: torch.dtype) -> int:
    """Of the significand."""
    return 1 - int(torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64).log2().item())
