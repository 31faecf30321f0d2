"""MSNForPreTraining: its loss by hand, the moving average, precisions and compilation."""

import copy
import math

import pytest
import torch
from tiny import tiny_batch, tiny_model
from tiny_semi_supervised import assert_same_step, take
from transformers import ViTMSNModel

from hf_msn.losses.msn import msn_loss


def projections_by_hand(model, views: list[torch.Tensor], prefix: str) -> torch.Tensor:
    """One list entry per view (B, C, H, W), through the plain encoder of transformers and the heads.

    The views of one size share the batch statistics of the heads, or all views do.
    """
    plain = ViTMSNModel(model.config.to_vit_msn_config()).double()
    plain.load_state_dict(getattr(model, f"{prefix}encoder").state_dict())
    cls_tokens = [plain(view, interpolate_pos_encoding=True).last_hidden_state[:, 0] for view in views]
    large = sum(view.shape[-1] == 16 for view in views)
    parts = [cls_tokens[:large], cls_tokens[large:]] if model.config.batch_norm_per_resolution else [cls_tokens]
    rows = [getattr(model, f"{prefix}projection_head")(torch.cat(part)) for part in parts if part]
    if not prefix and model.prediction_head is not None:
        rows = [model.prediction_head(part) for part in rows]
    return torch.cat(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prediction_head": True},
        {"prediction_head": True, "batch_norm_per_resolution": False},
        {"use_sinkhorn": True, "temperature": 0.2, "me_max_weight": 3.0, "entropy_weight": 0.5},
    ],
    ids=str,
)
def test_the_loss_is_that_of_anchors_then_focal_views_view_by_view(fields):
    model = tiny_model(mask_ratio=0.0, **fields).double()
    batch = {name: views.double() for name, views in tiny_batch(anchor_views=2, focal_views=3).items()}
    model.update_target(0.0)
    with torch.no_grad():
        model.encoder.embeddings.position_embeddings.add_(0.1)  # online and target must differ
    views = [batch["anchor_pixel_values"][:, view] for view in range(2)]
    views += [batch["focal_pixel_values"][:, view] for view in range(3)]
    by_hand = copy.deepcopy(model)  # its batch statistics are its own
    expected = msn_loss(
        projections_by_hand(by_hand, views, ""),
        projections_by_hand(by_hand, [batch["pixel_values"]], "target_"),
        model.prototypes,
        temperature=model.config.temperature,
        sharpen_temperature=0.25,
        use_sinkhorn=model.config.use_sinkhorn,
        me_max_weight=model.config.me_max_weight,
        entropy_weight=model.config.entropy_weight,
    )
    output = model(**batch)
    for name in ("loss", "cross_entropy", "me_max", "entropy", "target_probabilities"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert output.loss.requires_grad
    assert not output.target_probabilities.requires_grad
    for (name, found), wanted in zip(model.named_buffers(), by_hand.buffers()):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
    other = copy.deepcopy(by_hand)
    other.config.batch_norm_per_resolution ^= True
    assert (other(**batch).loss - output.loss).abs() > 1e-4  # the comparison is sensitive to it


def test_the_sharpening_temperature_can_be_an_argument(msn_batch):
    cold = tiny_model(sharpen_temperature=0.1)(**msn_batch)
    given = tiny_model(sharpen_temperature=0.9)(**msn_batch, sharpen_temperature=0.1)
    assert torch.equal(given.loss, cold.loss)
    assert not torch.equal(tiny_model(sharpen_temperature=0.9)(**msn_batch).loss, cold.loss)


@pytest.mark.parametrize("absent", ["anchor_pixel_values", "focal_pixel_values"])
def test_anchors_or_focal_views_may_be_absent_or_of_length_0(msn_batch, absent):
    empty = {**msn_batch, absent: msn_batch[absent][:, :0]}
    without = {name: views for name, views in msn_batch.items() if name != absent}
    loss = tiny_model()(**without).loss
    assert torch.equal(tiny_model()(**empty).loss, loss)
    assert not torch.equal(tiny_model()(**msn_batch).loss, loss)


@pytest.mark.parametrize(
    "change",
    [
        {"anchor_pixel_values": None, "focal_pixel_values": None},
        {"anchor_pixel_values": torch.zeros(4, 0, 3, 16, 16), "focal_pixel_values": None},
        {"anchor_pixel_values": torch.zeros(4, 3, 16, 16)},
        {"focal_pixel_values": torch.zeros(3, 2, 3, 8, 8)},
    ],
    ids=["neither", "no views", "no dimension of views", "another batch size"],
)
def test_views_that_do_not_fit_are_an_error(msn_model, msn_batch, change):
    with pytest.raises(ValueError, match=r"anchor_pixel_values.*B = 4"):
        msn_model(**{**msn_batch, **change})


def test_initial_weights_are_those_of_the_authors():
    wide = {"hidden_size": 128, "image_size": 64, "patch_size": 16, "prediction_head": True}
    model = tiny_model(projection_hidden_dim=256, projection_dim=64, num_prototypes=512, **wide)
    embeddings, heads = model.encoder.embeddings, [model.projection_head, model.prediction_head]
    for name in ("encoder", "projection_head", "prediction_head"):
        for target, online in zip(getattr(model, f"target_{name}").parameters(), getattr(model, name).parameters()):
            assert torch.equal(target, online) and not target.requires_grad
    patches = embeddings.patch_embeddings.projection
    layers = [layer for head in heads for layer in head.modules() if isinstance(layer, torch.nn.Linear)]
    expected = [(patches.weight, math.sqrt(2 / 768)), (model.prototypes, 64**-0.5 / math.sqrt(3))]
    expected += [(layer.weight, 0.02) for layer in layers]
    expected += [(embeddings.position_embeddings, 0.02), (embeddings.cls_token, 0.02)]
    for weight, deviation in expected:
        assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * weight.numel()))
    assert math.sqrt(2 / 768) == pytest.approx(0.051, abs=1e-4)
    assert model.prototypes.abs().max() <= 64**-0.5
    assert not any(layer.bias.any() for layer in [patches, *layers])
    assert all(isinstance(head.activation, torch.nn.GELU) for head in heads)


