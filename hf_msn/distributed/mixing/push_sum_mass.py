"""The mass of one rank in push-sum, x and w, and what of it is under way to and from the peers."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..comm.mailbox import Mailbox, Message
from ..topology import Topology
from .live_peers import MASS, LivePeers
from .numerators import Numerators

logger = logging.getLogger(__name__)


class PushSumMass:
    """Sends shares of x and w to peers, and merges what arrives: at once, or a number of steps after it was sent.

    Args:
        parameters (`Sequence[torch.Tensor]`): What holds z = x / w.
        group (`ProcessGroup`, *optional*): The ranks.
        topology ([`Topology`]): Who sends to whom.
        delay (`int`, *optional*): Steps after which mass is merged, by rank of the sender; `None` merges what arrives.
        wire_dtype (`torch.dtype`, *optional*): See [`Mailbox`].
        timeout_seconds (`float`): See [`LivePeers`].
        tolerant (`bool`): See [`LivePeers`].
        take (`Callable`): Called with messages that are no mass.

    Attributes:
        weight (`float`): w.
        numerators ([`Numerators`]): x; older than the parameters where w = 1, see `refresh`.
        unmerged (`list[Message]`): What has arrived and is not due.
        is_settled (`bool`): Whether nothing is under way, on any rank.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        group: dist.ProcessGroup | None,
        topology: Topology,
        delay: int | None,
        wire_dtype: torch.dtype | None,
        timeout_seconds: float,
        tolerant: bool,
        take: Callable[[Message], None],
    ):
        self.numerators = Numerators(parameters)
        self.weight = 1.0
        self.unmerged: list[Message] = []
        self.is_settled = True
        self.holds_back = False
        self._delay, self._take_other, self._is_disturbed = delay, take, False
        self.mailbox = Mailbox(
            self.numerators.buffers, group, wire_dtype=wire_dtype, num_numbers=max(topology.world_size, 2)
        ).start()
        self.peers = LivePeers(
            self.mailbox, topology, timeout_seconds, self._take, self._merge, self._disturb, tolerant=tolerant
        )

    @property
    def x(self) -> list[torch.Tensor]:
        return self.numerators.buffers

    @property
    def merges_on_time(self) -> bool:
        """Whether what is merged when depends on the steps only: as long as all ranks are there."""
        return self._delay is not None and not self._is_disturbed

    @property
    def weight_under_way(self) -> float:
        """Weight sent to peers that are there, less weight merged of theirs."""
        there = self.peers.reachable()
        sent = sum(self.mailbox.weight_posted[peer] - self.mailbox.weight_collected[peer] for peer in there)
        return sent + sum(message.weight for message in self.unmerged)

    @torch.no_grad()
    def push(self) -> None:
        """Splits x and w, and sends a share to each peer of this step."""
        self.is_settled = False
        step = self.peers.sent
        to = self.peers.plan.out_peers(self.peers.rank, step)
        for x in self.x:
            x.div_(len(to) + 1)
        self.weight /= len(to) + 1
        narrows = self.mailbox.wire_dtypes != [x.dtype for x in self.x]
        shares = [x.clone() for x in self.x] if narrows else self.x
        for peer in to:
            rest = [share.clone() for share in shares] if narrows else shares
            if self.merges_on_time:
                self.mailbox.post(peer, MASS, shares, step=step, weight=self.weight)
                if narrows:
                    for share, dtype in zip(rest, self.mailbox.wire_dtypes):
                        share.sub_(share.to(dtype).to(share.dtype))
            else:
                self.mailbox.post_sum(peer, MASS, rest, step=step, weight=self.weight)
            if narrows:
                # What the wire's precision took of the share is kept.
                torch._foreach_add_(self.x, rest)
        self.peers.sent += 1

    def pull(self, staleness_bound: int) -> None:
        """Waits for what was sent to this rank `staleness_bound` steps before the last one, or earlier."""
        last = self.peers.sent - 1 - staleness_bound
        self.peers.wait_for_mass(last)
        self.merge_until(last if self.merges_on_time else float("inf"))

    def merge_until(self, step: float = float("inf")) -> None:
        """Merges what has arrived and was sent at a step <= `step`."""
        due = [message for message in self.unmerged if message.step <= step]
        self.unmerged = [message for message in self.unmerged if message.step > step]
        for message in sorted(due, key=lambda message: (message.step, message.sender)):
            self._merge(message)

    def refresh(self) -> None:
        """With w = 1 the parameters are x, and what is in the buffers may be older. Before anything is merged."""
        if self.weight == 1.0:
            self.numerators.read()

    def settle(self) -> None:
        """All ranks hold the same, nothing is under way."""
        self.weight, self.is_settled = 1.0, True
        self.peers.settle()
        self._is_disturbed = not self.peers.plan.is_whole()

    def state(self, waits: bool = True) -> dict[str, Any]:
        """What `load` takes, copied. Where mass is merged on time, `waits` for what was sent and holds that too."""
        unmerged = []
        if self.merges_on_time and waits:
            self.refresh()
            self.peers.wait_for_mass(self.peers.sent - 1)
            # What a faster peer has sent since it will send again.
            unmerged = [message for message in self.unmerged if message.step < self.peers.sent]
        return {
            "rounds": self.peers.sent,
            "push_sum_weight": self.weight,
            "numerators": [x.clone() for x in self.x] if self.weight != 1.0 else None,
            "unmerged": [(m.sender, m.step, m.weight, [t.clone() for t in m.tensors]) for m in unmerged],
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        self.weight = state["push_sum_weight"]
        for x, saved in zip(self.x, state["numerators"] or []):
            x.copy_(saved)
        self.unmerged = [
            Message(sender, MASS, step, weight, (), [t.to(x.device, copy=True) for t, x in zip(tensors, self.x)])
            for sender, step, weight, tensors in state["unmerged"]
        ]
        self.peers.begin_at(state["rounds"])
        self.is_settled = self.weight == 1.0 and not self.unmerged

    def _take(self, message: Message) -> None:
        if message.kind != MASS:
            self._take_other(message)
        elif self.merges_on_time or self.holds_back:
            self.unmerged.append(message)
        else:
            self._merge(message)

    @torch.no_grad()
    def _merge(self, message: Message) -> None:
        for x, part in zip(self.x, message.tensors):
            x.add_(part.to(x.device))
        self.weight += message.weight
        self.mailbox.recycle(message)

    def _disturb(self) -> None:
        """Some rank is lost or passed over: mass is not held back any more until all have met again."""
        if self.merges_on_time:
            logger.warning("Not all ranks are there: mass is merged as it arrives, and the run will not repeat.")
        self._is_disturbed = True
        self.merge_until()
