"""Predict the speed of the methods of low-communication training on a network, from a model of it."""

import heapq
import inspect
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from ..checks import check_integer, check_number
from .async_gossip import MIN_WEIGHT_TO_PUSH
from .codistillation import Codistillation
from .diloco import DiLoCo
from .gossip import Gossip
from .local_sgd import LocalSGD
from .noloco import NoLoCo
from .overlap_gossip import OverlapGossip
from .slowmo import SlowMo
from .streaming_diloco import NUM_FRAGMENTS, StreamingDiLoCo
from .topology import ExponentialTopology, RandomOnePeerTopology, RingTopology, Topology

_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
_BITS_PER_SECOND = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_FEWEST_STEPS = 120
_FORWARD = 1 / 3  # of the seconds of a step


@dataclass(frozen=True)
class Network:
    """A network as ranks see it: a message of B bytes takes latency + B / bandwidth.

    Args:
        ranks (`int`): Number of ranks n.
        ranks_per_node (`int`): Ranks that share the link of their node.
        bandwidth (`float`): Bytes per second of the link of a node, in each direction.
        latency (`float`): Seconds from node to node.
        node_bandwidth (`float`): Bytes per second from rank to rank inside of a node, without latency.
    """

    ranks: int
    ranks_per_node: int
    bandwidth: float
    latency: float
    node_bandwidth: float

    def all_reduce_seconds(self, num_bytes: float) -> float:
        """Return the seconds of a ring all-reduce inside of the nodes, and between them."""

        def ring(members: int, bandwidth: float, latency: float) -> float:
            return 2 * (members - 1) / members * num_bytes / bandwidth + 2 * (members - 1) * latency

        nodes = self.ranks // self.ranks_per_node
        inside = ring(self.ranks_per_node, self.node_bandwidth, 0.0)
        return inside + ring(nodes, self.bandwidth, self.latency)

    def message_seconds(self, sources: list[list[int]], num_bytes: float) -> list[float]:
        """Return the seconds until each rank has the messages of its `sources`, which are all sent at once.

        The messages that leave a node or enter it share its link equally.
        """
        node = [rank // self.ranks_per_node for rank in range(self.ranks)]
        messages = [(source, rank) for rank, found in enumerate(sources) for source in found]
        leaving = Counter(node[source] for source, rank in messages if node[source] != node[rank])
        entering = Counter(node[rank] for source, rank in messages if node[source] != node[rank])
        inside = Counter(rank for source, rank in messages if node[source] == node[rank])
        seconds = [inside[rank] * num_bytes / self.node_bandwidth for rank in range(self.ranks)]
        for source, rank in messages:
            if node[source] != node[rank]:
                shared = max(leaving[node[source]], entering[node[rank]])
                seconds[rank] = max(seconds[rank], self.latency + shared * num_bytes / self.bandwidth)
        return seconds

    def all_to_all_seconds(self, num_bytes: float) -> float:
        """Return the seconds in which each rank sends a message to every other one."""
        others = self.ranks - self.ranks_per_node
        inside = (self.ranks_per_node - 1) * num_bytes / self.node_bandwidth
        return max(inside, others and self.latency + self.ranks_per_node * others * num_bytes / self.bandwidth)


def simulate_async_gossip(
    method: str, network: Network, num_bytes: float, draw_seconds: Callable[[], float], steps: int, seed: int = 0
) -> tuple[float, float, int]:
    """Simulate [`AsyncGossip`] event by event: steps, and messages that leave and enter a node one after the other.

    Args:
        method (`str`): `"ad_psgd"` or `"push_sum"`.
        network ([`Network`]): The links.
        num_bytes (`float`): Bytes of a message.
        draw_seconds (`Callable`): Returns the seconds of a step; called for each rank and step.
        steps (`int`): Optimizer steps of each rank.
        seed (`int`, *optional*, defaults to 0): Of the neighbours that AD-PSGD asks.

    Returns:
        Seconds and messages per step, means over the ranks, and the most messages of a rank in a step.
    """
    ranks, choose, numbers = network.ranks, random.Random(seed), itertools.count()
    events: list[tuple] = []  # (time, number, function, arguments)
    left, entered = [0.0] * ranks, [0.0] * ranks  # of each node: when its link has done all that was sent so far
    inboxes: list[list] = [[] for _ in range(ranks)]
    num_sent, in_step, most, ended = 0, [0] * ranks, 0, [0.0] * ranks

    def at(time: float, function: Callable, *arguments) -> None:
        heapq.heappush(events, (time, next(numbers), function, arguments))

    def send(now: float, source: int, rank: int, content: float) -> float:
        """Return when the message has left."""
        nonlocal num_sent, most
        num_sent += 1
        in_step[source] += 1
        most = max(most, in_step[source])
        out, into = source // network.ranks_per_node, rank // network.ranks_per_node
        if out == into:
            gone = arrived = now + num_bytes / network.node_bandwidth
        else:
            seconds = num_bytes / network.bandwidth
            gone = left[out] = max(now, left[out]) + seconds
            entered[into] = max(gone, entered[into] + seconds)
            arrived = entered[into] + network.latency
        at(arrived, lambda now: inboxes[rank].append((source, content)))
        return gone

    is_asking = [False] * ranks

    def average_pairwise(now: float, rank: int, step: int) -> None:
        for source, is_answer in inboxes[rank]:
            if is_answer:
                is_asking[rank] = False
            else:
                send(now, rank, source, True)
        if rank % 2 == 0 and not is_asking[rank]:  # the side that asks
            is_asking[rank] = True
            send(now, rank, 2 * choose.randrange(ranks // 2) + 1, False)

    topology, weights = ExponentialTopology(ranks), [1.0] * ranks
    waiting: dict[tuple[int, int], float] = {}  # weight of the sum that waits behind the message that is leaving

    def push(now: float, rank: int, step: int) -> None:
        weights[rank] += sum(weight for _, weight in inboxes[rank])
        peers = topology.out_peers(rank, step)
        if weights[rank] >= MIN_WEIGHT_TO_PUSH:
            weights[rank] /= len(peers) + 1
            for peer in peers:
                if (rank, peer) in waiting:
                    waiting[rank, peer] += weights[rank]
                else:
                    leave(now, rank, peer, weights[rank])

    def leave(now: float, rank: int, peer: int, weight: float) -> None:
        waiting[rank, peer] = 0.0
        at(send(now, rank, peer, weight), go_on, rank, peer)

    def go_on(now: float, rank: int, peer: int) -> None:
        weight = waiting.pop((rank, peer))
        if weight:
            leave(now, rank, peer, weight)

    mix = average_pairwise if method == "ad_psgd" else push

    def end_step(now: float, rank: int, step: int) -> None:
        in_step[rank] = 0
        mix(now, rank, step)
        inboxes[rank] = []
        ended[rank] = now
        if step + 1 < steps:
            at(now + draw_seconds(), end_step, rank, step + 1)

    for rank in range(ranks):
        at(draw_seconds(), end_step, rank, 0)
    while events:
        now, _, function, arguments = heapq.heappop(events)
        function(now, *arguments)
    return sum(ended) / ranks / steps, num_sent / ranks / steps, most


def plan_sync(
    *,
    parameters: str,
    ranks: int,
    bandwidth: str,
    step_seconds: float,
    ranks_per_node: int = 1,
    latency: str = "0.1ms",
    node_bandwidth: str = "300gbit",
    bytes_per_parameter: float = 4.0,
    stragglers: float = 0.0,
    efficiency: float = 0.92,
    ddp_overlap: float = 0.6,
    seed: int = 0,
) -> list[dict]:
    """Predict seconds and bytes per step of DDP and of each method, by simulating the steps of all ranks.

    A rank's step takes `step_seconds` times exp(`stragglers` z) with z standard normal, drawn anew for each rank and
    step. It ends when the rank has what it waits for: all ranks under DDP and at the averages of [`LocalSGD`],
    [`SlowMo`] and [`DiLoCo`], its peers under [`Gossip`] and [`NoLoCo`], messages older than one step under
    [`OverlapGossip`], whose messages leave one after the other, and nothing under [`AsyncGossip`], whose messages are
    simulated event by event. A fragment of [`StreamingDiLoCo`], here of equal sizes, begins its all-reduce when all
    ranks have sent it, and is waited for `delay` steps later. [`Codistillation`] is by checkpoints, to all others,
    and the forward pass of each of its n - 1 copies takes a third of a step.
    Settings are the defaults of the classes; all ranks are members of one group, without an `inner_group`.

    Args:
        parameters (`str`): Number of trainable parameters: 86M, 1.3B.
        ranks (`int`): Number of ranks.
        bandwidth (`str`): Of the link of a node, in each direction: 1gbit, 200mbit.
        step_seconds (`float`): Seconds of an optimizer step without any exchange.
        ranks_per_node (`int`, *optional*, defaults to 1): Ranks that share the link of a node. It divides `ranks`.
        latency (`str`, *optional*, defaults to `"0.1ms"`): Of a message from node to node: 20ms, 100us.
        node_bandwidth (`str`, *optional*, defaults to `"300gbit"`): Between the ranks of a node.
        bytes_per_parameter (`float`, *optional*, defaults to 4): 4 for float32, 2 for a bfloat16 wire; for the methods
            that have them 1.03 for int8, 0.53 for int4, with their scales.
        stragglers (`float`, *optional*, defaults to 0.0): Standard deviation of the logarithm of a step's seconds.
        efficiency (`float`, *optional*, defaults to 0.92): Part of `bandwidth` that is payload, in (0, 1]. The default
            is that of the all-reduce of LocalSGD in the table of docs/communication.md.
        ddp_overlap (`float`, *optional*, defaults to 0.6): Part of a step in which DDP hides its all-reduce, in
            [0, 1]. The default is from the same table.
        seed (`int`, *optional*, defaults to 0): Of the stragglers.

    Returns:
        A row per method, DDP first: `method`, `seconds_per_step` (mean over ranks and steps), `times_ddp`,
        `megabytes_per_step` (sent per rank, mean), `megabytes_peak` (in the step that sends most).

    Raises:
        ValueError: If an argument is outside of its rule.
    """
    payload = parse_quantity("parameters", parameters, _COUNT, "86M")
    payload *= check_number("bytes_per_parameter", bytes_per_parameter, above=0.0)
    ranks = check_integer("ranks", ranks, 2, remedy="One rank exchanges nothing.")
    ranks_per_node = check_integer("ranks_per_node", ranks_per_node)
    if ranks % ranks_per_node:
        raise ValueError(
            f"`ranks_per_node` must divide `ranks`, {ranks}, but is {ranks_per_node}. Give nodes of the same size."
        )
    efficiency = check_number("efficiency", efficiency, above=0.0, maximum=1.0, meaning="is the part that is payload")
    network = Network(
        ranks,
        ranks_per_node,
        parse_quantity("bandwidth", bandwidth, _BITS_PER_SECOND, "1gbit") / 8 * efficiency,
        parse_quantity("latency", latency, _SECONDS, "20ms", allow_zero=True),
        parse_quantity("node_bandwidth", node_bandwidth, _BITS_PER_SECOND, "300gbit") / 8,
    )
    step_seconds = check_number("step_seconds", step_seconds, above=0.0)
    deviation = check_number("stragglers", stragglers, minimum=0.0)
    overlap = check_number("ddp_overlap", ddp_overlap, minimum=0.0, maximum=1.0) * step_seconds
    check_integer("seed", seed, 0)

    all_reduce = network.all_reduce_seconds(payload)
    all_reduce_bytes = 2 * payload * (ranks - 1) / ranks

    def draw(generator: random.Random) -> float:
        return step_seconds * math.exp(deviation * generator.gauss(0.0, 1.0))

    def row(name: str, seconds: float, mean: float, peak: float) -> dict:
        sent = {"megabytes_per_step": mean / 1e6, "megabytes_peak": peak / 1e6}
        return {"method": name, "seconds_per_step": seconds, **sent}

    def simulate(
        name: str, period: int, advance: Callable[[list[float], int], list[float]], mean: float, peak: float
    ) -> dict:
        generator = random.Random(seed)
        steps = period * math.ceil(_FEWEST_STEPS / period)
        times = [0.0] * ranks
        for step in range(1, steps + 1):
            times = advance([time + draw(generator) for time in times], step)
        return row(name, sum(times) / ranks / steps, mean, peak)

    def every(period: int, advance: Callable[[list[float], int], list[float]]) -> Callable:
        return lambda times, step: times if step % period else advance(times, step // period - 1)

    def wait_for_all(seconds: float) -> Callable[[list[float], int], list[float]]:
        return lambda times, _: [max(times) + seconds] * ranks

    @cache
    def exchange(topology: Topology, step: int) -> tuple[list[list[int]], list[float]]:
        sources = _sources(topology, step)
        return sources, network.message_seconds(sources, payload)

    def wait_for_peers(topology: Topology) -> Callable[[list[float], int], list[float]]:
        def advance(times, step):
            sources, seconds = exchange(topology, step % (topology.period or step + 1))
            return [max(times[r] for r in (rank, *sources[rank])) + seconds[rank] for rank in range(ranks)]

        return advance

    def overlapped(topology: Topology) -> Callable[[list[float], int], list[float]]:
        arrived = [0.0] * ranks  # when the last message to each rank has come

        def advance(times, step):
            waited = [max(pair) for pair in zip(times, arrived)]  # for what was sent a step before
            sources, seconds = exchange(topology, step % (topology.period or step + 1))
            for rank, own in enumerate(sources):
                sent = max((waited[source] for source in own), default=0.0)
                arrived[rank] = max(arrived[rank], sent) + seconds[rank]
            return waited

        return advance

    def streamed(period: int, delay: int) -> Callable[[list[float], int], list[float]]:
        sent_at = [fragment * period // NUM_FRAGMENTS for fragment in range(1, NUM_FRAGMENTS + 1)]
        arrivals: dict[int, float] = {}  # by the step at which they are due
        seconds, free = network.all_reduce_seconds(payload / NUM_FRAGMENTS), 0.0

        def advance(times, step):
            nonlocal free
            if (step - 1) % period + 1 in sent_at:
                free = arrivals[step + delay] = max(*times, free) + seconds
            return [max(time, arrivals.get(step, 0.0)) for time in times]

        return advance

    rows = [simulate("DDP", 1, wait_for_all(max(all_reduce - overlap, 0.0)), *[all_reduce_bytes] * 2)]
    for method in (LocalSGD, SlowMo, DiLoCo):
        period = _default_of(method, "sync_every")
        advance = every(period, wait_for_all(all_reduce))
        rows.append(
            simulate(f"{method.__name__} ({period})", period, advance, all_reduce_bytes / period, all_reduce_bytes)
        )
    period, sent = _default_of(StreamingDiLoCo, "sync_every"), all_reduce_bytes
    advance = streamed(period, _default_of(StreamingDiLoCo, "delay"))
    rows.append(simulate(f"StreamingDiLoCo ({period})", period, advance, sent / period, sent / NUM_FRAGMENTS))
    period, pairs = _default_of(NoLoCo, "sync_every"), RandomOnePeerTopology(ranks, directed=False)
    rows.append(
        simulate(f"NoLoCo ({period})", period, every(period, wait_for_peers(pairs)), payload / period, payload)
    )
    for topology in (ExponentialTopology(ranks), RingTopology(ranks)):
        for method, advance in ((Gossip, wait_for_peers), (OverlapGossip, overlapped)):
            sent = payload * len(topology.out_peers(0, 0))
            name = f"{method.__name__}, {type(topology).__name__.removesuffix('Topology').lower()}"
            rows.append(simulate(name, 1, every(1, advance(topology)), sent, sent))
    period = _default_of(Codistillation, "exchange_every")
    seconds = step_seconds * math.exp(deviation**2 / 2) * (1 + (ranks - 1) * _FORWARD)
    seconds += max(network.all_to_all_seconds(payload) - period // 10 * seconds, 0.0) / period
    sent = payload * (ranks - 1)
    rows.append(row(f"Codistillation ({period})", seconds, sent / period, sent))
    for method, name in (("ad_psgd", "AD-PSGD"), ("push_sum", "push-sum")):
        generator = random.Random(seed)
        seconds, mean, peak = simulate_async_gossip(
            method, network, payload, partial(draw, generator), _FEWEST_STEPS, seed
        )
        rows.append(row(f"AsyncGossip, {name}", seconds, mean * payload, peak * payload))
    return [{**row, "times_ddp": rows[0]["seconds_per_step"] / row["seconds_per_step"]} for row in rows]


def parse_quantity(name: str, text: str, units: dict[str, float], example: str, *, allow_zero: bool = False) -> float:
    """Return the number of a text such as "1Gbit" in the base unit. Case does not matter.

    Raises:
        ValueError: If it is not a number > 0 (or 0 with `allow_zero`) with one of the units.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", str(text).strip(), re.IGNORECASE)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if found is None or found[2].lower() not in factors or not (float(found[1]) > 0 or allow_zero):
        listed = ", ".join(unit for unit in units if unit)
        rule = "a number >= 0" if allow_zero else "a number > 0"
        raise ValueError(f"`{name}` must be {rule} with one of the units {listed}, but is {text!r}. Write {example}.")
    return float(found[1]) * factors[found[2].lower()]


def _default_of(method: type, name: str) -> int:
    return inspect.signature(method).parameters[name].default


def _sources(topology: Topology, step: int) -> list[list[int]]:
    """Return the ranks that each rank receives from. All pairs are drawn once, not once for each rank."""
    if isinstance(topology, RandomOnePeerTopology):
        return [[other] if other != rank else [] for rank, other in enumerate(topology.targets(step))]
    return [topology.in_peers(rank, step) for rank in range(topology.world_size)]
