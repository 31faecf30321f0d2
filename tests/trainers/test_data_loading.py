"""What the trainers do between the data set and the model: crops, where views are finished, workers, waiting."""

import os

import datasets
import pytest
import torch
from launch import run_ranks
from semi_supervised_runs import LABELLED_ROWS, digits, make_run
from semi_supervised_runs import transform as small_views
from short_runs import assert_same_weights, logged, make_trainer

from hf_msn import (
    MSNTrainingArguments,
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    PAWSTrainingArguments,
    SupportDataset,
    load_images,
    multi_view_dataset,
)
from hf_msn.files import read_json
from hf_msn.trainers import pretraining_arguments

COLORED = {"image_size": 16, "focal_size": 8, "focal_views": 2}


class OtherCollator(MultiViewCollator):
    """Does the same, but the trainer cannot know it."""


class OwnTransform(MultiViewTransform):
    """A user's transform that changes finished views."""

    def __call__(self, image):
        return {name: -view for name, view in super().__call__(image).items()}


def _digits(number: int = 20, transform: MultiViewTransform | None = None, streamed: bool = False):
    images = load_images("digits").select(range(number))
    return multi_view_dataset(
        images.to_iterable_dataset() if streamed else images, transform or MultiViewTransform(**COLORED), seed=3
    )


def _batch(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("streamed", [False, True])
def test_loaders_give_crops_and_the_trainer_finishes_them(tmp_path, streamed):
    dataset = _digits(streamed=streamed)
    trainer = make_trainer(tmp_path, dataset)
    batch = _batch(trainer)
    assert batch["pixel_values"].shape == (4, 16, 16, 3) and batch["pixel_values"].dtype == torch.uint8
    assert batch["view_parameters"].shape == (4, 4, 12)
    finished = trainer._prepare_inputs(batch)
    assert {name: tuple(views.shape) for name, views in finished.items()} == {
        "pixel_values": (4, 3, 16, 16),
        "anchor_pixel_values": (4, 1, 3, 16, 16),
        "focal_pixel_values": (4, 2, 3, 8, 8),
    }
    # the user's data set is as it was
    item = next(iter(dataset)) if streamed else dataset[0]
    assert set(item) == set(finished) and item["pixel_values"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("streamed", "accumulated"), [(False, 2), (True, 1)])
def test_finishing_on_the_device_changes_no_weight(tmp_path, streamed, accumulated):
    # digits' recipe: the same numbers bit by bit, whether the loader or the trainer finishes the views
    transform = MultiViewTransform.for_small_grayscale(16, focal_views=2, focal_size=8)
    settings = {"gradient_accumulation_steps": accumulated, "save_strategy": "no", "eval_strategy": "epoch"}

    def run(folder):
        dataset, evaluated = _digits(20, transform, streamed), _digits(8, transform)
        settings["max_steps"] = 2
        return make_trainer(tmp_path / folder, dataset, eval_dataset=evaluated, **settings)

    cut, whole = run("cut"), run("whole")
    whole.data_collator = OtherCollator()
    assert "view_parameters" in _batch(cut) and "view_parameters" not in _batch(whole)
    cut.train()
    whole.train()
    assert logged(cut) == logged(whole)
    assert_same_weights(cut.model, whole.model)
    assert cut.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_stream_trains_without_warmup(tmp_path):
    settings = {"warmup_epochs": 0, "warmup_steps": 0, "max_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, _digits(streamed=True), **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="warmup"):
        make_trainer(tmp_path, _digits(streamed=True), **{**settings, "warmup_epochs": 1}).train()


def test_views_that_a_user_changes_are_left_to_the_loader(tmp_path):
    views = MultiViewTransform(**COLORED)
    for name, transform in (("own", OwnTransform(**COLORED)), ("any", lambda image: views(image))):
        trainer = make_trainer(tmp_path / name, MultiViewDataset(load_images("digits"), transform))
        assert _batch(trainer)["pixel_values"].dtype == torch.float32


def test_evaluation_with_another_normalisation_is_finished_by_its_own_transform(tmp_path):
    other = _digits(8, MultiViewTransform(**COLORED, image_std=(1.0, 1.0, 1.0)))
    trainer = make_trainer(tmp_path, _digits(), eval_dataset=other)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert torch.equal(batch["pixel_values"], MultiViewCollator()([other[row] for row in range(8)])["pixel_values"])


@pytest.mark.parametrize("method", ["paws", "suncet"])
def test_support_images_are_finished_by_the_trainer_too(tmp_path, method):
    trainer = make_run(tmp_path, method)
    trainer._micro_batch = 0
    support = trainer._load_support()
    assert support["support_pixel_values"].dtype == torch.uint8
    finished = trainer._prepare_inputs(support)
    dataset, rows = trainer.support_dataset, trainer.support_sampler().batch(0)
    places = trainer.support_sampler().places.tolist()
    expected = [dataset[(0, place, row)]["support_pixel_values"] for place, row in zip(places, rows)]
    assert torch.equal(finished["support_pixel_values"], torch.cat(expected))
    assert set(finished) == {"support_pixel_values", "support_labels"}


def _train_with_broken_images(rank, folder):
    rows = digits().select(range(22)).to_list()
    for broken in (2, 9, 11):  # 9 and 11 are labelled, of the classes 9 and 1
        rows[broken]["image"]["bytes"] = b"cut"
    images = datasets.Dataset.from_list(rows, digits().features)
    train, labelled = MultiViewDataset(images, small_views()), SupportDataset(images, LABELLED_ROWS, small_views())
    changes = {"train_dataset": train, "support_dataset": labelled}
    settings = {"per_device_train_batch_size": 2, "global_support_classes": 2, "max_steps": 30}
    trainer = make_run(folder, "paws", changes=changes, **settings)
    trainer.train()
    trainer.save_model()
    return train.num_broken, labelled.num_broken, trainer.state.log_history[-2]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_image_counts_once_over_ranks_and_is_recorded(tmp_path, ranks):
    results = run_ranks(_train_with_broken_images, ranks, str(tmp_path), timeout=120)
    assert ranks == 1 or sum(result[0] for result in results) > 3  # both found the same
    for _, _, logs in results:
        assert (logs["broken_images"], logs["broken_labelled_images"]) == (3, 2)
    record = read_json(tmp_path / "run.json")
    assert (record["data"]["num_images"], record["data"]["num_broken"]) == (22, 3)
    assert (record["labelled"]["num_images"], record["labelled"]["num_broken"]) == (8, 2)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 16), (2, 15), (8, 3), (64, 0)])
def test_workers_follow_the_cores_of_a_rank_where_an_accelerator_trains(tmp_path, monkeypatch, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(pretraining_arguments, "uses_accelerator", lambda use_cpu: True)
    made = MSNTrainingArguments(str(tmp_path), use_cpu=True)
    assert (made.dataloader_num_workers, made.dataloader_persistent_workers) == (workers, workers > 0)
    # PAWS reads supports beside the images.
    assert PAWSTrainingArguments(str(tmp_path), use_cpu=True).dataloader_num_workers == workers // 2


@pytest.mark.parametrize(
    ("given", "workers", "persistent"), [({}, 0, False), ({"dataloader_num_workers": 3}, 3, True)]
)
def test_workers_on_a_cpu_are_those_that_are_given(tmp_path, given, workers, persistent):
    args = MSNTrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (workers, persistent)
    assert not args.dataloader_pin_memory


def test_an_accelerator_is_used_unless_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    uses_accelerator = pretraining_arguments.uses_accelerator
    assert uses_accelerator(False) and not uses_accelerator(True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_accelerator(False)
