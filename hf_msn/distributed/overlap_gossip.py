"""Overlap SGP: push-sum gossip whose messages travel while the next steps are computed."""

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .comm.exchange import PeerError
from .comm.wire import checked_wire_dtype
from .local_training.training_state import frozen_and_buffers, trainable_parameters
from .local_update import LocalUpdate
from .mixing.consensus import Consensus, as_bytes, from_bytes, weighted_mean
from .mixing.push_sum_mass import PushSumMass
from .topology import ExponentialTopology, Topology

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0


class OverlapGossip(LocalUpdate):
    """Push-sum gossip (SGP) that sends without waiting and merges what has arrived, after every optimizer step.

    With d_i what the optimizer's step k subtracts on rank i, of the gradient at z_i, and p the number of peers that i
    sends to at step k:

        x_i <- (x_i - d_i) / (p + 1);  w_i <- w_i / (p + 1);  both are also sent to each of the p peers
        x_i <- x_i + sum of the x that have arrived;  w_i <- w_i + sum of the w that came with them
        z_i <- x_i / w_i

    Overlap SGP of [arXiv 1811.10792](https://arxiv.org/abs/1811.10792), for every topology. A rank blocks only while
    mass that was sent to it at a step <= k - `staleness_bound` is missing. With 0 that is SGP itself. Nothing is lost
    by delays: sum of w over the ranks and under way is n, so z_i tends to the exact mean where x_i does not.

    The model's parameters are z at all times but inside of `optimizer.step()`, which sees x: a weight decay takes its
    part of x, which is w times that of z. Between steps change them by `optimizer.step()` only.

    **Consensus.** `sync()` waits until what is under way has arrived; then all ranks hold the mean of the x, and w is
    1 again. Optimizer moments stay each rank's own with `base_buffers="maintain"`, the default; `"average"` takes
    their means at `sync()`.

    **Runs that repeat.** What is merged when depends on the network. With `deterministic=True` (and always with
    `staleness_bound=0`) mass is merged exactly `staleness_bound` steps after it was sent, by rank of the sender: a run
    repeats to the bit, as long as no peer is lost. `state_dict` then holds what was sent to this rank and is not
    merged, and waits for it. Without `deterministic` nobody can know that, so `state_dict` is refused unless
    everything was merged by a `sync()` and no step has followed.

    **Faults.** Ranks need not agree on who is alive: each sends over the topology of those that it takes for alive,
    says so, and is waited for by what it said.

    - A peer whose connection closes is named in a warning, once on each rank. What it had not received is taken back:
      sum of w over the others and under way between them stays what it was.
    - A peer that is waited for and silent for `timeout_seconds` is passed over, and taken back when it is heard again
      (a warning each). It goes on from where it stood. The others may be steps ahead: mass is mixed all the same.
    - `sync()` and `stop()` without all ranks go through the first rank in view, over the same connections, and say
      so. Parameters become the weighted mean of those that take part; frozen parameters and buffers the plain one;
      optimizer moments stay. A rank that was passed over takes the result when it comes to that `sync()`.

    What does not work without all ranks: `consensus_distance`, the outer steps of [`SlowMo`] and anything else over
    the process group raise or hang, and so does a peer's death *inside* of a `sync()` of all ranks, by a
    [`PeerError`] on the others. After the death of rank 0, which usually holds torch's store, no new groups can be
    made. Evaluation on one rank for longer than `timeout_seconds` gets it passed over.

    **Wire precision.** What `wire_dtype` rounds off stays with the sender, whose own share is x minus all that it
    sent. So no mass is lost, and the error comes back with later messages (error feedback). `sync()` is not rounded.

    **Memory.** x in float32 or wider, and for each peer one buffer that leaves and one that waits to leave (further
    mass is added to it), one that arrives and one that waits to be merged. With `deterministic=True` mass is never
    added up, so that a peer that is s steps ahead has s messages wait. Tensors on a GPU are staged through the CPU.

    Example:

    ```python
    with OverlapGossip(model, optimizer, staleness_bound=1) as sync:
        ...
        optimizer.step()
        sync.step()
    ```

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        topology ([`Topology`], *optional*): Who sends to whom, in places of `group`; its step counts the optimizer
            steps here. By default [`ExponentialTopology`].
        staleness_bound (`int`, *optional*, defaults to 1): Steps that mass may be under way, >= 0. The paper: 1.
        deterministic (`bool`, *optional*, defaults to `False`): See above.
        wire_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`, where that is narrower than the parameters; by
            default that of the parameters, or float32 for narrower ones.
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
            `deterministic=True`, if a setting is outside of its rule; and what [`LocalUpdate`] raises.
        PeerError: If a peer does not connect when entering, or dies inside of a `sync()`; with `inner_group` also if a
            peer dies or is silent.
    """

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
        if not isinstance(staleness_bound, int) or isinstance(staleness_bound, bool) or staleness_bound < 0:
            raise ValueError(
                "`staleness_bound` counts the steps that mass may be under way and must be an integer >= 0, but is "
                f"{staleness_bound!r}. The paper uses 1; 0 waits for the messages of the same step."
            )
        if base_buffers == "reset":
            raise ValueError(
                "`base_buffers` of OverlapGossip must be 'maintain' or 'average', as every step ends a period, but is "
                "'reset'. Give it to SlowMo over OverlapGossip, which resets at its outer steps."
            )
        if timeout_seconds is None:
            raise ValueError(
                "`timeout_seconds` is how long a peer may be silent and must be > 0, but is None. Give more than a "
                "step takes on the slowest rank; the default is 60."
            )
        if kwargs.get("inner_group") is not None and not deterministic:
            raise ValueError(
                "`inner_group` needs ranks of a node that stay equal to the bit, but with `deterministic=False` each "
                "merges what has arrived. Give `deterministic=True`."
            )
        super().__init__(
            model,
            optimizer,
            sync_every=1,
            group=group,
            timeout_seconds=timeout_seconds,
            base_buffers=base_buffers,
            **kwargs,
        )
        n = self._exchange.size
        self.topology = ExponentialTopology(n) if topology is None else topology
        if not isinstance(self.topology, Topology) or self.topology.world_size != n:
            raise ValueError(
                f"`topology` must be a Topology for the {n} ranks of the group, but is {self.topology!r}. Make it "
                f"with `world_size={n}`, or leave it out."
            )
        self.staleness_bound, self.deterministic = staleness_bound, deterministic
        self.wire_dtype, self._wire_dtype = wire_dtype, checked_wire_dtype(wire_dtype)
        self._mass: PushSumMass | None = None
        self._loaded: dict[str, Any] | None = None
        self._holds_numerators = self._is_attached = self._is_met = False

    @property
    def push_sum_weight(self) -> float:
        """w of this rank."""
        return 1.0 if self._mass is None else self._mass.weight

    @property
    def rounds(self) -> int:
        """Steps with messages so far, the step of the topology."""
        return 0 if self._mass is None else self._mass.peers.sent

    @property
    def weight_under_way(self) -> float:
        """Weight sent to peers that are there, less weight merged of theirs: summed over the ranks what is under way.

        The sum over all ranks of this and of `push_sum_weight` is n, and stays what it is when a rank is lost.
        """
        return 0.0 if self._mass is None else self._mass.weight_under_way

    @property
    def alive(self) -> list[int]:
        """The places of the ranks that this rank takes for alive."""
        return list(range(self._exchange.size)) if self._mass is None else sorted(self._mass.peers.view)

    @property
    def bytes_sent(self) -> int:
        return super().bytes_sent + (0 if self._mass is None else self._mass.mailbox.bytes_sent)

    @property
    def seconds_waiting(self) -> float:
        return super().seconds_waiting + (0.0 if self._mass is None else self._mass.peers.seconds_waiting)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "staleness_bound": self.staleness_bound,
            "deterministic": self.deterministic,
            "wire_dtype": self.wire_dtype,
            "topology": self.topology.description(),
        }

    # From entering to leaving

    def start(self) -> "OverlapGossip":
        if all(exchange.size == 1 for exchange in self._exchanges):
            warnings.warn("OverlapGossip has one rank only: it trains as without it.", stacklevel=2)
        return super().start()

    def _attach(self) -> None:
        super()._attach()
        self._holds_numerators, self._is_attached = False, True
        self._mass = PushSumMass(
            [p for _, p, _ in self._parameters],
            self._exchange.group,
            self.topology,
            self.staleness_bound if self.deterministic or self.staleness_bound == 0 else None,
            self._wire_dtype,
            self._exchange.timeout_seconds,
            self._inner is None,
            lambda message: self._consensus.take(message),
        )
        self._consensus = Consensus(self._mass.peers)
        if self._loaded is not None:
            self._mass.load(self._loaded)
            self._loaded = None

    def _detach(self) -> None:
        super()._detach()
        self._is_attached = False
        if self._mass is not None:
            self._mass.mailbox.close(min(_CLOSE_SECONDS, self._exchange.timeout_seconds))

    def _begin_local_steps(self) -> None:
        self._mass.settle()

    # A step

    def _before_local_step(self) -> None:
        # With w = 1 the parameters are x; once only, should the optimizer step twice before `step()`.
        if not self._holds_numerators and self.push_sum_weight != 1.0:
            self._mass.numerators.write()
        self._holds_numerators = True

    def _count_local_step(self) -> None:
        self._after_local_step()

    def _after_local_step(self) -> None:
        if self._exchange.size == 1:
            return
        if self._holds_numerators or self.push_sum_weight == 1.0:
            self._mass.numerators.read()
        self._holds_numerators = False
        self._mass.peers.look()
        self._mass.push()
        self._mass.pull(self.staleness_bound)
        self._mass.numerators.write(self.push_sum_weight)

    # Consensus

    def sync(self) -> None:
        self._require_started()
        if self._exchange.size == 1 or self._meet():
            self._is_met = True
            try:
                super().sync()
            finally:
                self._is_met = False
        else:
            self._sync_by_messages()

    def _meet(self) -> bool:
        """Merges all that is under way. Returns whether all ranks are there."""
        self._mass.refresh()
        whole = self._consensus.agree()
        self._mass.merge_until()
        return whole

    @torch.no_grad()
    def _before_mean(self) -> None:
        if self._exchange.size == 1:
            return
        if not self._is_met and not self._meet():
            missing = set(range(self._exchange.size)) - self._mass.peers.view
            # Who left did so because of the others.
            missing = missing - self._mass.mailbox.left or missing
            ranks = [self._exchange.global_ranks[place] for place in sorted(missing)]
            raise PeerError(
                "A mean over the process group needs all of its ranks, but some are gone or silent: as rank "
                f"{self._exchange.global_ranks[self._exchange.rank]} sees it, {ranks}. OverlapGossip alone goes on "
                "without them; an outer step over it has to go on from the last checkpoint.",
                ranks,
            )
        weight = torch.tensor([self.push_sum_weight], dtype=torch.float64, device=self._device)
        self._exchange.mean_([weight])
        # 1 but for rounding, unless ranks were passed over and have met without one another.
        mean = weight.item() if abs(weight.item() - 1.0) > 1e-9 else 1.0
        self._mass.numerators.write(mean)

    def _after_mean(self) -> None:
        self._mass.settle()

    @torch.no_grad()
    def _after_change(self) -> None:
        if self.push_sum_weight != 1.0:
            self._mass.numerators.read()
            torch._foreach_mul_(self._mass.x, self.push_sum_weight)

    @torch.no_grad()
    def _sync_by_messages(self) -> None:
        """`sync` among those that are there, see [`Consensus`]."""
        tensors = [*self._mass.x, *frozen_and_buffers(self.model)]

        def find_result(contributions: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
            me = self._mass.peers.name([self._exchange.rank]).capitalize()
            logger.warning(
                f"{me} takes the mean of {len(contributions)} of {self._exchange.size} ranks and sends it to the "
                "others: not all are there."
            )
            return weighted_mean(contributions, tensors, len(self._mass.x))

        # Who has the result first goes on: its next mass belongs to the result.
        self._mass.holds_back = True
        result = from_bytes(self._consensus.combine(self.push_sum_weight, as_bytes(tensors), find_result), tensors)
        for tensor, new in zip(tensors, result):
            tensor.copy_(new)
        self._mass.numerators.write()
        self._mass.settle()
        self._mass.holds_back = False

    def consensus_distance(self) -> float:
        if self._mass is not None and len(self._mass.peers.view) < self._exchange.size:
            raise PeerError(
                f"The consensus distance is over all {self._exchange.size} ranks of the group, but only the places "
                f"{self.alive} are there. `sync()` goes on without the others.",
            )
        return super().consensus_distance()

    # State

    def _method_state(self) -> dict[str, Any]:
        if self._mass is None:
            return self._loaded or {"rounds": 0, "push_sum_weight": 1.0, "numerators": None, "unmerged": []}
        if self._is_attached and not self._mass.merges_on_time and not self._mass.is_settled:
            raise RuntimeError(
                "A state of OverlapGossip with `deterministic=False` needs everything to be merged, but mass may be "
                "under way. Call `sync()` on all ranks before `state_dict()`, or give `deterministic=True`."
            )
        return self._mass.state(waits=self._is_attached)

    def _load_method_state(self, state: dict[str, Any]) -> None:
        need = sum(p.numel() for _, p, _ in trainable_parameters(self.model, self.optimizer))
        have = sum(x.numel() for x in state["numerators"] or [])
        if state["numerators"] is not None and have != need:
            raise ValueError(
                f"A state of OverlapGossip must hold x of every trainable parameter, here {need} numbers, but holds "
                f"{have}. Load the state of the same model with the same parameters frozen."
            )
        if self._is_attached:
            self._mass.load(state)
        else:
            self._loaded = {name: state[name] for name in ("rounds", "push_sum_weight", "numerators", "unmerged")}
