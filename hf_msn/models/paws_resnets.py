"""The networks of PAWS that timm does not have, registered with timm as `paws_wide_resnet` and `paws_resnet`."""

from collections.abc import Sequence

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

# the arguments of each network where `timm_options` has none: WideResNet-28-2, and a ResNet-50 of twice the width
PAWS_NETWORKS = {
    "paws_wide_resnet": {"layers": (4, 4, 4), "channels": (32, 64, 128), "stem_channels": 16},
    "paws_resnet": {
        "layers": (3, 4, 6, 3),
        "channels": (128, 256, 512, 1024),
        "stem_channels": 128,
        "bottleneck": True,
    },
}
_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs(
    {
        "paws_wide_resnet": {"input_size": (3, 32, 32), "num_classes": 0, **_STATISTICS},
        "paws_resnet": {"input_size": (3, 224, 224), "num_classes": 0, **_STATISTICS},
    }
)


class WideBlock(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))), with a 1x1 convolution of x where the shapes differ."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(self.bn1(x).relu())
        return self.conv2(self.bn2(hidden).relu()) + self.shortcut(x)


class WideResNet(nn.Module):
    """WideResNet for images of 32 pixels (arXiv 1605.07146): `(B, 3, H, W)` -> `(B, channels[-1])`.

    Args:
        layers (`Sequence[int]`): Blocks per stage; 4 for 28 layers.
        channels (`Sequence[int]`): Width of each stage; 32, 64 and 128 for factor 2.
        stem_channels (`int`): Width of the first convolution; 16 in the paper.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        stem_channels: int,
        num_classes: int = 0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, stem_channels, 3, padding=1)
        width = stem_channels
        for stage, (count, stage_channels) in enumerate(zip(layers, channels, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            widths = [width] + [stage_channels] * (count - 1)
            blocks = [WideBlock(before, stage_channels, stride) for before, stride in zip(widths, strides)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            width = stage_channels
        self.bn1 = nn.BatchNorm2d(width, momentum=0.99)  # as in the authors' code: statistics of the last batches
        self.num_features = self.head_hidden_size = width
        self.stages = [f"layer{stage + 1}" for stage in range(len(layers))]
        self.reset_classifier(num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.bn1(x).relu()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing is not supported"  # the form in which timm's networks report it


def _widened_resnet(
    layers: Sequence[int], channels: Sequence[int], stem_channels: int, bottleneck: bool, **kwargs
) -> ResNet:
    """Return timm's ResNet with a stem of another width than 64."""
    network = ResNet(Bottleneck if bottleneck else BasicBlock, layers, channels=tuple(channels), **kwargs)
    network.conv1 = nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(stem_channels)
    block, kernel = network.layer1[0], 1 if bottleneck else 3
    out_channels = channels[0] * block.expansion
    block.conv1 = nn.Conv2d(stem_channels, block.bn1.num_features, kernel, padding=kernel // 2, bias=False)
    block.downsample = None
    if stem_channels != out_channels:
        convolution = nn.Conv2d(stem_channels, out_channels, 1, bias=False)
        block.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
    network.init_weights(kwargs.get("zero_init_last", True))
    return network


@register_model
def paws_wide_resnet(pretrained: bool = False, **kwargs) -> WideResNet:
    return build_model_with_cfg(
        WideResNet, "paws_wide_resnet", pretrained, **{**PAWS_NETWORKS["paws_wide_resnet"], **kwargs}
    )


@register_model
def paws_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    return build_model_with_cfg(
        _widened_resnet, "paws_resnet", pretrained, **{**PAWS_NETWORKS["paws_resnet"], **kwargs}
    )
