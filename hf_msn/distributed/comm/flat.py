"""Lists of tensors as few flat buffers: one exchange instead of one a tensor."""

from collections.abc import Sequence

import torch


class FlatTensors:
    """Copies of tensors in one flat buffer for each dtype and device, for exchange over `torch.distributed`.

    The tensors themselves are never replaced: `copy_back` writes into them, so that optimizers, DDP and views keep
    what they hold.

    Args:
        tensors (`Sequence[torch.Tensor]`): Of any shapes, dtypes and devices.
        multiple_of (`int`, *optional*, defaults to 1): Zeros are added to the end of each buffer until its length is a
            multiple of this, so that it can be cut into equal shards.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, multiple_of: int = 1):
        groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._groups = list(groups.values())
        self.buffers, self._views = [], []
        for (dtype, device), group in groups.items():
            sizes = [tensor.numel() for tensor in group]
            padding = -sum(sizes) % multiple_of
            buffer = torch.empty(sum(sizes) + padding, dtype=dtype, device=device)
            buffer[sum(sizes) :].zero_()
            parts = buffer.split([*sizes, padding])
            self.buffers.append(buffer)
            self._views.append([part.view(tensor.shape) for part, tensor in zip(parts, group)])

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor with its part of a buffer, a view of the tensor's shape: `(part, tensor)`."""
        return [pair for views, group in zip(self._views, self._groups) for pair in zip(views, group)]

    @torch.no_grad()
    def copy_in(self) -> list[torch.Tensor]:
        """Copies the tensors into the buffers; returns these."""
        for views, group in zip(self._views, self._groups):
            torch._foreach_copy_(views, group)
        return self.buffers

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copies the buffers into the tensors, in place."""
        for views, group in zip(self._views, self._groups):
            torch._foreach_copy_(group, views)


def split_into_buckets(tensors: Sequence[torch.Tensor], max_bytes: int) -> list[list[int]]:
    """Indices of the tensors in lists of one dtype and device and at most `max_bytes` each, in the order given.

    A tensor that is larger than `max_bytes` has a bucket of its own: tensors are not cut. Working through a model
    bucket by bucket needs a buffer of one bucket instead of a second model.

    Args:
        tensors (`Sequence[torch.Tensor]`): Of any shapes, dtypes and devices.
        max_bytes (`int`): Of one bucket.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    buckets = []
    for index, tensor in enumerate(tensors):
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        bucket, filled = open_buckets.get(key, (None, 0))
        if bucket is None or filled + size > max_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(index)
        open_buckets[key] = bucket, filled + size
    return buckets
