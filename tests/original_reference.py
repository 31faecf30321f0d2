"""The networks of the authors' code, written plainly as functions of weights by their original names.

Pre-norm ViT with fused qkv, LayerNorm eps 1e-6 and exact GELU; ResNet with the stride in the 3x3; WideResNet with
biases and the stride in the second convolution; heads on top. Weights and running statistics are random, so that
exchanged tensors change the result.
"""

import math

import torch
import torch.nn.functional as F


def random_tensor(generator: torch.Generator, *shape: int, scale: float = 0.2) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=generator)


def affine(weights: dict, name: str, generator, *shape: int, norm: bool = False, bias: bool = True) -> None:
    scale = 0.2 if norm else math.prod(shape[1:]) ** -0.5
    weights[f"{name}.weight"] = random_tensor(generator, *shape, scale=scale) + (1 if norm else 0)
    if bias:
        weights[f"{name}.bias"] = random_tensor(generator, shape[0])


def batch_norm(weights: dict, name: str, generator, size: int) -> None:
    affine(weights, name, generator, size, norm=True)
    weights[f"{name}.running_mean"] = random_tensor(generator, size)
    weights[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=generator)
    weights[f"{name}.num_batches_tracked"] = torch.tensor(int(torch.randint(1, 99, (1,), generator=generator)))


def vit_weights(
    seed: int = 0,
    *,
    width=64,
    depth=2,
    mlp=96,
    patch=4,
    side=4,
    hidden=40,
    dim=24,
    bn=True,
    qkv_bias=True,
    head=True,
    pred=0,
) -> dict[str, torch.Tensor]:
    """A trunk and, by default, its projection head; `pred` is the hidden width of a prediction head."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "cls_token": random_tensor(generator, 1, 1, width),
        "pos_embed": random_tensor(generator, 1, 1 + side**2, width),
    }
    affine(weights, "patch_embed.proj", generator, width, 3, patch, patch)
    for block in range(depth):
        prefix = f"blocks.{block}."
        affine(weights, f"{prefix}norm1", generator, width, norm=True)
        affine(weights, f"{prefix}attn.qkv", generator, 3 * width, width, bias=qkv_bias)
        affine(weights, f"{prefix}attn.proj", generator, width, width)
        affine(weights, f"{prefix}norm2", generator, width, norm=True)
        affine(weights, f"{prefix}mlp.fc1", generator, mlp, width)
        affine(weights, f"{prefix}mlp.fc2", generator, width, mlp)
    affine(weights, "norm", generator, width, norm=True)
    if head:
        add_heads(weights, generator, width, hidden, dim, bn, pred)
    return weights


def add_heads(weights: dict, generator, width: int, hidden: int, dim: int, bn: bool = True, pred: int = 0) -> None:
    affine(weights, "fc.fc1", generator, hidden, width)
    affine(weights, "fc.fc2", generator, hidden, hidden)
    affine(weights, "fc.fc3", generator, dim, hidden)
    if bn:
        batch_norm(weights, "fc.bn1", generator, hidden)
        batch_norm(weights, "fc.bn2", generator, hidden)
    if pred:
        affine(weights, "pred.fc1", generator, pred, dim)
        affine(weights, "pred.fc2", generator, dim, pred)
        if bn:
            batch_norm(weights, "pred.bn1", generator, dim)
            batch_norm(weights, "pred.bn2", generator, pred)


def resnet_weights(
    seed: int = 0, blocks=(1, 1, 1, 1), channels=(8, 16, 24, 32), bottleneck=True, hidden=40, dim=24, pred=0, stem=64
) -> dict[str, torch.Tensor]:
    """`stem` is the width of the first convolution, 64 unless the network is widened."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def convolution(name, *shape):
        affine(weights, name, generator, *shape, bias=False)

    convolution("conv1", stem, 3, 7, 7)
    batch_norm(weights, "bn1", generator, stem)
    width = stem
    for stage, (count, channel) in enumerate(zip(blocks, channels)):
        out = channel * (4 if bottleneck else 1)
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            shapes = [(channel, width, 3, 3), (channel, channel, 3, 3)]
            if bottleneck:
                shapes = [(channel, width, 1, 1), (channel, channel, 3, 3), (out, channel, 1, 1)]
            for place, shape in enumerate(shapes, start=1):
                convolution(f"{name}.conv{place}", *shape)
                batch_norm(weights, f"{name}.bn{place}", generator, shape[0])
            if block == 0 and (stage > 0 or width != out):
                convolution(f"{name}.downsample.0", out, width, 1, 1)
                batch_norm(weights, f"{name}.downsample.1", generator, out)
            width = out
    add_heads(weights, generator, width, hidden, dim, pred=pred)
    return weights


