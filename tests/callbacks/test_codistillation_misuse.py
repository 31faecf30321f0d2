"""Wrong use of codistillation on a Trainer says value, rule and remedy; taken off, it leaves a trainer as it was."""

import pytest
import semi_supervised_runs
import short_runs
import torch.distributed as dist
from launch import run_ranks
from sync_runs import image_model, image_rows, same, weights
from sync_runs import make_local_trainer as make_trainer
from torch import nn
from transformers import TrainerCallback

from hf_msn import CodistillationCallback, SlowMoCallback


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exchange": "gradients"}, "`exchange` .* but is 'gradients'"),
        ({"alpha": -1.0}, "`alpha` .* >= 0, but is -1.0"),
        ({"exchange": "checkpoints", "top_k": 2}, "`top_k` .* must be None with `exchange='checkpoints'`"),
        ({"initialization": "other"}, "`initialization` must be 'own' or 'same', but is 'other'"),
        ({"publish": "all"}, "`publish` must be 'first' or 'best' or 'average', but is 'all'"),
        ({"same_batch": "yes"}, "`same_batch` must be True or False, but is 'yes'"),
        ({"mask": "labels"}, "`mask` must be a function, but is 'labels'"),
        ({"predictions": "logits"}, "`predictions` must be a function, but is 'logits'"),
        ({"inner_size": 0}, "`inner_size` .* integer >= 1 that divides all 1 ranks, but is 0"),
        ({"inner_size": 2}, "`inner_size` .* divides all 1 ranks, but is 2"),
        ({"on_lost_replica": "continue"}, "`on_lost_replica` must be 'raise' on a Trainer, .* but is 'continue'"),
    ],
)
def test_a_setting_outside_its_rule_is_named_before_the_training(tmp_path, settings, words):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=words):
        CodistillationCallback(trainer, **settings)
    trainer.add_callback(CodistillationCallback(trainer))


def test_a_loss_outside_of_the_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0 .* but it is 0.1. Smooth the labels"):
        CodistillationCallback(trainer)
    trainer = make_trainer(tmp_path)
    trainer.compute_loss_func = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"`compute_loss_func` must be None .* Override `compute_loss`"):
        CodistillationCallback(trainer)


def test_what_two_would_decide_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(SlowMoCallback(trainer))
    with pytest.raises(ValueError, match="one sync callback, but has SlowMoCallback and CodistillationCallback"):
        CodistillationCallback(trainer)
    best = make_trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match=r"`publish='best'` .* `load_best_model_at_end`"):
        CodistillationCallback(best, publish="best")
    msn = short_runs.make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"one schedule, but there are two: .* `final_weight_decay` 0.4"):
        CodistillationCallback(msn, falling_weight_decay=True)
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        CodistillationCallback(msn, publish="best")


def test_what_the_average_cannot_be_of_is_refused(tmp_path):
    for make in (short_runs.make_trainer, lambda folder: semi_supervised_runs.make_run(folder, "paws")):
        with pytest.raises(
            ValueError, match=r"`publish='average'` .* ends with a backbone, .* Give 'first' or 'best'"
        ):
            CodistillationCallback(make(tmp_path), publish="average")
    with pytest.raises(ValueError, match=r"`publish='average'` .* but this is a Own"):
        CodistillationCallback(make_trainer(tmp_path, model=Own()), publish="average")
    labels = image_model()
    labels.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"exclude each other, but this is a multi label classification"):
        CodistillationCallback(make_trainer(tmp_path, model=labels), publish="average")
    best = make_trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match=r"`publish='average'` .* `load_best_model_at_end`"):
        CodistillationCallback(best, publish="average")


def test_a_metric_that_no_evaluation_gives_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best_model="accuracy")
    with pytest.raises(
        ValueError, match=r"here 'eval_accuracy', but an evaluation without `compute_metrics` gives eva"
    ):
        CodistillationCallback(trainer, publish="best")
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"near": image_rows()[:4], "far": image_rows()[4:8]}
    with pytest.raises(ValueError, match=r"here 'eval_loss', .* gives eval_near_loss, eval_far_loss. Set `metric_for"):
        CodistillationCallback(trainer, publish="best")


def test_a_model_without_predictions_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`trainer` must be the Trainer .* but is a NoneType"):
        CodistillationCallback(None)
    with pytest.raises(ValueError, match=r"`SuNCEtForPreTraining` makes none. Give `predictions`"):
        CodistillationCallback(semi_supervised_runs.make_run(tmp_path, "suncet"))


@pytest.mark.filterwarnings("ignore:.*one replica only")
def test_an_error_stops_it_and_taken_off_the_trainer_trains_as_before(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    trainer = make_trainer(tmp_path)
    callback = CodistillationCallback(trainer)
    trainer.add_callback(callback)

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.sync is None
    trainer.remove_callback(Fail)
    trainer.remove_callback(callback)
    trainer.train()
    assert same(weights(trainer.model), weights(plain.model))


class Own(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 3).double()

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _own_model(rank, folder):
    said = {}
    for name, settings in {
        "unknown": {},
        "other_batches": {"same_batch": False, "reinitialize": lambda model: model.linear.reset_parameters()},
        "known": {"reinitialize": lambda model: model.linear.reset_parameters()},
    }.items():
        trainer = make_trainer(f"{folder}/{name}", model=Own(), max_steps=2)
        said[name] = None
        try:
            trainer.add_callback(CodistillationCallback(trainer, **settings))
            trainer.train()
        except ValueError as error:
            said[name] = str(error)
        dist.barrier()
    return said


@pytest.mark.distributed
def test_batches_that_differ_and_a_model_that_cannot_be_drawn_anew_are_named(tmp_path):
    first, second = run_ranks(_own_model, 2, str(tmp_path))
    for said in (first, second):
        assert "Give `reinitialize`" in said["unknown"]
        assert said["known"] is None
        assert "must see the same batch" in said["other_batches"]
