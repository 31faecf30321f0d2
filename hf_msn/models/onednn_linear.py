"""Linear layers whose products on the CPU are computed by oneDNN, with the bias, and for several layers at once."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

_MIN_WEIGHTS = 2**15  # below, the extra Python costs more than the products save


class OneDNNLinear(nn.Linear):
    """`nn.Linear` with the same weights under the same names, faster in training on the CPU.

    In float32 torch uses MKL for products, which knows no AVX-512 on AMD: there oneDNN, which torch contains for
    convolutions and 16 bits, is up to twice as fast. Without AVX-512 MKL is faster, and is left in place. In both
    precisions the bias is added in the product, without the copy into the output that `nn.Linear` needs. The order of
    the sums differs: results agree to rounding.

    Elsewhere (evaluation, other devices and dtypes, float32 by MKL on a CPU without AVX-512, bfloat16 on one
    without it, torch.compile) it is `nn.Linear`.
    """

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        """Replace each large `nn.Linear` inside `module`; parameters are taken over."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.weight.numel() >= _MIN_WEIGHTS:
                    with torch.device("meta"):  # draws no weights
                        layer = cls(child.in_features, child.out_features, bias=child.bias is not None)
                    layer.weight, layer.bias = child.weight, child.bias
                    setattr(parent, name, layer)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        dtype = _product_dtype(self, input)
        if dtype is None:
            return F.linear(input, self.weight, self.bias)
        return _Products.apply(*_cast(dtype, input, self.weight, self.bias))


def joint_linear(layers: Sequence[nn.Linear], input: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the outputs of several linear layers of one input `(..., in_features)`, each `(..., out_features)`.

    One product computes them all where every layer is a [`OneDNNLinear`] that uses oneDNN: the input is read, and cast
    to 16 bits, once instead of once per layer, and its gradient is one sum.
    """
    joined = all(type(layer) is OneDNNLinear and not _has_hooks(layer) for layer in layers)
    dtype = _product_dtype(layers[0], input) if joined else None
    if dtype is None or len({layer.bias is None for layer in layers}) > 1:
        return tuple(layer(input) for layer in layers)
    weight = torch.cat([layer.weight.to(dtype) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    output = _Products.apply(*_cast(dtype, input, weight, bias))
    return output.split([layer.out_features for layer in layers], dim=-1)


def _product_dtype(layer: nn.Linear, input: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of the products by oneDNN, or `None` if torch must compute them."""
    if _PRODUCT is None or not layer.training or torch.compiler.is_compiling() or not input.numel():
        return None
    if not input.device.type == layer.weight.device.type == "cpu" or layer.weight.dtype != torch.float32:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if _FASTER_IN_FLOAT32 and input.dtype == torch.float32 else None
    return torch.bfloat16 if HAS_BFLOAT16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def _cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


class _Products(torch.autograd.Function):
    """Y = X W^T + b, dX = dY W, dW = dY^T X, in the one dtype that all have."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        input, weight = ctx.saved_tensors
        input_gradient = weight_gradient = bias_gradient = None
        # with other strides, as of `sum()`, oneDNN takes 100 times as long
        rows = gradient.contiguous().flatten(0, -2)
        in_16_bits = gradient.dtype != torch.float32  # there torch uses oneDNN too, and copies less than `_product`
        if ctx.needs_input_grad[0]:
            input_gradient = rows @ weight if in_16_bits else _product(rows, weight.t())
            input_gradient = input_gradient.view(input.shape)
        if ctx.needs_input_grad[1]:
            inputs = input.flatten(0, -2)
            weight_gradient = rows.t() @ inputs if in_16_bits else _transposed_product(rows, inputs)
        if ctx.needs_input_grad[2]:
            bias_gradient = rows.sum(dim=0)
        return input_gradient, weight_gradient, bias_gradient


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b^T + bias."""
    return _PRODUCT(a, b, bias, "none", [], "")


def _transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b. The operator copies a transposed first argument: the smaller one comes first."""
    if a.shape[1] <= b.shape[1]:
        return _product(a.t(), b.t())
    return _product(b.t(), a.t()).t()


def _flops_of_product(input_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * math.prod(input_shape) * weight_shape[0]


# The switch: the operator that torch.compile uses. `None`, as in a build of torch without oneDNN, turns it off.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_FASTER_IN_FLOAT32 = torch.backends.cpu.get_cpu_capability() == "AVX512" or not torch.backends.mkl.is_available()
HAS_BFLOAT16 = _PRODUCT is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
if _PRODUCT is not None and _PRODUCT not in flop_registry:
    register_flop_formula(_PRODUCT)(_flops_of_product)  # without it FlopCounterMode counts 0