def test_initial_weights_can_be_set():
    ranges = {"patch_initializer_range": 0.12, "position_initializer_range": 1.0, "head_initializer_range": None}
    model = tiny_model(**ranges, projection_hidden_dim=256)
    embeddings = model.encoder.embeddings
    assert embeddings.patch_embeddings.projection.weight.std().item() == pytest.approx(0.12, rel=0.1)
    assert embeddings.position_embeddings.std().item() == pytest.approx(1, rel=0.1)
    # the exported encoder says it too: an untrained network to compare with starts as this one did
    assert model.config.to_vit_msn_config().position_initializer_range == 1.0
    assert not hasattr(tiny_model().config.to_vit_msn_config(), "position_initializer_range")
    for weight, bound in ((model.projection_head.fc1.weight, 32**-0.5), (model.projection_head.fc2.bias, 256**-0.5)):
        assert weight.abs().max() <= bound  # as torch draws linear layers
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_target_has_no_gradient_and_everything_else_has(msn_model, msn_batch):
    msn_model(**msn_batch).loss.backward()
    for name, parameter in msn_model.named_parameters():
        if name.startswith("target_"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_update_target_equals_its_equation(momentum):
    model = tiny_model(prediction_head=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_target(momentum)
    moved = 0
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name.startswith("target_"):
            expected = momentum * expected.double() + (1 - momentum) * before[name.removeprefix("target_")].double()
            moved += 1
        torch.testing.assert_close(parameter.double(), expected.double(), rtol=1e-6, atol=1e-6, msg=name)
    assert 2 * moved == len(list(model.parameters())) - 1  # all but the prototypes


def test_update_target_leaves_all_buffers_alone(msn_model, msn_batch):
    msn_model(**msn_batch)
    buffers = {name: buffer.clone() for name, buffer in msn_model.named_buffers()}
    assert not torch.equal(
        buffers["target_projection_head.bn1.running_mean"], buffers["projection_head.bn1.running_mean"]
    )
    msn_model.update_target(0.0)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in msn_model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_16_bits_is_refused(dtype):
    model = tiny_model().to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}"):
        model.update_target(0.996)
    model.update_target(0.0)  # a copy loses nothing
    model.update_target(1.0)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_a_momentum_outside_of_0_to_1_is_an_error(msn_model, momentum):
    with pytest.raises(ValueError, match=f"`momentum`.*{momentum}"):
        msn_model.update_target(momentum)


@pytest.mark.parametrize("use_sinkhorn", [False, True])
def test_bf16_autocast_is_within_2_percent_of_float32(msn_batch, use_sinkhorn):
    full = tiny_model(use_sinkhorn=use_sinkhorn)(**msn_batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiny_model(use_sinkhorn=use_sinkhorn)(**msn_batch)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    assert low.loss.item() != full.loss.item()


@pytest.mark.slow
def test_compiled_encoders_give_the_same_loss_and_keep_the_names_of_the_weights(msn_batch):
    plain, compiled = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    compiled.compile_encoders(backend="eager")
    assert compiled.encoder._compiled_call_impl is not None
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert_same_step(take(compiled, msn_batch), take(plain, msn_batch), 1e-5)
    assert torch.equal(copy.deepcopy(compiled).prototypes, plain.prototypes)
