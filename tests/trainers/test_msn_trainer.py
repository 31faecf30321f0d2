"""MSNTrainer: schedules, decay, clipping, log, refusals, saving. Resume is in test_resume.py."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from short_runs import SHORT, RandomViews, StopAt, assert_same_weights, logged, make_trainer
from tiny import tiny_model
from transformers import TrainingArguments

from hf_msn import (
    MSNTrainer,
    MSNTrainingArguments,
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    PAWSTrainingArguments,
    load_images,
)
from hf_msn.trainers import pretraining_trainer
from hf_msn.trainers.checkpoints import CheckpointError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["schedule"]


def golden_trainer(tmp_path):
    return make_trainer(
        tmp_path,
        dataset=RandomViews(GOLDEN["steps_per_epoch"] * 4),
        max_steps=-1,
        num_train_epochs=GOLDEN["epochs"],
        warmup_steps=0,
        warmup_epochs=GOLDEN["warmup_epochs"],
        start_learning_rate=GOLDEN["start_lr"],
        learning_rate=GOLDEN["lr"],
        final_learning_rate=GOLDEN["final_lr"],
        weight_decay=GOLDEN["wd"],
        final_weight_decay=GOLDEN["final_wd"],
        schedule_stretch=GOLDEN["stretch"],
        save_strategy="no",
        callbacks=[StopAt(len(GOLDEN["lr_at_step"]))],
    )


def test_schedules_of_a_run_are_the_golden_ones(tmp_path):
    seen = []
    trainer = golden_trainer(tmp_path)
    step = trainer.training_step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        groups = trainer.optimizer.param_groups
        assert groups[1]["weight_decay"] == 0.0
        seen.append((groups[0]["lr"], groups[0]["weight_decay"], trainer.ema_momentum_now()))
        return loss

    trainer.training_step = watched
    trainer.train()
    assert trainer.state.max_steps == GOLDEN["steps_per_epoch"] * GOLDEN["epochs"]
    for name, column in (("lr_at_step", 0), ("wd_at_step", 1), ("momentum_at_step", 2)):
        assert [entry[column] for entry in seen] == pytest.approx(GOLDEN[name], rel=1e-12)


def test_the_log_has_the_parts_of_the_loss(tmp_path):
    fields = {"mask_ratio": 0.0, "me_max_weight": 2.0}
    arguments = {
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "start_sharpen_temperature": 0.5,
    }
    trainer = make_trainer(tmp_path, model_fields=fields, **arguments)
    trainer.train()
    log = trainer.state.log_history[0]

    batch = MultiViewCollator()([RandomViews()[row] for row in range(4)])
    output = tiny_model(**fields)(**batch, sharpen_temperature=0.5)
    assert log["cross_entropy"] == pytest.approx(output.cross_entropy.item(), rel=1e-5)
    assert log["me_max"] == pytest.approx(output.me_max.item(), rel=1e-4)
    assert log["entropy"] == pytest.approx(output.entropy.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(output.cross_entropy.item() + 2 * output.me_max.item(), rel=1e-5)
    target = output.target_probabilities
    assert log["mean_max_target_probability"] == pytest.approx(target.amax(-1).mean().item(), rel=1e-5)
    assert log["prototypes_in_use"] == len(target.argmax(-1).unique())
    assert log["sharpen_temperature"] == 0.5
    assert log["images_per_second"] > 0
    assert {"ema_momentum", "weight_decay", "learning_rate", "grad_norm"} <= set(log)


@pytest.mark.parametrize("stretch", [1.0, 1.25])
def test_sharpening_is_linear_over_the_stretched_horizon(tmp_path, stretch):
    settings = {"start_sharpen_temperature": 0.5, "final_sharpen_temperature": 0.1, "schedule_stretch": stretch}
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="no", **settings)
    trainer.train()
    expected = [0.5 - 0.4 * step / (4 * stretch) for step in range(1, 5)]
    assert list(logged(trainer, "sharpen_temperature").values()) == pytest.approx(expected)


def test_horizon_and_warmup_are_cut_to_whole_steps(tmp_path):
    # 22 images in batches of 4: 5 updates per epoch, of which 1.5 epochs are 7 whole ones; 1.25 * 10 steps are 12.
    rates = {"start_learning_rate": 0.1, "learning_rate": 0.8, "final_learning_rate": 0.01}
    trainer = make_trainer(
        tmp_path,
        RandomViews(22),
        max_steps=-1,
        num_train_epochs=2,
        warmup_steps=0,
        warmup_epochs=1.5,
        save_strategy="no",
        weight_decay=0.1,
        final_weight_decay=0.2,
        **rates,
    )
    trainer.train()
    expected = [0.1 + 0.1 * step for step in range(1, 8)]
    expected += [0.01 + 0.79 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(1, 4)]
    assert list(logged(trainer, "learning_rate").values()) == pytest.approx(expected)
    trainer.state.global_step = 5
    assert trainer.weight_decay_now() == pytest.approx(0.15)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save = torch.save
    calls = []

    def full_disk(value, path, *args, **kwargs):
        if "optimizer" in str(path):
            calls.append(path)
            if len(calls) == 2:
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"checkpoint-6' failed: .*No space left.*checkpoint-3' is as it was"):
        make_trainer(tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("num_images", "batch", "message"),
    [(0, 4, "has 0 images"), (1, 1, "has 1 images, but one batch takes 2"), (3, 4, "has 3 images, but one batch")],
)
def test_too_few_images(tmp_path, num_images, batch, message):
    trainer = make_trainer(tmp_path, RandomViews(num_images), per_device_train_batch_size=batch)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("dataset", [load_images("digits"), [torch.zeros(3, 16, 16)] * 8], ids=["images", "tensors"])
def test_items_that_are_no_views_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="MultiViewDataset"):
        make_trainer(tmp_path, dataset).train()


def test_a_model_that_is_made_by_the_trainer_trains(tmp_path):
    args = MSNTrainingArguments(str(tmp_path), **SHORT)
    trainer = MSNTrainer(None, args, model_init=lambda: tiny_model(), train_dataset=RandomViews())
    trainer.train()
    assert trainer.state.global_step == 8 and 1 <= logged(trainer, "prototypes_in_use")[8] <= 8


def test_arguments_of_another_trainer_are_refused(tmp_path):
    for arguments in (TrainingArguments, PAWSTrainingArguments):
        with pytest.raises(ValueError, match=f"MSNTrainingArguments.* {arguments.__name__}"):
            MSNTrainer(tiny_model(), arguments(str(tmp_path), use_cpu=True), train_dataset=RandomViews())


def test_the_final_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.train()

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match=r"No space left.*checkpoint-8' is as it"),
    ):
        patch.setattr(trainer.model, "save_pretrained", full_disk)
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob(".*"))
    trainer.save_model()
    assert_same_weights(type(trainer.model).from_pretrained(tmp_path), trainer.model)


def test_a_batch_of_one_needs_no_batch_norm(tmp_path):
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 1"):
        make_trainer(tmp_path, per_device_train_batch_size=1).train()
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, model_fields={"projection_batch_norm": False})
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("focal_size", 6), ("image_size", 18), ("image_size", 8)])
def test_views_must_be_of_the_models_size_and_whole_patches(tmp_path, name, size):
    transform = MultiViewTransform(**{"image_size": 16, "focal_size": 8, "focal_views": 1, name: size})
    views = MultiViewDataset(load_images("digits").select(range(4)), transform)
    for dataset in (views, list(views)) if size == 8 else (views,):
        with pytest.raises(ValueError, match=f"`{name}` .* {size} pixels"):
            make_trainer(tmp_path, dataset).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("schedule_stretch", 0.8),
        ("ema_momentum", 1.2),
        ("final_sharpen_temperature", 0.0),
        ("final_weight_decay", -1.0),
        ("learning_rate_batch_size", 0),
        ("num_train_epochs", 0),
        ("lars_momentum", 1.0),
        ("gradient_accumulation_steps", 0),
        ("remove_unused_columns", True),
        ("torch_compile", True),
    ],
)
def test_an_argument_outside_of_its_range_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` .*({value}|must be False)"):
        MSNTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bf16_is_warned_of_where_the_processor_has_none(tmp_path, monkeypatch, caplog, has_bfloat16):
    monkeypatch.setattr(pretraining_trainer, "HAS_BFLOAT16", has_bfloat16)
    make_trainer(tmp_path, bf16=True, max_steps=1, save_strategy="no").train()
    assert ("`bf16` is True" in caplog.text) != has_bfloat16
