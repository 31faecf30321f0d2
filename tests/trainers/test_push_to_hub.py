"""Pushes of the trainers over HTTP: which files, that they load and resume, and that no failure costs a training."""

import json
import logging
import threading

import pytest
import torch
from hub_server import HubServer
from hub_state import TOKEN
from safetensors.torch import load_file
from short_runs import StopAt, assert_same_weights, make_trainer
from transformers import TrainerCallback

from hf_msn import MSNForPreTraining, PublishingError, SlowMoCallback, evaluation_image_processor

NAME = "alice/mine"
MODEL = {"config.json", "model.safetensors", "run.json"}
ROOT = {"README.md", *MODEL}
RESUME = {*MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


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


def test_only_the_listed_files_of_each_save_go_up(hub, folder):
    trainer = pushing(folder, hub_private_repo=True)
    assert hub.repos[NAME].private and hub.files(NAME) == {}  # found out before training
    trainer.train()
    assert set(hub.files(NAME)) == ROOT
    assert hub.repos[NAME].messages[1:] == [f"Training in progress, checkpoint-{step}" for step in (3, 6, 8)]
    trainer.save_model()
    assert set(hub.files(NAME)) == ROOT
    assert_same_weights(MSNForPreTraining.from_pretrained(NAME), trainer.model)
    assert not (folder / ".pushing").exists()


def test_the_end_alone_is_pushed_where_that_is_asked_for(hub, folder):
    trainer = pushing(folder, "end", hub_model_id=None, hub_revision="run-1")
    trainer.train()
    assert hub.files(NAME) == {} and not hub.asked("POST", "commit")
    trainer.push_to_hub(license="apache-2.0", tags=["digits"])
    assert set(hub.files(NAME, "run-1")) == ROOT and hub.files(NAME) == {}
    assert hub.repos[NAME].messages[1:] == ["End of training"]
    assert b"digits" in hub.files(NAME, "run-1")["README.md"]


def test_a_run_goes_on_bit_for_bit_from_what_the_checkpoint_strategy_pushed(hub, folder, tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    pushing(folder, "checkpoint", callbacks=[StopAt(6)]).train()
    files = hub.files(NAME)
    assert set(files) == ROOT | {f"last-checkpoint/{name}" for name in RESUME}
    (tmp_path / "other" / "checkpoint-6").mkdir(parents=True)
    for path, data in files.items():
        if path.startswith("last-checkpoint/"):
            (tmp_path / "other" / "checkpoint-6" / path.split("/")[1]).write_bytes(data)
    resumed = make_trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert_same_weights(resumed.model, whole.model)


def test_all_checkpoints_go_up_where_that_is_asked_for_also_those_that_are_rotated_away(hub, folder):
    pushing(folder, "all_checkpoints", save_total_limit=1).train()
    steps = {path.split("/")[0] for path in hub.files(NAME) if "/" in path}
    assert steps == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    assert set(hub.files(NAME)) == ROOT | {f"{step}/{name}" for step in steps for name in RESUME}
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]


def test_state_of_local_training_is_part_of_a_checkpoint_to_resume_from_only(hub, folder):
    trainer = pushing(folder, "checkpoint")
    trainer.add_callback(SlowMoCallback(trainer, sync_every=2))
    trainer.train()
    assert {path for path in hub.files(NAME) if "sync_state" in path} == {"last-checkpoint/sync_state_0.pt"}
    assert set(hub.files(NAME)) - {f"last-checkpoint/{name}" for name in (*RESUME, "sync_state_0.pt")} == ROOT


def test_replicas_of_an_earlier_run_in_the_same_folder_are_not_told_of(hub, folder):
    folder.mkdir(parents=True)
    (folder / "codistillation.json").write_text('{"replicas": 2, "published": 1, "publish": "best"}')
    trainer = pushing(folder, "end", overwrite_output_dir=True)
    trainer.train()
    trainer.save_model()
    assert set(hub.files(NAME)) == ROOT and b"Codistilled" not in hub.files(NAME)["README.md"]


def test_pushing_changes_nothing_in_the_training(hub, folder, tmp_path):
    plain = make_trainer(tmp_path / "plain", save_steps=1)
    plain.train()
    pushed = pushing(folder, save_steps=1)
    pushed.train()
    assert_same_weights(pushed.model, plain.model)


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


def test_a_push_that_fails_in_the_middle_does_not_cost_the_training_and_is_made_good(hub, folder, caplog):
    hub.fail("POST", "commit", 403, times=2)
    trainer = pushing(folder)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 8
    assert "'checkpoint-3' could not be pushed to 'alice/mine', and training goes on: The token may not" in caplog.text
    assert hub.repos[NAME].messages[1:] == ["Training in progress, checkpoint-8"]
    trainer.save_model()  # all that should be there is


def test_a_push_that_fails_at_the_end_is_an_error_once_the_model_is_saved(hub, folder):
    trainer = pushing(folder)
    trainer.train()
    hub.fail("POST", "preupload", 500)
    with pytest.raises(
        PublishingError, match=r"The Hub failed .*saved in '.*mine'. To push it: python scripts/publish"
    ):
        trainer.save_model()
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(saved["prototypes"], trainer.model.prototypes)


def test_checkpoints_that_are_missing_at_the_end_are_an_error_when_the_model_is_there(hub, folder):
    hub.fail("POST", "commit", cut_after=10, times=1)
    trainer = pushing(folder, "all_checkpoints")
    trainer.train()
    with pytest.raises(PublishingError, match=r"in the middle of training failed, and checkpoint-3/ .* is not there"):
        trainer.save_model()
    assert {path.split("/")[0] for path in hub.files(NAME) if "/" in path} == {"checkpoint-6", "checkpoint-8"}
    assert_same_weights(MSNForPreTraining.from_pretrained(NAME), trainer.model)


class Waits(TrainerCallback):
    """Lets uploads through after a step."""

    def __init__(self, step: int, event: threading.Event):
        self.step, self.event = step, event

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.event.set()


def test_training_does_not_wait_for_a_slow_push_and_the_last_checkpoint_gets_there(hub, folder, monkeypatch):
    goes_on = threading.Event()
    trainer = pushing(folder, "checkpoint", hub_always_push=False, save_total_limit=1)
    upload = trainer._repository.upload
    monkeypatch.setattr(trainer._repository, "upload", lambda *a, **k: (goes_on.wait(60), upload(*a, **k))[1])
    trainer.add_callback(Waits(8, goes_on))  # the push of step 3 cannot end before
    trainer.train()
    steps = [message.split("-")[-1] for message in hub.repos[NAME].messages[1:]]
    assert steps == ["3", "8"]
    state = json.loads(hub.files(NAME)["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hub_model_id": "a/b/c"}, "`repo_id` must be 'user/name', but is 'a/b/c'"),
        ({"hub_model_id": "bob/mine"}, "may not write to 'bob/mine'"),
        ({"hub_revision": "a b"}, "`revision` must be the name of a branch"),
        ({"hub_token": "hf_" + "wrong" * 6}, "does not accept the token"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(hub, folder, arguments, message):
    with pytest.raises((ValueError, PublishingError), match=message):
        pushing(folder, **arguments)
    assert not folder.exists()


def test_a_repo_with_another_model_is_refused_and_one_of_this_configuration_goes_on(hub, folder, tmp_path):
    hub.add_repo(NAME, {"pytorch_model.bin": b"weights"})
    with pytest.raises(PublishingError, match=r"'alice/mine' \(main\) holds other files already, such as"):
        pushing(folder)
    del hub.repos[NAME]
    pushing(folder, callbacks=[StopAt(4)]).train()
    pushing(folder).train(resume_from_checkpoint=True)
    assert hub.repos[NAME].messages[-1] == "Training in progress, checkpoint-8"
    with pytest.raises(PublishingError, match="holds another model already: num_prototypes 8 there, 4 here"):
        pushing(tmp_path / "another", model_fields={"num_prototypes": 4})
