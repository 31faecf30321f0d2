"""Collectives of one group with a deadline, an account of bytes and seconds, and an error that names the peer."""

import datetime
import hashlib
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..collectives import rank, world_size

_STORE_SECONDS = 2.0  # what asking the store for the missing rank may take: its host may be the one that is gone

# Exchanges so far by group name. Ranks of a group exchange in lockstep, so whoever is behind has not arrived.
_arrivals: dict[str, int] = {}


class PeerError(RuntimeError):
    """A peer died, or did not take part in an exchange before the deadline.

    Attributes:
        ranks (`tuple[int, ...]`): Global ranks that had not arrived at the exchange; empty where it is not known who.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.ranks = tuple(ranks)


class Exchange:
    """Collectives over `group`, in place and without gradient, for tensors on a device that the group can reach.

    Args:
        group (`ProcessGroup`, *optional*): `None` for the default group, or this process alone where
            `torch.distributed` is not initialised: every method then leaves its input as it is.
        timeout_seconds (`float`, *optional*): Deadline of one exchange. With it each rank also notes its arrival in
            the store of the default group, one small message for each exchange, so that an error can say who is
            missing. `None` waits as long as the group itself does.

    Attributes:
        bytes_sent (`int`): Payload that this rank has sent, counted for n ranks and B bytes as a ring sends them: mean
            2B(n-1)/n, mean that keeps a shard B(n-1)/n, gathering of shards of B bytes B(n-1), broadcast B for its
            source and 0 for the others. What the backend adds is not counted.
        seconds_waiting (`float`): Time spent in exchanges. On CUDA without `timeout_seconds` the host does not wait
            for the device, so that this holds the launches only.

    Raises:
        ValueError: If `group` is given but not initialised, or this rank is not in it, or `timeout_seconds` is not a
            number over 0.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_seconds: float | None = None):
        is_number = isinstance(timeout_seconds, (int, float)) and not isinstance(timeout_seconds, bool)
        if timeout_seconds is not None and not (is_number and timeout_seconds > 0):
            raise ValueError(
                "`timeout_seconds` is how long one exchange may take and must be > 0, or None for the group's own "
                f"deadline, but is {timeout_seconds!r}. Give more than a slow rank's local steps take."
            )
        initialized = dist.is_available() and dist.is_initialized()
        if group is not None and not initialized:
            raise ValueError(
                f"`group` must be a group of an initialised torch.distributed, but is {group!r} and nothing is "
                "initialised. Call `torch.distributed.init_process_group` first, or give no group for one process."
            )
        if initialized and dist.get_rank(group) < 0:
            raise ValueError(
                f"`group` must have this rank among its members, but rank {dist.get_rank()} is not one of them. "
                "Give each rank the group that it is in."
            )
        self.group = group
        self.size, self.rank = world_size(group), rank(group)
        self.timeout_seconds = timeout_seconds
        self.bytes_sent = 0
        self.seconds_waiting = 0.0

    @property
    def global_ranks(self) -> list[int]:
        """The members of the group, as ranks of the default group."""
        if self.size == 1 and not (dist.is_available() and dist.is_initialized()):
            return [0]
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    def check_devices(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuses tensors that the group's backend cannot send, such as CPU tensors over NCCL.

        Raises:
            ValueError: With the device and the backend.
        """
        if self.size == 1:
            return
        config = dist.get_backend_config(self.group)
        reached = {part.split(":")[0] for part in config.split(",")}
        for device in sorted({tensor.device.type for tensor in tensors} - reached):
            raise ValueError(
                f"The tensors must be on a device that the group's backend can send from ({config}), but some are on "
                f"'{device}'. Move the model there, or give a group of a backend for '{device}' (gloo for 'cpu')."
            )

    @torch.no_grad()
    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces the tensors by their means over the ranks. They must be contiguous."""
        if self.size == 1:
            return
        self._run(
            "a mean", [lambda t=t: dist.all_reduce(t, group=self.group, async_op=True) for t in tensors], tensors
        )
        for tensor in tensors:
            tensor.div_(self.size)
            self.bytes_sent += 2 * _bytes(tensor) * (self.size - 1) // self.size

    @torch.no_grad()
    def mean_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's shard, `(N / n,)`, of the mean of `tensor`, `(N,)` with N a multiple of n."""
        if self.size == 1:
            return tensor
        shard = tensor.new_empty(tensor.numel() // self.size)
        self._run(
            "a mean of shards",
            [lambda: dist.reduce_scatter_tensor(shard, tensor, group=self.group, async_op=True)],
            [tensor],
        )
        self.bytes_sent += _bytes(tensor) * (self.size - 1) // self.size
        return shard.div_(self.size)

    @torch.no_grad()
    def gather_(self, whole: torch.Tensor, shard: torch.Tensor) -> None:
        """Writes all ranks' shards, `(N / n,)`, into `whole`, `(N,)`, first rank first."""
        if self.size == 1:
            if whole is not shard:
                whole.copy_(shard)
            return
        self._run(
            "a gathering of shards",
            [lambda: dist.all_gather_into_tensor(whole, shard, group=self.group, async_op=True)],
            [whole],
        )
        self.bytes_sent += _bytes(shard) * (self.size - 1)

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[torch.Tensor], place: int = 0) -> None:
        """Replaces the tensors by those of the rank at `place`, the group's first. They must be contiguous."""
        if self.size == 1:
            return
        source = self.global_ranks[place]
        self._run(
            "a broadcast",
            [lambda t=t: dist.broadcast(t, source, group=self.group, async_op=True) for t in tensors],
            tensors,
        )
        if self.rank == place:
            self.bytes_sent += sum(map(_bytes, tensors))

    def texts_that_differ(self, text: str, device: torch.device) -> list[str] | None:
        """All ranks' texts, first rank first, if they are not all the same; else `None`. Sends digests first."""
        if self.size == 1:
            return None
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=device)
        digests = digest.new_empty(self.size * digest.numel())
        self.gather_(digests, digest)
        rows = digests.view(self.size, -1)
        if bool((rows == rows[:1]).all()):
            return None
        encoded = list(text.encode())
        lengths = torch.empty(self.size, dtype=torch.int64, device=device)
        self.gather_(lengths, torch.tensor([len(encoded)], dtype=torch.int64, device=device))
        padded = torch.tensor(encoded + [0] * (int(lengths.max()) - len(encoded)), dtype=torch.uint8, device=device)
        texts = padded.new_empty(self.size * padded.numel())
        self.gather_(texts, padded)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(texts.view(self.size, -1), lengths.tolist())]

    def _run(self, what: str, starts: list, tensors: Sequence[torch.Tensor]) -> None:
        """Starts the collectives one after the other, then waits for all of them until the deadline."""
        started = time.monotonic()
        try:
            self._note_arrival()
            works = [start() for start in starts]
            for work in works:
                self._wait(work, started)
        except RuntimeError as error:
            raise self._peer_error(what, error) from error
        finally:
            self.seconds_waiting += time.monotonic() - started

    def _wait(self, work, started: float) -> None:
        if self.timeout_seconds is None:
            work.wait()
            return
        # Never 0: it means "without a deadline" to torch.
        left = max(started + self.timeout_seconds - time.monotonic(), 1e-3)
        work.wait(datetime.timedelta(seconds=left))

    @property
    def _store_key(self) -> str:
        return f"hf_msn/exchange/{(self.group or dist.group.WORLD).group_name}"

    def _note_arrival(self) -> None:
        if self.timeout_seconds is not None:
            count = _arrivals[self._store_key] = _arrivals.get(self._store_key, 0) + 1
            dist.distributed_c10d._get_default_store().set(f"{self._store_key}/{self.rank}", str(count))

    def _peer_error(self, what: str, error: RuntimeError) -> PeerError:
        missing = self._missing_ranks() if self.timeout_seconds is not None else None
        message = f"{what.capitalize()} over the ranks {self.global_ranks} failed on rank {dist.get_rank()}: "
        if self.timeout_seconds is None:
            message += "one of them has died or left. Give `timeout_seconds` to learn which."
        elif missing:
            message += (
                f"rank {', '.join(map(str, missing))} had not arrived (`timeout_seconds={self.timeout_seconds}`), so "
                "it has died, hangs or is slow. See its log; if it is only slow, give more seconds."
            )
        elif missing is None:
            message += "the store that would know who is missing does not answer, so look at its host, rank 0, first."
        else:
            message += "all ranks had arrived, so one of them died or left during the exchange. See their logs."
        return PeerError(f"{message} ({error})", missing or ())

    def _missing_ranks(self) -> list[int] | None:
        """Global ranks whose arrival at this exchange is not in the store; `None` if the store does not answer."""
        arrivals = self._arrivals_of_all()
        count = _arrivals.get(self._store_key, 0)
        return None if arrivals is None else [rank for rank, arrived in arrivals.items() if arrived < count]

    def _arrivals_of_all(self) -> dict[int, int] | None:
        """How many exchanges each global rank has arrived at; `None` if the store does not answer."""
        key, found = self._store_key, {}

        def ask():
            store = dist.distributed_c10d._get_default_store()
            for place, global_rank in enumerate(self.global_ranks):
                found[global_rank] = int(store.get(f"{key}/{place}")) if store.check([f"{key}/{place}"]) else 0

        # In a thread: a stopped host of the store would keep this one waiting past the deadline.
        thread = threading.Thread(target=_without_error, args=(ask,), daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        return found if len(found) == self.size else None


def _without_error(function) -> None:
    try:
        function()
    except RuntimeError:
        return


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
