"""BYOLTrainer: momentum, log, resume, refusals."""

import math

import pytest
from semi_supervised_runs import digits, make_run, transform
from short_runs import logged, whole_and_resumed
from tiny_semi_supervised import RESNET18

from hf_msn import MultiViewDataset
from hf_msn.trainers.checkpoints import CheckpointError


def test_the_momentum_rises_along_a_cosine(tmp_path):
    trainer = make_run(tmp_path, "byol", ema_momentum=0.9, max_steps=4)
    trainer.train()
    expected = [1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(1, 5)]
    assert list(logged(trainer, "ema_momentum").values()) == pytest.approx(expected)


@pytest.mark.parametrize("predictor", ["mlp", "linear", "direct_pred"])
def test_the_log_has_the_spectrum_of_the_predictors_input(tmp_path, predictor):
    trainer = make_run(tmp_path, "byol", model_fields={"predictor": predictor, "ema": False}, max_steps=2)
    trainer.train()
    log = trainer.state.log_history[-2]
    model = trainer.model
    assert log["step"] == 2 and "ema_momentum" not in log
    for name, value in model.input_correlation.spectrum(model.prediction_head).items():
        assert log[name] == pytest.approx(value)
    assert log["correlation_largest"] > log["correlation_smallest"] >= 0
    assert 1 <= log["correlation_rank"] <= 8
    assert log.get("predictor_alignment", 0) == pytest.approx(
        {"mlp": 0, "direct_pred": 1}.get(predictor, 0.5), abs=0.5
    )


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"predictor": "direct_pred", "predictor_update_every": 2, "mask_ratio": 0.5}, {}),
        ({"predictor": "direct_copy", "ema": False}, {"gradient_accumulation_steps": 2, "use_lars": True}),
        (RESNET18, {}),
    ],
)
def test_resume_is_bit_exact(tmp_path, fields, settings):
    _, resumed = whole_and_resumed(make_run, tmp_path, 3, method="byol", model_fields=fields, **settings)
    assert resumed.model.input_correlation.num_updates == 8


def test_a_checkpoint_of_another_predictor_is_refused(tmp_path):
    make_run(tmp_path, "byol", max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(CheckpointError, match="predictor"):
        make_run(tmp_path, "byol", model_fields={"predictor": "linear"}).train(resume_from_checkpoint=True)


def test_wrong_views_are_refused_before_training(tmp_path):
    def trainer(fields=None, **views):
        dataset = MultiViewDataset(digits().select(range(20)), transform("byol", **views))
        return make_run(tmp_path, "byol", model_fields=fields, changes={"train_dataset": dataset})

    with pytest.raises(ValueError, match=r"`anchor_views`.*2"):
        trainer(anchor_views=2).train()
    with pytest.raises(ValueError, match=r"`image_size`.*9"):
        trainer(image_size=9).train()
