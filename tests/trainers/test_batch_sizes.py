"""The size of batches: found by trying, the last of an epoch, and those of an evaluation."""

import pytest
import torch
from semi_supervised_runs import make_run
from short_runs import RandomViews, logged, make_trainer

from hf_msn.files import read_json
from hf_msn.trainers.checkpoints import find_last_checkpoint


def without_memory_for_more_than(images: int, trainer):
    compute_loss = trainer.compute_loss

    def limited(model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > images:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = limited
    return trainer


def test_a_batch_that_was_found_is_that_of_schedules_and_record(tmp_path, caplog):
    settings = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "warmup_steps": 0,
        "warmup_epochs": 1,
        "learning_rate_batch_size": 8,
        "save_steps": 5,
    }
    found = make_trainer(tmp_path / "found", per_device_train_batch_size=8, auto_find_batch_size=True, **settings)
    without_memory_for_more_than(3, found).train()
    size = found.images_per_update()
    assert 1 < size <= 3
    given = make_trainer(tmp_path / "given", per_device_train_batch_size=size, **settings)
    given.train()
    assert found.state.max_steps == given.state.max_steps == 2 * (20 // size)
    rates = logged(found, "learning_rate")
    assert rates == logged(given, "learning_rate")
    assert max(rates.values()) == pytest.approx(found.args.learning_rate * size / 8)
    record = read_json(find_last_checkpoint(tmp_path / "found") / "run.json")
    assert record["batch"]["per_device"] == record["batch"]["images_per_update"] == size
    assert record["settings"]["per_device_train_batch_size"] == size
    resumed = make_trainer(tmp_path / "found", per_device_train_batch_size=8, auto_find_batch_size=True, **settings)
    resumed.train(resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path / "found", per_device_train_batch_size=size, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("num_images", [13, 7])  # a smaller last batch, and no whole batch
def test_an_evaluation_reads_every_row_and_training_whole_batches(tmp_path, num_images):
    settings = {"per_device_eval_batch_size": 8, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, RandomViews(14), eval_dataset=RandomViews(num_images), **settings)
    seen, compute_loss = {True: [], False: []}, trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen[model.training].append(len(inputs["pixel_values"]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert set(seen[True]) == {4} and sum(seen[False]) == 2 * num_images
    assert set(logged(trainer, "eval_loss")) == {4, 8}
    assert sum(len(batch["pixel_values"]) for batch in trainer.get_test_dataloader(RandomViews(9))) == 9
    assert trainer.args.dataloader_drop_last


def test_a_last_batch_of_one_image_is_refused_before_training_where_batch_norm_needs_two(tmp_path):
    settings = {"dataloader_drop_last": False, "save_strategy": "no"}
    for more in ({}, {"max_steps": -1, "num_train_epochs": 1}, {"gradient_accumulation_steps": 2}):
        trainer = make_trainer(tmp_path, RandomViews(21), **settings, **more)
        before, random = {**trainer.model.state_dict()}, torch.get_rng_state()
        with pytest.raises(
            ValueError, match=r"`dataloader_drop_last`.* 1 of the 21 images.*per_device_train_batch_size"
        ):
            trainer.train()
        assert trainer.state.global_step == 0 and torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    for model_fields, num_images, more in (
        ({}, 22, {}),
        ({}, 21, {"max_steps": 5}),  # ends before
        ({"projection_batch_norm": False}, 21, {"max_steps": 7}),
    ):
        trainer = make_trainer(tmp_path, RandomViews(num_images), model_fields=model_fields, **settings, **more)
        trainer.train()
        assert trainer.state.global_step == trainer.state.max_steps


@pytest.mark.parametrize("method", ["paws", "suncet"])
def test_a_last_batch_of_one_image_with_a_support_trains_or_is_refused_before(tmp_path, method):
    trainer = make_run(tmp_path, method, num_images=21, dataloader_drop_last=False)
    try:
        trainer.train()
    except ValueError as error:
        assert "`dataloader_drop_last`" in str(error) and trainer.state.global_step == 0
    else:
        assert trainer.state.global_step == 8


def test_a_last_batch_of_one_image_is_refused_where_the_batch_was_found(tmp_path):
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "dataloader_drop_last": False}
    # 8, 7, 6, 5 and 4 are tried; 6 and 4 leave one of 13 images.
    trainer = make_trainer(tmp_path, RandomViews(13), save_strategy="no", **settings)
    with pytest.raises(ValueError, match=r"`dataloader_drop_last`.* 1 of the 13 images"):
        without_memory_for_more_than(4, trainer).train()
    assert trainer.state.global_step == 0 and trainer._train_batch_size == 4
    trainer = make_trainer(tmp_path, RandomViews(13), save_strategy="no", **settings)
    without_memory_for_more_than(5, trainer).train()
    assert trainer.state.global_step == 8 and trainer._train_batch_size == 5
