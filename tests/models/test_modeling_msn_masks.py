"""The sequence of masks: per image, per step, per rank, and going on where a run stopped."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from hf_msn import MSNForPreTraining
from hf_msn.models import modeling_msn


@pytest.fixture
def watched():
    """Makes a tiny model; gives it and the list in which its encoder's masks appear."""

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


def losses(model, count: int) -> list[float]:
    return [model(**tiny_batch(seed=step)).loss.item() for step in range(count)]


def test_every_image_view_and_step_has_its_own_mask(watched):
    model, masks = watched(mask_ratio=0.5)
    for _ in range(3):
        model(**tiny_batch(anchor_views=2))
    assert [mask.shape for mask in masks] == [(8, 8)] * 3
    assert len(set(rows(masks))) == 24


def test_every_rank_has_its_own_masks(watched, monkeypatch):
    model, masks = watched(mask_ratio=0.5)
    for rank in range(3):
        monkeypatch.setattr(modeling_msn, "rank", lambda rank=rank: rank)
        model.seed_masks(5)
        model(**tiny_batch())
    assert len(set(rows(masks))) == 12


def test_a_shared_mask_is_one_for_all_images_and_ranks_but_another_at_each_step(watched, monkeypatch):
    model, masks = watched(mask_ratio=0.5, shared_mask=True)
    for rank in range(2):
        monkeypatch.setattr(modeling_msn, "rank", lambda rank=rank: rank)
        model.seed_masks(5)
        model(**tiny_batch(anchor_views=2))
        model(**tiny_batch(anchor_views=2))
    assert [len(set(rows([mask]))) for mask in masks] == [1, 1, 1, 1]
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_without_masking_nothing_is_drawn(watched):
    model, masks = watched(mask_ratio=0.0)
    model(**tiny_batch())
    assert masks == [None]
    assert model.mask_state.tolist() == [0, 0]


def test_seeding_starts_the_sequence_anew(watched):
    model, masks = watched()
    for seed in (3, 4, 3):
        model.seed_masks(seed)
        model(**tiny_batch())
        model(**tiny_batch())
    assert model.mask_state.tolist() == [3, 2]
    assert torch.equal(torch.stack(masks[:2]), torch.stack(masks[4:]))
    assert len(set(map(str, masks))) == 4


def test_masks_do_not_touch_the_global_generator(msn_model, msn_batch):
    state = torch.get_rng_state()
    msn_model(**msn_batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sequence_goes_on_after_saving_and_loading(tmp_path):
    uninterrupted = losses(tiny_model(), 5)
    assert len(set(uninterrupted)) == 5
    model = tiny_model()
    model.seed_masks(0)
    assert losses(model, 2) == uninterrupted[:2]
    model.save_pretrained(tmp_path)
    resumed = MSNForPreTraining.from_pretrained(tmp_path).train()
    assert resumed.mask_state.tolist() == [0, 2]
    rest = [resumed(**tiny_batch(seed=step)).loss.item() for step in range(2, 5)]
    assert rest == uninterrupted[2:]


def test_the_sequence_goes_on_after_loading_a_state_dict_into_a_model_that_had_drawn_others():
    model = tiny_model()
    model.seed_masks(11)
    losses(model, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [model(**tiny_batch(seed=step)).loss.item() for step in range(2, 5)]
    other = tiny_model(seed=1)
    losses(other, 3)
    other.load_state_dict(state)
    assert [other(**tiny_batch(seed=step)).loss.item() for step in range(2, 5)] == expected


def test_an_evaluation_in_between_leaves_the_sequence_of_training_as_it_is():
    uninterrupted = losses(tiny_model(projection_batch_norm=False), 3)
    model = tiny_model(projection_batch_norm=False)
    first = losses(model, 1)
    model.eval()
    evaluated = {model(**tiny_batch(seed=1)).loss.item() for _ in range(3)}
    assert evaluated == {uninterrupted[1]}  # the mask that comes next, each time
    assert model.mask_state.tolist() == [0, 1]
    model.train()
    assert first + [model(**tiny_batch(seed=step)).loss.item() for step in (1, 2)] == uninterrupted
