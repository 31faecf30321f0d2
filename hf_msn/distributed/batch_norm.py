"""Batch normalisation over the batches of all ranks, on any device."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .collectives import all_reduce_mean, is_distributed, world_size


class CrossRankBatchNorm(_BatchNorm):
    """Batch normalisation with mean and variance over all ranks, for the CPU, where `nn.SyncBatchNorm` has no kernel.

    Mean and variance are averaged over the ranks with gradient, so that the outputs and, once
    `DistributedDataParallel` has averaged them, the gradients are those of one rank with the whole batch. All ranks
    must have batches of the same size. In evaluation mode or on one rank it is plain batch normalisation.

    It has the state dict of the layer that it replaces, and the dropout and activation at the end of timm's layers.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.process_group: dist.ProcessGroup | None = None  # named as in `nn.SyncBatchNorm`
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and is_distributed(self.process_group):
            return self.act(self.drop(self._normalize_over_ranks(x)))
        return self.act(self.drop(super().forward(x)))

    def _normalize_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        dimensions = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        mean = all_reduce_mean(wide.mean(dimensions), self.process_group)
        centred = wide - mean.view(shape)
        variance = all_reduce_mean(centred.square().mean(dimensions), self.process_group)
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * world_size(self.process_group)
            self._track(mean.detach(), variance.detach(), count)
        normalized = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Take inputs of any number of dimensions, where the base class has no check."""


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace the batch normalisation of a model by one over all ranks, in place where possible, and return the model.

    On CUDA it is `nn.SyncBatchNorm` (timm's variant for timm's layers), elsewhere [`CrossRankBatchNorm`].
    """
    if device.type == "cuda":
        import timm.layers  # here, so that this file loads torch only

        return timm.layers.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, CrossRankBatchNorm(child))
        else:
            synchronize_batch_norm(child, device)
    return model


def track_statistics_once(model: nn.Module) -> None:
    """Keep activation checkpointing from updating running statistics again when it repeats a forward pass.

    Call it once, after [`synchronize_batch_norm`] if both are used. Outputs do not change.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not hasattr(module, "_tracked_buffers"):
            module._tracked_buffers = None
            module.register_forward_pre_hook(_set_buffers_aside)
            module.register_forward_hook(_take_buffers_back, always_call=True)  # a repetition stops early


def _set_buffers_aside(module: _BatchNorm, args) -> None:
    in_backward_pass = torch._C._current_graph_task_id() != -1  # only the repetition runs a module there
    if in_backward_pass and module.training and module.track_running_stats:
        module._tracked_buffers = dict(module._buffers)
        # Copies, because autograd has saved the buffers themselves.
        module._buffers.update({name: buffer.clone() for name, buffer in module._buffers.items()})


def _take_buffers_back(module: _BatchNorm, args, output) -> None:
    if module._tracked_buffers is not None:
        module._buffers.update(module._tracked_buffers)
        module._tracked_buffers = None
