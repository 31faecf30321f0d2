"""The layers that leave out what the [CLS] does not need, against those that compute it all."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import ViTMSNModel

from hf_msn.models.encoder_layers import batched_products
from hf_msn.models.patch_dropping import PatchDroppingViTMSNModel


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return PatchDroppingViTMSNModel(tiny_config()).double()


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kept_patches", [None, torch.tensor([[0, 5, 9], [2, 3, 4], [15, 1, 0]])])
def test_the_cls_alone_has_the_value_and_the_gradients_it_has_among_all_tokens(
    encoder, pixel_values, kept_patches, attention
):
    encoder.set_attn_implementation(attention)
    tolerance = 1e-12 if attention == "sdpa" else 1e-6  # the eager softmax is in float32
    found = []
    for cls_only in (False, True):
        encoder.zero_grad()
        cls = encoder(pixel_values, kept_patches=kept_patches, cls_only=cls_only).last_hidden_state[:, 0]
        (cls * torch.arange(cls.numel()).view_as(cls)).sum().backward()
        found.append({"": cls.detach(), **{name: p.grad for name, p in encoder.named_parameters()}})
    everything, alone = found
    scale = max(gradient.abs().max() for gradient in everything.values())
    for name, value in alone.items():
        assert (value - everything[name]).abs().max() <= tolerance * scale, name


def test_the_cls_alone_spares_the_other_tokens_of_the_last_layer(encoder, pixel_values):
    tokens = {}
    for number, layer in enumerate(encoder.layers):
        for name in ("attention.q_proj", "attention.k_proj", "attention.o_proj", "mlp.fc1"):
            layer.get_submodule(name).register_forward_hook(
                lambda module, inputs, _, key=(number, name): tokens.update({key: inputs[0].shape[1]})
            )
    assert encoder(pixel_values, cls_only=True).last_hidden_state.shape == (3, 1, 32)
    assert [tokens[0, name] for name in ("attention.q_proj", "attention.k_proj", "mlp.fc1")] == [17, 17, 17]
    assert tokens[1, "attention.k_proj"] == 17
    assert [tokens[1, name] for name in ("attention.q_proj", "attention.o_proj", "mlp.fc1")] == [1, 1, 1]


def test_the_model_asks_for_the_cls_alone():
    model, tokens = tiny_model(), []
    for encoder in (model.encoder, model.target_encoder):
        encoder.layers[-1].mlp.register_forward_hook(lambda module, inputs, _: tokens.append(inputs[0].shape[1]))
    model(**tiny_batch())
    assert tokens == [1, 1, 1]  # anchors, focal views, target


def test_the_cls_alone_and_an_attention_mask_are_an_error(encoder, pixel_values):
    with pytest.raises(ValueError, match="`cls_only` takes no `attention_mask`"):
        encoder(pixel_values, cls_only=True, attention_mask=torch.ones(3, 17))


def test_batched_products_equal_the_loop():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    found, _ = batched_products(None, query, key, value, None, dropout=0.0, scaling=0.5)
    for image in range(2):
        for token in range(5):
            for head in range(3):
                scores = [0.5 * float(query[image, head, token] @ key[image, head, other]) for other in range(5)]
                total = sum(math.exp(score) for score in scores)
                expected = sum(math.exp(score) / total * value[image, head, i] for i, score in enumerate(scores))
                torch.testing.assert_close(found[image, token, head], expected, rtol=1e-12, atol=1e-14)


def test_batched_products_drop_as_many_weights_as_asked():
    torch.manual_seed(0)
    uniform = torch.zeros(1, 1, 100, 4)
    found, _ = batched_products(None, uniform, uniform, torch.ones(1, 1, 100, 4), None, dropout=0.75, scaling=1.0)
    assert found.mean().item() == pytest.approx(1.0, abs=0.1)  # what is kept is scaled up
    assert found.std().item() == pytest.approx(math.sqrt(0.75 / 0.25 / 100), rel=0.3)


def test_sixteen_bits_on_the_cpu_go_backward_without_the_flash_kernel():
    batch = tiny_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiny_model(mask_ratio=0.0)
        names = operators_of_the_graph(low(**batch).loss)
    assert "ScaledDotProductFlashAttentionForCpuBackward0" not in names
    full = tiny_model(mask_ratio=0.0)
    assert "ScaledDotProductFlashAttentionForCpuBackward0" in operators_of_the_graph(full(**batch).loss)


def test_without_gradients_sixteen_bits_equal_the_plain_model_bit_for_bit(encoder, pixel_values):
    encoder = encoder.to(torch.bfloat16).eval()
    plain = ViTMSNModel(tiny_config().to_vit_msn_config()).to(torch.bfloat16).eval()
    plain.load_state_dict(encoder.state_dict())
    pixel_values = pixel_values.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(encoder(pixel_values).last_hidden_state, plain(pixel_values).last_hidden_state)


def operators_of_the_graph(loss: torch.Tensor) -> set[str]:
    """Names of all that `loss.backward()` will run."""
    names, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    return names
