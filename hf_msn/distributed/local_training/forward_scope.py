"""Keeps what a forward pass exchanges inside of the ranks that train alike: losses and batch norms over ranks."""

import torch.distributed as dist
from torch import nn

from ..batch_norm import CrossRankBatchNorm
from ..collectives import group_scope
from ..subgroups import subgroup


class ForwardScope:
    """While limited, `group=None` means another group in the model's forward and backward pass.

    A loss over all ranks, such as mean-entropy maximisation or gathered supports, has its right gradient only if DDP
    averages gradients over the same ranks; and it would make every rank wait for every other at every step. The same
    holds for batch normalisation over ranks ([`CrossRankBatchNorm`], `nn.SyncBatchNorm`).

    Args:
        model (`nn.Module`): Without wrapper. What it exchanges outside of `forward` is not touched.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list = []
        self._open: list = []
        self._norms: list[tuple[nn.Module, dist.ProcessGroup | None]] = []

    def limit_to(self, group: dist.ProcessGroup | None) -> None:
        """From now on `group`, or this process alone for `None`. Without torch.distributed there is nothing to do."""
        self.lift()
        if not (dist.is_available() and dist.is_initialized()):
            return
        group = subgroup([dist.get_rank()], name="alone") if group is None else group
        self._handles = [
            self._model.register_forward_pre_hook(lambda *_: self._enter(group)),
            self._model.register_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        for module in self._model.modules():
            if isinstance(module, (CrossRankBatchNorm, nn.SyncBatchNorm)):
                self._norms.append((module, module.process_group))
                module.process_group = group

    def lift(self) -> None:
        """As before `limit_to`."""
        for handle in self._handles:
            handle.remove()
        for module, group in self._norms:
            module.process_group = group
        self._handles, self._norms = [], []

    def _enter(self, group: dist.ProcessGroup) -> None:
        scope = group_scope(group)
        scope.__enter__()
        self._open.append(scope)

    def _leave(self) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
