"""SuNCEtForPreTraining: both halves together and each alone, against loops over the images."""

import copy

import pytest
import torch
from tiny_semi_supervised import (
    ENCODERS,
    assert_same_gradients,
    features_of,
    gradients,
    nt_xent_by_hand,
    semi_supervised_batch,
    suncet_by_hand,
    tiny_suncet,
)
from transformers import AutoModelForPreTraining

VIEWS = ("pixel_values", "anchor_pixel_values")
SUPPORT = ("support_pixel_values", "support_labels")


def suncet_batch(names=(*VIEWS, *SUPPORT), seed: int = 1) -> dict:
    batch = semi_supervised_batch(small_crops=0, seed=seed)
    return {name: batch[name] for name in names}


def by_hand(model, batch) -> dict[str, torch.Tensor]:
    """The losses of what the batch holds, in one pass of the encoder."""
    groups = [batch["pixel_values"], batch["anchor_pixel_values"][:, 0]] if VIEWS[0] in batch else []
    groups += [batch["support_pixel_values"]] if SUPPORT[0] in batch else []
    projected = model.projection_head(features_of(model, torch.cat(groups)))
    parts = dict(zip(range(3), projected.split([len(group) for group in groups])))
    found = {}
    if VIEWS[0] in batch:
        found["nt_xent"] = nt_xent_by_hand(parts[0], parts[1], model.config.temperature)
    if SUPPORT[0] in batch:
        found["suncet"] = suncet_by_hand(parts[len(groups) - 1], batch["support_labels"], model.config)
    return found


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("names", [(*VIEWS, *SUPPORT), VIEWS, SUPPORT], ids=["both", "SimCLR", "SuNCEt"])
def test_loss_and_gradients_are_the_sum_of_those_of_views_and_support(encoder, names):
    model = tiny_suncet(label_smoothing=0.1, temperature=0.2, **ENCODERS[encoder])
    batch, reference = suncet_batch(names), copy.deepcopy(model)
    output, parts = model(**batch), by_hand(reference, batch)
    expected = sum(parts.values())
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(output.loss, model), gradients(expected, reference))
    for name in ("nt_xent", "suncet"):
        if name in parts:
            torch.testing.assert_close(output[name], parts[name].detach(), rtol=1e-9, atol=0)
        else:
            assert getattr(output, name) is None
    for (name, found), wanted in zip(model.named_buffers(), reference.buffers()):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_ten_steps_are_those_of_a_plain_loop():
    model = tiny_suncet(**ENCODERS["resnetv2"])
    plain = copy.deepcopy(model)
    for trained, loss_of in (
        (model, lambda batch: model(**batch).loss),
        (plain, lambda batch: sum(by_hand(plain, batch).values())),
    ):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for step in range(10):
            loss = loss_of(suncet_batch(seed=step % 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = (model.projection_head.fc1.weight - tiny_suncet(**ENCODERS["resnetv2"]).projection_head.fc1.weight).abs()
    assert moved.max() > 5e-3
    for (name, found), wanted in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_saved_model_comes_back_with_buffers(encoder, tmp_path):
    model, batch = tiny_suncet(**ENCODERS[encoder]), suncet_batch()
    model(**batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).train()
    assert type(loaded) is type(model) and loaded.evaluation_encoder is loaded.encoder
    for (name, found), wanted in zip(loaded.state_dict().items(), model.state_dict().values()):
        assert torch.equal(found, wanted), name
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict.fromkeys((*VIEWS, *SUPPORT)), "`pixel_values` and `support_pixel_values`"),
        ({"anchor_pixel_values": None}, "`anchor_pixel_values` is None"),
        ({"support_labels": None}, "`support_labels`.*None"),
        ({"support_pixel_values": None}, "`support_pixel_values`.*None"),
        ({"support_labels": torch.tensor([0, 0, 1, 1, 2, 3])}, "2 of 6"),
        ({"support_labels": torch.tensor([0, 0, 1, 1, -100, -100])}, "-100"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_suncet()(**{**suncet_batch(), **changes})
