"""PAWSForPreTraining: its loss and gradients by hand, image by image, and ten steps of a plain loop."""

import copy

import pytest
import torch
from tiny import tiny_model
from tiny_semi_supervised import (
    ENCODERS,
    RESNETV2,
    assert_same_gradients,
    assert_same_step,
    features_of,
    gradients,
    semi_supervised_batch,
    smoothed_rows,
    take,
    tiny_paws,
)
from transformers import AutoModelForPreTraining

from hf_msn.losses.paws import PAWSLossOutput, paws_loss

PREDICTION = {"prediction_head": True, "prediction_hidden_dim": 4}


def loss_of(anchors, anchor_supports, targets, target_supports, labels, config) -> PAWSLossOutput:
    """The loss of the views of each image: `anchors` (B, V, D) and `targets` (B, 2, D), as nested lists."""

    def view_major(images):
        return torch.stack([view for views in zip(*images) for view in views])

    swapped = view_major([views[::-1] for views in targets])
    return paws_loss(
        view_major(anchors),
        anchor_supports,
        swapped,
        target_supports,
        smoothed_rows(labels, config.label_smoothing),
        num_small_crops=len(anchors[0]) - 2,
        temperature=config.temperature,
        sharpen_temperature=config.sharpen_temperature,
        me_max_weight=config.me_max_weight,
    )


def by_hand_one_by_one(model, batch) -> PAWSLossOutput:
    """Each image in a pass of its own, which is allowed where nothing mixes the images."""

    def project(image):
        return model.projection_head(features_of(model, image[None]))[0]

    def predict(projection):
        return projection if model.prediction_head is None else model.prediction_head(projection[None])[0]

    supports = torch.stack([project(image) for image in batch["support_pixel_values"]])
    targets, anchors = [], []
    for place, first in enumerate(batch["pixel_values"]):
        crops = batch["focal_pixel_values"][place] if "focal_pixel_values" in batch else []
        views = [project(first), project(batch["anchor_pixel_values"][place, 0]), *(project(crop) for crop in crops)]
        targets.append(views[:2])
        anchors.append([predict(view) for view in views])
    anchor_supports = torch.stack([predict(support) for support in supports])
    return loss_of(anchors, anchor_supports, targets, supports, batch["support_labels"], model.config)


def by_hand_jointly(model, batch) -> torch.Tensor:
    """Supports and global views in one pass of the encoder and the heads, small crops in another.

    Without `batch_norm_per_resolution` all are in one pass of the heads.
    """
    images, crops = len(batch["pixel_values"]), batch["focal_pixel_values"]
    supports = len(batch["support_labels"])
    groups = [batch["pixel_values"], batch["anchor_pixel_values"][:, 0], batch["support_pixel_values"]]
    large = features_of(model, torch.cat(groups))
    small = features_of(model, crops.flatten(0, 1))
    rows = [large, small] if model.config.batch_norm_per_resolution else [torch.cat([large, small])]
    projected = [model.projection_head(part) for part in rows]
    predicted = projected if model.prediction_head is None else [model.prediction_head(part) for part in projected]

    def split(rows):
        first, second, of_supports, of_crops = torch.cat(rows).split([images, images, supports, len(small)])
        of_crops = of_crops.unflatten(0, crops.shape[:2])
        return [[first[i], second[i], *of_crops[i]] for i in range(images)], of_supports

    anchors, anchor_supports = split(predicted)
    views, target_supports = split(projected)
    targets = [own[:2] for own in views]
    return loss_of(anchors, anchor_supports, targets, target_supports, batch["support_labels"], model.config).loss


@pytest.mark.parametrize("small_crops", [0, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**PREDICTION, "label_smoothing": 0.1},
        {"label_smoothing": 0.3, "temperature": 0.3, "sharpen_temperature": 0.5, "me_max_weight": 0.25},
    ],
    ids=["plain", "prediction head", "other numbers"],
)
def test_loss_and_gradients_are_those_of_the_equations_image_by_image(fields, small_crops):
    model = tiny_paws(projection_batch_norm=False, **fields)
    batch = semi_supervised_batch(small_crops=small_crops)
    output = model(**batch)
    expected = by_hand_one_by_one(model, batch)
    for name in ("loss", "cross_entropy", "me_max", "target_probabilities"):
        torch.testing.assert_close(output[name], getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert_same_gradients(gradients(output.loss, model), gradients(expected.loss, model))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "head",
    [{}, PREDICTION, {**PREDICTION, "batch_norm_per_resolution": False}],
    ids=["no prediction head", "prediction head", "all views together"],
)
def test_supports_and_global_views_share_their_batch_statistics(encoder, head):
    model = tiny_paws(label_smoothing=0.1, **ENCODERS[encoder], **head)
    batch = semi_supervised_batch()
    by_hand = copy.deepcopy(model)
    output = model(**batch)
    expected = by_hand_jointly(by_hand, batch)
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(output.loss, model), gradients(expected, by_hand))
    for (name, found), wanted in zip(model.named_buffers(), by_hand.buffers()):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
    # The comparison is sensitive to it: supports in a pass of their own give another loss.
    apart = {**batch, "support_pixel_values": torch.nn.functional.pad(batch["support_pixel_values"], (0, 16))}
    if encoder != "vit":
        assert (tiny_paws(label_smoothing=0.1, **ENCODERS[encoder], **head)(**apart).loss - expected).abs() > 1e-6


