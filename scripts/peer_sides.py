"""What `benchmark_peers.py` compares: a training step of each library, and ours."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_msn import MSNConfig, MSNForPreTraining

MOMENTUM = 0.996


class UnsupportedViewsError(ValueError):
    """The library cannot take these views at all; the message says why."""


@dataclass(frozen=True)
class Shape:
    """The work that every side is given."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    mask_ratio: float
    num_prototypes: int
    image_size: int
    focal_size: int
    anchor_views: int
    focal_views: int
    batch_size: int


@dataclass
class Side:
    """One library's training step.

    Attributes:
        name: As the table shows it.
        model: All modules of the step.
        loss: Views as `prepare` gives them -> scalar loss with gradient.
        update_target: One step of the moving average.
        optimizer: Over all that is trained.
        first_blocks: The first transformer block of the online and of the target encoder; their inputs are counted.
        prototypes: Of shape `(K, D)`.
        prepare: Batch of `random_views` -> what the library's data loader gives. Not timed.
        clipped: Parameters whose gradients are clipped; none, where the library's example clips nothing.
        differs: What it leaves out or does otherwise, a line each.
        other_tokens: It cannot drop patches, so that its anchors have more tokens; said in `differs`.
    """

    name: str
    model: nn.Module
    loss: Callable[[Any], torch.Tensor]
    update_target: Callable[[], None]
    optimizer: torch.optim.Optimizer
    first_blocks: list[nn.Module]
    prototypes: torch.Tensor
    prepare: Callable[[dict[str, torch.Tensor]], Any] = lambda batch: batch
    clipped: list[nn.Parameter] | None = None
    differs: list[str] = field(default_factory=list)
    other_tokens: bool = False

    def step(self, views: Any, precision: str) -> torch.Tensor:
        """Forward, backward, clipping, optimizer and moving average; returns the loss."""
        with torch.autocast(self.prototypes.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss(views)
        loss.backward()
        if self.clipped is not None:
            nn.utils.clip_grad_norm_(self.clipped, 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_target()
        return loss.detach()

    def work(self, views: Any, batch_size: int) -> dict[str, Any]:
        """One step in float32, counted.

        Returns:
            `dict`: `loss`; `parameters`, those that got a gradient; `prototypes`; `tokens`, a dictionary from the
            length of a sequence to the number of such sequences an image; `gflop` an image.
        """
        lengths, touched = Counter(), set()
        hooks = [block.register_forward_pre_hook(_count(lengths)) for block in self.first_blocks]
        hooks += [
            parameter.register_post_accumulate_grad_hook(lambda p: touched.add(p))
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        with FlopCounterMode(display=False) as counter:
            loss = self.step(views, "fp32")
        for hook in hooks:
            hook.remove()
        return {
            "loss": loss.item(),
            "parameters": sum(parameter.numel() for parameter in touched),
            "prototypes": len(self.prototypes),
            "tokens": {length: rows / batch_size for length, rows in sorted(lengths.items(), reverse=True)},
            "gflop": counter.get_total_flops() / batch_size / 1e9,
        }


def our_side(shape: Shape, device: torch.device) -> Side:
    """`MSNForPreTraining` as on anyone's loop, with the optimizer, the groups and the clipping of `MSNTrainer`."""
    model = MSNForPreTraining(
        MSNConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=4 * shape.hidden_size,
            patch_size=shape.patch_size,
            image_size=shape.image_size,
            mask_ratio=shape.mask_ratio,
            num_prototypes=shape.num_prototypes,
            use_sinkhorn=True,
            me_max_weight=1.0,
        )
    )
    model = model.to(device).train()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim > 1 and name != "prototypes"]
    others = [parameter for name, parameter in trained if parameter.ndim == 1 or name == "prototypes"]
    return Side(
        name="hf_msn",
        model=model,
        loss=lambda views: model(**views).loss,
        update_target=lambda: model.update_target(MOMENTUM),
        optimizer=torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], fused=True),
        first_blocks=[model.encoder.layers[0], model.target_encoder.layers[0]],
        prototypes=model.prototypes,
        clipped=[parameter for name, parameter in trained if name != "prototypes"],
        differs=["the step alone: MSNTrainer also does schedules and logs, and benchmark_step.py times it with them"],
    )


def _count(lengths: Counter) -> Callable:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows, tokens = inputs[0].shape[:2]
        lengths[tokens] += rows

    return hook
