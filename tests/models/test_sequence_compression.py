"""Token dropout and patch scaling of the views: exact where nothing is lost, resumable, counted in FLOPs."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_gradient_cache import byol_views, msn, msn_views, take_cached
from tiny import tiny_config
from tiny_semi_supervised import assert_same_step, semi_supervised_batch, take, tiny_byol, tiny_paws, tiny_suncet
from torch.utils.flop_counter import FlopCounterMode

from hf_msn import PAWSForPreTraining, SequenceCompression
from hf_msn.models.encoder import PatchDroppingViTMSNModel
from hf_msn.models.patch_resampling import resample_patch_weight
from hf_msn.models.sequence_compression import encoder_flops

MODELS = {
    "msn": (msn, msn_views),
    "paws": (tiny_paws, semi_supervised_batch),
    "suncet": (tiny_suncet, lambda: semi_supervised_batch(small_crops=0)),
    "byol": (partial(tiny_byol, mask_ratio=0.25), byol_views),
    "simsiam": (partial(tiny_byol, ema=False, mask_ratio=0.0), byol_views),
}


def watch_tokens(model) -> list[tuple[str, int]]:
    """Collect, of each encoder pass, the number of images and of tokens in the first layer."""
    seen = []
    for name in ("encoder", "target_encoder"):
        if getattr(model, name, None) is not None:
            getattr(model, name).layers[0].register_forward_pre_hook(
                lambda layer, inputs, name=name: seen.append((name, *inputs[0].shape[:2]))
            )
    return seen


@pytest.mark.parametrize("method", MODELS)
def test_without_dropout_and_with_the_patch_size_of_the_model_a_step_is_the_plain_one(method):
    make, batch = MODELS[method]
    model, batch = make(), batch()
    expected = take(copy.deepcopy(model), batch)
    for compression in (SequenceCompression(), SequenceCompression(0.0, 4)):
        compressed = copy.deepcopy(model)
        compressed.compression = compression
        assert_same_step(take(compressed, batch), expected, tolerance=0)
        assert compression.counts["flops"] == compression.counts["plain_flops"] > 0


def test_each_kind_of_view_loses_what_its_setting_says():
    model = msn(mask_ratio=0.25)
    seen = watch_tokens(model)
    views = {"focal": {"patch_size": 8}, "target": {"dropout": 0.75}}
    model.compression = SequenceCompression(0.5, views=views)
    model(**msn_views())
    # of 16 patches the mask keeps 12 and the dropout 6; a focal view of 8 pixels is one patch of 8
    assert seen == [("encoder", 10, 7), ("encoder", 10, 2), ("target_encoder", 5, 5)]
    assert model.compression.counts["images"] == 25
    assert model.compression.counts["tokens"] == 10 * 7 + 10 * 2 + 5 * 5


def test_targets_are_whole_by_default_and_evaluation_always():
    model = msn()
    seen = watch_tokens(model)
    model.compression = SequenceCompression(0.5)
    model(**msn_views())
    model.eval()
    model(**msn_views())
    assert [tokens for _, _, tokens in seen] == [7, 3, 17, 13, 5, 17]


def test_supports_and_views_share_a_pass_only_if_they_lose_the_same():
    model, batch = tiny_paws(), semi_supervised_batch()
    seen = watch_tokens(model)
    model.compression = SequenceCompression(0.5)
    model(**batch)
    model.compression = SequenceCompression(0.5, views={"support": {}})
    model(**batch)
    assert [row[1:] for row in seen] == [(12, 9), (6, 3), (6, 17), (6, 9), (6, 3)]


@pytest.mark.parametrize("method", MODELS)
def test_the_gradient_cache_encodes_again_what_was_drawn(method):
    make, batch = MODELS[method]
    model, batch = make(), batch()
    model.compression = SequenceCompression(0.5, 3)
    assert_same_step(take_cached(copy.deepcopy(model), batch, 2), take(copy.deepcopy(model), batch))
    assert (take(copy.deepcopy(model), batch)[0] - take(make(), batch)[0]).abs() > 1e-9


def test_with_gradient_checkpointing():
    model = msn()
    model.compression = SequenceCompression(0.5, 3)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable()
    assert_same_step(take(checkpointed, msn_views()), take(model, msn_views()))


@pytest.mark.parametrize("method", MODELS)
def test_draws_differ_between_steps_and_go_on_from_the_state_dict(method):
    make, batch = MODELS[method]
    model, batch = make(), batch()

    def losses(model, count):
        return [model(**batch).loss.item() for _ in range(count)]

    model.compression = SequenceCompression(0.5)
    model.seed_masks(3)
    first = copy.deepcopy(model)
    expected = losses(first, 2)
    assert len({*expected}) == 2
    resumed = make(seed=1)
    resumed.compression = SequenceCompression(0.5)
    losses(resumed, 1)
    resumed.load_state_dict(first.state_dict())
    assert losses(resumed, 2) == losses(first, 2)
    other = copy.deepcopy(model)
    other.seed_masks(4)
    assert losses(other, 1)[0] != expected[0]


def test_a_checkpoint_without_the_state_of_the_draws_loads(tmp_path):
    model = tiny_paws().float()
    model.compression = SequenceCompression(0.5)
    model(**{name: t.float() if t.is_floating_point() else t for name, t in semi_supervised_batch().items()})
    assert model.mask_state.tolist() == [0, 2]  # one for each size of the views
    old = {name: tensor for name, tensor in model.state_dict().items() if name != "mask_state"}
    model.save_pretrained(tmp_path, state_dict=dict(old))
    loaded = PAWSForPreTraining.from_pretrained(tmp_path)
    assert loaded.mask_state.tolist() == [0, 0]
    assert torch.equal(loaded.encoder.layernorm.weight, model.encoder.layernorm.weight)
    model.load_state_dict(old)
    assert model.mask_state.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="mask_state"):
        msn().load_state_dict({name: t for name, t in msn().state_dict().items() if name != "mask_state"})


# Patch scaling


def enlarge_patches(images: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Enlarge each patch by itself, bicubically, in a loop."""
    rows, columns = images.shape[-2] // old, images.shape[-1] // old
    enlarged = images.new_empty(*images.shape[:2], rows * new, columns * new)
    for row in range(rows):
        for column in range(columns):
            patch = images[..., row * old : (row + 1) * old, column * old : (column + 1) * old]
            patch = F.interpolate(patch, (new, new), mode="bicubic", antialias=True)
            enlarged[..., row * new : (row + 1) * new, column * new : (column + 1) * new] = patch
    return enlarged


