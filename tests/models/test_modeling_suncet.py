"""SuNCEtForPreTraining: both halves together and each alone, against passes of encoder and head by hand."""

import copy

import pytest
import torch
from tiny_semi_supervised import (
    ENCODERS,
    assert_same_gradients,
    features_of,
    gradients,
    semi_supervised_batch,
    smoothed_rows,
    tiny_suncet,
)

from hf_msn.losses.simclr import nt_xent_loss
from hf_msn.losses.suncet import suncet_loss

VIEWS = ("pixel_values", "anchor_pixel_values")
SUPPORT = ("support_pixel_values", "support_labels")


def suncet_batch(names=(*VIEWS, *SUPPORT)) -> dict:
    batch = semi_supervised_batch(small_crops=0)
    return {name: batch[name] for name in names}


def by_hand(model, batch) -> dict[str, torch.Tensor]:
    """The losses of what the batch holds, in one pass of the encoder."""
    groups = [batch["pixel_values"], batch["anchor_pixel_values"][:, 0]] if VIEWS[0] in batch else []
    groups += [batch["support_pixel_values"]] if SUPPORT[0] in batch else []
    projected = model.projection_head(features_of(model, torch.cat(groups)))
    num_views = 2 * len(batch.get(VIEWS[0], ()))
    found, config = {}, model.config
    if VIEWS[0] in batch:
        settings = {"temperature": config.temperature, "full_gradient": config.full_gradient}
        found["nt_xent"] = nt_xent_loss(projected[:num_views], **settings)
    if SUPPORT[0] in batch:
        labels = smoothed_rows(batch["support_labels"], config.label_smoothing)
        found["suncet"] = suncet_loss(projected[num_views:], labels, temperature=config.temperature)
    return found


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("names", [(*VIEWS, *SUPPORT), VIEWS, SUPPORT], ids=["both", "SimCLR", "SuNCEt"])
def test_loss_and_gradients_are_the_sum_of_those_of_views_and_support(encoder, names):
    settings = {"label_smoothing": 0.1, "temperature": 0.2, "full_gradient": encoder == "vit"}
    model = tiny_suncet(**settings, **ENCODERS[encoder])
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


def test_an_unsupervised_support_takes_part_in_the_batch_statistics_alone():
    model, batch = tiny_suncet(**ENCODERS["resnet18"]), suncet_batch()
    both, alone, without = (copy.deepcopy(model) for _ in range(3))
    output = alone(**batch, supervised=False)
    assert output.suncet is None
    torch.testing.assert_close(output.loss, both(**batch).nt_xent, rtol=1e-12, atol=0)
    for (name, found), wanted in zip(alone.named_buffers(), both.buffers()):
        assert torch.equal(found, wanted), name
    assert (without(**suncet_batch(VIEWS)).loss - output.loss).abs() > 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict.fromkeys((*VIEWS, *SUPPORT)), "`pixel_values` and `support_pixel_values`"),
        ({"anchor_pixel_values": None}, "`anchor_pixel_values` is None"),
        ({"support_labels": None}, "`support_labels`.*None"),
        ({"support_labels": torch.tensor([0, 0, 1, 1, 2, 3])}, "2 of 6"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_suncet()(**{**suncet_batch(), **changes})