def wide_resnet_weights(
    seed: int = 0, blocks: int = 1, channels=(8, 16, 24), stem=4, hidden=40, dim=24, pred=0
) -> dict[str, torch.Tensor]:
    """`blocks` per stage; WideResNet-28-2 has 4, and channels (32, 64, 128) after 16."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    affine(weights, "conv1", generator, stem, 3, 3, 3)
    width = stem
    for stage, channel in enumerate(channels):
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            batch_norm(weights, f"{name}.bn1", generator, width)
            affine(weights, f"{name}.conv1", generator, channel, width, 3, 3)
            batch_norm(weights, f"{name}.bn2", generator, channel)
            affine(weights, f"{name}.conv2", generator, channel, channel, 3, 3)
            if block == 0 and (stage > 0 or width != channel):
                affine(weights, f"{name}.shortcut.0", generator, channel, width, 1, 1)
            width = channel
    batch_norm(weights, "bn1", generator, width)
    add_heads(weights, generator, width, hidden, dim, pred=pred)
    return weights


def vit_forward(weights: dict, images: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] before and after the final LayerNorm: two of (B, width)."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    patch = weights["patch_embed.proj.weight"]
    x = F.conv2d(images, patch, weights["patch_embed.proj.bias"], stride=patch.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    batch, tokens, width = x.shape
    positions = weights["pos_embed"]
    trained = positions.shape[1] - 1
    if tokens != trained:  # by a scale factor, which is how the original goes to 96 pixels
        side = int(math.sqrt(trained))
        grid = positions[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
        factor = math.sqrt(tokens / trained)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
        positions = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)
    x = torch.cat([weights["cls_token"].expand(batch, -1, -1), x], dim=1) + positions
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for block in range(depth):
        prefix = f"blocks.{block}."
        qkv = linear(f"{prefix}attn.qkv", norm(f"{prefix}norm1", x))
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
        x = x + linear(f"{prefix}attn.proj", (attention @ v).transpose(1, 2).reshape(batch, -1, width))
        inner = linear(f"{prefix}mlp.fc1", norm(f"{prefix}norm2", x))
        x = x + linear(f"{prefix}mlp.fc2", inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    return x[:, 0], norm("norm", x)[:, 0]


def normalised(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Batch normalisation with the running statistics, or `x` where there is none."""
    if f"{name}.weight" not in weights:
        return x
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, gain, bias = (
        weights[f"{name}.{kind}"].view(shape) for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * gain + bias


def resnet_forward(weights: dict, images: torch.Tensor) -> torch.Tensor:
    """Features (B, width) after the mean over the image."""

    def unit(name, place, x, stride=1):
        kernel = weights[f"{name}.conv{place}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return normalised(weights, f"{name}.bn{place}", x)

    x = F.conv2d(images, weights["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(normalised(weights, "bn1", x).relu(), 3, stride=2, padding=1)
    for stage in range(1, 5):
        block = 0
        while (name := f"layer{stage}.{block}") and f"{name}.conv1.weight" in weights:
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in weights:
                shortcut = F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride)
                shortcut = normalised(weights, f"{name}.downsample.1", shortcut)
            if f"{name}.conv3.weight" in weights:
                inner = unit(name, 2, unit(name, 1, x).relu(), stride).relu()
                inner = unit(name, 3, inner)
            else:
                inner = unit(name, 2, unit(name, 1, x, stride).relu())
            x = (inner + shortcut).relu()
            block += 1
    return x.mean(dim=(2, 3))


def wide_resnet_forward(weights: dict, images: torch.Tensor) -> torch.Tensor:
    """Features (B, width) after the mean over the image."""

    def convolution(name, x, stride=1):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.conv2d(x, kernel, bias, stride=stride, padding=kernel.shape[-1] // 2)

    x = convolution("conv1", images)
    for stage in (1, 2, 3):
        block = 0
        while (name := f"layer{stage}.{block}") and f"{name}.conv1.weight" in weights:
            stride = 2 if stage > 1 and block == 0 else 1
            inner = convolution(f"{name}.conv1", normalised(weights, f"{name}.bn1", x).relu())
            inner = convolution(f"{name}.conv2", normalised(weights, f"{name}.bn2", inner).relu(), stride)
            has_shortcut = f"{name}.shortcut.0.weight" in weights
            x = inner + (convolution(f"{name}.shortcut.0", x, stride) if has_shortcut else x)
            block += 1
    return normalised(weights, "bn1", x).relu().mean(dim=(2, 3))


def project(weights: dict, features: torch.Tensor, activation=F.gelu) -> torch.Tensor:
    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    hidden = activation(normalised(weights, "fc.bn1", linear("fc.fc1", features)))
    hidden = activation(normalised(weights, "fc.bn2", linear("fc.fc2", hidden)))
    return linear("fc.fc3", hidden)


def predict(weights: dict, projections: torch.Tensor, activation=F.relu) -> torch.Tensor:
    hidden = normalised(weights, "pred.bn1", projections)
    hidden = F.linear(hidden, weights["pred.fc1.weight"], weights["pred.fc1.bias"])
    hidden = activation(normalised(weights, "pred.bn2", hidden))
    return F.linear(hidden, weights["pred.fc2.weight"], weights["pred.fc2.bias"])


def doubled(weights: dict) -> dict:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def prefixed(weights: dict, prefix: str = "module.") -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def msn_checkpoint(full: bool = True, prefix: str = "module.", prototypes: int = 6, **shape) -> dict:
    """In the form of the original training loop, or with `full=False` in that of the released files."""
    target = vit_weights(1, **shape)
    generator = torch.Generator().manual_seed(9)
    content = {
        "target_encoder": prefixed(target, prefix),
        "prototypes": random_tensor(generator, prototypes, target["fc.fc3.weight"].shape[0]),
    }
    if full:
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        content = {"encoder": prefixed(vit_weights(2, **shape), prefix), **content}
        content.update(opt=optimizer, scaler=None, epoch=7, loss=3.5, batch_size=64, world_size=16, lr=1e-3)
    return content
