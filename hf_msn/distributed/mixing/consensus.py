"""How ranks of which some may be gone agree on who takes part in a mean, and take it by messages if not all do."""

from collections.abc import Callable, Collection

import torch

from ..comm.mailbox import Message
from .live_peers import ARRIVED, CONSENT, CONTRIBUTION, DECISION, PROPOSAL, RESULT, LivePeers


class Consensus:
    """Numbered meetings of the ranks. The first rank in view leads; when it is lost, the next one does.

    1. Each rank tells all that it has arrived, after its last mass: connections are first in, first out, so that with
       a peer's arrival all of its mass has arrived.
    2. The leader proposes, the others consent, the leader decides: with all ranks, or with those in its view.
    3. Not with all, each sends its contribution to the leader, which sends the result to everybody: also to those that
       were passed over, which find it when they come to this meeting.

    What this does not cover: a leader that stops for longer than the deadline between consent and decision. The ranks
    then part, and the group's own exchange fails at its deadline.

    Args:
        peers ([`LivePeers`]): Which hands the messages of the kinds above to `take`.
    """

    def __init__(self, peers: LivePeers):
        self._peers = peers
        self.number = 0
        self._heard = [0] * peers.size
        self._consents: set[int] = set()
        self._decision: tuple[int, bool] | None = None
        self._contributions: dict[int, tuple[float, torch.Tensor]] = {}
        self._results: dict[int, torch.Tensor] = {}

    def take(self, message: Message) -> None:
        sender, number = message.sender, int(message.numbers[0])
        if message.kind == ARRIVED:
            self._heard[sender] = max(self._heard[sender], number)
        elif message.kind == RESULT:
            if number >= self.number:
                self._results[number] = message.tensors[0]
        elif message.kind in (PROPOSAL, DECISION) and number in self._results:
            # Who asks did not get what a leader before it had found.
            self._send_result([sender], number)
        elif number != self.number:
            return
        elif message.kind == PROPOSAL:
            self._peers.tell(CONSENT, (number,), [sender])
        elif message.kind == CONSENT:
            self._consents.add(sender)
        elif message.kind == DECISION:
            self._decision = sender, bool(message.numbers[1])
        elif message.kind == CONTRIBUTION:
            self._contributions[sender] = message.numbers[1], message.tensors[0]

    def agree(self) -> bool:
        """Meets the others. Afterwards all of their mass has arrived. Returns whether all ranks take part.

        If not, `combine` has to follow, on all ranks.
        """
        peers, me = self._peers, self._peers.rank
        self.number += 1
        self._results = {number: result for number, result in self._results.items() if number >= self.number}
        self._consents, self._decision, self._contributions = set(), None, {}
        peers.tell(ARRIVED, (self.number,))
        peers.wait_for(lambda: [] if self._is_over else [p for p in peers.view - {me} if not self._has_arrived(p)])
        while self._decision is None and not self._is_over:
            leader = min(peers.view)
            if leader == me:
                peers.tell(PROPOSAL, (self.number,))
                peers.wait_for(lambda: self._unless_over(peers.view - {me} - self._consents))
                if self._decision is None and not self._is_over:
                    whole = len(peers.view) == peers.size
                    peers.tell(DECISION, (self.number, whole))
                    self._decision = me, whole
            else:
                peers.wait_for(lambda at=leader: self._unless_over({at} & peers.view))
        if self._is_over or not self._decision[1]:
            return False
        # The leader has heard everybody, but this rank may have passed somebody over.
        everybody = [p for p in range(peers.size) if p != me]
        peers.wait_for(lambda: [p for p in everybody if not self._has_arrived(p) and p not in peers.lost])
        return True

    def combine(
        self,
        weight: float,
        contribution: torch.Tensor,
        find_result: Callable[[list[tuple[float, torch.Tensor]]], torch.Tensor],
    ) -> torch.Tensor:
        """The result of the contributions of those that take part: the same bits everywhere.

        Args:
            weight (`float`): This rank's.
            contribution (`torch.Tensor`): This rank's; flat, uint8.
            find_result (`Callable`): From weights and contributions, by rank; called by the leader only.
        """
        peers, me, contributed_to = self._peers, self._peers.rank, None
        while not self._is_over:
            leader = self._decision[0] if self._decision[0] in peers.view else min(peers.view)
            if leader == me:
                if self._decision[0] != me:
                    peers.tell(DECISION, (self.number, False))
                    self._decision = me, False
                self._contributions[me] = weight, contribution
                peers.wait_for(lambda: [] if self._is_over else peers.view - self._contributions.keys())
                if not self._is_over:
                    self._results[self.number] = find_result([c for _, c in sorted(self._contributions.items())])
                self._send_result(peers.reachable(), self.number)
                break
            if leader != contributed_to:
                contributed_to = leader
                numbers = (self.number, weight)
                peers.mailbox.post_bytes(leader, CONTRIBUTION, contribution, step=peers.sent - 1, numbers=numbers)
            peers.wait_for(lambda at=leader: [] if self._is_over or self._decision[0] != at else {at} & peers.view)
        return self._results[self.number]

    @property
    def _is_over(self) -> bool:
        return self.number in self._results

    def _has_arrived(self, peer: int) -> bool:
        return self._heard[peer] >= self.number

    def _unless_over(self, missing: Collection[int]) -> Collection[int]:
        return [] if self._is_over or self._decision is not None else missing

    def _send_result(self, peers: list[int], number: int) -> None:
        for peer in peers:
            step, result = self._peers.sent - 1, self._results[number]
            self._peers.mailbox.post_bytes(peer, RESULT, result, step=step, numbers=(number,))


def weighted_mean(
    contributions: list[tuple[float, torch.Tensor]], like: list[torch.Tensor], num_weighted: int
) -> torch.Tensor:
    """sum of x / sum of w of the first `num_weighted` tensors, the plain means of the others, the first of integers.

    Args:
        contributions (`list[tuple[float, torch.Tensor]]`): w and the tensors [`as_bytes`] of each rank.
        like (`list[torch.Tensor]`): Of the same shapes, dtypes and devices as the tensors.
        num_weighted (`int`): Number of tensors that are numerators of push-sum.
    """
    total = from_bytes(contributions[0][1], like)
    for _, payload in contributions[1:]:
        for tensor, more in zip(total, from_bytes(payload, like)):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(more)
    total_weight = sum(weight for weight, _ in contributions)
    for i, tensor in enumerate(total):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.div_(total_weight if i < num_weighted else len(contributions))
    return as_bytes(total)


def as_bytes(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of any kind as one of uint8 on the CPU."""
    parts = [tensor.detach().reshape(-1).cpu().view(torch.uint8) for tensor in tensors if tensor.numel()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def from_bytes(payload: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """What [`as_bytes`] was given, in new tensors of the shapes, dtypes and devices of `like`."""
    parts = payload.split([tensor.numel() * tensor.element_size() for tensor in like])
    # A copy each: a part need not lie where its dtype has to.
    return [p.clone().view(t.dtype).view(t.shape).to(t.device) for p, t in zip(parts, like)]
