"""Optimizers of other packages in a run: parameter groups, weight decay, resume, averages, fine-tuning."""

import pytest
import torch
from finetuning_runs import VIEWS, classifier_arguments, digits, suncet_config
from short_runs import assert_same_weights, make_trainer, whole_and_resumed
from tiny import tiny_model

from hf_msn import CriticalGradients, MSNForPreTraining, finetune_classifier
from hf_msn.trainers.checkpoints import CheckpointError

CONSTANT = {"start_learning_rate": 0.01, "learning_rate": 0.01, "final_learning_rate": 0.01}
FREE = {"optim": "schedulefree:AdamWScheduleFree", **CONSTANT}
NO_SCHEDULE = {"weight_decay": 0.1, "final_weight_decay": None}
NO_DECAY = {"weight_decay": 0.0, "final_weight_decay": None}
RUNS = {
    "lion": {"optim": "timm:lion", "critical_gradients": 3},
    "lamb": {"optim": "timm:lamb"},
    "novograd": {"optim": "timm:novograd"},
    "mars": {"optim": "timm:mars", "optim_args": "betas=(0.95,0.99)"},
    "ademamix": {"optim": "pytorch_optimizer:AdEMAMix", "optim_args": "weight_decouple=true"},
    "grams": {"optim": "pytorch_optimizer:Grams"},
    "diffgrad": {"optim": "pytorch_optimizer:DiffGrad"},
    "gravity": {"optim": "pytorch_optimizer:Gravity", **NO_DECAY},
    "shampoo": {"optim": "pytorch_optimizer:Shampoo", **NO_SCHEDULE},
    "nero": {"optim": "pytorch_optimizer:Nero", **NO_DECAY},
    "soap": {"optim": "pytorch_optimizer:SOAP", "optim_args": "precondition_frequency=3"},
    "schedule-free": {**FREE, "critical_gradients": 3},
    "schedule-free of transformers": {**FREE, "optim": "schedule_free_adamw"},
    "dog": {"optim": "dog:DoG", "optim_args": "reps_rel=1e-4", **NO_SCHEDULE, "learning_rate": 1.0},
    "amsgrad": {"optim": "torch.optim:AdamW", "optim_args": "amsgrad=true"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_keeps_its_groups_and_resumes_bit_exactly(tmp_path, name):
    before = dict(tiny_model().named_parameters())
    whole, _ = whole_and_resumed(make_trainer, tmp_path, 4, **RUNS[name])
    trained = {key for key, value in whole.model.named_parameters() if value.requires_grad}
    assert all(not torch.equal(before[key], value) for key, value in whole.model.named_parameters() if key in trained)
    decayed, others = whole.optimizer.param_groups
    assert others["weight_decay"] == 0.0 and all(p.ndim > 1 for p in decayed["params"])
    whole.state.global_step -= 1
    assert decayed["weight_decay"] == whole.weight_decay_now()


NADAMW = {"optim": "timm:nadamw", "optim_args": "betas=(0.5,0.6)"}
RESUMES = [  # what a run was trained with, what it goes on with, and what the error names; None: it goes on
    ({"optim": "adamw_torch"}, {"optim": "timm:lion"}, r"timm\.Lion.*torch\.AdamW"),
    ({"optim": "timm:lion"}, {"optim": "adamw_torch"}, r"torch\.AdamW.*timm\.Lion"),
    ({"optim": "torch.optim:AdamW"}, {"optim": "torch.optim:Adam", **NO_SCHEDULE}, r"torch\.Adam, .*torch\.AdamW"),
    ({"optim": "torch.optim:AdamW"}, {"optim": "torch.optim:AdamW", "optim_args": "amsgrad=true"}, "max_exp_avg_sq"),
    ({"critical_gradients": 3}, {"critical_gradients": 4}, "`critical_gradients`.*3.*4"),
    ({"optim": "torch.optim:AdamW", "optim_args": "amsgrad=true"}, {"optim": "adamw_torch"}, None),
    ({"critical_gradients": 3}, {"critical_gradients": 0}, None),
    ({"critical_gradients": 0}, {"critical_gradients": 3}, None),
    (NADAMW, {**NADAMW, "optim_args": "betas=(0.7,0.8)"}, None),
    (NADAMW, {**NADAMW, "optim_args": None}, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here", "named"), RESUMES)
def test_a_resume_with_another_optimizer_is_refused_and_other_settings_of_it_hold(
    tmp_path, there, here, named, caplog
):
    make_trainer(tmp_path, max_steps=2, save_steps=2, **there).train()
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no", **here)
    if named is not None:
        with pytest.raises((CheckpointError, ValueError), match=named):
            trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2 and "The run goes on" not in caplog.text
        return
    trainer.train(resume_from_checkpoint=True)
    for name, value in there.items():
        assert value == here.get(name) or f"{name} {value} there, {here.get(name)} here" in caplog.text
    if there is NADAMW:
        expected = (0.7, 0.8) if here["optim_args"] else (0.9, 0.999)
        assert all(tuple(group["betas"]) == expected for group in trainer.optimizer.param_groups)
    assert len(trainer.optimizer.state_dict().get("critical_gradients", {}).get("priorities", ())) == (
        1 if here.get("critical_gradients") else 0
    )


@pytest.mark.parametrize("optim", ["timm:lion", "adamw_torch"])
def test_the_buffer_of_critical_gradients_is_around_it(tmp_path, optim):
    settings = {"optim": optim, "save_strategy": "no", "max_steps": 3}
    trainer, loop = make_trainer(tmp_path, critical_gradients=3, **settings), make_trainer(tmp_path, **settings)
    trainer.train()
    loop.create_optimizer()
    buffer = CriticalGradients(loop.optimizer, 3, aggregate="mean")
    loop.train()
    assert len(buffer.priorities) == 3
    assert_same_weights(trainer.model, loop.model)


def test_the_model_of_a_schedule_free_run_has_the_averages_wherever_it_is_used(tmp_path):
    """x = (y - (1 - beta) z) / beta, of the weights y that take the gradients."""
    seen = {}
    trainer = make_trainer(tmp_path, save_steps=4, logging_steps=4, **FREE)
    name = "encoder.layers.0.mlp.fc1.weight"

    def weights():
        return trainer.model.get_parameter(name).detach().clone()

    step = trainer.training_step

    def training_step(model, *args):
        loss = step(model, *args)
        if trainer.state.global_step in (3, 7):
            seen[trainer.state.global_step] = weights()
        return loss

    save = trainer._save_checkpoint

    def _save_checkpoint(*args):
        y, z = weights(), trainer.optimizer.state[trainer.model.get_parameter(name)]["z"]
        seen["average", trainer.state.global_step] = (y - 0.1 * z) / 0.9
        save(*args)

    trainer.training_step, trainer._save_checkpoint = training_step, _save_checkpoint
    trainer.train()
    for step_number in (4, 8):
        saved = MSNForPreTraining.from_pretrained(tmp_path / f"checkpoint-{step_number}").get_parameter(name)
        torch.testing.assert_close(saved, seen["average", step_number], rtol=1e-5, atol=1e-6)
        assert (saved - seen[step_number - 1]).abs().max() > 1e-4
    assert torch.equal(weights(), saved)


def test_a_warm_up_is_not_taken_twice(tmp_path):
    trainer = make_trainer(tmp_path, **{**FREE, "optim": "schedule_free_adamw", "warmup_steps": 4})
    assert trainer.create_optimizer().param_groups[0]["warmup_steps"] == 0


def finetune(folder, **fields):
    images = digits(3)
    return finetune_classifier(suncet_config(), *images, VIEWS, classifier_arguments(folder, **fields))


def test_fine_tuning_takes_the_same_names(tmp_path):
    results = [
        finetune(tmp_path / str(place), num_train_epochs=2, **fields).model.state_dict()
        for place, fields in enumerate(
            (
                {"optim": "timm:lion", "learning_rate": 1e-3},
                {"optim": "timm:lion", "learning_rate": 1e-3, "optim_args": "betas=(0.5,0.6)"},
                {"optim": "schedulefree:SGDScheduleFree", "final_learning_rate": 0.05},
            )
        )
    ]
    assert all(value.isfinite().all() for state in results for value in state.values())
    weight = "classifier.weight"
    assert not torch.equal(results[0][weight], results[1][weight])
    with pytest.raises(ValueError, match="use_lars"):
        finetune(tmp_path / "lars", optim="timm:lion", use_lars=True)
