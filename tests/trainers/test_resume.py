"""N steps are k steps, a stop of any kind, a resume, and N - k steps: bit for bit."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from short_runs import RandomViews, StopAt, assert_same_weights, logged, make_trainer

from hf_msn import MultiViewDataset, MultiViewTransform, load_images, multi_view_dataset
from hf_msn.trainers.checkpoints import CheckpointError, find_last_checkpoint


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", [4, 5])  # 20 images, 4 a batch: within an epoch and between two
def test_resume_is_bit_exact(tmp_path, accumulation, stop):
    settings = {"gradient_accumulation_steps": accumulation, "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    make_trainer(tmp_path / "parts", callbacks=[StopAt(stop)], **settings).train()
    resumed = make_trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=True)

    assert_same_weights(resumed.model, whole.model)
    assert logged(resumed) == logged(whole)
    assert resumed.state.global_step == 8


@pytest.mark.parametrize("steps", [5, 8])  # the end of an epoch, of 5 updates, and within one
def test_a_finished_run_is_not_trained_any_further(tmp_path, steps):
    finished = make_trainer(tmp_path, max_steps=steps, save_steps=1)
    finished.train()
    again = make_trainer(tmp_path, max_steps=steps, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert_same_weights(again.model, finished.model)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact_with_drawn_views_and_workers(tmp_path, workers):
    transform = MultiViewTransform.for_small_grayscale(image_size=16, focal_views=1)

    def trainer(folder, callbacks=None):
        images = load_images("digits").select(range(20))
        dataset = MultiViewDataset(images, transform, seed=3)
        return make_trainer(tmp_path / folder, dataset, callbacks, dataloader_num_workers=workers, save_steps=1)

    whole = trainer("whole")
    whole.train()
    trainer("parts", [StopAt(7)]).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model)


def test_resume_of_a_stream_is_bit_exact_beyond_its_first_pass(tmp_path):
    transform = MultiViewTransform.for_small_grayscale(image_size=16, focal_views=1)

    def trainer(folder, callbacks=None):
        stream = load_images("digits").select(range(13)).to_iterable_dataset()  # not a whole number of batches
        dataset = multi_view_dataset(stream, transform, seed=3)
        return make_trainer(tmp_path / folder, dataset, callbacks, save_steps=1)

    whole = trainer("whole")
    whole.train()
    trainer("parts", [StopAt(5)]).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, whole.model)
    assert logged(resumed) == logged(whole)


def test_every_epoch_has_its_own_views_and_masks(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e-30, start_learning_rate=1e-30, final_learning_rate=0.0)
    trainer.train()
    values = list(logged(trainer).values())
    assert len(set(values)) == len(values) == 8


def test_a_kill_while_saving_leaves_the_last_whole_checkpoint(tmp_path, caplog):
    script = textwrap.dedent(
        """
        import os, signal, sys, torch
        sys.path[:0] = sys.argv[2:]
        from short_runs import make_trainer
        torch.set_num_threads(1)  # as in the process that it is compared with
        saves, save = 0, torch.save

        def kill_in_the_second_checkpoint(*args, **kwargs):
            global saves
            saves += "optimizer" in str(args[1])
            if saves == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args, **kwargs)

        torch.save = kill_in_the_second_checkpoint
        make_trainer(sys.argv[1]).train()
        """
    )
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed"), *folders], timeout=120)
    assert killed.returncode == -9
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [".incomplete", "checkpoint-3"]

    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6" in caplog.text and "stopped while it was writing" in caplog.text
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(resumed.model, whole.model)
    assert sorted(path.name for path in (tmp_path / "killed").glob(".*")) == []


def test_what_a_killed_save_left_does_not_get_into_the_next_checkpoint(tmp_path):
    abandoned = tmp_path / ".incomplete" / "checkpoint-3"
    abandoned.mkdir(parents=True)
    (abandoned / "rng_state_1.pth").write_bytes(b"half")
    make_trainer(tmp_path, max_steps=3).train()
    assert not (tmp_path / "checkpoint-3" / "rng_state_1.pth").exists()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    "file, fault",
    [
        ("model.safetensors", "damaged"),
        ("optimizer.pt", "damaged"),
        ("rng_state.pth", "damaged"),
        ("trainer_state.json", "damaged"),
        ("config.json", "damaged"),
    ],
)
def test_a_broken_checkpoint_is_named_and_skipped(tmp_path, caplog, file, fault):
    make_trainer(tmp_path).train()
    broken = tmp_path / "checkpoint-8" / file
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert "checkpoint-8" in caplog.text and fault in caplog.text
    with pytest.raises(CheckpointError, match=fault):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_missing_file_is_named(tmp_path, caplog):
    make_trainer(tmp_path).train()
    (tmp_path / "checkpoint-8" / "scheduler.pt").unlink()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert "'scheduler.pt' is missing" in caplog.text


def test_resume_without_any_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 8


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match="num_prototypes 8 there, 4 here"):
        make_trainer(tmp_path, model_fields={"num_prototypes": 4}).train(resume_from_checkpoint=True)


def test_an_output_dir_with_checkpoints_asks_for_a_decision(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint=True"):
        make_trainer(tmp_path).train()
    trained = make_trainer(tmp_path / "model", save_strategy="no")
    trained.train()
    trained.save_model()
    with pytest.raises(ValueError, match="has the model of an earlier run"):
        make_trainer(tmp_path / "model").train()
    again = make_trainer(tmp_path, overwrite_output_dir=True)
    again.train()
    assert again.state.global_step == 8


def test_another_number_of_ranks_is_said(tmp_path, caplog):
    make_trainer(tmp_path).train()
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_1.pth")
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "saved by 2 ranks and goes on with 1: one update now has 4 images" in caplog.text
    assert trainer.state.global_step == 8


def test_the_best_checkpoint_is_recorded_under_its_final_name(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    trainer = make_trainer(tmp_path, eval_dataset=RandomViews(8), **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in {str(tmp_path / "checkpoint-3"), str(tmp_path / "checkpoint-6"), str(tmp_path / "checkpoint-8")}
    assert_same_weights(trainer.model, type(trainer.model).from_pretrained(best))