def test_class_numbers_are_names_and_the_order_of_the_supports_means_nothing():
    model = tiny_paws(projection_batch_norm=False)
    batch = semi_supervised_batch()
    loss = model(**batch).loss
    renamed = {**batch, "support_labels": torch.tensor([{4: 0, 17: 1, 99: 2}[n] for n in [99, 4, 17, 4, 99, 17]])}
    torch.testing.assert_close(model(**renamed).loss, loss, rtol=1e-12, atol=0)
    order = [3, 1, 5, 0, 2, 4]
    shuffled = {**batch, **{name: batch[name][order] for name in ("support_pixel_values", "support_labels")}}
    torch.testing.assert_close(model(**shuffled).loss, loss, rtol=1e-12, atol=0)
    wrong = {**batch, "support_labels": batch["support_labels"][order]}
    assert (model(**wrong).loss - loss).abs() > 1e-3


def test_the_targets_give_no_gradient_even_through_the_supports():
    model = tiny_paws(projection_batch_norm=False, **PREDICTION, me_max_weight=0.0)
    batch = semi_supervised_batch(small_crops=0)
    with torch.no_grad():  # the anchors see constants, the targets do not
        model.prediction_head.fc2.weight.zero_()
        model.prediction_head.fc2.bias.fill_(1.0)
    found = gradients(model(**batch).loss, model)
    assert all(gradient.abs().max() < 1e-12 for name, gradient in found.items() if not name.startswith("prediction"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_pixel_values": None}, "`anchor_pixel_values` is None"),
        ({"anchor_pixel_values": torch.zeros(3, 2, 3, 16, 16)}, r"\(3, 2, 3, 16, 16\)"),
        ({"support_pixel_values": None}, "`support_pixel_values`.*None"),
        ({"support_labels": torch.zeros(5, dtype=torch.long)}, r"\(6, 3, 16, 16\) and \(5,\)"),
        ({"support_labels": torch.full((6,), -1)}, "`support_labels`.*-1"),
        ({"support_labels": torch.zeros(6, 3, dtype=torch.long)}, r"\(6, 3\)"),
        ({"focal_pixel_values": torch.zeros(2, 2, 3, 8, 8, dtype=torch.float64)}, "num_small_crops"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_paws()(**{**semi_supervised_batch(), **changes})


@pytest.mark.parametrize("encoder", ENCODERS)
def test_projections_and_features_are_those_of_the_modules(encoder):
    model = tiny_paws(**ENCODERS[encoder], **PREDICTION).eval()
    assert model.evaluation_encoder is model.encoder
    images = semi_supervised_batch()["pixel_values"]
    expected = model.projection_head(features_of(model, images))  # not the prediction head's
    torch.testing.assert_close(model.project(images), expected, rtol=1e-12, atol=1e-14)
    one_by_one = torch.cat([model.project(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(model.train().project(images), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_saved_model_comes_back_with_buffers_and_goes_on_alike(encoder, tmp_path):
    model = tiny_paws(**ENCODERS[encoder], **PREDICTION)
    batch = semi_supervised_batch()
    model(**batch)  # running statistics that are not those of a new model
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).train()
    assert type(loaded) is type(model)
    for (name, found), wanted in zip(loaded.named_buffers(), model.buffers()):
        assert torch.equal(found, wanted), name
    found, wanted = loaded(**batch).loss, model(**batch).loss
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(found, loaded), gradients(wanted, model))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_repeats_passes_and_changes_nothing(encoder):
    model = tiny_paws(**ENCODERS[encoder])
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable()
    layer = "fc1" if encoder == "vit" else "conv1"
    within = [module for name, module in checkpointed.encoder.named_modules() if name.endswith(f"0.{layer}")]
    passes = []
    if within:
        within[0].register_forward_hook(lambda *args: passes.append(1))
    found, expected = (take(one, semi_supervised_batch()) for one in (checkpointed, model))
    assert_same_step(found, expected)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0)  # statistics moved once, not again
    assert not within or len(passes) == 4  # global views and supports, small crops, and each again


def test_checkpointing_of_a_timm_network_without_it_is_an_error():
    with pytest.raises(ValueError, match="vgg11"):
        tiny_paws(timm_model="vgg11", timm_options={"mlp_ratio": 0.001}).activation_checkpointing_enable()


def test_the_loss_is_right_under_bfloat16_autocast():
    model, batch = tiny_paws(**RESNETV2).float(), semi_supervised_batch()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = copy.deepcopy(model)(**batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch).loss, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("model", [tiny_model, tiny_paws])
def test_predict_without_a_prediction_head_is_an_error(model):
    with pytest.raises(ValueError, match="`prediction_head` of the configuration is off"):
        model(prediction_head=False).predict(torch.zeros(2, 3, 16, 16))