@pytest.mark.parametrize("patch_size", [5, 7, 8])
def test_enlarged_patches_have_the_embeddings_of_the_plain_ones(patch_size):
    torch.manual_seed(0)
    encoder = PatchDroppingViTMSNModel(tiny_config()).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found = encoder(enlarge_patches(images, 4, patch_size), patch_size=patch_size).last_hidden_state
    torch.testing.assert_close(found, encoder(images).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_resampled_weights_are_the_pseudo_inverse_with_gradient_to_the_one_set_of_weights():
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for new in (2, 3, 8):
        columns = []
        for pixel in range(16):
            basis = torch.eye(16, dtype=torch.float64)[pixel].view(1, 1, 4, 4)
            columns.append(F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten())
        resize = torch.stack(columns, dim=1)  # x' = resize @ x
        inverse = torch.linalg.pinv(resize.T)
        expected = torch.stack([inverse @ kernel.flatten() for row in weight for kernel in row])
        found = resample_patch_weight(weight, new)
        torch.testing.assert_close(found.reshape(6, -1), expected, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(found.square().sum(), weight)
        (reference,) = torch.autograd.grad(expected.square().sum(), weight)
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)
        assert gradient.norm() > 0.1


def test_views_are_resized_to_the_nearest_multiple_and_positions_to_the_new_grid():
    encoder = PatchDroppingViTMSNModel(tiny_config()).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    resized = F.interpolate(images, (15, 15), mode="bicubic", antialias=True)
    found = encoder(images, patch_size=5).last_hidden_state
    assert found.shape[1] == 1 + 9
    torch.testing.assert_close(found, encoder(resized, patch_size=5).last_hidden_state, rtol=0, atol=0)
    # a plain encoder of 12 pixels has the same 3 x 3 positions
    tokens = encoder._embed(images, None, 5)
    weight = resample_patch_weight(encoder.embeddings.patch_embeddings.projection.weight, 5)
    first = (resized[0, :, :5, 5:10] * weight[7]).sum() + encoder.embeddings.patch_embeddings.projection.bias[7]
    grid = encoder.embeddings.position_embeddings[:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    positions = F.interpolate(grid, (3, 3), mode="bicubic")
    torch.testing.assert_close(tokens[0, 2, 7], first + positions[0, 7, 0, 1])


def test_kept_patches_count_in_the_new_grid():
    encoder = PatchDroppingViTMSNModel(tiny_config()).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    order = torch.tensor([[3, 0, 2, 1], [1, 2, 0, 3]])
    whole = encoder(images, patch_size=8).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images, kept_patches=order, patch_size=8).last_hidden_state[:, 0], whole)


def test_under_autocast_the_weights_are_resampled_in_float32():
    model, batch = msn(torch.float32), msn_views(torch.float32)
    model.compression = SequenceCompression(0.25, 6, {"focal": {"patch_size": 6}})
    steps = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps.append(take(copy.deepcopy(model), batch))
            weight = model.encoder.embeddings.patch_embeddings.projection.weight
            assert resample_patch_weight(weight, 6).dtype == torch.float32
    plain, low = (torch.cat([gradient.flatten() for gradient in step[1].values()]) for step in steps)
    assert 1e-5 < (low - plain).norm() / plain.norm() < 0.1


