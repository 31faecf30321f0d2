"""Asynchronous gossip: every rank mixes at its own pace, and no rank waits for another one in a step."""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checks import check_choice, check_integer
from .background_gossip import BackgroundGossip
from .collectives import world_size
from .comm.flat import FlatTensors
from .comm.mailbox import Message
from .comm.membership import Membership
from .comm.wire import as_bytes, from_bytes
from .push_sum import PushSum
from .topology import ExponentialTopology, Topology, TwoSidesTopology, two_sides

_REQUEST, _ANSWER, _MASS = range(3)  # kinds of messages
MIN_WEIGHT_TO_PUSH = 0.5
_RATE_WINDOW_SECONDS = 30.0
_MAX_RATE_SAMPLES = 100  # per window
_MIN_RATE_STEPS = 4  # per estimate
_MAX_SCALE = 10.0  # a step that is scaled by more would not be stable


class AsyncGossip(BackgroundGossip):
    """Mix parameters in the background of training; a rank never waits for another one in a step.

    Messages are merged between two steps, so that a forward and its backward pass see one model.

    **AD-PSGD** (`method="ad_psgd"`, [arXiv 1710.06952](https://arxiv.org/abs/1710.06952)) averages pairwise over a
    bipartite graph. After a step a rank i of one side sends its x to a random neighbour j and goes on. Rank j replies
    after its next step:

        j:  d = (x_i as sent - x_j) / 2;   x_j <- x_j + d;   sends d          i, when d arrives:  x_i <- x_i - d

    Both apply the same d to the x that they hold by then, so the sum over the ranks stays, to rounding.

    **Subgradient-push** (`method="push_sum"`, [arXiv 1803.08950](https://arxiv.org/abs/1803.08950)): after each of its
    own steps a rank adds the x and w that have arrived, and pushes equal shares of them to `topology.out_peers(rank,
    its number of mixings so far)`. The model's parameters are z = x / w, which the optimizer sees and changes; x
    changes by the same amount. w over the ranks and in flight sums to n. A rank with w < 1/2 does not push, so that
    beside slow senders w never falls below 1/(2 p + 2), with p peers; z moves by up to 1/w times the change of x.

    **Rate correction.** A rank that takes more steps would pull the optimum to its own data. So rank i multiplies what
    the optimizer has changed since the last mixing by

        s_i = mean_j(rate_j) / rate_i,    within [1/10, 10]

    with the steps per second of the last 30 s, j over the ranks that are there; s is 1 until all rates are known.
    `False` is AD-PSGD as in its paper. Choose the learning rate for s times its value: that of slow ranks grows.

    **Consensus.** At `sync()` and `stop()` each rank arrives after its own number of steps, and serves the others
    until all have come. Then no messages are in flight, all hold the exact mean, and w is 1. `steps` counts a rank's
    own steps. Runs do not repeat bit for bit, but a checkpoint of each rank after `sync()` holds everything;
    `state_dict` is refused at other times.

    On one rank it does nothing and warns. For faults and memory see docs/gossip.md.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        method (`str`, *optional*, defaults to `"ad_psgd"`): `"ad_psgd"` or `"push_sum"`.
        topology ([`Topology`], *optional*): In places of `group`; its step counts a rank's own mixings. For AD-PSGD
            symmetric and bipartite; by default all ranks at even places with all at odd ones. For push-sum any; by
            default [`ExponentialTopology`].
        rate_correction (`bool`, *optional*, defaults to `True`): Scale the steps so that fast ranks do not pull the
            optimum to their data.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, where that is narrower than the parameters; by
            default the dtype of the parameters, or float32 for narrower ones. The sum over the ranks stays exact: in
            AD-PSGD both apply the rounded d, in push-sum the sender keeps the rounding error (error feedback). The
            ranks differ by about that precision until a `sync()`, which is not rounded.
        seed (`int`, *optional*, defaults to 0): Seed of AD-PSGD's random neighbours.
        sync_every (`int`, *optional*, defaults to 1): A rank's own optimizer steps between two mixings.
        group (`ProcessGroup`, *optional*): See [`LocalUpdate`].
        timeout_seconds (`float`, *optional*, defaults to 60): How long a peer may be silent: more than the longest
            step takes, or an evaluation that is not between two `sync()`s. Also the deadline of one collective.
        kwargs: `sync_start_step` of [`LocalUpdate`]. `base_buffers` must be `"maintain"`; `inner_group` is refused.

    Attributes:
        weight (`float`): w of this rank; 1 in AD-PSGD.
        rounds (`int`): Mixings of this rank so far.
        scale (`float`): s of this rank at the last mixing.

    Raises:
        ValueError: If a setting is outside of its rule, the topology is for another number of ranks or, for AD-PSGD,
            not symmetric and bipartite; and the errors of [`LocalUpdate`].
        PeerError: If a peer is silent in a `sync()`, or does not connect when entering.
    """

    can_be_base = False
    _on_silent = "raise"
    _setting_names = (*BackgroundGossip._setting_names, "method", "rate_correction", "wire_dtype", "seed")

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
        check_choice("method", method, ("ad_psgd", "push_sum"))
        check_integer("seed", seed, 0)
        remedy = "Leave it out: optimizer moments stay local."
        check_choice("base_buffers", kwargs.get("base_buffers", "maintain"), ("maintain",), remedy=remedy)
        if kwargs.get("inner_group") is not None:
            raise ValueError(
                "`inner_group` must be None: its ranks must stay equal to the bit, but each rank of AsyncGossip "
                "merges messages when they arrive. Use Gossip or OverlapGossip between nodes."
            )
        make = TwoSidesTopology if method == "ad_psgd" else ExponentialTopology
        super().__init__(
            model,
            optimizer,
            topology=make(world_size(group)) if topology is None else topology,
            must_pair=method == "ad_psgd" and topology is not None,
            wire_dtype=wire_dtype,
            sync_every=sync_every,
            group=group,
            timeout_seconds=timeout_seconds,
            **kwargs,
        )
        self.method, self.rate_correction, self.seed = method, bool(rate_correction), seed
        self.rounds, self.scale = 0, 1.0

    @property
    def weight(self) -> float:
        """w of this rank."""
        return 1.0 if self._push_sum is None else self._push_sum.weight

    # From entering to leaving

    def _attach(self) -> None:
        super()._attach()
        self._rates = StepRates(self._exchange.size)
        mixing = PairwiseAveraging if self.method == "ad_psgd" else SubgradientPush
        self._mixing = mixing(self._push_sum, self._peers, self.topology, self.seed)
        self._has_changed = False  # whether x is newer than the parameters
        self._must_read = True  # whether x has to be read from the parameters, which somebody else has written

    def _begin_local_steps(self) -> None:
        self._must_read = True
        self._peers.reset()

    # A step

    def _after_local_step(self) -> None:
        self._peers.end_step(self.steps)

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        if self._exchange.size == 1:
            return
        self._is_settled = False
        self._absorb()
        self._peers.pass_over(self._peers.expect(self._peers.connected, self._peers.timeout_seconds))
        self._peers.update()
        self._mixing.send(self.rounds)
        self._write()
        self.rounds += 1

    @torch.no_grad()
    def _absorb(self) -> None:
        """x <- x + s * (change of z since it was written)."""
        weight, rank = self._push_sum.weight, self._peers.rank
        for peer, (step, step_ended) in enumerate(self._mailbox.latest):
            if step > 0:
                self._rates.note(peer, step, step_ended)
        self._rates.note(rank, self._mailbox.step, self._mailbox.step_ended)
        self.scale = self._rates.scale(rank, self._peers.members) if self.rate_correction else 1.0
        if self._must_read or (self.scale == weight == 1.0):
            self._push_sum.read()
            if weight != 1.0:
                torch._foreach_mul_(self._push_sum.x, weight)
        else:
            for x, parameter in self._push_sum.pairs:
                z = (x / weight if weight != 1.0 else x).to(parameter.dtype)
                x.add_(parameter - z, alpha=self.scale)
            self._has_changed = True
        self._must_read = False

    def _write(self) -> None:
        """z <- x / w, in the model."""
        if self._has_changed or self._push_sum.weight != 1.0:
            self._push_sum.write()
        self._has_changed = False

    @torch.no_grad()
    def _receive(self, message: Message) -> None:
        self._has_changed |= self._mixing.receive(message)
        self._mailbox.recycle(message)

    @torch.no_grad()
    def _member_changed(self, peer: int) -> None:
        if peer in self._peers.lost or peer in self._peers.silent:
            self._has_changed |= self._mixing.take_back(peer)

    # Consensus

    def sync(self) -> None:
        self._require_started()
        self._absorb()
        try:
            super().sync()
        except BaseException:
            self._has_changed = True  # x keeps what this rank has brought
            self._write()
            raise

    def _average_by_collectives(self) -> None:
        self._push_sum.write(1.0)  # the plain mean of x is the consensus, since w sums to n
        self._average_all()

    def _unanswered(self) -> set[int]:
        return self._mixing.asked - self._peers.lost

    def _settle(self) -> None:
        """All ranks hold the mean, and no messages are in flight."""
        self._push_sum.weight = 1.0
        self._push_sum.read()
        self._rates.pause()
        self._peers.reset()
        self._has_changed, self._is_settled = False, True

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """Return sqrt(mean_i ||z_i - zbar||^2) over the living ranks, each after its own number of steps."""
        self._require_started()
        if self._exchange.size == 1:
            return 0.0
        self._absorb()
        flat, result = FlatTensors([p for _, p, _ in self._parameters]), []

        def by_collectives() -> None:
            self._write()
            result.append(self._distance_by_collectives())

        def contribute() -> tuple[float, torch.Tensor]:
            self._write()
            return 1.0, as_bytes(flat.copy_in())

        def combine(parts: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
            z = [torch.cat([t.double().cpu() for t in from_bytes(part, flat.buffers)]) for _, part in parts]
            mean = sum(z) / len(z)
            return as_bytes([(sum((v - mean).square().sum() for v in z) / len(z)).sqrt()])

        def finish(distance: torch.Tensor | None) -> None:
            if distance is not None:
                result[:] = from_bytes(distance, [torch.zeros((), dtype=torch.float64)])

        try:
            self._agreement.reach(by_collectives, contribute, combine, finish, self._unanswered)
        finally:
            self._write()
        return float(result[-1])

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank; only after a `sync()`, before the next mixing.

        Raises:
            RuntimeError: If messages may be in flight.
        """
        if not self._is_settled:
            raise RuntimeError(
                "A state of AsyncGossip must have no messages in flight, but there were mixings since the last "
                "`sync()`. Call `sync()` on all ranks, then `state_dict()`."
            )
        return super().state_dict()

    def _method_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def _load_method_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]
        self._must_read = self._is_settled = True
        if self._push_sum is not None:
            self._push_sum.weight = 1.0


class _Mixing:
    """Mixing of x and w with the `topology` of the ranks that are there; random neighbours are drawn from `seed`."""

    def __init__(self, push_sum: PushSum, peers: Membership, topology: Topology, seed: int):
        self._push_sum, self._peers, self._seed = push_sum, peers, seed
        self._topology, self._repaired = topology, {frozenset(): topology}
        self.asked: set[int] = set()  # peers that have not answered

    def _topology_of_members(self) -> Topology:
        absent = frozenset(self._peers.lost | self._peers.silent)
        if absent not in self._repaired:
            self._repaired = {frozenset(): self._topology, absent: self._topology.without(absent)}
        return self._repaired[absent]


class PairwiseAveraging(_Mixing):
    """AD-PSGD between two syncs; w stays 1.

    An average counts once the rank that asked has applied the answer. One with a peer that is lost half-way is undone
    where this can be known: an answer that has not left is taken back, and the answer of a lost peer is not applied.
    """

    _sides: tuple[Topology | None, dict[int, int]] = None, {}

    def send(self, number: int) -> None:
        """Ask a random neighbour, if this rank is of the side that asks and only silent peers have not answered."""
        topology, rank = self._topology_of_members(), self._peers.rank
        if self._sides[0] is not topology:
            self._sides = topology, two_sides(topology)[0]
        if self._sides[1][rank] != 0 or self.asked & self._peers.members:
            return
        neighbours = [peer for peer in topology.out_peers(rank, number) if peer not in self.asked]
        if neighbours:
            peer = random.Random(f"{self._seed} {rank} {number}").choice(neighbours)
            self._peers.mailbox.post(peer, _REQUEST, self._push_sum.x)
            self.asked.add(peer)

    def receive(self, message: Message) -> bool:
        """Answer x_i by d, x_j <- x_j + d; or take the answer d, x_i <- x_i - d. Return whether x has changed."""
        peer = message.sender
        if message.kind == _ANSWER:
            self.asked.discard(peer)
        if peer in self._peers.lost:
            return False
        if message.kind == _ANSWER:
            self._add(message.tensors, -1.0)
            return True
        d = [theirs.to(x.dtype).sub_(x).mul_(0.5) for x, theirs in zip(self._push_sum.x, message.tensors)]
        # Both apply the same d to the bit, in the precision of the wire: so the sum stays.
        d = self._peers.mailbox.rounded(d)
        self._add(d, 1.0)
        self._peers.mailbox.post(peer, _ANSWER, d)
        return True

    def take_back(self, peer: int) -> bool:
        """Undo an average that a lost peer has not received. Return whether x has changed."""
        if peer not in self._peers.lost:
            return False  # a silent peer still gets its question or answer, and the average ends late
        self.asked.discard(peer)
        answers = [message for message in self._peers.mailbox.take_back(peer) if message.kind == _ANSWER]
        for message in answers:
            self._add(message.tensors, -1.0)
        return bool(answers)

    def _add(self, tensors: Sequence[torch.Tensor], sign: float) -> None:
        for x, tensor in zip(self._push_sum.x, tensors):
            x.add_(tensor.to(x.device), alpha=sign)


class SubgradientPush(_Mixing):
    """Subgradient-push between two syncs: shares of x and w, which the receivers add."""

    def send(self, number: int) -> None:
        """Push shares of x and w to the peers; not while w < 1/2."""
        peers = self._topology_of_members().out_peers(self._peers.rank, number)
        if peers and self._push_sum.weight >= MIN_WEIGHT_TO_PUSH:
            self._push_sum.push(peers, self._peers.mailbox, _MASS)

    def receive(self, message: Message) -> bool:
        self._push_sum.add([message])
        return True

    def take_back(self, peer: int) -> bool:
        messages = [message for message in self._peers.mailbox.take_back(peer) if message.kind == _MASS]
        self._push_sum.add(messages)
        if not self._peers.connected and self._push_sum.weight != 1.0:
            self._push_sum.divide(self._push_sum.weight)  # alone, only z counts
            return True
        return bool(messages)


class StepRates:
    """Steps per second over the last 30 seconds. Times are those of the senders' clocks: only differences count."""

    def __init__(self, num_ranks: int, window_seconds: float = _RATE_WINDOW_SECONDS):
        self._window = window_seconds
        self._samples: list[deque[tuple[int, float]]] = [deque() for _ in range(num_ranks)]
        self._latest = [-1] * num_ranks
        self._rates: list[float | None] = [None] * num_ranks

    def note(self, rank: int, step: int, seconds: float) -> None:
        """Note that `rank` ended its step `step` at `seconds` on its own clock. Known steps change nothing."""
        samples = self._samples[rank]
        if step <= self._latest[rank]:
            return
        self._latest[rank] = step
        if len(samples) > 1 and samples[-1][1] - samples[-2][1] < self._window / _MAX_RATE_SAMPLES:
            samples.pop()
        samples.append((step, seconds))
        while len(samples) > 2 and seconds - samples[1][1] > self._window:
            samples.popleft()
        steps, elapsed = step - samples[0][0], seconds - samples[0][1]
        if steps >= _MIN_RATE_STEPS and elapsed > 0.0:
            self._rates[rank] = steps / elapsed

    def pause(self) -> None:
        """Begin new windows, after the ranks have waited for one another. Until then the estimates hold."""
        for samples in self._samples:
            samples.clear()

    def scale(self, rank: int, among: Iterable[int]) -> float:
        """Return s = mean_j(rate_j) / rate of `rank`, j in `among`, within [1/10, 10]; 1 until all are known."""
        rates, own = [self._rates[j] for j in among], self._rates[rank]
        if own is None or any(rate is None for rate in rates):
            return 1.0
        return min(max(sum(rates) / len(rates) / own, 1.0 / _MAX_SCALE), _MAX_SCALE)
