"""The encoder that drops patches and its faster layers, against the plain ViTMSNModel of transformers."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import ViTMSNModel

from hf_msn.models.encoder import PatchDroppingViTMSNModel, batched_products

PATCH = 4


@pytest.fixture
def encoders():
    """Ours and the plain one with the same weights, in float64."""
    torch.manual_seed(0)
    ours = PatchDroppingViTMSNModel(tiny_config()).double().eval()
    plain = ViTMSNModel(tiny_config().to_vit_msn_config()).double().eval()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def images(height: int = 16, width: int = 16, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_on_kept_patches(plain, pixel_values, kept_patches, interpolate=False):
    """The plain model's own embeddings and layers, an image at a time, on [CLS] and the patches picked by hand."""
    outputs = []
    for image, kept in zip(pixel_values, kept_patches.tolist()):
        tokens = plain.embeddings(image[None], interpolate_pos_encoding=interpolate)
        tokens = torch.stack([tokens[0, 0], *(tokens[0, 1 + patch] for patch in kept)])[None]
        for layer in plain.layers:
            tokens = layer(tokens)
        outputs.append(plain.layernorm(tokens)[0])
    return torch.stack(outputs)


# The eager attention of transformers takes its softmax in float32.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])
def test_kept_patches_equal_the_plain_model_on_tokens_picked_by_hand(encoders, attention, tolerance):
    ours, plain = encoders
    ours.set_attn_implementation(attention)
    kept = torch.tensor([[0, 5, 15, 2, 7], [1, 2, 3, 4, 5], [15, 14, 8, 0, 3]])
    torch.testing.assert_close(
        ours(images(), kept_patches=kept).last_hidden_state,
        plain_on_kept_patches(plain, images(), kept),
        rtol=100 * tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_mask_it_is_the_plain_model_bit_for_bit(encoders, dtype):
    ours, plain = (encoder.to(dtype) for encoder in encoders)
    outputs = ours(images().to(dtype), output_hidden_states=True)
    expected = plain(images().to(dtype), output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 3
    assert all(torch.equal(mine, its) for mine, its in zip(outputs.hidden_states, expected.hidden_states))
    assert torch.equal(ours.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 4), (24, 24), (24, 16), (8, 32)])
def test_other_sizes_equal_the_plain_model_with_interpolated_positions(encoders, height, width):
    ours, plain = encoders
    pixel_values = images(height, width)
    expected = plain(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(ours(pixel_values).last_hidden_state, expected)
    kept = torch.tensor([[0], [0], [0]]) if height == 4 else torch.tensor([[3, 1], [0, 2], [2, 3]])
    torch.testing.assert_close(
        ours(pixel_values, kept_patches=kept).last_hidden_state,
        plain_on_kept_patches(plain, pixel_values, kept, interpolate=True),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 18), (2, 2)])
def test_a_size_that_is_no_multiple_of_the_patch_is_an_error(encoders, height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} .*`patch_size`"):
        encoders[0](images(height, width))


@pytest.fixture
def encoder(encoders):
    """Ours, in training mode."""
    return encoders[0].train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kept_patches", [None, torch.tensor([[0, 5, 9], [2, 3, 4], [15, 1, 0]])])
def test_the_cls_alone_has_the_value_and_the_gradients_it_has_among_all_tokens(encoder, kept_patches, attention):
    encoder.set_attn_implementation(attention)
    tolerance = 1e-12 if attention == "sdpa" else 1e-6  # the eager softmax is in float32
    found = []
    for cls_only in (False, True):
        encoder.zero_grad()
        cls = encoder(images(), kept_patches=kept_patches, cls_only=cls_only).last_hidden_state[:, 0]
        (cls * torch.arange(cls.numel()).view_as(cls)).sum().backward()
        found.append({"": cls.detach(), **{name: p.grad for name, p in encoder.named_parameters()}})
    everything, alone = found
    scale = max(gradient.abs().max() for gradient in everything.values())
    for name, value in alone.items():
        assert (value - everything[name]).abs().max() <= tolerance * scale, name


def test_the_cls_alone_spares_the_other_tokens_of_the_last_layer(encoder):
    tokens = {}
    for number, layer in enumerate(encoder.layers):
        for name in ("attention.q_proj", "attention.k_proj", "attention.o_proj", "mlp.fc1"):
            layer.get_submodule(name).register_forward_hook(
                lambda module, inputs, _, key=(number, name): tokens.update({key: inputs[0].shape[1]})
            )
    assert encoder(images(), cls_only=True).last_hidden_state.shape == (3, 1, 32)
    assert [tokens[0, name] for name in ("attention.q_proj", "attention.k_proj", "mlp.fc1")] == [17, 17, 17]
    assert tokens[1, "attention.k_proj"] == 17
    assert [tokens[1, name] for name in ("attention.q_proj", "attention.o_proj", "mlp.fc1")] == [1, 1, 1]


def test_the_model_asks_for_the_cls_alone():
    model, tokens = tiny_model(), []
    for encoder in (model.encoder, model.target_encoder):
        encoder.layers[-1].mlp.register_forward_hook(lambda module, inputs, _: tokens.append(inputs[0].shape[1]))
    model(**tiny_batch())
    assert tokens == [1, 1, 1]  # anchors, focal views, target


def test_the_cls_alone_and_an_attention_mask_are_an_error(encoder):
    with pytest.raises(ValueError, match="`cls_only` takes no `attention_mask`"):
        encoder(images(), cls_only=True, attention_mask=torch.ones(3, 17))


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


def test_without_gradients_sixteen_bits_equal_the_plain_model_bit_for_bit(encoder):
    encoder = encoder.to(torch.bfloat16).eval()
    plain = ViTMSNModel(tiny_config().to_vit_msn_config()).to(torch.bfloat16).eval()
    plain.load_state_dict(encoder.state_dict())
    pixel_values = images().to(torch.bfloat16)
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
