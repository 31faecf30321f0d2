"""Pushes of the trainers over HTTP: which files, that they load and resume, and that no failure stops a training."""

import json
import logging
import threading

import pytest
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file
from short_runs import StopAt, assert_same_weights, make_trainer
from transformers import TrainerCallback

from hf_msn import MSNForPreTraining, PublishingError, SlowMoCallback, evaluation_image_processor
from hf_msn.trainers.checkpoints import find_fault

NAME = "alice/mine"
MODEL = {"config.json", "model.safetensors", "run.json"}
ROOT = {"README.md", *MODEL}
RESUME = {*MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checksums.sha256"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "no_home")
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "home" / "alice" / "mine"


def pushing(folder, strategy="every_save", **arguments):
    """8 steps, a checkpoint at 3, 6 and 8."""
    arguments = {"hub_model_id": NAME, "hub_always_push": True, "hub_strategy": strategy, **arguments}
    return make_trainer(folder, push_to_hub=True, **arguments)


@pytest.mark.slow
def test_each_save_pushes_only_the_listed_files_and_changes_no_weight(hub, folder, tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = pushing(folder, hub_private_repo=True)
    assert hub.repos[NAME].private and hub.files(NAME) == {}
    trainer.train()
    assert set(hub.files(NAME)) == ROOT
    assert hub.repos[NAME].messages[1:] == [f"Training in progress, checkpoint-{step}" for step in (3, 6, 8)]
    trainer.save_model()
    assert set(hub.files(NAME)) == ROOT and hub.repos[NAME].messages[-1] == "Model save"
    assert_same_weights(MSNForPreTraining.from_pretrained(NAME), trainer.model)
    assert_same_weights(trainer.model, plain.model)
    assert not (folder / ".pushing" / "checkpoint-8").exists()


@pytest.mark.slow
def test_strategy_end_pushes_the_saved_model_alone(hub, folder):
    trainer = pushing(folder, "end", hub_model_id=None, hub_revision="run-1")
    trainer.train()
    assert hub.files(NAME) == {} and not hub.asked("POST", "commit")
    trainer.push_to_hub(license="apache-2.0", tags=["digits"])
    assert set(hub.files(NAME, "run-1")) == ROOT and hub.files(NAME) == {}
    assert hub.repos[NAME].messages[1:] == ["End of training"]
    assert b"digits" in hub.files(NAME, "run-1")["README.md"]


@pytest.mark.slow
def test_a_pushed_checkpoint_resumes_bit_for_bit(hub, folder, tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    pushing(folder, "checkpoint", callbacks=[StopAt(6)]).train()
    files = hub.files(NAME)
    assert set(files) == ROOT | {f"last-checkpoint/{name}" for name in RESUME}
    downloaded = tmp_path / "other" / "checkpoint-6"
    downloaded.mkdir(parents=True)
    for name in RESUME:
        (downloaded / name).write_bytes(files[f"last-checkpoint/{name}"])
    for name in RESUME - {"checksums.sha256"}:  # also those that differ from the files here
        data = (downloaded / name).read_bytes()
        (downloaded / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        assert f"'{name}'" in find_fault(downloaded)
        (downloaded / name).write_bytes(data)
    resumed = make_trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.slow
def test_strategy_all_checkpoints_pushes_also_those_that_are_rotated_away(hub, folder):
    trainer = pushing(folder, "all_checkpoints", save_total_limit=1)
    trainer.add_callback(SlowMoCallback(trainer, sync_every=2))
    trainer.train()
    steps = {path.split("/")[0] for path in hub.files(NAME) if "/" in path}
    assert steps == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    resume = RESUME | {"sync_state_0.pt"}
    assert set(hub.files(NAME)) == ROOT | {f"{step}/{name}" for step in steps for name in resume}
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.slow
def test_neither_token_nor_path_reaches_the_hub_or_a_file(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = pushing(folder, "checkpoint", hub_token=TOKEN)
    trainer.processing_class = evaluation_image_processor(16)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    assert set(hub.files(NAME)) >= ROOT | {"preprocessor_config.json"}
    sent = hub.sent_bytes()
    for secret in (TOKEN, str(folder), str(folder.parent)):
        assert secret.encode() not in sent, secret
    for file in folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file
    assert trainer.args.hub_token == TOKEN
    assert torch.load(folder / "training_args.bin", weights_only=False).hub_token is None


@pytest.mark.slow
def test_a_failed_push_does_not_stop_the_training_and_a_later_one_replaces_it(hub, folder, caplog):
    hub.fail("POST", "commit", 403, times=2)
    trainer = pushing(folder)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 8
    assert "checkpoint-3" in caplog.text and "403" in caplog.text
    assert hub.repos[NAME].messages[1:] == ["Training in progress, checkpoint-8"]
    trainer.save_model()  # raises nothing: no file is missing


@pytest.mark.slow
def test_a_push_that_is_missing_at_the_end_is_an_error_after_the_model_is_saved(hub, folder):
    hub.fail("POST", "commit", 403, times=1)
    trainer = pushing(folder, "all_checkpoints")
    trainer.train()
    hub.fail("POST", "preupload", 500)
    with pytest.raises(PublishingError, match="500"):
        trainer.save_model()
    assert torch.equal(load_file(folder / "model.safetensors")["prototypes"], trainer.model.prototypes)
    hub.failures.clear()
    with pytest.raises(PublishingError, match="checkpoint-3/"):
        trainer.save_model()
    assert {path.split("/")[0] for path in hub.files(NAME) if "/" in path} == {"checkpoint-6", "checkpoint-8"}
    assert_same_weights(MSNForPreTraining.from_pretrained(NAME), trainer.model)


class Release(TrainerCallback):
    """Let uploads through after a step."""

    def __init__(self, step: int, event: threading.Event):
        self.step, self.event = step, event

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.event.set()


@pytest.mark.slow
def test_training_does_not_wait_for_a_slow_push_and_the_last_checkpoint_arrives(hub, folder, monkeypatch):
    released = threading.Event()
    trainer = pushing(folder, "checkpoint", hub_always_push=False, save_total_limit=1)
    repository = trainer.push.repository
    commit = repository.commit
    monkeypatch.setattr(repository, "commit", lambda *a, **k: (released.wait(60), commit(*a, **k))[1])
    trainer.add_callback(Release(8, released))  # the push of step 3 cannot end before
    trainer.train()
    steps = [message.split("-")[-1] for message in hub.repos[NAME].messages[1:]]
    assert steps == ["3", "8"]
    assert json.loads(hub.files(NAME)["last-checkpoint/trainer_state.json"])["global_step"] == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hub_model_id": "a/b/c"}, "a/b/c"),
        ({"hub_model_id": "bob/mine"}, "bob/mine"),
        ({"hub_token": "hf_no"}, "401"),
    ],
)
def test_a_repo_that_cannot_be_pushed_to_is_an_error_before_training(hub, folder, arguments, named):
    with pytest.raises((ValueError, PublishingError), match=named):
        pushing(folder, **arguments)
    assert not folder.exists()


@pytest.mark.slow
def test_a_repo_of_another_configuration_is_refused_and_one_of_this_is_continued(hub, folder, tmp_path):
    pushing(folder, callbacks=[StopAt(4)]).train()
    pushing(folder).train(resume_from_checkpoint=True)
    assert hub.repos[NAME].messages[-1] == "Training in progress, checkpoint-8"
    with pytest.raises(PublishingError, match="num_prototypes"):
        pushing(tmp_path / "another", model_fields={"num_prototypes": 4})
