"""PAWS, NT-Xent and SuNCEt on several ranks are those of one rank with everything, gradients included."""

import pytest
import torch
from launch import run_ranks

from hf_msn.losses.paws import paws_loss
from hf_msn.losses.simclr import nt_xent_loss
from hf_msn.losses.suncet import suncet_loss

pytestmark = pytest.mark.distributed

IMAGES, CROPS, SUPPORTS, CLASSES, DIM = 2, 2, 3, 3, 5  # images and supports of one rank


def whole(num_ranks: int) -> dict[str, torch.Tensor]:
    """The views (V, B, D) and supports (N, D) of all ranks."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "anchors": (2 + CROPS, num_ranks * IMAGES, DIM),
        "targets": (2, num_ranks * IMAGES, DIM),
        "anchor_supports": (num_ranks * SUPPORTS, DIM),
        "target_supports": (num_ranks * SUPPORTS, DIM),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def labels(num_ranks: int) -> torch.Tensor:
    # Not every rank has every class.
    classes = torch.arange(num_ranks * SUPPORTS) // 2 % CLASSES
    return 0.9 * torch.eye(CLASSES, dtype=torch.float64)[classes] + 0.1 / CLASSES


def losses(tensors: dict[str, torch.Tensor], support_labels: torch.Tensor) -> dict:
    """Values and gradients of the losses on these images and supports."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    paws = paws_loss(
        leaves["anchors"].flatten(0, 1),
        leaves["anchor_supports"],
        leaves["targets"].flatten(0, 1),
        leaves["target_supports"],
        support_labels,
        num_small_crops=CROPS,
    )
    results = {"paws": paws.loss}
    for name, full_gradient in (("nt_xent", True), ("nt_xent of the authors", False)):
        views = leaves["anchors"][:2].flatten(0, 1)
        results[name] = nt_xent_loss(views, full_gradient=full_gradient)
        results[f"{name}, in tiles"] = nt_xent_loss(views, full_gradient=full_gradient, tile_size=3)
    results["suncet"] = suncet_loss(leaves["anchor_supports"], support_labels)
    found = {"values": torch.stack(list(results.values())).detach(), "me_max": paws.me_max.detach()}
    for name, loss in results.items():
        wanted = [leaves[key] for key in ("anchors", "anchor_supports")]
        found[name] = torch.autograd.grad(loss, wanted, allow_unused=True)
    return found


def _losses_of_this_rank(rank, num_ranks):
    views = slice(rank * IMAGES, (rank + 1) * IMAGES)
    supports = slice(rank * SUPPORTS, (rank + 1) * SUPPORTS)
    tensors = whole(num_ranks)
    own = {name: tensor[supports] if "supports" in name else tensor[:, views] for name, tensor in tensors.items()}
    return losses(own, labels(num_ranks)[supports])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one_rank_with_everything(num_ranks):
    ranks = run_ranks(_losses_of_this_rank, num_ranks, num_ranks)
    one = losses(whole(num_ranks), labels(num_ranks))
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(sum(result["values"] for result in ranks) / num_ranks, one["values"], **close)
    for result in ranks:
        torch.testing.assert_close(result["me_max"], one["me_max"], **close)
    torch.testing.assert_close(one["values"][[2, 4]], one["values"][[1, 3]], **close)  # with and without tiles
    for name in set(one) - {"values", "me_max"}:
        for place, dimension in ((0, 1), (1, 0)):  # of the anchors, of the supports
            if one[name][place] is None:
                continue
            # As DistributedDataParallel averages, an embedding's gradient through all ranks' losses over their number.
            gathered = torch.cat([result[name][place] for result in ranks], dimension) / num_ranks
            torch.testing.assert_close(gathered, one[name][place], **close)
            assert one[name][place].norm() > 1e-3
    # The comparison can fail: a rank alone is another loss.
    alone = losses(
        {k: v[:SUPPORTS] if "supports" in k else v[:, :IMAGES] for k, v in whole(num_ranks).items()},
        labels(num_ranks)[:SUPPORTS] + 0,
    )
    assert (alone["values"] - ranks[0]["values"]).abs().min() > 1e-3
