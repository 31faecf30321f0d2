"""Low-shot evaluation while training."""

import pytest
from short_runs import assert_same_weights, logged, make_trainer

from hf_msn import LowShotCallback, LowShotEvaluator, evaluation_image_processor, load_images
from hf_msn.evaluation.probes import SoftNearestNeighborProbe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every_epochs", "arguments", "steps"),
    [
        (1, {"num_train_epochs": 3}, [5, 10, 15]),
        (2, {"num_train_epochs": 3}, [10, 15]),  # and once more after the last
        (2, {"num_train_epochs": 2}, [10]),  # the last epoch is not evaluated twice
        (9, {"max_steps": 7}, [7]),  # stopped inside the second epoch
    ],
)
def test_evaluation_every_few_epochs_and_at_the_end_is_logged(tmp_path, every_epochs, arguments, steps):
    trainer = make_trainer(tmp_path, **{"max_steps": -1, "save_strategy": "no", **arguments})
    evaluated = []

    def evaluator(model):
        assert model is trainer.model
        evaluated.append(trainer.state.global_step)
        return {"low_shot_5": 10.0 * len(evaluated)}

    trainer.add_callback(LowShotCallback(trainer, evaluator, every_epochs))
    trainer.train()
    assert evaluated == steps
    assert logged(trainer, "eval_low_shot_5") == {step: 10.0 * (n + 1) for n, step in enumerate(steps)}


@pytest.mark.slow
def test_projections_are_classified_and_training_goes_on_unchanged(tmp_path):
    plain, trainer = (
        make_trainer(tmp_path / name, max_steps=7, save_strategy="no") for name in ("plain", "evaluated")
    )
    plain.train()
    evaluator = LowShotEvaluator(
        load_images("digits").select(range(40)),
        load_images("digits", split="test").select(range(20)),
        image_processor=evaluation_image_processor(16, crop_fraction=1.0),
        images_per_class=(),
        rows={"support": range(30)},
        probe=SoftNearestNeighborProbe(),
        features="projection",
    )
    trainer.add_callback(LowShotCallback(trainer, evaluator))
    trainer.train()
    measured = logged(trainer, "eval_low_shot/support/top1")
    assert sorted(measured) == [5, 7]
    assert measured[7] == evaluator(trainer.model)["low_shot/support/top1"]
    assert trainer.model.training
    assert_same_weights(trainer.model, plain.model)


@pytest.mark.parametrize("every_epochs", [0, 0.5])
def test_less_than_one_epoch_is_refused(every_epochs):
    with pytest.raises(ValueError, match=f"`every_epochs` .* {every_epochs}"):
        LowShotCallback(None, lambda model: {}, every_epochs)