@pytest.mark.slow
def test_a_compiled_encoder_is_not_compiled_again_for_a_shape_it_has_seen():
    from torch._dynamo.testing import CompileCounter

    model, batch = tiny_suncet(num_hidden_layers=1), semi_supervised_batch(small_crops=0)
    compiled, counter = copy.deepcopy(model), CompileCounter()
    compiled.compile_encoders(backend=counter)
    graphs = []
    for patch_size in (4, 8, 4, 8, 4, 8):
        losses = []
        for one in (model, compiled):
            one.compression = SequenceCompression(0.5, patch_size)
            losses.append(one(**batch).loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[0] < graphs[1] and graphs[3] == graphs[5]


# Cost


def flops_of(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(("dropout", "patch_size"), [(0.0, 4), (0.5, 4), (0.0, 8), (0.75, 3)])
def test_counted_flops_of_an_encoder_are_those_of_the_formula(dropout, patch_size):
    config = tiny_config(image_size=24, num_hidden_layers=3, hidden_size=64)
    encoder, images = PatchDroppingViTMSNModel(config).double(), torch.randn(32, 3, 24, 24)
    encoder.set_attn_implementation("eager")  # the counter does not know the CPU's own attention
    num_patches = (24 // patch_size) ** 2
    kept = torch.stack([torch.randperm(num_patches)[: int(num_patches * (1 - dropout))] for _ in range(32)])
    formula = 32 * encoder_flops(config, num_patches, kept.shape[1], patch_size)

    def step(backward: bool):
        features = encoder(images, kept_patches=kept, cls_only=True, patch_size=patch_size).last_hidden_state
        if backward:
            features.sum().backward()

    with torch.no_grad():
        assert flops_of(lambda: step(False)) == pytest.approx(formula, rel=0.05)
    assert flops_of(lambda: step(True)) == pytest.approx(3 * formula, rel=0.05)


@pytest.mark.parametrize("method", ["msn", "paws", "byol"])
def test_counted_flops_of_a_step_are_those_of_its_encoders(method):
    """The heads cost the same with and without compression."""
    make, batch = MODELS[method]
    model, batch = make(), batch()
    model.set_attn_implementation("eager")  # the counter does not know the CPU's own attention
    found = {}
    for dropout in (0.0, 0.75):
        model.compression = SequenceCompression(dropout)
        found[dropout] = flops_of(lambda: model(**batch).loss.backward())
    counts = model.compression.counts
    assert found[0.0] - found[0.75] == pytest.approx(counts["plain_flops"] - counts["flops"], rel=0.05)
    assert counts["flops"] < 0.7 * counts["plain_flops"]


# Misuse


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan"), True, "0.5"])
def test_a_rate_outside_of_0_to_1_is_an_error(dropout):
    with pytest.raises(ValueError, match=f"`dropout`.*{dropout}"):
        SequenceCompression(dropout)


@pytest.mark.parametrize("patch_size", [0, -4, 2.5, "8"])
def test_a_patch_size_that_is_no_number_of_pixels_is_an_error(patch_size):
    with pytest.raises(ValueError, match=f"`patch_size`.*{patch_size}"):
        SequenceCompression(patch_size=patch_size)


def test_unknown_kinds_and_settings_are_an_error():
    with pytest.raises(ValueError, match="'anchor'"):
        SequenceCompression(views={"anchor": {}})
    with pytest.raises(ValueError, match="'rate'"):
        SequenceCompression(views={"focal": {"rate": 0.5}})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: tiny_suncet(), {"views": {"focal": {}}}, "'focal'"),
        (lambda: tiny_byol(ema=False, mask_ratio=0.0), {"views": {"target": {"dropout": 0.5}}}, "'target'"),
        (lambda: tiny_paws(timm_model="resnet18"), {"dropout": 0.5}, "'resnet18'"),
        (msn, {"patch_size": 33}, r"33.*16 pixels"),
        (msn, {"dropout": 0.95}, r"0.95.*16 patches.*16 pixels"),
        (msn, {"dropout": 0.3, "patch_size": 16}, r"0.3.*1 patches"),
    ],
)
def test_what_a_model_cannot_lose_is_an_error_when_it_is_set(make, settings, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.compression = SequenceCompression(**settings)
    assert model.compression is None


def test_a_focal_view_without_a_patch_is_an_error():
    model = msn(mask_ratio=0.0)
    model.compression = SequenceCompression(views={"focal": {"dropout": 0.9}})
    with pytest.raises(ValueError, match=r"0.9.*4 patches"):
        model(**msn_views())
    with pytest.raises(ValueError, match=r"`patch_size` 17.*8 pixels"):
        model.encoder(torch.zeros(1, 3, 8, 8, dtype=torch.float64), patch_size=17)
