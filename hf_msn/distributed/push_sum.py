"""Push-sum: a numerator x and a weight w per rank, whose sums over the ranks stay; the model holds z = x / w."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .comm.flat import FlatTensors
from .comm.mailbox import Mailbox, Message
from .comm.wire import as_bytes, from_bytes
from .training_state import trainable_parameters


class PushSum:
    """x and w (`weight`) of one rank, beside parameters that hold z = x / w."""

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._flat = FlatTensors(parameters, widen=True)
        self.weight = 1.0
        self.read()

    @property
    def x(self) -> list[torch.Tensor]:
        """x in flat buffers, one per dtype and device of the parameters, real and of at least float32."""
        return self._flat.buffers

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a view of x and the parameter that it belongs to."""
        return self._flat.pairs

    def read(self) -> None:
        """x <- the parameters."""
        self._flat.copy_in()

    def write(self, divisor: float | None = None) -> None:
        """The parameters <- x / w, or x / `divisor`."""
        self._flat.copy_back(self.weight if divisor is None else divisor)

    def divide(self, divisor: float) -> None:
        """x <- x / divisor; w <- w / divisor."""
        torch._foreach_div_(self.x, divisor)
        self.weight /= divisor

    def push(self, peers: Sequence[int], mailbox: Mailbox, kind: int, *, adds_up: bool = True) -> None:
        """x <- x / (p + 1), w <- w / (p + 1), and send both to each of p peers, less the wire's rounding error.

        Messages that wait are added up, or stay apart for receivers that merge each at its step.
        """
        self.divide(len(peers) + 1)
        narrows = mailbox.narrows
        shares = [x.clone() if narrow else x for x, narrow in zip(self.x, narrows)]
        for peer in peers:
            errors = [share.clone() if narrow else share for share, narrow in zip(shares, narrows)]
            if adds_up:
                mailbox.post_sum(peer, kind, errors, weight=self.weight)
            else:
                mailbox.post(peer, kind, errors, weight=self.weight)
                for error, sent, narrow in zip(errors, mailbox.rounded(errors), narrows):
                    if narrow:
                        error.sub_(sent)
            for x, error, narrow in zip(self.x, errors, narrows):
                if narrow:
                    x.add_(error)

    def add(self, messages: Iterable[Message]) -> None:
        """x <- x + sum of the messages' tensors; w <- w + sum of their weights."""
        for message in messages:
            self.weight += message.weight
            for x, part in zip(self.x, message.tensors):
                x.add_(part.to(x.device))

    # The mean over ranks by messages: of x over that of w, and of tensors that push-sum does not mix

    def contribution(self, others: Sequence[torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Return w, and x and the other tensors as bytes."""
        return self.weight, as_bytes([*self.x, *others])

    @torch.no_grad()
    def combine(
        self, contributions: Sequence[tuple[float, torch.Tensor]], others: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return sum x / sum w, the means of other float tensors, and the first rank's other tensors, as bytes."""
        like = [*self.x, *others]
        total = from_bytes(contributions[0][1], like)
        floats = [i for i, tensor in enumerate(like) if tensor.is_floating_point() or tensor.is_complex()]
        for _, payload in contributions[1:]:
            parts = from_bytes(payload, like)
            for i in floats:
                total[i].add_(parts[i])
        total_weight = sum(weight for weight, _ in contributions)
        for i in floats:
            total[i].div_(total_weight if i < len(self.x) else len(contributions))
        return as_bytes(total)

    @torch.no_grad()
    def load(self, result: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
        """Take over the result of `combine`: w = 1, and x and the parameters hold the mean."""
        tensors = [*self.x, *others]
        for tensor, new in zip(tensors, from_bytes(result, tensors)):
            tensor.copy_(new)
        self.weight = 1.0
        self.write()


def check_state_size(
    owner: str, name: str, buffers: Sequence[torch.Tensor] | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Check that a state's flat buffers hold a number for every trainable parameter."""
    parameters = [p for _, p, _ in trainable_parameters(model, optimizer)]
    expected = sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters)
    found = sum(buffer.numel() for buffer in buffers or [])
    if buffers and found != expected:
        raise ValueError(
            f"{owner} must hold {name} of every trainable parameter, here {expected} numbers, but holds {found}. "
            "Load the state of the same model with the same parameters frozen."
        )
