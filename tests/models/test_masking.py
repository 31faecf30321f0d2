"""The draw of kept patches, and the sequence of draws of a model: per image, step and rank, kept in checkpoints."""

import fractions
import math

import pytest
import torch
from tiny import tiny_batch, tiny_model

from hf_msn import MSNForPreTraining
from hf_msn.models import modeling_pretraining
from hf_msn.models.masking import draw_kept_patches, num_kept_patches


def test_number_of_kept_patches_is_exact():
    assert math.floor(10 * (1 - 0.9)) == 0  # floating point alone
    for num_patches in (4, 10, 16, 49, 100, 196, 784, 1024, 3136):
        for percent in range(100):
            exact = num_patches * (1 - fractions.Fraction(percent, 100))
            assert num_kept_patches(num_patches, percent / 100) == math.floor(exact)


def test_no_patch_is_an_error():
    with pytest.raises(ValueError, match=r"`mask_ratio` 0.9 .* 4 patches"):
        draw_kept_patches(2, 4, 0.9, seed=(0,))


def test_every_patch_is_kept_equally_often_and_at_most_once_per_image():
    # A patch is kept by Binomial(4000, 3 / 4) images: five standard deviations are 137.
    kept = draw_kept_patches(4000, 16, 0.25, seed=(7,))
    assert (kept.flatten().bincount(minlength=16) - 3000).abs().max() < 137
    assert all(len(set(row)) == 12 for row in kept.tolist())


def draw(*seed: int, shared: bool = False) -> torch.Tensor:
    return draw_kept_patches(8, 64, 0.5, seed=seed, shared=shared)


def test_masks_differ_between_images_draws_ranks_and_seeds():
    rows = [row for seed in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)) for row in draw(*seed).tolist()]
    assert len({tuple(sorted(row)) for row in rows}) == len(rows) == 32
    shared = draw(0, 0, 0, shared=True)
    assert shared.shape == (8, 32) and torch.equal(shared, shared[:1].expand(8, -1))


def test_draws_are_those_of_earlier_versions():
    # a run that was begun with an earlier version continues with the same masks
    assert draw_kept_patches(2, 8, 0.5, seed=(3, 1, 4)).tolist() == [[6, 0, 1, 7], [6, 1, 2, 7]]


@pytest.fixture
def watched():
    """Makes a tiny model; returns it and the list in which its encoder's masks appear."""

    def make(**fields):
        model, masks = tiny_model(**fields), []
        forward = model.encoder.forward

        def watch(pixel_values, kept_patches=None, **kwargs):
            if pixel_values.shape[-1] == 16:
                masks.append(None if kept_patches is None else kept_patches.clone())
            else:
                assert kept_patches is None  # a focal view keeps all patches
            return forward(pixel_values, kept_patches=kept_patches, **kwargs)

        model.encoder.forward = watch
        return model, masks

    return make


def rows(masks: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(sorted(row)) for mask in masks for row in mask.tolist()]


def losses(model, steps) -> list[float]:
    return [model(**tiny_batch(seed=step)).loss.item() for step in steps]


def test_every_image_view_step_and_rank_has_its_own_mask(watched, monkeypatch):
    model, masks = watched(mask_ratio=0.5)
    for rank in range(3):
        monkeypatch.setattr(modeling_pretraining, "rank", lambda rank=rank: rank)
        model.seed_masks(5)
        for _ in range(2):
            model(**tiny_batch(anchor_views=2))
    assert [mask.shape for mask in masks] == [(8, 8)] * 6
    assert len(set(rows(masks))) == 48


def test_a_shared_mask_is_one_for_all_images_and_ranks_but_another_at_each_step(watched, monkeypatch):
    model, masks = watched(mask_ratio=0.5, shared_mask=True)
    for rank in range(2):
        monkeypatch.setattr(modeling_pretraining, "rank", lambda rank=rank: rank)
        model.seed_masks(5)
        model(**tiny_batch(anchor_views=2))
        model(**tiny_batch(anchor_views=2))
    assert [len(set(rows([mask]))) for mask in masks] == [1, 1, 1, 1]
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_without_masking_nothing_is_drawn(watched):
    model, masks = watched(mask_ratio=0.0)
    model(**tiny_batch())
    assert masks == [None]
    assert model.mask_state.tolist() == [0, 0]


def test_seeding_restarts_the_sequence(watched):
    model, masks = watched()
    state = torch.get_rng_state()
    for seed in (3, 4, 3):
        model.seed_masks(seed)
        model(**tiny_batch())
        model(**tiny_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.mask_state.tolist() == [3, 2]
    assert torch.equal(torch.stack(masks[:2]), torch.stack(masks[4:]))
    assert len(set(map(str, masks))) == 4


def test_the_sequence_continues_after_saving_and_loading(tmp_path):
    uninterrupted = losses(tiny_model(), range(5))
    assert len(set(uninterrupted)) == 5
    model = tiny_model()
    model.seed_masks(0)
    assert losses(model, range(2)) == uninterrupted[:2]
    model.save_pretrained(tmp_path)
    resumed = MSNForPreTraining.from_pretrained(tmp_path).train()
    assert resumed.mask_state.tolist() == [0, 2]
    other = tiny_model(seed=1)
    other.seed_masks(11)
    losses(other, range(3))
    other.load_state_dict(model.state_dict())  # into a model that has drawn others
    assert losses(resumed, range(2, 5)) == losses(other, range(2, 5)) == uninterrupted[2:]


def test_an_evaluation_does_not_advance_the_sequence():
    uninterrupted = losses(tiny_model(projection_batch_norm=False), range(3))
    model = tiny_model(projection_batch_norm=False)
    first = losses(model, [0])
    model.eval()
    assert losses(model, [1, 1, 1]) == [uninterrupted[1]] * 3  # the mask that comes next, each time
    assert model.mask_state.tolist() == [0, 1]
    model.train()
    assert first + losses(model, [1, 2]) == uninterrupted
