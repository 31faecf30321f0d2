"""The loss of MSN on several ranks is that of one rank with the concatenated batch, gradients included."""

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from tiny import tiny_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

from hf_msn.losses.msn import msn_loss

pytestmark = pytest.mark.distributed

VIEWS, IMAGES, DIM, PROTOTYPES = 2, 3, 6, 5  # images of one rank


def whole_batch(num_ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Anchors (V, B, D), targets (B, D) and prototypes of all ranks together."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(VIEWS, num_ranks * IMAGES, DIM), (num_ranks * IMAGES, DIM), (PROTOTYPES, DIM)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def loss_and_gradients(anchors, targets, prototypes, settings, group=None) -> dict:
    anchors, prototypes = anchors.clone().requires_grad_(), prototypes.clone().requires_grad_()
    output = msn_loss(anchors.flatten(0, 1), targets, prototypes, **settings, group=group)
    output.loss.backward()
    return {
        "parts": torch.stack([output.loss, output.cross_entropy, output.entropy]).detach(),
        "me_max": output.me_max.detach(),
        "targets": output.target_probabilities,
        "anchors": anchors.grad,
        "prototypes": prototypes.grad,
    }


def _loss_of_this_rank(rank, num_ranks, settings, members=None):
    group = dist.new_group(members) if members is not None else None
    if members is not None and rank not in members:
        return None
    place = rank if members is None else members.index(rank)
    rows = slice(place * IMAGES, (place + 1) * IMAGES)
    anchors, targets, prototypes = whole_batch(num_ranks)
    return loss_and_gradients(anchors[:, rows], targets[rows], prototypes, settings, group)


def assert_ranks_equal_one(ranks: list[dict], settings: dict) -> None:
    one = loss_and_gradients(*whole_batch(len(ranks)), settings)
    close = {"rtol": 1e-11, "atol": 1e-14}
    # As DistributedDataParallel: the mean over the ranks.
    for name in ("parts", "prototypes"):
        torch.testing.assert_close(sum(result[name] for result in ranks) / len(ranks), one[name], **close)
    # An anchor's gradient reaches the mean only through its own rank.
    torch.testing.assert_close(
        torch.cat([result["anchors"] for result in ranks], 1) / len(ranks), one["anchors"], **close
    )
    torch.testing.assert_close(torch.cat([result["targets"] for result in ranks]), one["targets"], **close)
    for result in ranks:
        torch.testing.assert_close(result["me_max"], one["me_max"], **close)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("use_sinkhorn", [False, True])
def test_ranks_equal_one_rank_with_the_concatenated_batch(num_ranks, use_sinkhorn):
    settings = {"use_sinkhorn": use_sinkhorn, "me_max_weight": 2.0, "entropy_weight": 0.5}
    ranks = run_ranks(_loss_of_this_rank, num_ranks, num_ranks, settings)
    assert_ranks_equal_one(ranks, settings)
    # The comparison can fail: without the other ranks, neither would be right.
    anchors, targets, prototypes = whole_batch(num_ranks)
    alone = loss_and_gradients(anchors[:, :IMAGES], targets[:IMAGES], prototypes, settings)
    assert (alone["me_max"] - ranks[0]["me_max"]).abs() > 1e-3
    assert torch.allclose(alone["targets"], ranks[0]["targets"], atol=1e-3) != use_sinkhorn


def test_a_group_shares_mean_and_marginals_among_its_own_ranks_only():
    settings = {"use_sinkhorn": True}
    members = [0, 2]
    ranks = run_ranks(_loss_of_this_rank, 3, len(members), settings, members)
    assert ranks[1] is None
    assert_ranks_equal_one([ranks[member] for member in members], settings)


def _model_gradients(rank, num_ranks, use_sinkhorn):
    model = _model(use_sinkhorn)
    batch = {name: views.double().chunk(num_ranks)[rank] for name, views in tiny_batch(2 * num_ranks).items()}
    parallel = DistributedDataParallel(model)  # must outlive the backward pass that it hooks into
    parallel(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def _model(use_sinkhorn):
    # Batch statistics and masks are each rank's own: without them the ranks must add up exactly.
    return tiny_model(projection_batch_norm=False, mask_ratio=0.0, use_sinkhorn=use_sinkhorn).double()


@pytest.mark.parametrize("use_sinkhorn", [False, True])
def test_the_whole_model_under_ddp_gets_the_gradients_of_the_concatenated_batch(use_sinkhorn):
    ranks = run_ranks(_model_gradients, 2, 2, use_sinkhorn)
    model = _model(use_sinkhorn)
    model(**{name: views.double() for name, views in tiny_batch(4).items()}).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for gradients in ranks:
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)
    assert expected["prototypes"].norm() > 1e-3
    assert expected["encoder.embeddings.cls_token"].norm() > 1e-6


def _masks(rank, shared):
    model = tiny_model(shared_mask=shared)
    model.seed_masks(3)
    return model._draw_kept_patches([torch.zeros(2, 3, 16, 16)], 0.25)


def test_every_rank_draws_its_own_masks_unless_they_are_shared():
    first, second = run_ranks(_masks, 2, False)
    assert not torch.equal(first, second)
    first, second = run_ranks(_masks, 2, True)
    assert torch.equal(first, second)
