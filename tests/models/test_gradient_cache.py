"""The gradient cache has the loss, gradients and buffers of the plain step."""

import copy

import pytest
import torch
from tiny import tiny_batch, tiny_model
from tiny_semi_supervised import (
    RESNETV2,
    VIT,
    assert_same_step,
    result,
    semi_supervised_batch,
    take,
    tiny_byol,
    tiny_paws,
    tiny_suncet,
)
from torch import nn

from hf_msn import GradientCache
from hf_msn.models.modeling_pretraining import PretrainingModel

TIMM_VIT = {
    "timm_model": "vit_tiny_patch16_224",
    "timm_options": {
        "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True
    },
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
DROP_PATH = {**TIMM_VIT, "timm_options": {**TIMM_VIT["timm_options"], "drop_path_rate": 0.5, "proj_drop_rate": 0.2}}


def msn(dtype=torch.float64, **fields):
    return tiny_model(**{"use_sinkhorn": True, "prediction_head": True, "initializer_range": 0.2, **fields}).to(dtype)


def msn_views(dtype=torch.float64):
    return {name: views.to(dtype) for name, views in tiny_batch(batch_size=5, anchor_views=2).items()}


def byol_views():
    return {name: views for name, views in semi_supervised_batch().items() if "support" not in name}


CASES = {  # (model, batch, chunk sizes)
    "msn": (msn, msn_views, (1, 3, 9)),  # passes of 10 anchors, 10 focal views and 5 targets
    "paws": (lambda: tiny_paws(**VIT, prediction_head=True), semi_supervised_batch, (1, 5, 11)),
    "paws, timm's ViT": (lambda: tiny_paws(**TIMM_VIT), lambda: semi_supervised_batch(small_crops=0), (4,)),
    "byol": (lambda: tiny_byol(**VIT, mask_ratio=0.25), byol_views, (2,)),
    "suncet": (lambda: tiny_suncet(**VIT), lambda: semi_supervised_batch(small_crops=0), (5,)),
}


def take_cached(model, batch, chunk_size):
    with GradientCache(model, chunk_size=chunk_size) as cache:
        outputs = cache.backward(batch)
    return result(model, outputs.loss)


def encode_in_chunks(chunk_sizes):
    """Return the reference in place of `_encode`: a loop over the chunks, all of whose activations are kept."""
    whole = PretrainingModel._encode

    def encode(self, encoder, images, kept_patches, patch_size):
        images = torch.cat(images)
        sizes = chunk_sizes(len(images))
        kept = [None] * len(sizes) if kept_patches is None else kept_patches.split(sizes)
        return torch.cat([whole(self, encoder, [rows], k, patch_size) for rows, k in zip(images.split(sizes), kept)])

    return encode


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_buffers_are_those_of_the_plain_step(case):
    make, batch, chunk_sizes = CASES[case]
    model, batch = make(), batch()
    expected = take(copy.deepcopy(model), batch)
    for chunk_size in chunk_sizes:
        assert_same_step(take_cached(copy.deepcopy(model), batch, chunk_size), expected)


def test_float32_is_within_rounding():
    model, batch = msn(torch.float32), msn_views(torch.float32)
    assert_same_step(take_cached(copy.deepcopy(model), batch, 3), take(copy.deepcopy(model), batch), 1e-6)


@pytest.mark.parametrize(
    ("make", "batch"),
    [(lambda: msn(**DROPOUT), msn_views), (lambda: tiny_paws(**DROP_PATH), semi_supervised_batch)],
    ids=["dropout", "drop path"],
)
def test_random_draws_of_a_chunk_are_the_same_in_both_passes(make, batch, monkeypatch):
    model, batch = make(), batch()
    torch.manual_seed(5)
    found = take_cached(copy.deepcopy(model), batch, 4)
    after = torch.rand(1)
    sizes = {12: [4, 4, 4], 10: [3, 3, 4], 6: [3, 3], 5: [2, 3]}
    monkeypatch.setattr(PretrainingModel, "_encode", encode_in_chunks(sizes.__getitem__))
    torch.manual_seed(5)
    expected = take(copy.deepcopy(model), batch)
    assert_same_step(found, expected)
    assert torch.equal(after, torch.rand(1))  # what follows draws on alike
    torch.manual_seed(6)
    assert (take(copy.deepcopy(model), batch)[0] - expected[0]).abs() > 1e-6  # the draws matter


@pytest.mark.parametrize("make", [lambda: msn(**DROPOUT), lambda: tiny_paws(**DROP_PATH)], ids=["ours", "timm"])
def test_with_gradient_checkpointing(make):
    model = make()
    batch = msn_views() if hasattr(model, "target_encoder") else semi_supervised_batch()
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable()
    steps = []
    for one in (model, checkpointed):
        torch.manual_seed(5)
        steps.append(take_cached(one, batch, 4))
    assert_same_step(steps[1], steps[0])


@pytest.mark.slow
def test_with_a_compiled_encoder():
    model, batch = tiny_suncet(**{**VIT, "num_hidden_layers": 1}), semi_supervised_batch(small_crops=0)
    expected = take(copy.deepcopy(model), batch)
    model.compile_encoders(backend="aot_eager")
    assert_same_step(take_cached(model, batch, 4), expected)


def test_accumulated_gradients_are_those_of_plain_steps():
    plain, cached = msn(), msn()
    with GradientCache(cached, chunk_size=4) as cache:
        for scale in (1.0, 0.5):
            batch = {name: scale * views for name, views in msn_views().items()}
            plain(**batch).loss.backward()
            cache.backward(batch)
    assert_same_step(result(cached, torch.zeros(1)), result(plain, torch.zeros(1)))


def test_in_bfloat16_the_gradients_of_the_chunks_add_up_in_float32():
    model, batch = msn(torch.float32, num_hidden_layers=1), msn_views(torch.float32)
    batch = {name: views.repeat(16, *[1] * (views.ndim - 1)) for name, views in batch.items()}
    gradients = []
    for step in (take, lambda *of: take_cached(*of, chunk_size=1)):
        with torch.autocast("cpu", torch.bfloat16):
            found = step(copy.deepcopy(model), batch)[1]
        gradients.append(torch.cat([g.flatten() for name, g in found.items() if name.endswith("fc1.weight")]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < difference < 0.02  # more if the sum over 320 chunks is in 16 bits


def test_a_chunk_is_encoded_again_when_the_backward_pass_of_the_one_before_has_ended():
    model, events = msn(), []

    def watch(embeddings, inputs, output):
        events.append(f"encode {len(output)}")
        if output.requires_grad and torch._C._current_graph_task_id() == -1:
            output.register_hook(lambda gradient: events.append(f"end {len(gradient)}"))

    model.encoder.embeddings.dropout.register_forward_hook(watch)
    take_cached(model, msn_views(), 4)
    chunks = [3, 3, 4, 3, 3, 4]  # of anchors and of focal views
    again = [event for size in chunks[::-1] for event in (f"encode {size}", f"end {size}")]
    assert events == [f"encode {size}" for size in chunks] + again


def test_targets_are_encoded_in_chunks_too_and_once():
    model, rows = msn(), []
    model.target_encoder.layernorm.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    take_cached(model, msn_views(), 4)
    assert rows == [2, 3]


def test_batch_norm_in_an_encoder_is_per_chunk_with_statistics_of_one_pass(monkeypatch, caplog):
    model, batch = tiny_paws(**RESNETV2), semi_supervised_batch()
    cached = copy.deepcopy(model)
    with GradientCache(cached, chunk_size=6) as cache:
        found = result(cached, cache.backward(batch).loss)
        cached.zero_grad()
        cache.backward(batch)
    assert len([record for record in caplog.records if "batch normalisation" in record.message]) == 1

    plain = take(copy.deepcopy(model), batch)
    assert (found[0] - plain[0]).abs() > 1e-4
    monkeypatch.setattr(PretrainingModel, "_encode", encode_in_chunks({12: [6, 6], 6: [6]}.__getitem__))
    assert_same_step(found, take(model, batch))


def test_batch_norm_of_the_heads_and_layer_norm_need_no_warning(caplog):
    take_cached(msn(), msn_views(), 4)
    frozen = tiny_paws(**RESNETV2)
    frozen.encoder.eval()
    batch = semi_supervised_batch()
    assert_same_step(take_cached(copy.deepcopy(frozen), batch, 5), take(frozen, batch))
    assert not caplog.records


class Counting(nn.Module):
    """Its features depend on the number of calls."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.calls = encoder, 0

    def forward(self, images):
        self.calls += 1
        return self.encoder(images) * (1 + 0.1 * self.calls)


def test_an_encoder_that_is_not_deterministic_is_named():
    model = tiny_suncet(**TIMM_VIT)
    model.encoder = Counting(model.encoder)
    with pytest.raises(ValueError, match=r"Counting.*deterministic"):
        take_cached(model, semi_supervised_batch(small_crops=0), 4)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True])
def test_chunks_below_one_image_are_an_error(chunk_size):
    with pytest.raises(ValueError, match=f"`chunk_size`.*{chunk_size}"):
        GradientCache(msn(), chunk_size=chunk_size)


def test_a_chunk_of_all_images_is_an_error_and_leaves_no_gradients():
    model = msn()
    with pytest.raises(ValueError, match=r"largest has 10\b.*is 10\b"):
        take_cached(model, msn_views(), 10)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_an_encoder_to_cut_at_is_an_error():
    with pytest.raises(ValueError, match="Linear"):
        GradientCache(nn.Linear(1, 1), chunk_size=4)


def test_outside_of_the_context_the_model_encodes_at_once():
    model, rows = msn(), []
    model.encoder.layernorm.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    with GradientCache(model, chunk_size=4) as outer:
        with outer:
            copy.deepcopy(model)
        with GradientCache(model, chunk_size=5) as inner, torch.no_grad():
            inner.model(**msn_views())
    model(**msn_views())
    assert rows == [5, 5, 5, 5, 10, 10]
