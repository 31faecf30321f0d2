"""Overlap SGP: push-sum gossip whose messages travel while the next steps are computed."""

import logging
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_choice, check_integer
from .background_gossip import BackgroundGossip
from .collectives import world_size
from .comm.exchange import PeerError
from .comm.mailbox import Message
from .push_sum import check_state_size
from .topology import ExponentialTopology, Topology

logger = logging.getLogger(__name__)

_MASS, _VIEW = range(2)  # kinds of messages
_KEPT_VIEWS = 16


class OverlapGossip(BackgroundGossip):
    """Push-sum gossip (SGP) that sends without waiting and merges mass as it arrives, after every optimizer step.

    With d_i the change that the optimizer subtracts at step k on rank i, from the gradient at z_i, and p the number of
    peers to which i sends at step k:

        x_i <- (x_i - d_i) / (p + 1);  w_i <- w_i / (p + 1);  both are also sent to each of the p peers
        x_i <- x_i + sum of the x that have arrived;  w_i <- w_i + sum of the w that have arrived
        z_i <- x_i / w_i

    Overlap SGP of [arXiv 1811.10792](https://arxiv.org/abs/1811.10792), for every topology. A rank blocks only while
    mass that was sent to it at a step <= k - `staleness_bound` is missing; 0 is SGP itself. Delays lose no mass: the
    sum of w over the ranks and in flight is n, so z_i tends to the exact mean where x_i does not.

    The model's parameters are z, except inside of `optimizer.step()`, which sees x: weight decay acts on x. Between
    steps, change them by `optimizer.step()` only.

    **Consensus.** `sync()` waits for the messages in flight, sets all ranks to the mean of x, and w to 1. Optimizer
    moments stay local with `base_buffers="maintain"`, the default; `"average"` takes their means at `sync()`.

    **Determinism.** Which step merges a message depends on the network. With `deterministic=True` (and always with
    `staleness_bound=0`) mass is merged exactly `staleness_bound` steps after it was sent, by rank of the sender: a run
    repeats to the bit while no peer is lost, and `state_dict` waits for the messages in flight and holds them. Without
    it `state_dict` is refused, except after a `sync()` and before the next step.

    The others go on without a rank that dies, stops or takes fewer steps. For faults and memory see docs/gossip.md.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        topology ([`Topology`], *optional*): Who sends to whom, in places of `group`; its step counts the optimizer
            steps here. By default [`ExponentialTopology`].
        staleness_bound (`int`, *optional*, defaults to 1): Steps that mass may be in flight, >= 0. The paper: 1.
        deterministic (`bool`, *optional*, defaults to `False`): Merge each message at the step of the bound instead of
            on arrival, so that a run repeats to the bit.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, where that is narrower than the parameters; by
            default the dtype of the parameters, or float32 for narrower ones. The sender keeps the rounding error,
            which returns with later messages (error feedback). `sync()` is not rounded.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`]; any backend. Messages go over gloo.
        timeout_seconds (`float`, *optional*, defaults to 60): How long a peer that is waited for may be silent: more
            than a step takes on the slowest rank. Also the deadline of one exchange in `sync()`.
        base_buffers (`str`, *optional*, defaults to `"maintain"`): `"maintain"` or `"average"`, see above.
        kwargs: `sync_start_step` and `inner_group` of [`LocalUpdate`]. With `inner_group` faults are errors.

    Attributes:
        push_sum_weight (`float`): w of this rank.
        rounds (`int`): Steps with messages so far, the step of the topology.

    Raises:
        ValueError: If the topology is for another number of ranks, if `inner_group` is given without
            `deterministic=True`, if a setting is outside of its rule; and the errors of [`LocalUpdate`].
        PeerError: If a peer does not connect when entering; with `inner_group` also if a peer dies or is silent.
    """

    _setting_names = (*BackgroundGossip._setting_names, "staleness_bound", "deterministic", "wire_dtype")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        topology: Topology | None = None,
        staleness_bound: int = 1,
        deterministic: bool = False,
        wire_dtype: str | None = None,
        group: dist.ProcessGroup | None = None,
        timeout_seconds: float = 60.0,
        base_buffers: str = "maintain",
        **kwargs: Any,
    ):
        check_integer("staleness_bound", staleness_bound, 0, meaning="counts the steps that mass may be in flight")
        remedy = "Every step ends a period here: pass 'reset' to SlowMo over OverlapGossip."
        check_choice("base_buffers", base_buffers, ("maintain", "average"), remedy=remedy)
        if kwargs.get("inner_group") is not None and not deterministic:
            raise ValueError(
                "`inner_group` needs ranks of a node that stay equal to the bit, but with `deterministic=False` each "
                "merges mass when it arrives. Set `deterministic=True`."
            )
        super().__init__(
            model,
            optimizer,
            topology=ExponentialTopology(world_size(group)) if topology is None else topology,
            wire_dtype=wire_dtype,
            sync_every=1,
            group=group,
            timeout_seconds=timeout_seconds,
            base_buffers=base_buffers,
            **kwargs,
        )
        self.staleness_bound, self.deterministic = staleness_bound, deterministic
        self._loaded: dict[str, Any] | None = None

    @property
    def push_sum_weight(self) -> float:
        """w of this rank."""
        return 1.0 if self._push_sum is None else self._push_sum.weight

    @property
    def rounds(self) -> int:
        """Steps with messages so far, the step of the topology."""
        return 0 if self._push_sum is None else self._mailbox.step + 1

    @property
    def alive(self) -> list[int]:
        """Places of the ranks that are neither lost nor silent, as this rank sees it."""
        return sorted(range(self._exchange.size) if self._push_sum is None else self._peers.members)

    # From entering to leaving

    def _attach(self) -> None:
        super()._attach()
        self._schedule = Schedule(self.topology, self._mailbox.rank)
        self._unmerged: list[Message] = []  # arrived, but not due
        self._holds_numerators = self._is_disturbed = False
        self._go_on_at(0)
        if self._loaded is not None:
            self._load(self._loaded)
            self._loaded = None

    def _begin_local_steps(self) -> None:
        self._settle()

    def _go_on_at(self, step: int) -> None:
        self._mailbox.step = step - 1
        self._schedule.go_on_at(step)

    # A step

    def _before_local_step(self) -> None:
        # With w = 1 the parameters are x. Once only, should the optimizer step twice before `step()`.
        if not self._holds_numerators and self._push_sum.weight != 1.0:
            self._push_sum.write(1.0)
        self._holds_numerators = True

    def _count_local_step(self) -> None:
        self._after_local_step()

    def _after_local_step(self) -> None:
        if self._exchange.size == 1:
            return
        if self._holds_numerators or self._push_sum.weight == 1.0:
            self._push_sum.read()
        self._holds_numerators = False
        self._peers.update()
        self._peers.ping()  # a peer that waits in a `sync` gets no mass
        if not self._merges_on_time:
            self._merge()
        self._push()
        self._pull()
        self._push_sum.write()

    @torch.no_grad()
    def _push(self) -> None:
        """x <- x / (p + 1), w <- w / (p + 1), and send both to p peers."""
        self._is_settled = False
        self._mailbox.step += 1
        step, arrived = self._mailbox.step, self._agreement.arrived
        to = self._schedule.out_peers(self._mailbox.rank, step)
        # A peer that waits in a `sync` after fewer steps returns no mass: w here would fall with every step.
        to = [peer for peer in to if arrived.get(peer, step) >= step]
        self._push_sum.push(to, self._mailbox, _MASS, adds_up=not self._merges_on_time)

    def _pull(self) -> None:
        """Wait for mass that was sent `staleness_bound` steps ago or earlier, and merge it."""
        last = self._mailbox.step - self.staleness_bound
        self._wait_for_mass(last)
        self._merge(last if self._merges_on_time else float("inf"))

    @property
    def _merges_on_time(self) -> bool:
        return (self.deterministic or self.staleness_bound == 0) and not self._is_disturbed

    def _wait_for_mass(self, step: int) -> None:
        """Wait until all mass that was sent to this rank at a step <= `step` has arrived.

        Peers that wait in a `sync` have taken fewer steps, and all that they sent has arrived.
        """
        agreement, peers = self._agreement, self._peers
        peers.wait_for(lambda: self._schedule.missing(step, peers.members - agreement.arrived.keys()))
        self._schedule.settle_until(step)

    @torch.no_grad()
    def _merge(self, step: float = float("inf")) -> None:
        """Merge the mass that has arrived and was sent at a step <= `step`."""
        due = [message for message in self._unmerged if message.step <= step]
        self._unmerged = [message for message in self._unmerged if message.step > step]
        for message in sorted(due, key=lambda message: (message.step, message.sender)):
            self._push_sum.add([message])
            self._mailbox.recycle(message)

    def _receive(self, message: Message) -> None:
        peer = message.sender
        if message.kind == _MASS:
            self._schedule.note_mass(peer, message.step, self._mailbox.step)
            self._unmerged.append(message)
        else:
            view = frozenset(p for p in range(self._peers.size) if message.numbers[p])
            self._schedule.announce(peer, message.step + 1, view)
            if len(view) < self._peers.size:
                self._disturb()
            if self._peers.rank not in view:
                self._mailbox.ping(peer)  # this rank is alive

    @torch.no_grad()
    def _member_changed(self, peer: int) -> None:
        """Send only to the ranks that are there from now on, and let all know; take back mass for a lost peer."""
        members, lost = self._peers.members, self._peers.lost
        self._schedule.announce(self._peers.rank, self._mailbox.step + 1, members)
        if peer in members:
            self._schedule.note_return(peer, self._mailbox.latest[peer][0], self._mailbox.step)
        self._peers.tell(self._peers.connected, _VIEW, [float(p in members) for p in range(self._peers.size)])
        if len(members) < self._peers.size:
            self._disturb()
        if peer in lost:
            self._push_sum.add(message for message in self._mailbox.take_back(peer) if message.kind == _MASS)

    def _disturb(self) -> None:
        """Merge mass as it arrives, because some rank is lost or silent, until all ranks agree on a mean again."""
        if self._merges_on_time:
            logger.warning("Not all ranks are there: mass is merged as it arrives, and the run will not repeat.")
        self._is_disturbed = True

    # Consensus

    def sync(self) -> None:
        self._require_started()
        self._refresh()
        super().sync()

    def _contribution(self, others: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
        self._merge()
        members = self._agreement.members
        if members[0] == self._peers.rank:
            logger.warning(f"`sync` takes the mean of {len(members)} of {self._exchange.size} ranks.")
        return super()._contribution(others)

    def _average_by_collectives(self) -> None:
        self._write_mean_share()
        self._average_all()

    def _refresh(self) -> None:
        """With w = 1 the parameters are x, and the buffers may be older."""
        if self._push_sum.weight == 1.0:
            self._push_sum.read()

    def _meet(self, event: str) -> None:
        """Bring all ranks together for a mean by collectives, which [`SlowMo`] takes."""
        if self._exchange.size == 1:
            return
        self._refresh()
        if not self._agreement.agree():
            missing = set(range(self._exchange.size)) - self._peers.members
            missing = missing - self._mailbox.left or missing  # a rank that left did so because of the others
            ranks = [self._mailbox.global_ranks[peer] for peer in sorted(missing)]
            raise PeerError(
                "A mean over the process group needs all of its ranks, but some are gone or silent: as "
                f"{self._peers.name([self._peers.rank])} sees it, {ranks}. OverlapGossip alone goes on without them; "
                "an outer step over it has to go on from the last checkpoint.",
                ranks,
            )

    @torch.no_grad()
    def _before_mean(self) -> None:
        if self._exchange.size > 1:
            self._write_mean_share()

    def _write_mean_share(self) -> None:
        """Merge all, and write x / mean_i w_i, of which the plain mean is the consensus, into the parameters."""
        self._merge()
        weight = torch.tensor([self._push_sum.weight], dtype=torch.float64, device=self._device)
        self._exchange.mean_([weight])
        # 1 but for rounding, unless ranks were passed over and have taken a mean without one another.
        self._push_sum.write(weight.item() if abs(weight.item() - 1.0) > 1e-9 else 1.0)

    def _after_mean(self) -> None:
        if self._exchange.size > 1:
            self._agreement.end(self._settle)

    def _settle(self) -> None:
        """All ranks hold the same, and no mass is in flight."""
        self._push_sum.weight, self._is_settled = 1.0, True
        self._schedule.settle(self._mailbox.step)
        self._is_disturbed = not self._schedule.is_whole()

    @torch.no_grad()
    def _after_change(self) -> None:
        if self._push_sum.weight != 1.0:
            self._push_sum.read()
            torch._foreach_mul_(self._push_sum.x, self._push_sum.weight)

    def consensus_distance(self) -> float:
        if self._push_sum is not None and len(self.alive) < self._exchange.size:
            raise PeerError(
                f"The consensus distance is over all {self._exchange.size} ranks of the group, but only the places "
                f"{self.alive} are there. `sync()` goes on without the others.",
            )
        self._require_started()
        return self._distance_by_collectives()

    # State

    def _method_state(self) -> dict[str, Any]:
        if self._push_sum is None:
            return self._loaded or {"rounds": 0, "push_sum_weight": 1.0, "numerators": None, "unmerged": []}
        if self._is_attached and not self._merges_on_time and not self._is_settled:
            raise RuntimeError(
                "A state of OverlapGossip with `deterministic=False` needs all mass to be merged, but some may be in "
                "flight. Call `sync()` on all ranks before `state_dict()`, or set `deterministic=True`."
            )
        unmerged = []
        if self._is_attached and self._merges_on_time:
            self._refresh()
            self._wait_for_mass(self._mailbox.step)
            # A faster peer sends mass of later steps again.
            unmerged = [message for message in self._unmerged if message.step <= self._mailbox.step]
        return {
            "rounds": self.rounds,
            "push_sum_weight": self._push_sum.weight,
            "numerators": [x.clone() for x in self._push_sum.x] if self._push_sum.weight != 1.0 else None,
            "unmerged": [(m.sender, m.step, m.weight, [t.clone() for t in m.tensors]) for m in unmerged],
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        check_state_size("A state of OverlapGossip", "x", state["numerators"], self.model, self.optimizer)
        if self._is_attached:
            self._load(state)
        else:
            self._loaded = {name: state[name] for name in ("rounds", "push_sum_weight", "numerators", "unmerged")}

    @torch.no_grad()
    def _load(self, state: dict[str, Any]) -> None:
        self._push_sum.weight, x_buffers = state["push_sum_weight"], self._push_sum.x
        for x, saved in zip(x_buffers, state["numerators"] or []):
            x.copy_(saved)
        self._unmerged = [
            Message(
                sender,
                _MASS,
                step,
                weight=weight,
                tensors=[t.to(x.device, copy=True) for t, x in zip(tensors, x_buffers)],
            )
            for sender, step, weight, tensors in state["unmerged"]
        ]
        self._go_on_at(state["rounds"])
        self._is_settled = self._push_sum.weight == 1.0 and not self._unmerged


class Schedule:
    """The steps at which each peer sends mass to this rank, as far as it has announced, and the steps that arrived.

    A rank sends over the topology of the ranks that *it* sees, and announces its view. Push-sum permits that ranks
    differ in it, since a sender splits only its own mass. A receiver follows the sender's announcements, so it does
    not wait for mass that was sent elsewhere.
    """

    def __init__(self, topology: Topology, rank: int):
        self._topology, self._rank = topology, rank
        self._all = frozenset(topology.alive)
        self._repaired = {self._all: topology}
        self._views = [[(0, self._all)] for _ in range(topology.world_size)]
        self.go_on_at(0)

    def announce(self, rank: int, step: int, view: frozenset[int]) -> None:
        """Note that from `step` on `rank` sends to ranks in `view` only."""
        self._views[rank] = [*self._views[rank], (step, view)][-_KEPT_VIEWS:]

    def out_peers(self, rank: int, step: int) -> list[int]:
        """Return the peers to which `rank` sends at `step`."""
        known = [view for first, view in self._views[rank] if first <= step]
        view = known[-1] if known else self._views[rank][0][1]
        if view not in self._repaired:
            self._repaired[view] = self._topology.without(self._all - view)
        return self._repaired[view].out_peers(rank, step)

    def is_whole(self) -> bool:
        """Return whether all ranks see all ranks."""
        return all(views[-1][1] == self._all for views in self._views)

    def go_on_at(self, step: int) -> None:
        """Begin at `step`, with no mass of earlier steps in flight."""
        size = self._topology.world_size
        self._arrived = [step - 1] * size  # last step whose mass has arrived
        self._settled = [step - 1] * size  # last step that needs no look any more
        self._lag = [0] * size  # steps that a peer that was passed over is behind

    def settle(self, step: int) -> None:
        """Note that all ranks are at `step`, and that mass up to it has arrived."""
        self._arrived = [max(arrived, step) for arrived in self._arrived]
        self._settled, self._lag = [step] * len(self._settled), [0] * len(self._lag)

    def settle_until(self, step: int) -> None:
        """Note that nothing is missing up to `step`."""
        self._settled = [max(settled, step - lag) for settled, lag in zip(self._settled, self._lag)]

    def note_mass(self, peer: int, step: int, now: int) -> None:
        """Note that mass of the peer's step `step` has arrived, at step `now` of this rank."""
        self._arrived[peer] = max(self._arrived[peer], step)
        self._lag[peer] = min(self._lag[peer], max(0, now - step))

    def note_return(self, peer: int, step: int, now: int) -> None:
        """Note that a silent peer continues after its step `step`: expect its next steps, not those it missed."""
        self._lag[peer] = max(0, now - step)
        self._settled[peer] = step

    def missing(self, step: int, members: Collection[int]) -> list[int]:
        """Return the members whose mass for this rank, of their steps until `step`, has not arrived."""
        missing = []
        for peer in sorted(members):
            first = max(self._settled[peer], self._arrived[peer]) + 1
            steps = range(first, step - self._lag[peer] + 1)
            if peer != self._rank and any(self._rank in self.out_peers(peer, s) for s in steps):
                missing.append(peer)
        return missing
