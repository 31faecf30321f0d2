"""Streaming DiLoCo: outer steps of one fragment of the parameters at a time, exchanged in the background."""

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..checks import check_integer, check_number, did_you_mean
from .comm.background import BackgroundCalls
from .comm.exchange import Exchange, num_bytes
from .comm.flat import split_into_buckets
from .diloco import OUTER_SGD, DiLoCo
from .subgroups import subgroup
from .training_state import trainable_parameters

NUM_FRAGMENTS = 4
_LAYER = re.compile(r".*?\.\d+(?=\.)|\d+(?=\.)")  # up to the first index in a list of modules

_numbers: set[int] = set()  # of the objects that run now: the threads of two must not share a group


@dataclass
class _Transfer:
    """A fragment on its way: the local steps until it is applied, and the mean change of its parameters."""

    steps_left: int
    changes: Future


class StreamingDiLoCo(DiLoCo):
    """[`DiLoCo`] in fragments: each has its own outer step once per period, exchanged while the training goes on.

    Fragment p of P (from 1) is sent after the local steps t = p H / P, rounded down, of each period of H =
    `sync_every`, and applied `delay` local steps after that:

        Delta <- mean_i (x0 - x_i(t))                        in the background
        x0 <- OuterOptimizer(x0, Delta)                      at t + delay
        x_i <- alpha x_i(t + delay) + (1 - alpha) x0         alpha is `mixing_alpha`

    for the parameters of the fragment. [arXiv 2501.18512](https://arxiv.org/abs/2501.18512), algorithm 2; the paper
    recommends alpha 0.5, a delay of up to 5 steps, fragments of 3 layers and outer gradients of 4 bits
    (`wire_dtype="int4"`). One fragment with `delay=0` and `mixing_alpha=0` is [`DiLoCo`], to the bit.

    A transfer has `delay` local steps for its way; what it needs beyond them is waited for and counts as
    `seconds_waiting`. The peak of bytes per step is that of the largest fragment, about 1 / P of DiLoCo's, see
    [`LocalSGD`] with N the parameters of that fragment. Each fragment has an outer optimizer of its own.

    **Consensus.** `sync()` and leaving receive and apply what is on its way. Leaving then takes an outer step for each
    fragment with local steps since it was sent, and all ranks end with x0. `state_dict()` waits for what is on its
    way, and keeps it with the steps until it is due, so that a run resumes bit for bit.

    Memory beside the model: as [`DiLoCo`], and a copy of each fragment on its way: one, if `delay` is at most H / P.

    Args:
        model (`nn.Module`): See [`LocalUpdate`].
        optimizer (`torch.optim.Optimizer`): The inner optimizer, see [`LocalUpdate`].
        sync_every (`int`, *optional*, defaults to 100): H, optimizer steps per period.
        num_fragments (`int`, *optional*): P, at most `sync_every`. By default 4, or the length of `fragments`.
        fragments (`str` or `Sequence[Sequence[str]]`, *optional*, defaults to `"strided"`): `"strided"`: layers i,
            i + P, i + 2P, ... are one fragment, where a layer is an entry of a list of modules such as `layer.3`, or a
            module with parameters of its own outside of these. `"size"`: consecutive parameters, the largest fragment
            as small as can be. Or the names of the parameters of each fragment, each trainable one in one of them.
        delay (`int`, *optional*, defaults to 5): Local steps between sending and applying, from 0 to `sync_every` - 1.
        mixing_alpha (`float`, *optional*, defaults to 0.5): Weight of the rank's own parameters, in [0, 1).
        outer_optimizer (`Callable`, *optional*): See [`DiLoCo`]. The attribute `outer_optimizers` has one for each
            fragment, once the local steps have begun.
        wire_dtype (`str`, *optional*): See [`DiLoCo`].
        kwargs: `base_buffers` (acts once per period), `group` and the other arguments of [`LocalUpdate`].
            `on_lost_rank="continue"` is refused.

    Raises:
        ValueError: If a setting is outside of its rule, a fragment would be empty, or `fragments` leaves a trainable
            parameter out, names one twice, or names one that there is not; and as [`DiLoCo`] raises.
        PeerError: As [`LocalUpdate`] raises, at a later step than that at which the exchange failed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sync_every: int = 100,
        num_fragments: int | None = None,
        fragments: str | Sequence[Sequence[str]] = "strided",
        delay: int = 5,
        mixing_alpha: float = 0.5,
        outer_optimizer: Callable[[list[nn.Parameter]], Optimizer] = OUTER_SGD,
        wire_dtype: str | None = None,
        **kwargs: Any,
    ):
        if isinstance(fragments, str):
            if fragments not in ("strided", "size"):
                raise ValueError(
                    f"`fragments` must be 'strided', 'size' or the names of the parameters of each fragment, but is "
                    f"'{fragments}'. {did_you_mean(fragments, ['strided', 'size'])}"
                )
            num_fragments = NUM_FRAGMENTS if num_fragments is None else num_fragments
        else:
            fragments = [list(names) for names in fragments]
            if num_fragments not in (None, len(fragments)):
                raise ValueError(
                    f"`num_fragments` must be the length of `fragments`, {len(fragments)}, but is {num_fragments}. "
                    "Leave it out."
                )
            num_fragments = len(fragments)
        self.fragments = fragments
        self.num_fragments = check_integer("num_fragments", num_fragments, meaning="counts parts of the model")
        self.delay = check_integer("delay", delay, 0, meaning="counts optimizer steps")
        self.mixing_alpha = check_number("mixing_alpha", mixing_alpha, minimum=0.0, below=1.0)
        super().__init__(
            model,
            optimizer,
            sync_every=sync_every,
            outer_optimizer=outer_optimizer,
            wire_dtype=wire_dtype,
            **kwargs,
        )
        if self.on_lost_rank == "continue":
            raise ValueError(
                "`on_lost_rank` must be 'raise' for StreamingDiLoCo, whose transfers in the background are not taken "
                "again without a lost rank, but is 'continue'. Use DiLoCo."
            )
        for name, most in (("num_fragments", self.sync_every), ("delay", self.sync_every - 1)):
            if getattr(self, name) > most:
                raise ValueError(
                    f"`{name}` must be at most {most} with `sync_every` {self.sync_every}, as each fragment is sent "
                    f"and applied once per period, but is {getattr(self, name)}. Lower it, or raise `sync_every`."
                )
        self._background: BackgroundCalls | None = None
        self._transfers = self._exchange  # of a group of its own, when entered
        self._on_the_way: dict[int, _Transfer] = {}
        self._steps_since_sent = [0] * self.num_fragments
        self._bytes_sent_before, self._seconds_for_transfers = 0, 0.0

    @property
    def outer_optimizers(self) -> list[Optimizer]:
        """The outer optimizer of each fragment, once the local steps have begun."""
        return self._outer_optimizers

    @property
    def bytes_sent(self) -> int:
        own = 0 if self._transfers is self._exchange else self._transfers.bytes_sent
        return super().bytes_sent + self._bytes_sent_before + own

    @property
    def seconds_waiting(self) -> float:
        return super().seconds_waiting + self._seconds_for_transfers

    def _settings(self) -> dict[str, Any]:
        names = ("num_fragments", "fragments", "delay", "mixing_alpha")
        return {**super()._settings(), **{name: getattr(self, name) for name in names}}

    def _split(self) -> list[list[int]]:
        found = trainable_parameters(self.model, self.optimizer)
        places = {name: place for place, (name, _, _) in enumerate(found)}
        sizes = {name: num_bytes(p) for name, p, _ in found}
        # In the model's order, not group by group; those of the optimizer alone last.
        order = {name: place for place, (name, _) in enumerate(self.model.named_parameters())}
        sizes = {name: sizes[name] for name in sorted(sizes, key=lambda name: order.get(name, len(order)))}
        parts = _split_parameters(sizes, self.fragments, self.num_fragments)
        return [sorted(places[name] for name in part) for part in parts]

    def _attach(self) -> None:
        super()._attach()
        self._buckets, self._buckets_of, tensors = [], [], self._tensors
        for fragment in self._fragments:
            buckets = split_into_buckets([tensors[i] for i in fragment])
            self._buckets_of.append(range(len(self._buckets), len(self._buckets) + len(buckets)))
            self._buckets += [[fragment[i] for i in bucket] for bucket in buckets]
        if self._exchange.size > 1:
            # Transfers run beside the exchanges of the training's own thread.
            group = self._exchange.group
            backend = None if group is None else dist.get_backend_config(group)
            self._number = next(number for number in count() if number not in _numbers)
            _numbers.add(self._number)
            own = subgroup(self._exchange.global_ranks, backend=backend, name=f"fragments {self._number}")
            self._transfers = Exchange(own, self._exchange.timeout_seconds)
        self._background = BackgroundCalls("hf_msn fragments")

    def _detach(self) -> None:
        super()._detach()
        self._on_the_way.clear()
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._transfers is not self._exchange:
            self._bytes_sent_before += self._transfers.bytes_sent
            self._transfers = self._exchange

    def _begin_local_steps(self) -> None:
        super()._begin_local_steps()
        self._on_the_way.clear()
        self._steps_since_sent = [0] * self.num_fragments

    @property
    def _is_pending(self) -> bool:
        return bool(self._anchors)  # own and global parameters differ

    @torch.no_grad()
    def _after_local_step(self) -> None:
        for fragment in range(self.num_fragments):
            self._steps_since_sent[fragment] += 1
            if self.local_steps == (fragment + 1) * self.sync_every // self.num_fragments:
                self._calls.check()
                self._send(fragment, self.delay + 1)
        for fragment, transfer in list(self._on_the_way.items()):
            transfer.steps_left -= 1
            if transfer.steps_left == 0:
                self._apply(fragment, self.mixing_alpha)
            elif transfer.changes.done():
                transfer.changes.result()  # raise a failure now

    def _take_outer_step(self) -> None:
        if self.local_steps < self.sync_every:  # leaving
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """Take the outer steps that are pending, and set the parameters to the anchors."""
        self._meet("the end")
        self._before_mean()
        for fragment in range(self.num_fragments):
            if self._steps_since_sent[fragment]:
                self._send(fragment, 0)
        for fragment in list(self._on_the_way):
            self._apply(fragment, 0.0)
        torch._foreach_copy_(self._tensors, self._anchors)
        if self._transfers is not self._exchange:
            _numbers.discard(self._number)  # not after an error: a transfer may still use the group

    @torch.no_grad()
    def _before_mean(self) -> None:
        for fragment in list(self._on_the_way):
            self._apply(fragment, self.mixing_alpha)

    def _send(self, fragment: int, steps_left: int) -> None:
        changes = [(index, self._change(index)) for index in self._buckets_of[fragment]]
        event, steps, device = f"the outer step of fragment {fragment}", self.steps, self._device
        transfers = self._transfers  # after an error this object leaves while the thread goes on
        stream: Any = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))

        def transfer() -> list[torch.Tensor]:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                transfers.meet(event, steps, device)
                for index, change in changes:
                    self._mean_change_(index, change.buffers[0], transfers)
                if stream is not None:
                    stream.synchronize()
            found = {i: part for index, change in changes for i, (part, _) in zip(self._buckets[index], change.pairs)}
            return [found[i] for i in self._fragments[fragment]]

        self._steps_since_sent[fragment] = 0
        self._on_the_way[fragment] = _Transfer(steps_left, self._background.submit(transfer))

    def _received(self, transfer: _Transfer) -> list[torch.Tensor]:
        began = time.monotonic()
        try:
            return transfer.changes.result()
        finally:
            self._seconds_for_transfers += time.monotonic() - began

    def _apply(self, fragment: int, alpha: float) -> None:
        changes = self._received(self._on_the_way.pop(fragment))
        anchors = [self._anchors[i] for i in self._fragments[fragment]]
        tensors = self._tensors
        own = [tensors[i] for i in self._fragments[fragment]]
        for x0, change in zip(anchors, changes):
            x0.grad = change.to(x0.dtype)
        self._step_anchors(fragment)
        for x, x0 in zip(own, anchors):
            x.copy_(torch.lerp(x0, x.to(x0.dtype), alpha) if alpha else x0)

    def _method_state(self) -> dict[str, Any]:
        on_the_way = {
            fragment: {"steps_left": transfer.steps_left, "changes": [c.clone() for c in self._received(transfer)]}
            for fragment, transfer in self._on_the_way.items()
        }
        return {
            "on_the_way": on_the_way,  # first: the rounding errors belong to what was received
            "steps_since_sent": list(self._steps_since_sent),
            **super()._method_state(),
        }

    def _load_method_state(self, state: dict[str, Any]) -> None:
        if len(state["steps_since_sent"]) != self.num_fragments:
            raise ValueError(
                f"`num_fragments` must be that of the saved state, {len(state['steps_since_sent'])}, but is "
                f"{self.num_fragments}. Set the same."
            )
        for transfer in self._on_the_way.values():
            self._received(transfer)  # it changes the rounding errors
        super()._load_method_state(state)
        self._steps_since_sent = list(state["steps_since_sent"])
        self._on_the_way = {}
        for fragment, saved in state["on_the_way"].items():
            future: Future = Future()
            future.set_result([change.to(self._device, copy=True) for change in saved["changes"]])
            self._on_the_way[fragment] = _Transfer(saved["steps_left"], future)


def _split_parameters(
    sizes: Mapping[str, int], fragments: str | Sequence[Sequence[str]], num_fragments: int
) -> list[list[str]]:
    """Return the names of the parameters of each fragment, from their bytes by name, in the order of the model."""
    if not isinstance(fragments, str):
        _check_fragments(fragments, sizes)
        return [list(names) for names in fragments]
    layers: dict[str, list[str]] = {}
    for name in sizes:
        found = _LAYER.match(name)
        layers.setdefault(found[0] if found else name.rpartition(".")[0], []).append(name)
    kind, number = ("layers", len(layers)) if fragments == "strided" else ("trainable parameters", len(sizes))
    if number < num_fragments:
        raise ValueError(
            f"Each fragment needs one of the {kind} of the model, but it has {number} and `num_fragments` is "
            f"{num_fragments}. Lower it, or set `fragments` to 'size' or to names."
        )
    if fragments == "size":
        return _by_size(sizes, num_fragments)
    strided = [list(layers.values())[i::num_fragments] for i in range(num_fragments)]
    return [[name for layer in part for name in layer] for part in strided]


def _check_fragments(fragments: Sequence[Sequence[str]], names: Collection[str]) -> None:
    given = Counter(name for fragment in fragments for name in fragment)
    problems = {
        "leaves out": [name for name in names if name not in given],
        "has twice": [name for name, count in given.items() if count > 1],
        "has, though no trainable parameter is called so,": sorted(given.keys() - set(names)),
        "has empty ones": [str(i) for i, fragment in enumerate(fragments) if not fragment],
    }
    for problem, found in problems.items():
        if found:
            more = f" and {len(found) - 3} more" * (len(found) > 3)
            raise ValueError(
                "`fragments` must have each trainable parameter in one fragment, by its name in "
                f"`named_parameters()`, but {problem} {', '.join(found[:3])}{more}."
            )


def _by_size(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Cut the names into `count` runs, of which the largest is as small as can be."""

    def cut(most: int) -> list[list[str]]:
        runs: list[list[str]] = []
        filled = most + 1
        for place, (name, size) in enumerate(sizes.items()):
            # The last ones each get a run, where there would be too few.
            if filled + size > most or len(sizes) - place <= count - len(runs):
                runs.append([])
                filled = 0
            runs[-1].append(name)
            filled += size
        return runs

    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
    return cut(low)
