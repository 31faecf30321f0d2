"""Collectives of one group with a deadline, an account of bytes and seconds, and an error that names the peer."""

import datetime
import hashlib
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ...checks import check_number
from ..collectives import rank, world_size

_STORE_SECONDS = 2.0  # deadline for asking the store who is missing: its host may be the missing rank

# torch 2.14 renames these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PeerError(RuntimeError):
    """A peer died, or did not take part in an exchange before the deadline.

    Attributes:
        ranks (`tuple[int, ...]`): Global ranks that are missing; empty where they are not known.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.ranks = tuple(ranks)


class Exchange:
    """Collectives over `group`, in place and without gradient, for tensors on a device that the group can reach.

    Args:
        group (`ProcessGroup`, *optional*): `None` for the default group, or for this process alone where
            `torch.distributed` is not initialised; every method then leaves its input as it is.
        timeout_seconds (`float`, *optional*): Deadline of one exchange. `None` waits as long as the group itself does.
            Each rank counts its exchanges in the store of the default group, one small message per exchange, so that
            an error can name the missing rank.

    Attributes:
        bytes_sent (`int`): Payload that this rank has sent. With n ranks and B bytes: mean 2B(n-1)/n, mean of which a
            shard is kept B(n-1)/n, swap of shards B(n-1)/n, gathering of shards of B bytes B(n-1), broadcast B for
            its source.
        seconds_waiting (`float`): Time spent in exchanges. On CUDA without `timeout_seconds` the host does not wait
            for the device, and only the launches count.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_seconds: float | None = None):
        if timeout_seconds is not None:
            remedy = "Choose more than the local steps of a slow rank take."
            check_number("timeout_seconds", timeout_seconds, above=0.0, remedy=remedy)
        self._is_initialized = dist.is_available() and dist.is_initialized()
        if (group is not None and not self._is_initialized) or rank(group) < 0:
            raise ValueError(
                "`group` must be an initialised group with this rank among its members, but rank "
                f"{rank(None)} is not one of them. Pass each rank the group that it is in."
            )
        self.group = group
        self.size, self.rank = world_size(group), rank(group)
        self.timeout_seconds = timeout_seconds
        self.bytes_sent = 0
        self.seconds_waiting = 0.0
        self._count, self._name = 0, ""  # exchanges so far, and the last one
        self._store_key: str | None = None

    @property
    def global_ranks(self) -> list[int]:
        """Members of the group, as ranks of the default group."""
        return dist.get_process_group_ranks(self.group or dist.group.WORLD) if self._is_initialized else [0]

    def check_devices(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check that the group's backend can send the tensors."""
        if self.size == 1:
            return
        config = dist.get_backend_config(self.group)
        reached = {part.split(":")[0] for part in config.split(",")}
        for device in sorted({tensor.device.type for tensor in tensors} - reached):
            raise ValueError(
                f"The tensors must be on a device that the group's backend can send from ({config}), but some are on "
                f"'{device}'. Move the model there, or pass a group with a backend for '{device}' (gloo for 'cpu')."
            )

    @torch.no_grad()
    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace the tensors by their means over the ranks. They must be contiguous."""
        if self.size == 1:
            return
        self._run("mean", [lambda t=t: dist.all_reduce(t, group=self.group, async_op=True) for t in tensors])
        for tensor in tensors:
            tensor.div_(self.size)
            self.bytes_sent += 2 * num_bytes(tensor) * (self.size - 1) // self.size

    @torch.no_grad()
    def mean_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard `(N / n,)` of the mean of `tensor`, `(N,)` with N a multiple of n."""
        if self.size == 1:
            return tensor
        shard = tensor.new_empty(tensor.numel() // self.size)
        self._run("mean of shards", [lambda: _reduce_scatter(shard, tensor, group=self.group, async_op=True)])
        self.bytes_sent += num_bytes(tensor) * (self.size - 1) // self.size
        return shard.div_(self.size)

    @torch.no_grad()
    def swap(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send shard i of `tensor` to rank i. Return the shards that came here, in the same shape, first rank first.

        The first dimension must be a multiple of n.
        """
        if self.size == 1:
            return tensor
        received, swap = torch.empty_like(tensor), dist.all_to_all_single
        self._run("swap of shards", [lambda: swap(received, tensor, group=self.group, async_op=True)])
        self.bytes_sent += num_bytes(tensor) * (self.size - 1) // self.size
        return received

    @torch.no_grad()
    def gather_(self, whole: torch.Tensor, shard: torch.Tensor) -> None:
        """Write the shards `(N / n,)` of all ranks into `whole`, `(N,)`, first rank first."""
        if self.size == 1:
            if whole is not shard:
                whole.copy_(shard)
            return
        self._run("gathering of shards", [lambda: _all_gather(whole, shard, group=self.group, async_op=True)])
        self.bytes_sent += num_bytes(shard) * (self.size - 1)

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[torch.Tensor], place: int = 0) -> None:
        """Replace the tensors by those of the rank at `place` in the group. They must be contiguous."""
        if self.size == 1:
            return
        broadcast = dist.broadcast
        broadcasts = [lambda t=t: broadcast(t, group=self.group, group_src=place, async_op=True) for t in tensors]
        self._run("broadcast", broadcasts)
        if self.rank == place:
            self.bytes_sent += sum(map(num_bytes, tensors))

    def texts_that_differ(self, text: str, device: torch.device) -> list[str] | None:
        """Return the texts of all ranks, first rank first, if they are not all equal, else `None`. Compare digests.

        It does not count as payload.
        """
        if self.size == 1:
            return None
        sent = self.bytes_sent
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=device)
        digests = digest.new_empty(self.size * digest.numel())
        self.gather_(digests, digest)
        self.bytes_sent = sent
        rows = digests.view(self.size, -1)
        if bool((rows == rows[:1]).all()):
            return None
        encoded = list(text.encode())
        lengths = torch.empty(self.size, dtype=torch.int64, device=device)
        self.gather_(lengths, torch.tensor([len(encoded)], dtype=torch.int64, device=device))
        padded = torch.tensor(encoded + [0] * (int(lengths.max()) - len(encoded)), dtype=torch.uint8, device=device)
        texts = padded.new_empty(self.size * padded.numel())
        self.gather_(texts, padded)
        self.bytes_sent = sent
        return [bytes(row[:n].tolist()).decode() for row, n in zip(texts.view(self.size, -1), lengths.tolist())]

    def meet(self, event: str, steps: int | None, device: torch.device) -> None:
        """Raise a [`PeerError`] where the ranks come to different events, such as an outer step and the end."""
        if self.texts_that_differ(event, device) is None:
            return
        own = event if steps is None else f"{event} after {steps} optimizer steps"
        texts = self.texts_that_differ(own, device)
        others = {rank: text for rank, text in zip(self.global_ranks, texts) if not text.startswith(event)}
        raise PeerError(
            f"All ranks must come to the same exchange, but rank {dist.get_rank()} comes to {own}, and "
            f"{', '.join(f'rank {rank} to {text}' for rank, text in others.items())}. Let every rank take the same "
            "number of steps.",
            list(others),
        )

    def _run(self, name: str, launches: Sequence[Callable]) -> None:
        """Launch the collectives one after the other, then wait for all of them until the deadline."""
        began = time.monotonic()
        try:
            self._note_arrival(name)
            for work in [launch() for launch in launches]:
                self._wait(work, began)
        except RuntimeError as error:
            raise self._peer_error(name, error) from error
        finally:
            self.seconds_waiting += time.monotonic() - began

    def _wait(self, work, began: float) -> None:
        if self.timeout_seconds is None:
            work.wait()
            return
        # Never 0, which torch takes for "no deadline".
        left = max(began + self.timeout_seconds - time.monotonic(), 1e-3)
        work.wait(datetime.timedelta(seconds=left))

    def _note_arrival(self, name: str) -> None:
        """Count an exchange in the store: the missing rank has a lower count, or is at an exchange of another name."""
        store = dist.distributed_c10d._get_default_store()
        if self._store_key is None:  # lockstep gives all ranks the same number
            group = f"hf_msn/exchange/{(self.group or dist.group.WORLD).group_name}"
            self._store_key = f"{group}/{store.add(f'{group}/opened/{self.rank}', 1)}"
        self._count += 1
        self._name = name
        store.set(f"{self._store_key}/{self.rank}", f"{self._count} {name}")  # returns at once, as `add` does not

    def _peer_error(self, name: str, error: RuntimeError) -> PeerError:
        missing, how = self._missing_ranks(), "had not arrived"
        if missing == []:
            # A rank that stopped during the exchange had arrived, too, but does not come here, nor do those that still
            # wait for it.
            how = "had arrived and not ended it"
            self._note_arrival("error")
            deadline = time.monotonic() + _STORE_SECONDS / 2
            while (missing := self._missing_ranks()) and time.monotonic() < deadline:
                time.sleep(0.05)
        message = f"The {name} over the ranks {self.global_ranks} failed on rank {dist.get_rank()}: "
        if missing:
            setting = "" if self.timeout_seconds is None else f" (`timeout_seconds={self.timeout_seconds}`)"
            which = "it" if len(missing) == 1 else "one of them"
            message += (
                f"rank {', '.join(map(str, missing))} {how}{setting}, so {which} has died, hangs or is slow. See the "
                "log; if it is only slow, allow more seconds."
            )
        elif missing is None:
            message += "the store that knows who is missing does not answer, so look at its host, rank 0, first."
        else:
            message += "all ranks had arrived, so one of them died or left during the exchange. See their logs."
        return PeerError(f"{message} ({error})", missing or ())

    def _missing_ranks(self) -> list[int] | None:
        """Return the global ranks that have not come to this exchange; `None` if the store does not answer."""
        arrivals = self._arrivals()
        if arrivals is None:
            return None
        here = self._count, self._name
        return [
            rank for rank, there in arrivals.items() if there[0] < here[0] or (there[0] == here[0] and there != here)
        ]

    def _arrivals(self) -> dict[int, tuple[int, str]] | None:
        """Return number and name of the last exchange of each global rank; `None` if the store does not answer."""
        found = {}

        def ask():
            store = dist.distributed_c10d._get_default_store()
            for place, global_rank in enumerate(self.global_ranks):
                key = f"{self._store_key}/{place}"
                count, _, name = store.get(key).decode().partition(" ") if store.check([key]) else ("0", "", "")
                found[global_rank] = int(count), name

        # In a thread: a stopped host of the store would block this rank past the deadline.
        thread = threading.Thread(target=_ignore_errors, args=(ask,), daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        return found if len(found) == self.size else None


def _ignore_errors(function: Callable) -> None:
    try:
        function()
    except RuntimeError:
        return


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()
