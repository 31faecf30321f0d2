"""A stopped fine-tuning goes on bit for bit, also where it was stopped while it trained again on all labels."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetuning_runs import VIEWS, classifier_arguments, digits, suncet_arguments, suncet_config, with_labels
from launch import run_ranks
from transformers import TrainerCallback

from hf_msn import SuNCEtForPreTraining, finetune_classifier, finetune_suncet
from hf_msn.finetuning.trainer import BestEpochCallback, FinetuningTrainer
from hf_msn.trainers.checkpoints import CheckpointError

RESNET = suncet_config(timm_model="test_resnet")
METHODS = {
    "linear": (finetune_classifier, classifier_arguments, suncet_config()),
    "linear on a convnet": (finetune_classifier, classifier_arguments, RESNET),
    "suncet": (finetune_suncet, suncet_arguments, suncet_config()),
}


class Stop(TrainerCallback):
    """Stop like a kill when the process begins its `epoch`-th epoch, counted over both trainings."""

    def __init__(self, epoch):
        self.left = epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def tune(name, folder, callbacks=(), **fields):
    method, arguments, start = METHODS[name]
    settings = {"num_train_epochs": 3, "refit": True, "save_strategy": "epoch", **fields}
    return method(start, *digits(3), VIEWS, arguments(folder, **settings), callbacks=callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_as_one_that_was_not_stopped(name, tmp_path):
    whole = tune(name, tmp_path / "whole")
    place = {"resume_from_checkpoint": "auto"}
    for epoch in (3, 3 if whole.best_epoch > 1 else 2):  # the last of the first training, then in the second one
        with pytest.raises(KeyboardInterrupt):
            tune(name, tmp_path / "parts", [Stop(epoch)], **place)
    resumed = tune(name, tmp_path / "parts", **place)
    assert resumed.best_epoch == whole.best_epoch and resumed.accuracy_by_epoch == whole.accuracy_by_epoch
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())


def test_the_setting_that_differs_is_named_before_the_weights_that_it_changes():
    trainer = SimpleNamespace(train_dataset=[])
    saved = BestEpochCallback(trainer, settings={"start": "some weights", "images": "0" * 1000}).state_dict()
    of_earlier_version = {**saved, "settings": saved["settings"].replace("{", '{"per_device_train_batch_size": 8, ')}
    BestEpochCallback(trainer, settings=json.loads(saved["settings"])).load_state_dict(of_earlier_version)
    other = BestEpochCallback(trainer, settings={"start": "others", "images": "0" * 1000, "seed": 1})
    with pytest.raises(ValueError, match="`seed`"):
        other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="'checkpoint-3'"):
        FinetuningTrainer._load_from_checkpoint(trainer, "checkpoint-3")


@pytest.mark.slow
def test_a_run_is_resumed_with_the_same_settings_and_labels_only(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        tune("linear", tmp_path, resume_from_checkpoint="true")
    with pytest.raises(KeyboardInterrupt):
        tune("linear", tmp_path, [Stop(2)])
    with pytest.raises(ValueError, match=r"`learning_rate` .*0.05.*0.01"):
        tune("linear", tmp_path, resume_from_checkpoint="true", learning_rate=0.01)
    method, arguments, start = METHODS["linear"]
    settings = {"num_train_epochs": 3, "refit": True, "save_strategy": "epoch", "resume_from_checkpoint": "true"}
    args = arguments(tmp_path, **settings)
    with pytest.raises(ValueError, match="`rows`"):
        method(start, *digits(4), VIEWS, args)
    with pytest.raises(ValueError, match=r"`rotation` .* 7"):
        method(start, *digits(3), replace(VIEWS, rotation=7.0), args)
    with pytest.raises(ValueError, match="`images`"):
        images, rows = digits(3)
        others = with_labels(images.select(range(len(images) - 1, -1, -1)), np.array(images["label"]))
        method(start, others, rows, VIEWS, args)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    for file in (checkpoint / "best_epoch.pt", checkpoint / "model.safetensors"):
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"'{file.name}' is damaged"):
            tune("linear", tmp_path, resume_from_checkpoint=str(checkpoint))
        file.write_bytes(whole)


EVEN = {"validation_fraction": 0, "refit": False, "global_batch_size": 10}  # 3 batches, nothing filled up


def _stop_in_the_second_epoch(rank, folder):
    with pytest.raises(KeyboardInterrupt):
        tune("linear", folder, [Stop(2)], **EVEN)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_classifier_goes_on_with_another_number_of_ranks(tmp_path):
    whole = tune("linear", tmp_path / "whole", **EVEN).model.state_dict()
    run_ranks(_stop_in_the_second_epoch, 2, str(tmp_path / "parts"), timeout=120)
    resumed = tune("linear", tmp_path / "parts", resume_from_checkpoint="true", **EVEN).model.state_dict()
    for name, value in whole.items():
        assert torch.allclose(resumed[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
def test_a_resumed_run_has_the_same_number_of_epochs_and_the_same_weights_to_start_from(tmp_path, monkeypatch):
    method, arguments, config = METHODS["suncet"]
    torch.manual_seed(0)
    model = SuNCEtForPreTraining(config)
    model.save_pretrained(tmp_path / "start")
    out = tmp_path / "out"

    def tune_from(start, callbacks=(), **fields):
        settings = {"num_train_epochs": 2, "validation_fraction": 0, "save_strategy": "epoch", **fields}
        return method(start, *digits(1), VIEWS, arguments(out, **settings), callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        tune_from(tmp_path / "start", [Stop(2)])
    resume = {"resume_from_checkpoint": "true"}
    for name in ("num_train_epochs", "gradient_accumulation_steps"):
        with pytest.raises(ValueError, match=f"`{name}` .* but is 3"):
            tune_from(tmp_path / "start", **resume, **{name: 3})
    (tmp_path / "start").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        model.encoder.layernorm.bias[0] += 1
    with pytest.raises(ValueError, match=r"`start` .* a model with the weights"):
        tune_from(model, **resume)
    assert tune_from("moved", **resume).best_epoch == 2
