"""The x of push-sum beside a model whose parameters hold z = x / w."""

from collections.abc import Sequence

import torch


class Numerators:
    """A flat buffer for each dtype and device of the parameters, in float32 or wider.

    A complex parameter is its real and imaginary parts here. The parameters themselves are never replaced.

    Args:
        parameters (`Sequence[torch.Tensor]`): Of any shapes, dtypes and devices.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        groups: dict[tuple, list[torch.Tensor]] = {}
        for p in parameters:
            groups.setdefault((p.dtype, p.device), []).append(p)
        self._groups = list(groups.values())
        self.buffers = [self._new_buffer(group) for group in self._groups]

    @torch.no_grad()
    def read(self) -> None:
        """x = the parameters."""
        for parameters, views in self._pairs(self.buffers):
            torch._foreach_copy_(views, parameters)

    @torch.no_grad()
    def write(self, divisor: float = 1.0) -> None:
        """The parameters = x / divisor."""
        for parameters, views in self._pairs(self.buffers):
            if divisor == 1.0:
                torch._foreach_copy_(parameters, views)
            elif views[0].dtype == parameters[0].dtype:
                torch._foreach_copy_(parameters, views)
                torch._foreach_div_(parameters, divisor)
            else:  # rounded once, after the division
                torch._foreach_copy_(parameters, torch._foreach_div(views, divisor))

    @staticmethod
    def _new_buffer(group: list[torch.Tensor]) -> torch.Tensor:
        dtype = torch.promote_types(group[0].dtype.to_real(), torch.float32)
        size = sum(p.numel() * (2 if p.is_complex() else 1) for p in group)
        return torch.zeros(size, dtype=dtype, device=group[0].device)

    def _pairs(self, buffers: list[torch.Tensor]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        pairs = []
        for group, buffer in zip(self._groups, buffers):
            real = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in group]
            parts = buffer.split([p.numel() for p in real])
            pairs.append((real, [part.view(p.shape) for part, p in zip(parts, real)]))
        return pairs
