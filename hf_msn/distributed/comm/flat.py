"""Flat buffers: the tensors of a model copied into a few contiguous ones, for exchange with other ranks."""

from collections.abc import Sequence

import torch

BUCKET_BYTES = 32 * 2**20  # memory of an exchange beside the model; enough to use a network fully


class FlatTensors:
    """Copies of tensors in one flat buffer per dtype and device.

    The tensors are never replaced: `copy_back` writes into them, so that optimizers, DDP and views stay valid.

    Args:
        tensors (`Sequence[torch.Tensor]`): Tensors of any shapes, dtypes and devices.
        multiple_of (`int`, *optional*, defaults to 1): Pad each buffer with zeros to a length that is a multiple of
            this, so that it can be cut into equal shards.
        widen (`bool`, *optional*, defaults to `False`): Make buffers real and of at least float32. A complex tensor is
            copied as its real and imaginary parts.
        buffers (`Sequence[torch.Tensor]`, *optional*): Buffers to use, of another object over the same tensors.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        multiple_of: int = 1,
        widen: bool = False,
        buffers: Sequence[torch.Tensor] | None = None,
    ):
        groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._groups, self._views = [], []
        self.buffers: list[torch.Tensor] = []
        for (dtype, device), group in groups.items():
            if widen:
                group = [torch.view_as_real(t.detach()) if t.is_complex() else t for t in group]
                dtype = torch.promote_types(dtype.to_real(), torch.float32)
            sizes = [tensor.numel() for tensor in group]
            padding = -sum(sizes) % multiple_of
            if buffers is not None:
                buffer = buffers[len(self.buffers)]
            else:
                buffer = torch.empty(sum(sizes) + padding, dtype=dtype, device=device)
                buffer[sum(sizes) :].zero_()
            parts = buffer.split([*sizes, padding])
            self._groups.append(group)
            self.buffers.append(buffer)
            self._views.append([part.view(tensor.shape) for part, tensor in zip(parts, group)])

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs `(part, tensor)`: a view of a buffer, and the tensor that it is a copy of, of the same shape."""
        return [pair for views, group in zip(self._views, self._groups) for pair in zip(views, group)]

    @torch.no_grad()
    def copy_in(self) -> list[torch.Tensor]:
        """Copy the tensors into the buffers. Return the buffers."""
        for views, group in zip(self._views, self._groups):
            torch._foreach_copy_(views, group)
        return self.buffers

    @torch.no_grad()
    def copy_back(self, divisor: float = 1.0) -> None:
        """Copy the buffers, divided by `divisor`, into the tensors, in place."""
        for views, group in zip(self._views, self._groups):
            if divisor == 1.0:
                torch._foreach_copy_(group, views)
            elif views[0].dtype == group[0].dtype:
                torch._foreach_copy_(group, views)
                torch._foreach_div_(group, divisor)
            else:  # round once, after the division
                torch._foreach_copy_(group, torch._foreach_div(views, divisor))


def split_into_buckets(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Group the indices of tensors into lists of one dtype and device and at most 32 MiB each, in order.

    A tensor larger than that gets a bucket of its own. Working through a model bucket by bucket needs a buffer
    of one bucket instead of a second model.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    buckets = []
    for index, tensor in enumerate(tensors):
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, filled = open_buckets.get(key, (None, 0))
        if bucket is None or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(index)
        open_buckets[key] = bucket, filled + size
    return buckets
