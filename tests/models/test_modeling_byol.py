"""BYOLForPreTraining: BYOL, SimSiam and every predictor, against passes of encoder and heads written out."""

import copy
from types import SimpleNamespace

import pytest
import torch
from loss_inputs import cosine
from tiny_semi_supervised import ENCODERS, assert_same_gradients, features_of, semi_supervised_batch, tiny_byol

from hf_msn import BYOLConfig, BYOLForPreTraining
from hf_msn.models.direct_predictor import direct_copy, direct_pred

PREDICTORS = ("mlp", "linear", "direct_pred", "direct_copy")


def views(small_crops: int = 2) -> dict:
    batch = semi_supervised_batch(small_crops=small_crops)
    return {name: value for name, value in batch.items() if "support" not in name}


def head(module, rows):
    """The projection head, layer by layer."""
    rows = torch.relu(module.bn1(rows @ module.fc1.weight.T + module.fc1.bias))
    if module.fc2 is not None:
        rows = torch.relu(module.bn2(rows @ module.fc2.weight.T + module.fc2.bias))
    return module.bn3(rows @ module.fc3.weight.T + module.fc3.bias)


def by_hand(model, batch) -> torch.Tensor:
    """The loss view by view and row by row. Each view has batch statistics of its own."""
    images = [batch["pixel_values"], batch["anchor_pixel_values"][:, 0]]
    whole = list(images)
    if "focal_pixel_values" in batch:
        images.append(batch["focal_pixel_values"].transpose(0, 1).flatten(0, 1))
    projections = [head(model.projection_head, features_of(model, view)) for view in images]
    if model.config.predictor == "mlp":
        layers = model.prediction_head
        predictions = [layers.fc2(torch.relu(layers.bn2(layers.fc1(rows)))) for rows in projections]
    else:
        predictions = [rows @ model.prediction_head.weight.T for rows in projections]
    targets = projections[:2]
    if model.config.ema:
        target = SimpleNamespace(config=model.config, encoder=model.target_encoder)
        targets = [head(model.target_projection_head, features_of(target, view)) for view in whole]
    targets = [rows.detach() for rows in targets]
    num_images, total = len(whole[0]), 0.0
    crops = predictions[2].unflatten(0, (-1, num_images)) if len(images) > 2 else []
    for image in range(num_images):
        for place in (0, 1):
            rows = [predictions[1 - place][image], *(crop[image] for crop in crops)]
            total = total + sum(2 - 2 * cosine(row, targets[place][image]) for row in rows) / len(rows)
    return total / num_images


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loss_and_gradients_equal_those_by_hand(encoder, ema, predictor):
    simsiam_head = {"projection_layers": 3, "projection_output_batch_norm": True} if not ema else {}
    model = tiny_byol(ema=ema, predictor=predictor, **ENCODERS[encoder], **simsiam_head)
    batch, reference = views(small_crops=2 if encoder == "vit" else 0), copy.deepcopy(model)
    loss, expected = model(**batch).loss, by_hand(reference, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found, wanted = (
        {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        for one, value in ((model, loss), (reference, expected))
        if value.backward() is None
    )
    assert_same_gradients(found, wanted)
    assert ("prediction_head.weight" in found) == (predictor == "linear")
    assert not any(name.startswith("target") for name in found)


@pytest.mark.parametrize("rule, function", [("direct_pred", direct_pred), ("direct_copy", direct_copy)])
def test_the_predictor_is_set_from_the_projections_of_all_views(rule, function):
    model = tiny_byol(predictor=rule, predictor_eps=0.2, batch_norm_per_resolution=False)
    rows = []
    model.projection_head.register_forward_hook(lambda _, inputs, output: rows.append(output.detach()))
    model(**views()).loss.backward()
    assert [len(entry) for entry in rows] == [12]  # 3 images: 2 global views and 2 crops
    model.update_target(1.0)
    F = sum(torch.outer(row, row) for row in rows[0]) / 12
    torch.testing.assert_close(model.input_correlation.correlation, F)
    torch.testing.assert_close(model.prediction_head.weight, function(F, 0.2))


def test_the_target_moves_and_simsiam_has_none():
    model = tiny_byol()
    before = copy.deepcopy(model)
    model.update_target(0.75)
    for name, parameter in model.named_parameters():
        if name.startswith("target_"):
            online = before.get_parameter(name.removeprefix("target_"))
            expected = 0.75 * before.get_parameter(name) + 0.25 * online
            torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14)
    fresh = BYOLForPreTraining(BYOLConfig(**ENCODERS["resnet18"], projection_hidden_dim=16, projection_dim=8))
    for module in ("encoder", "projection_head"):
        online, target = (getattr(fresh, name).state_dict() for name in (module, f"target_{module}"))
        assert all(torch.equal(target[name], value) for name, value in online.items())
    simsiam = tiny_byol(ema=False)
    simsiam(**views()).loss.backward()
    simsiam.update_target(0.5)
    assert not any("target" in name for name in simsiam.state_dict())


def test_global_views_lose_patches_and_the_target_and_crops_lose_none():
    model, seen = tiny_byol(mask_ratio=0.5), {"encoder": [], "target_encoder": []}
    for name, masks in seen.items():
        encoder = getattr(model, name)

        def watch(pixels, kept_patches=None, forward=encoder.forward, masks=masks, **kwargs):
            masks.append(None if kept_patches is None else kept_patches.clone())
            return forward(pixels, kept_patches=kept_patches, **kwargs)

        encoder.forward = watch
    model.seed_masks(3)
    model(**views())
    first, second, crops = seen["encoder"]
    assert first.shape == second.shape == (3, 8) and not torch.equal(first, second)
    assert crops is None and seen["target_encoder"] == [None, None]
    model(**views())
    again = tiny_byol(mask_ratio=0.5)
    again.load_state_dict(model.state_dict())
    assert again.mask_state.tolist() == [3, 4]


@pytest.mark.parametrize("predictor", ["mlp", "direct_copy"])
@pytest.mark.parametrize("encoder", ["vit", "resnet18"])
def test_a_saved_model_goes_on_alike(encoder, predictor, tmp_path):
    model = tiny_byol(predictor=predictor, **ENCODERS[encoder])
    model(**views(0)).loss.backward()
    model.update_target(0.9)
    model.save_pretrained(tmp_path)
    loaded = BYOLForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).train()
    trained = [[name for name, p in one.named_parameters() if p.requires_grad] for one in (model, loaded)]
    assert trained[0] == trained[1]
    for one in (model, loaded):
        one.zero_grad()
        one(**views(0)).loss.backward()
        one.update_target(0.9)
    for (name, value), again in zip(model.state_dict().items(), loaded.state_dict().values()):
        torch.testing.assert_close(value, again, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "fields, offending",
    [
        ({"predictor": "direct"}, "'direct'.*'direct_pred'"),
        ({"predictor_rho": 1.0}, "`predictor_rho`.*1.0"),
        ({"predictor_eps": -0.1}, "`predictor_eps`.*-0.1"),
        ({"predictor_eps": 0.1}, "`predictor_eps`.*'mlp'"),
        ({"predictor_update_every": 0}, "`predictor_update_every`.*0"),
        ({"predictor_update_every": 2, "predictor": "linear"}, "`predictor_update_every`.*'linear'"),
        ({"projection_layers": 4}, "`projection_layers`.*4"),
        ({"prediction_hidden_dim": 0}, "`prediction_hidden_dim`.*0"),
        ({"mask_ratio": 1.0}, "`mask_ratio`.*1.0"),
        ({"mask_ratio": 0.5, "timm_model": "resnet18"}, "`mask_ratio`.*0.5"),
    ],
)
def test_settings_out_of_range_are_refused(fields, offending):
    with pytest.raises(ValueError, match=offending):
        BYOLConfig(**fields)


def test_a_batch_without_a_second_view_is_refused():
    with pytest.raises(ValueError, match="`anchor_pixel_values` is None"):
        tiny_byol()(pixel_values=torch.zeros(2, 3, 16, 16).double())
