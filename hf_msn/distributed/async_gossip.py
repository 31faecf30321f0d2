"""Asynchronous gossip: every rank at its own pace, nobody waits for anybody in a step."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_integer
from .comm.flat import FlatTensors
from .comm.mailbox import Message
from .comm.watched_mailbox import WatchedMailbox
from .comm.wire import checked_wire_dtype
from .local_training.training_state import frozen_and_buffers
from .local_update import LocalUpdate
from .mixing.meeting import Meeting, average_by_messages, distance_by_messages
from .mixing.pairwise_averaging import AsynchronousPush, PairwiseAveraging
from .topology import ExponentialTopology, Topology, TwoSidesTopology, check_topology

_CLOSE_SECONDS = 5.0


class AsyncGossip(LocalUpdate):
    """Mixes parameters in the background of training: a rank never waits for another one in a step.

    What has arrived is merged between two steps, so that a forward and its backward pass see one model.

    **AD-PSGD** (`method="ad_psgd"`, [arXiv 1710.06952](https://arxiv.org/abs/1710.06952)): pairwise averages over a
    bipartite graph. After a step an active rank i (one side of the graph) sends its x to a random neighbour j and goes
    on. The passive one replies after its next step:

        j:  d = (x_i as sent - x_j) / 2;   x_j <- x_j + d;   sends d          i, when d arrives:  x_i <- x_i - d

    Both apply the same d to whatever they hold by then: the sum over the ranks stays, to rounding. An active rank has
    one exchange under way, one more for each silent peer.

    **Subgradient-push** (`method="push_sum"`, [arXiv 1803.08950](https://arxiv.org/abs/1803.08950)): after each of its
    own steps a rank adds the x and w that have arrived, and pushes equal shares of them to `topology.out_peers(rank,
    its number of mixings so far)`. The model's parameters are z = x / w, which is what the optimizer sees and changes;
    x changes as z does. What waits on a busy connection is added up, so that no mass is lost: w over the ranks and
    under way sums to n. A rank with w < 1/2 does not push, so that w never falls below 1/(2 p + 2), with p peers,
    beside ranks that are slow to send; z then moves by up to 1/w of what x does.

    **Rate correction.** A rank that takes more steps would pull the optimum to its own data. So rank i applies

        s_i = mean_j(rate_j) / rate_i        times what the optimizer has changed since the last mixing

    with the steps a second of the last 30 s, j over the ranks that are there; s is within 1/10 and 10, and 1 until all
    rates are known. It is the effective learning rate of slow ranks that grows: choose it for s times its value.
    `False` is AD-PSGD as in its paper.

    **Consensus.** `sync()` and `stop()` are meetings: each rank comes after its own number of steps, and serves the
    others until all have come. Nothing is under way then, all hold the exact mean, and w is 1. `steps` counts a rank's
    own steps. Runs do not repeat bit for bit, but a checkpoint of each rank after `sync()` holds everything;
    `state_dict` in between is refused. With a learning-rate schedule, mind that the ranks end at different times.

    **Faults.**

    - A peer whose connection closes is named in one warning, and the others go on over `topology.without` it. Pushed
      mass that it has not received is taken back. AD-PSGD undoes an exchange with it that was half done: an answer
      that has not left is taken back, and that of a lost peer is not applied; only where the answer left in vain the
      passive rank keeps its half. The sum of the living is in any case that of what they hold.
    - A peer from which nothing was heard for `timeout_seconds` is passed over (not chosen, not sent to) and taken back
      when it is heard. Ranks give signs of life after their steps and in meetings, so give more than the longest step
      takes, or an evaluation that is not between two `sync()`s.
    - In a meeting a lost peer is not waited for: the living take the mean by messages (to the same bits on all), of
      parameters, frozen parameters and buffers. A silent one is waited for until `timeout_seconds` after its last
      word; then `sync` raises a [`PeerError`] that names it, since without it there is no mean of all: `sync()` again
      waits on. A slow rank that gives signs of life is waited for without end. If a rank dies in the very collectives
      of a meeting, the living take the mean again by messages. The group itself is broken then: entering once more
      needs a new one.

    **Memory** beside the model, in sizes of the trainable parameters: 1 for x; in transit, on the CPU, up to 2 on an
    active rank of AD-PSGD and 2 for each active neighbour on a passive one; with push-sum up to 2 for each peer sent
    to and 2 for each peer heard; 1 more with a `wire_dtype`. A mean by messages takes 1 for each living rank, and 4.

    On one rank it is a no-op and says so. SlowMo cannot go over it: its outer steps wait for all.

    Example:

    ```python
    with AsyncGossip(model, optimizer, method="ad_psgd") as sync:
        ...
        optimizer.step()
        sync.step()
    ```

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        method (`str`, *optional*, defaults to `"ad_psgd"`): `"ad_psgd"` or `"push_sum"`.
        topology ([`Topology`], *optional*): In places of `group`; its step counts a rank's own mixings. For AD-PSGD
            symmetric and bipartite; by default all ranks at even places (active) with all at odd ones. For push-sum
            any; by default [`ExponentialTopology`].
        rate_correction (`bool`, *optional*, defaults to `True`): See above.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`; by default that of the parameters. The sum over
            the ranks stays exact: in AD-PSGD both apply the rounded d, in push-sum the sender keeps what rounding
            took (error feedback). The ranks differ by about that precision until a `sync()`, which is not rounded.
        seed (`int`, *optional*, defaults to 0): Of AD-PSGD's random neighbours: drawn from (seed, rank, mixing).
        sync_every (`int`, *optional*, defaults to 1): A rank's own optimizer steps between two mixings.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`].
        timeout_seconds (`float`, *optional*, defaults to 60): See above; also the deadline of one collective.
        kwargs: `sync_start_step` of [`LocalUpdate`]. `base_buffers` must be `"maintain"`; `inner_group` is refused.

    Attributes:
        weight (`float`): w of this rank; 1 in AD-PSGD.
        rounds (`int`): Mixings of this rank so far.
        scale (`float`): s of this rank at the last mixing.

    Raises:
        ValueError: If a setting is outside of its rule, the topology is for another number of ranks or, for AD-PSGD,
            not symmetric and bipartite; and what [`LocalUpdate`] raises.
        PeerError: If a peer is silent in a meeting, or does not connect when entering.
    """

    can_be_base = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: str = "ad_psgd",
        topology: Topology | None = None,
        rate_correction: bool = True,
        wire_dtype: str | None = None,
        seed: int = 0,
        sync_every: int = 1,
        group: dist.ProcessGroup | None = None,
        timeout_seconds: float = 60.0,
        **kwargs: Any,
    ):
        _check_settings(method, timeout_seconds, **kwargs)
        super().__init__(
            model, optimizer, sync_every=sync_every, group=group, timeout_seconds=timeout_seconds, **kwargs
        )
        self.method, self.rate_correction = method, bool(rate_correction)
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self.seed = check_integer("seed", seed, 0, meaning="starts the draws of the neighbours")
        default = TwoSidesTopology if method == "ad_psgd" else ExponentialTopology
        self.topology = default(self._exchange.size) if topology is None else topology
        check_topology(self.topology, self._exchange.size, must_pair=method == "ad_psgd" and topology is not None)
        self.rounds, self.scale = 0, 1.0
        self._is_settled = True
        self._mailbox: WatchedMailbox | None = None
        self._sent_before, self._waited_before = 0, 0.0

    @property
    def weight(self) -> float:
        """w of this rank."""
        return 1.0 if self._mailbox is None else self._mixing.weight

    @property
    def bytes_sent(self) -> int:
        under_way = 0 if self._mailbox is None else self._mailbox.bytes_sent
        return super().bytes_sent + self._sent_before + under_way

    @property
    def seconds_waiting(self) -> float:
        in_meetings = 0.0 if self._mailbox is None else self._meeting.seconds_waiting
        return super().seconds_waiting + self._waited_before + in_meetings

    def start(self) -> "AsyncGossip":
        if self._exchange.size == 1:
            warnings.warn("AsyncGossip has one rank only: it trains as without it.", stacklevel=2)
        try:
            return super().start()
        except BaseException:
            if self._gradients is None:
                self._detach()
            raise

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """As [`LocalUpdate`]'s, in a meeting: each rank comes after its own number of steps. Without lost ranks."""
        self._require_started()
        if self._mailbox is None:
            return super().consensus_distance()
        self._absorb()
        try:
            return self._meeting.hold(
                lambda: self._mixing.unanswered,
                super().consensus_distance,
                lambda: distance_by_messages(self._meeting, FlatTensors([p for _, p, _ in self._parameters])),
            )
        finally:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on; only after a `sync()`, before the next mixing.

        Raises:
            RuntimeError: If something may be under way.
        """
        if not self._is_settled:
            raise RuntimeError(
                "A state of AsyncGossip must have nothing under way, but there were mixings since the last `sync()`. "
                "Call `sync()` on all ranks, then `state_dict()`."
            )
        return super().state_dict()

    # From entering to leaving

    def _settings(self) -> dict[str, Any]:
        own = ("method", "rate_correction", "wire_dtype", "seed")
        return {
            **super()._settings(),
            **{name: getattr(self, name) for name in own},
            "topology": self.topology.description(),
        }

    def _attach(self) -> None:
        super()._attach()
        if self._exchange.size == 1:
            return
        self._flat = FlatTensors([p for _, p, _ in self._parameters])
        x = self._flat.copy_in()
        timeout_seconds = self._exchange.timeout_seconds
        self._mailbox = WatchedMailbox(x, self._exchange.group, self._wire_dtype, timeout_seconds)
        if self.method == "ad_psgd":
            self._mixing = PairwiseAveraging(x, self._mailbox, self.topology, self.seed)
        else:
            self._mixing = AsynchronousPush(x, self._mailbox, self.topology)
        self._meeting = Meeting(self._mailbox, self._serve, self._part_from)
        self._has_changed, self._is_settled, self._must_read = False, True, True
        self._mailbox.start()

    def _detach(self) -> None:
        super()._detach()
        if self._mailbox is not None:
            self._mailbox.close(min(_CLOSE_SECONDS, self._exchange.timeout_seconds))
            self._sent_before += self._mailbox.bytes_sent
            self._waited_before += self._meeting.seconds_waiting
            self._mailbox, self._flat, self._mixing = None, None, None

    def _begin_local_steps(self) -> None:
        self._must_read = True
        if self._mailbox is not None:
            self._mailbox.hear_all()

    # A step

    def _after_local_step(self) -> None:
        if self._mailbox is not None:
            self._mailbox.end_step(self.steps)

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        if self._mailbox is None:
            return
        self._is_settled = False
        self._absorb()
        for peer in self._mailbox.look():
            self._part_from(peer)
        for message in self._mailbox.collect():
            self._meeting.take(message)
        self._mixing.send(self.rounds)
        self._write()
        self.rounds += 1

    @torch.no_grad()
    def _absorb(self) -> None:
        """Adds to x what has become of z since it was written, times s."""
        mailbox, weight = self._mailbox, self._mixing.weight
        there = [rank for rank in range(mailbox.size) if rank not in mailbox.absent]
        self.scale = mailbox.rates.scale(mailbox.rank, there) if self.rate_correction else 1.0
        if self._must_read or (self.scale == weight == 1.0):
            self._flat.copy_in()
            for x in self._flat.buffers if weight != 1.0 else ():
                x.mul_(weight)
        else:
            for x, parameter in self._flat.pairs:
                x.add_(parameter - (x / weight if weight != 1.0 else x), alpha=self.scale)
            self._has_changed = True
        self._must_read = False

    def _write(self) -> None:
        """z = x / w, in the model."""
        weight = self._mixing.weight
        if weight != 1.0:
            for x, parameter in self._flat.pairs:
                parameter.copy_(x / weight)
        elif self._has_changed:
            self._flat.copy_back()
        self._has_changed = False

    @torch.no_grad()
    def _serve(self, message: Message) -> None:
        self._has_changed |= self._mixing.receive(message)
        self._mailbox.recycle(message)

    @torch.no_grad()
    def _part_from(self, peer: int) -> None:
        self._has_changed |= self._mixing.part_from(peer)

    # Meetings

    @torch.no_grad()
    def sync(self) -> None:
        """Meets the others, however many steps each has taken; then all hold the exact mean, see the class.

        Raises:
            PeerError: If a peer is silent. Parameters stay as they are, and `sync()` can be called again.
        """
        self._require_started()
        if self._mailbox is None:
            super().sync()
            return
        self._absorb()
        # x keeps what this rank has brought until all have agreed on the end.
        try:
            self._meeting.hold(
                lambda: self._mixing.unanswered, self._average_by_collectives, self._average_by_messages
            )
        except BaseException:
            self._has_changed = True
            self._write()
            raise
        self._settle()

    def _average_by_collectives(self) -> None:
        self._flat.copy_back()  # the x of all ranks, whose w sum to n
        self._average_in_place([p for _, p, _ in self._parameters])
        others = frozen_and_buffers(self.model)
        self._average_in_place([t for t in others if _is_float(t)])
        self._broadcast([t for t in others if not _is_float(t)])

    def _average_by_messages(self) -> None:
        mean = FlatTensors([p for _, p, _ in self._parameters])
        others = frozen_and_buffers(self.model)
        average_by_messages(self._meeting, mean, self._flat.buffers, self._mixing.weight, others)

    def _settle(self) -> None:
        """All ranks hold the mean, nothing is under way."""
        self._flat.copy_in()
        self._mixing.begin_anew()
        self._mailbox.rates.pause()
        self._mailbox.hear_all()
        self._has_changed, self._is_settled = False, True

    def _method_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]
        self._must_read = self._is_settled = True
        if self._mailbox is not None:
            self._mixing.begin_anew()


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_settings(
    method: str, timeout_seconds: float, *, base_buffers: str = "maintain", inner_group=None, **_: Any
) -> None:
    if method not in ("ad_psgd", "push_sum"):
        raise ValueError(
            f"`method` says how ranks mix and must be 'ad_psgd' or 'push_sum', but is {method!r}. 'push_sum' takes "
            "every topology."
        )
    if timeout_seconds is None:
        raise ValueError(
            "`timeout_seconds` is how long a peer may be silent and must be > 0, but is None. Give more than the "
            "longest step takes; the default is 60."
        )
    if base_buffers != "maintain":
        raise ValueError(
            "`base_buffers` of AsyncGossip must be 'maintain', since every step ends a period and none waits for the "
            f"others, but is {base_buffers!r}. Leave it out: optimizer moments stay each rank's own."
        )
    if inner_group is not None:
        raise ValueError(
            "`inner_group` needs ranks of a node that stay equal to the bit, but here each merges what has arrived "
            "when it comes by, and what arrives differs. Use Gossip or OverlapGossip between nodes."
        )
