"""The replicas of a codistillation as two groups of ranks: what they compare, measure and hand over."""

import torch
import torch.distributed as dist

from ..comm.exchange import Exchange
from ..comm.flat import FlatTensors, split_into_buckets
from ..local_training.training_state import compare_ranks

_BUCKET_BYTES = 32 * 2**20  # what an exchange needs in memory beside the model


class Replicas:
    """Exchanges between replicas (`outer`) and inside of one (`inner`).

    Args:
        outer ([`Exchange`]): One rank of each replica.
        inner ([`Exchange`], *optional*): The ranks of this replica.
    """

    def __init__(self, outer: Exchange, inner: Exchange | None):
        self.outer, self.inner = outer, inner
        self._exchanges = [exchange for exchange in (inner, outer) if exchange is not None]

    @property
    def size(self) -> int:
        """Number of replicas n."""
        return self.outer.size

    @property
    def inner_group(self) -> dist.ProcessGroup | None:
        """The ranks of this replica; `None` if it has one only."""
        return None if self.inner is None else self.inner.group

    @property
    def place(self) -> tuple[int, ...]:
        """Rank and number of ranks inside of the replica (if it has several) and among the replicas."""
        return tuple(number for exchange in self._exchanges for number in (exchange.rank, exchange.size))

    @property
    def bytes_sent(self) -> int:
        return sum(exchange.bytes_sent for exchange in self._exchanges)

    @property
    def seconds_waiting(self) -> float:
        return sum(exchange.seconds_waiting for exchange in self._exchanges)

    def compare(self, description: list[str], tensors: list[torch.Tensor]) -> None:
        """Refuses ranks that differ in their lines, or tensors that the groups cannot reach."""
        for exchange in self._exchanges:
            exchange.check_devices(tensors)
            compare_ranks(exchange, description, tensors[0].device)

    @torch.no_grad()
    def make_inner_equal(self, tensors: list[torch.Tensor]) -> None:
        """Makes the tensors those of the replica's first rank."""
        if self.inner is not None:
            self._broadcast(self.inner, tensors, 0)

    @torch.no_grad()
    def take(self, place: int, tensors: list[torch.Tensor]) -> None:
        """Makes the tensors those of the replica at `place`."""
        self._broadcast(self.outer, tensors, place)

    @torch.no_grad()
    def are_equal(self, tensors: list[torch.Tensor]) -> bool:
        """Whether the sums of all tensors are the same in all replicas."""
        sums = torch.stack([tensor.detach().abs().double().sum() for tensor in tensors]).tolist()
        return self.outer.texts_that_differ(repr(sums), tensors[0].device) is None

    @torch.no_grad()
    def distance(self, tensors: list[torch.Tensor]) -> float:
        """sqrt(mean_i ||x_i - xbar||^2), xbar the mean of the replicas' x_i."""
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for bucket in _in_buckets(tensors):
            own, mean = FlatTensors(bucket).copy_in(), FlatTensors(bucket).copy_in()
            self.outer.mean_(mean)
            total += sum((x - y).abs().double().square().sum() for x, y in zip(own, mean))
        self.outer.mean_([total])
        return total.sqrt().item()

    @torch.no_grad()
    def values(self, value: float, device: torch.device) -> list[float]:
        """Every replica's number, first replica first."""
        own = torch.tensor([value], dtype=torch.float64, device=device)
        values = own.new_empty(self.size)
        self.outer.gather_(values, own)
        return values.tolist()

    @torch.no_grad()
    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over the replicas, a new tensor."""
        mean = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.outer.mean_([mean])
        return mean

    def _broadcast(self, exchange: Exchange, tensors: list[torch.Tensor], place: int) -> None:
        for bucket in _in_buckets(tensors):
            flat = FlatTensors(bucket)
            exchange.broadcast_(flat.copy_in(), place)
            flat.copy_back()


def _in_buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[tensors[i] for i in bucket] for bucket in split_into_buckets(tensors, _BUCKET_BYTES)]
