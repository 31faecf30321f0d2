"""NoLoCo: outer steps between random pairs of ranks, without any collective."""

from typing import Any

import torch
from torch import nn

from ..checks import check_number
from .comm.flat import FlatTensors
from .peer_update import PeerUpdate
from .topology import RandomOnePeerTopology


class NoLoCo(PeerUpdate):
    """Take an outer step with one random other rank every `sync_every` optimizer steps.

        delta_i <- a delta_i - b mean_j (phi_j - x_j) - g (phi_i - mean_j phi_j)
        phi_i <- phi_i + delta_i;    x_i <- phi_i

    with the means over the pair of rank i. [arXiv 2506.10911](https://arxiv.org/abs/2506.10911) in the form of its
    authors' code, where g = b. The anchor phi_i holds the parameters before the first local step, delta_i is 0 at
    first, and both are the rank's own. The pairs are drawn uniformly from `seed` and the number of the outer step
    ([`RandomOnePeerTopology`] with `directed=False`), alike on all ranks. Only the two of a pair wait for each other.
    With an odd number of ranks one rank rests at each outer step: it exchanges nothing and takes the step with the
    means over itself alone. On one rank it is an outer SGD with momentum.

    **Spread.** The last term draws the two anchors of a pair together. Without local steps it keeps the mean over the
    ranks, and the mean square distance from it falls to 0 for any number of ranks if 0 < g < 2 (1 - a^2): the
    recursion of the second moments of phi and delta over random pairs, in expectation. The condition is exact for an
    odd number of ranks and for many; an even number n allows 2 (1 - a^2) / (1 + a - a n / (n - 1)).

    **Consensus.** `sync()` sets all ranks to the mean of x, and moves the anchor by as much as x: the next outer step
    still covers the local steps before and after.

    Memory beside the model: phi and delta, two copies of the trainable parameters, in at least float32, and a bucket
    of 32 MiB twice during an outer step. An outer step sends one copy of them: x_i + (g / b - 1) phi_i, of which both
    means follow.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): See [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 50): Optimizer steps per period. The authors' experiments: 50.
        outer_lr (`float`, *optional*, defaults to 0.7): b > 0. The authors' experiments: 0.7.
        outer_momentum (`float`, *optional*, defaults to 0.5): a in [0, 1). The authors' experiments: 0.5.
        pull (`float`, *optional*, defaults to 0.7): g > 0, and < 2 (1 - a^2). The authors' experiments: b.
        seed (`int`, *optional*, defaults to 0): Of the pairs; the same on all ranks.
        kwargs: `sync_start_step`, `base_buffers`, `group`, `inner_group` and `timeout_seconds` of [`LocalUpdate`].

    Attributes:
        rounds (`int`): Outer steps so far, the step of the topology.

    Raises:
        ValueError: If `outer_lr`, `outer_momentum`, `pull` or `seed` is outside of its rule; and as [`LocalUpdate`]
            raises.
        PeerError: If a peer died or did not come before the deadline. It names the ranks that are furthest behind.
    """

    can_be_base = False
    _acts_alone = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 50,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.5,
        pull: float = 0.7,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(model, optimizer, sync_every=sync_every, **kwargs)
        self.outer_lr = check_number("outer_lr", outer_lr, above=0.0, remedy="The authors use 0.7.")
        remedy = "The authors use 0.5."
        self.outer_momentum = check_number("outer_momentum", outer_momentum, minimum=0.0, below=1.0, remedy=remedy)
        self.pull = check_number(
            "pull",
            pull,
            above=0.0,
            below=2.0 * (1.0 - self.outer_momentum**2),
            meaning="draws the ranks together as long as it is below 2 (1 - `outer_momentum`^2)",
            remedy="The authors use 0.7 with `outer_momentum=0.5`.",
        )
        self.topology = RandomOnePeerTopology(self._exchange.size, seed, directed=False)
        self._anchors: list[torch.Tensor] = []
        self._momenta: list[torch.Tensor] = []

    def _settings(self) -> dict[str, Any]:
        own = ("outer_lr", "outer_momentum", "pull")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}, "seed": self.topology.seed}

    @torch.no_grad()
    def _begin_local_steps(self) -> None:
        self.rounds = 0
        self._anchors = [FlatTensors(bucket, widen=True).copy_in()[0] for bucket in self._bucket_tensors()]
        self._momenta = [torch.zeros_like(anchor) for anchor in self._anchors]

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        with self._announced_failure():
            peers, _ = self._peers_of(self.rounds)
            self.rounds += 1
            for bucket, phi, delta in zip(self._bucket_tensors(), self._anchors, self._momenta):
                flat = FlatTensors(bucket, widen=True)
                [x] = flat.copy_in()
                x.add_(phi, alpha=self.pull / self.outer_lr - 1.0)
                received = {peer: [torch.empty_like(x)] for peer in peers}
                self._exchange.send_and_receive({peer: [x] for peer in peers}, received)
                for [other] in received.values():
                    x.add_(other).div_(2.0)
                # the difference first: x and phi are close, and large beside delta
                delta.mul_(self.outer_momentum).add_(x.sub_(phi, alpha=self.pull / self.outer_lr), alpha=self.outer_lr)
                x.copy_(phi.add_(delta))
                flat.copy_back()

    def _before_mean(self) -> None:
        self._move_anchors(-1.0)

    def _after_mean(self) -> None:
        self._move_anchors(1.0)

    @torch.no_grad()
    def _move_anchors(self, factor: float) -> None:
        for bucket, phi in zip(self._bucket_tensors(), self._anchors):
            phi.add_(FlatTensors(bucket, widen=True).copy_in()[0], alpha=factor)

    def _method_state(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "anchors": [anchor.clone() for anchor in self._anchors],
            "momenta": [momentum.clone() for momentum in self._momenta],
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]
        self._anchors = [anchor.to(self._device, copy=True) for anchor in state["anchors"]]
        self._momenta = [momentum.to(self._device, copy=True) for momentum in state["momenta"]]
