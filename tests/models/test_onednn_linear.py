"""Linear layers by oneDNN against torch's own, forward and backward."""

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_msn.models import onednn_linear
from hf_msn.models.onednn_linear import OneDNNLinear, joint_linear


def layers_of(*sizes, bias=True):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(*size, bias=bias) for size in sizes)


def run(layers, input, autocast=False):
    """Return outputs, and the gradients of a weighted sum of them with respect to input and parameters."""
    input = input.clone().requires_grad_()
    layers.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = joint_linear(list(layers), input) if len(layers) > 1 else (layers[0](input),)
    weights = [torch.linspace(-1, 1, output.numel()).view(output.shape) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
    return [output.detach() for output in outputs], [input.grad, *(p.grad for p in layers.parameters())]


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(onednn_linear, "_FASTER_IN_FLOAT32", True)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the products that oneDNN computes."""
    count, product = [], onednn_linear._PRODUCT

    def counted(*args):
        count.append(args[0].shape)
        return product(*args)

    monkeypatch.setattr(onednn_linear, "_PRODUCT", counted)
    return count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 192), (2, 3, 4, 192)])
@pytest.mark.parametrize("sizes", [[(192, 768)], [(192, 192), (192, 256), (192, 320)]])
def test_outputs_and_gradients_are_those_of_plain_layers_in_float64(sizes, shape, bias, products):
    layers = layers_of(*sizes, bias=bias)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = run(layers_of(*sizes, bias=bias).double(), input.double())
    OneDNNLinear.replace_in(layers)
    outputs, gradients = run(layers, input)
    assert len(products) == 3, "one product for the outputs of all layers, and two for the gradients"
    for ours, theirs in zip([*outputs, *gradients], [*expected[0], *expected[1]]):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("gradient", [torch.ones(()), torch.ones(768), torch.ones(5, 1)], ids=["sum", "row", "column"])
def test_an_expanded_gradient_is_made_contiguous_before_the_slow_operator_sees_it(gradient, monkeypatch):
    product = onednn_linear._PRODUCT

    def checked(*args):
        assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in args[:2])
        return product(*args)

    monkeypatch.setattr(onednn_linear, "_PRODUCT", checked)
    layers, input = layers_of((192, 768)), torch.randn(5, 192, requires_grad=True)
    layers[0](input).backward(gradient.expand(5, 768))
    expected = [input.grad.clone(), *(p.grad.clone() for p in layers.parameters())]
    input.grad = None
    layers.zero_grad()
    OneDNNLinear.replace_in(layers)
    layers[0](input).backward(gradient.expand(5, 768))
    for ours, theirs in zip([input.grad, *(p.grad for p in layers.parameters())], expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[(192, 768)], [(192, 192), (192, 256)]])
def test_under_autocast_they_are_those_of_autocast(sizes, products):
    layers = layers_of(*sizes)
    input = torch.randn(6, 11, 192, generator=torch.Generator().manual_seed(1))
    expected, gradients_expected = run(layers_of(*sizes), input, autocast=True)
    exact, exact_gradients = run(layers_of(*sizes).double(), input.double())
    OneDNNLinear.replace_in(layers)
    outputs, gradients = run(layers, input, autocast=True)
    assert len(products) == (1 if onednn_linear.HAS_BFLOAT16 else 0)  # without it torch's own products
    for ours, theirs, truth in zip(
        [*outputs, *gradients], [*expected, *gradients_expected], [*exact, *exact_gradients]
    ):
        assert ours.dtype == theirs.dtype
        size = truth.abs().max()
        error, error_of_torch = (ours - truth).abs().max() / size, (theirs - truth).abs().max() / size
        assert error < 0.02 and error < 1.5 * error_of_torch + 1e-6


def test_strided_inputs_and_gradients():
    layers, plain = layers_of((192, 256)), layers_of((192, 256))
    OneDNNLinear.replace_in(layers)
    tokens = torch.randn(4, 6, 192, generator=torch.Generator().manual_seed(1))
    for input in (tokens[:, :1], tokens[:, ::2], tokens.transpose(0, 1)):
        ours, theirs = input.detach().requires_grad_(), input.detach().requires_grad_()
        ours_out, theirs_out = layers[0](ours), plain[0](theirs)
        torch.testing.assert_close(ours_out, theirs_out, rtol=1e-5, atol=1e-5)
        ours_out.sum().backward(), theirs_out.sum().backward()  # the gradient of a sum is expanded: strides of 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layers[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_frozen_parameters_and_inputs_get_no_gradient(products):
    layers = layers_of((192, 256))
    OneDNNLinear.replace_in(layers)
    layers[0].weight.requires_grad_(False)
    layers[0](torch.ones(3, 192)).sum().backward()
    assert layers[0].weight.grad is None
    assert torch.equal(layers[0].bias.grad, torch.full((256,), 3.0))
    assert len(products) == 1


def test_outside_of_training_in_float32_it_is_the_plain_layer_bit_for_bit(products, monkeypatch):
    small, large = layers_of((64, 128)), layers_of((192, 256))
    plain = layers_of((192, 256))[0]
    for layers in (small, large):
        OneDNNLinear.replace_in(layers)
    assert type(small[0]) is nn.Linear and type(large[0]) is OneDNNLinear
    input = torch.randn(5, 192)
    assert torch.equal(large.eval()[0](input), plain(input))
    large.train()
    assert large[0](torch.empty(0, 192)).shape == (0, 256)
    monkeypatch.setattr(onednn_linear, "_FASTER_IN_FLOAT32", False)  # where oneDNN is slower than torch's products
    assert torch.equal(large[0](input), plain(input))
    assert torch.equal(torch.cat(joint_linear([large[0], large[0]], input), dim=1), plain(input).repeat(1, 2))
    assert torch.equal(large.double()[0](input.double()), plain.double()(input.double()))
    assert not products


def test_layers_with_hooks_or_of_another_class_are_called_one_by_one(products):
    layers = layers_of((192, 192), (192, 192))
    OneDNNLinear.replace_in(layers)
    seen = []
    layers[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    joint_linear(list(layers), torch.ones(3, 192))
    assert seen == [(3, 192)] and len(products) == 2


def test_its_operations_are_counted():
    counts = []
    for replace in (False, True):
        layers = layers_of((192, 256))
        if replace:
            OneDNNLinear.replace_in(layers)
        with FlopCounterMode(display=False) as counter:
            layers[0](torch.ones(5, 3, 192, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 15 * 192 * 256] * 2


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_loss_and_gradient_of_a_model_are_those_of_plain_layers(monkeypatch, products, autocast, tolerance):
    encoder = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 384}
    model = tiny_model(image_size=32, patch_size=8, **encoder)
    views = torch.randn(8, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for autocast_here, product in ((autocast, onednn_linear._PRODUCT), (False, None)):
        monkeypatch.setattr(onednn_linear, "_PRODUCT", product)
        model.zero_grad()
        model.seed_masks(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_here):
            loss = model(pixel_values=views[:, 0], anchor_pixel_values=views[:, 1:]).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.encoder.parameters()]
        found.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (plain_loss, plain_gradient) = found
    assert loss == pytest.approx(plain_loss, rel=tolerance)
    assert (gradient - plain_gradient).norm() <= 10 * tolerance * plain_gradient.norm()
    assert products or (autocast and not onednn_linear.HAS_BFLOAT16)
