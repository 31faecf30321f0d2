"""Callbacks, each in a real run of MSNTrainer."""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from tiny import tiny_batch, tiny_model
from transformers import TrainerCallback

from hf_msn import (
    LowShotCallback,
    LowShotEvaluator,
    MSNTrainer,
    MSNTrainingArguments,
    evaluation_image_processor,
    load_images,
)
from hf_msn.evaluation.probes import SoftNearestNeighborProbe
from hf_msn.trainers.callbacks.training import ThroughputProgressCallback, UpdateTargetCallback


class Views(torch.utils.data.Dataset):
    """8 items that note the epoch in which each was read."""

    def __init__(self):
        self.items = tiny_batch(batch_size=8)
        self.epoch, self.reads = None, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __getitem__(self, row):
        self.reads.append((self.epoch, row))
        return {name: views[row] for name, views in self.items.items()}


def make_trainer(tmp_path, dataset=None, **arguments) -> MSNTrainer:
    arguments = {"disable_tqdm": True, "max_steps": -1, **arguments}
    return MSNTrainer(
        tiny_model(),
        MSNTrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,  # 2 updates an epoch
            warmup_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **arguments,
        ),
        train_dataset=dataset or Views(),
    )


def test_the_data_set_is_told_each_epoch_before_it_is_read(tmp_path):
    dataset = Views()
    make_trainer(tmp_path, dataset, num_train_epochs=3).train()
    assert sorted(dataset.reads) == [(epoch, row) for epoch in range(3) for row in range(8)]


def test_a_data_set_without_epochs_is_left_alone(tmp_path):
    dataset = [Views()[row] for row in range(8)]
    trainer = make_trainer(tmp_path, dataset, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("every_epochs", "arguments", "steps"),
    [
        (1, {"num_train_epochs": 3}, [2, 4, 6]),
        (2, {"num_train_epochs": 5}, [4, 8, 10]),  # and once more after the last
        (2, {"num_train_epochs": 4}, [4, 8]),  # the last epoch is not evaluated twice
        (9, {"num_train_epochs": 3}, [6]),
        (2, {"max_steps": 5}, [4, 5]),  # stopped in the middle of the third epoch
    ],
)
def test_low_shot_evaluation_keeps_its_cadence_and_is_logged(tmp_path, every_epochs, arguments, steps):
    trainer = make_trainer(tmp_path, **arguments)
    evaluated = []

    def evaluator(model):
        assert model is trainer.model
        evaluated.append(trainer.state.global_step)
        return {"low_shot_5": 10.0 * len(evaluated)}

    trainer.add_callback(LowShotCallback(trainer, evaluator, every_epochs))
    trainer.train()
    assert evaluated == steps
    logged = [
        (entry["step"], entry["eval_low_shot_5"]) for entry in trainer.state.log_history if "eval_low_shot_5" in entry
    ]
    assert logged == [(step, 10.0 * (number + 1)) for number, step in enumerate(steps)]


def test_projections_are_classified_while_training_and_training_goes_on_as_without(tmp_path):
    plain = make_trainer(tmp_path, num_train_epochs=2)
    plain.train()
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    train, test = load_images("digits").select(range(40)), load_images("digits", split="test").select(range(20))
    evaluator = LowShotEvaluator(
        train,
        test,
        image_processor=evaluation_image_processor(16, crop_fraction=1.0),
        images_per_class=(),
        rows={"support": range(30)},
        probe=SoftNearestNeighborProbe(),
        features="projection",
    )
    trainer.add_callback(LowShotCallback(trainer, evaluator))
    trainer.train()
    logged = [
        entry["eval_low_shot/support/top1"]
        for entry in trainer.state.log_history
        if "eval_low_shot/support/top1" in entry
    ]
    assert len(logged) == 2
    assert logged[-1] == evaluator(trainer.model)["low_shot/support/top1"]
    assert trainer.model.training
    for name, weights in trainer.model.state_dict().items():
        assert torch.equal(weights, plain.model.state_dict()[name]), name


@pytest.mark.parametrize("every_epochs", [0, -1])
def test_a_cadence_below_one_epoch_is_an_error(every_epochs):
    with pytest.raises(ValueError, match=f"`every_epochs` must be >= 1, but is {every_epochs}"):
        LowShotCallback(None, lambda model: {}, every_epochs)


class TargetDistance(TrainerCallback):
    """How far each update moved the target, and whether it lies on the online encoder."""

    def __init__(self):
        self.moved, self.is_online = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.weight(model.target_encoder).clone()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append((self.weight(model.target_encoder) - self.before).norm().item())
        self.is_online.append(torch.equal(self.weight(model.target_encoder), self.weight(model.encoder)))

    @staticmethod
    def weight(encoder):
        return encoder.layers[0].mlp.fc1.weight.detach()


def test_the_target_moves_after_each_optimizer_step_with_what_that_step_gave(tmp_path):
    trainer, distance = (
        make_trainer(tmp_path, num_train_epochs=2, ema_momentum=0.0, final_ema_momentum=0.0),
        TargetDistance(),
    )
    trainer.add_callback(distance)
    trainer.train()
    assert distance.is_online == [True] * 4
    assert min(distance.moved) > 0


def test_the_target_moves_once_an_update_under_accumulation(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, num_train_epochs=2, gradient_accumulation_steps=2, ema_momentum=0.5)
    momenta, update = [], trainer.model.update_target
    monkeypatch.setattr(trainer.model, "update_target", lambda momentum: (momenta.append(momentum), update(momentum)))
    trainer.train()
    # Two updates, stretched over 2.5: the momenta of the first and of the second.
    assert momenta == pytest.approx([0.5, 0.5 + 0.5 / 2.5], rel=1e-12)


def test_the_target_stays_where_the_optimizer_step_was_skipped(tmp_path, monkeypatch):
    trainer, distance = make_trainer(tmp_path, num_train_epochs=2, ema_momentum=0.0), TargetDistance()
    trainer.add_callback(distance)
    # As after an overflow in fp16, at the second and third update.
    monkeypatch.setattr(
        AcceleratedOptimizer, "step_was_skipped", property(lambda self: trainer.state.global_step in (1, 2))
    )
    trainer.train()
    assert [moved > 0 for moved in distance.moved] == [True, False, False, True]


def test_an_optimizer_that_cannot_skip_always_moves_the_target():
    model = tiny_model()
    with torch.no_grad():
        model.prototypes.zero_()
        model.encoder.layernorm.bias.fill_(3.0)
    callback = UpdateTargetCallback(lambda: 0.75)
    callback.on_optimizer_step(None, None, None, model=model, optimizer=torch.optim.SGD([model.prototypes], lr=0.1))
    assert model.target_encoder.layernorm.bias.unique().tolist() == [0.75]


def test_the_progress_bar_shows_images_per_second(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, disable_tqdm=False, logging_steps=1)
    shown = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ThroughputProgressCallback)]
            if "images_per_second" in logs:
                shown.append((bars[0].training_bar.postfix, f"{logs['images_per_second']:.0f} images/s"))

    trainer.add_callback(Watch())
    trainer.train()
    assert len(shown) == 4
    assert all(bar == expected for bar, expected in shown)
