"""The encoder that drops patches, against the plain ViTMSNModel of transformers."""

import fractions
import math

import pytest
import torch
from tiny import tiny_config
from transformers import ViTMSNModel

from hf_msn.models.patch_dropping import PatchDroppingViTMSNModel, draw_kept_patches, num_kept_patches

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


def test_what_is_dropped_cannot_be_seen(encoders):
    ours, _ = encoders
    kept = torch.tensor([[1, 2, 3, 6, 9]]).expand(3, -1)
    changed = images()
    changed[:, :, :PATCH, :PATCH] += 100.0  # patch 0
    changed[:, :, 3 * PATCH :, 3 * PATCH :] = math.nan  # patch 15
    before, after = (ours(x, kept_patches=kept).last_hidden_state for x in (images(), changed))
    assert torch.equal(before, after)
    changed = images()
    changed[:, :, :PATCH, PATCH : 2 * PATCH] += 1.0  # patch 1, which is kept
    assert not torch.allclose(before, ours(changed, kept_patches=kept).last_hidden_state)


def test_the_order_of_the_kept_patches_does_not_change_the_cls_token(encoders):
    ours, _ = encoders
    kept = torch.tensor([[1, 2, 3, 6, 9]]).expand(3, -1)
    forwards = ours(images(), kept_patches=kept).last_hidden_state
    backwards = ours(images(), kept_patches=kept.flip(1)).last_hidden_state
    torch.testing.assert_close(forwards[:, 0], backwards[:, 0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(forwards[:, 1:], backwards[:, 1:].flip(1), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_mask_it_is_the_plain_model_bit_for_bit(encoders, dtype):
    ours, plain = (encoder.to(dtype) for encoder in encoders)
    outputs = ours(images().to(dtype), output_hidden_states=True)
    expected = plain(images().to(dtype), output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 3
    assert all(torch.equal(mine, its) for mine, its in zip(outputs.hidden_states, expected.hidden_states))
    assert torch.equal(ours.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 4), (24, 24), (24, 16), (16, 24), (32, 8), (8, 32)])
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


def test_kept_patches_are_counted_row_by_row_in_images_that_are_not_square(encoders):
    ours, _ = encoders
    pixel_values, kept = images(16, 24), torch.tensor([[6 + 2]]).expand(3, -1)  # second row of six patches, third
    before = ours(pixel_values, kept_patches=kept).last_hidden_state
    elsewhere = pixel_values.clone()
    elsewhere[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = 0.0
    assert not torch.allclose(before, ours(elsewhere, kept_patches=kept).last_hidden_state)
    everywhere_else = torch.zeros_like(pixel_values)
    everywhere_else[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = pixel_values[
        :, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH
    ]
    assert torch.equal(before, ours(everywhere_else, kept_patches=kept).last_hidden_state)


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 18), (3, 16), (2, 2)])
def test_a_size_that_is_no_multiple_of_the_patch_is_an_error(encoders, height, width):
    message = f"images are {height} x {width} pixels, but both sides must be multiples of `patch_size`, which is 4"
    with pytest.raises(ValueError, match=message):
        encoders[0](images(height, width))


def test_cls_token_and_positions_are_drawn_where_the_plain_model_has_zeros():
    torch.manual_seed(0)
    embeddings = PatchDroppingViTMSNModel(tiny_config(image_size=64, hidden_size=64)).embeddings
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    plain = ViTMSNModel(tiny_config().to_vit_msn_config()).embeddings
    assert plain.position_embeddings.abs().max() == 0.0  # if this changes, ours need not draw any more


@pytest.mark.parametrize(
    ("image_size", "patch_size", "mask_ratio", "kept"),
    [
        (224, 16, 0.15, 166),  # S/16: floor(196 * 0.85)
        (224, 16, 0.3, 137),  # B/16
        (224, 16, 0.5, 98),  # L/16
        (224, 8, 0.3, 548),  # B/8
        (224, 4, 0.7, 940),  # B/4
        (224, 7, 0.7, 307),  # L/7
    ],
)
def test_number_of_kept_patches_for_the_sizes_of_the_paper(image_size, patch_size, mask_ratio, kept):
    num_patches = (image_size // patch_size) ** 2
    assert num_kept_patches(num_patches, mask_ratio) == kept
    assert draw_kept_patches(2, num_patches, mask_ratio, seed=(0,)).shape == (2, kept)


def test_number_of_kept_patches_is_not_thrown_off_by_floating_point():
    assert math.floor(10 * (1 - 0.9)) == 0  # what is to be avoided
    for num_patches in (4, 10, 16, 49, 100, 196, 784, 1024, 3136):
        for percent in range(100):
            exact = num_patches * (1 - fractions.Fraction(percent, 100))
            assert num_kept_patches(num_patches, percent / 100) == math.floor(exact)


def test_no_patch_is_kept_twice():
    kept = draw_kept_patches(200, 16, 0.25, seed=(1, 2, 3))
    assert kept.min() == 0
    assert kept.max() == 15
    assert all(len(set(row)) == 12 for row in kept.tolist())


def test_every_patch_is_kept_equally_often():
    # A patch is kept by Binomial(4000, 3 / 4) images: five standard deviations are 137.
    counts = draw_kept_patches(4000, 16, 0.25, seed=(7,)).flatten().bincount(minlength=16)
    assert (counts - 3000).abs().max() < 137


def test_masks_differ_between_images_draws_ranks_and_seeds():
    rows = [row for seed in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)) for row in draw(seed).tolist()]
    assert len({tuple(sorted(row)) for row in rows}) == len(rows) == 32


def draw(seed: tuple[int, ...]) -> torch.Tensor:
    return draw_kept_patches(8, 64, 0.5, seed=seed)


def test_a_shared_mask_is_one_for_all_images():
    kept = draw_kept_patches(8, 64, 0.5, seed=(0, 0, 0), shared=True)
    assert kept.shape == (8, 32)
    assert torch.equal(kept, kept[:1].expand(8, -1))


def test_a_draw_depends_on_its_seed_alone_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    first, state = draw((5, 0, 9)), torch.get_rng_state()
    torch.rand(100)
    assert torch.equal(draw((5, 0, 9)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
