"""N steps equal k steps, a stop of any kind, a resume, and N - k steps: bit for bit."""

import os
import shutil
import signal

import pytest
import torch
from launch import run_ranks
from semi_supervised_runs import digits
from short_runs import RandomViews, assert_same_weights, end_workers, logged, make_trainer, whole_and_resumed

from hf_msn import MultiViewDataset, MultiViewTransform, multi_view_dataset
from hf_msn.files import read_json, write_json
from hf_msn.trainers.checkpoints import CheckpointError, find_fault, find_last_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 8 steps, with checkpoints 3, 6 and 8, and its trainer. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, trainer


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def drawn_views(streamed: bool = False):
    transform = MultiViewTransform.for_small_grayscale(image_size=16, focal_views=1)
    if not streamed:
        return MultiViewDataset(digits().select(range(20)), transform, seed=3)
    stream = digits().select(range(13)).to_iterable_dataset()  # not a whole number of batches
    return multi_view_dataset(stream, transform, seed=3)


@pytest.mark.parametrize(
    ("views", "stop", "settings"),
    [  # 20 images, 4 per batch: 5 updates per epoch, or 3 with accumulation
        (RandomViews, 4, {}),
        (RandomViews, 5, {}),  # between two epochs
        (RandomViews, 4, {"gradient_accumulation_steps": 2}),
        (RandomViews, 4, {"gradient_accumulation_steps": 2, "critical_gradients": 3}),
        pytest.param(drawn_views, 7, {"dataloader_num_workers": 2}, marks=pytest.mark.slow),
        (lambda: drawn_views(streamed=True), 5, {}),  # beyond the first pass
    ],
)
def test_resume_is_bit_exact(tmp_path, views, stop, settings):
    trainers = whole_and_resumed(lambda *it, **kw: make_trainer(*it, views(), **kw), tmp_path, stop, **settings)
    if "dataloader_num_workers" in settings:
        for trainer in trainers:
            end_workers(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 8])  # the end of an epoch, of 5 updates, and within one
def test_a_finished_run_is_not_trained_any_further(tmp_path, steps):
    finished, again = (make_trainer(tmp_path, max_steps=steps, save_steps=steps) for _ in range(2))
    finished.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert_same_weights(again.model, finished.model)


def _die_while_saving(rank, folder):
    save, saves = torch.save, 0

    def die_in_the_second_checkpoint(*args, **kwargs):
        nonlocal saves
        saves += "optimizer" in str(args[1])
        if saves == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args, **kwargs)

    torch.save = die_in_the_second_checkpoint
    make_trainer(folder).train()


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_last_whole_checkpoint(tmp_path, caplog, finished):
    with pytest.raises(AssertionError, match=r"died.*-9"):
        run_ranks(_die_while_saving, 1, str(tmp_path), timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incomplete", "checkpoint-3"]

    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6" in caplog.text
    assert_same_weights(resumed.model, finished[1].model)
    assert not list(tmp_path.glob(".*"))


def test_files_of_a_killed_save_do_not_get_into_the_next_checkpoint(tmp_path):
    abandoned = tmp_path / ".incomplete" / "checkpoint-3"
    abandoned.mkdir(parents=True)
    (abandoned / "rng_state_1.pth").write_bytes(b"half")
    make_trainer(tmp_path, max_steps=3).train()
    assert not (tmp_path / "checkpoint-3" / "rng_state_1.pth").exists()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "config.json", "scheduler.pt"]
)
@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_broken_checkpoint_is_named_and_skipped(copy, caplog, name, fault):
    (copy / "checkpoint-8" / "checksums.sha256").unlink()  # as in checkpoints of earlier versions
    broken = copy / "checkpoint-8" / name
    content = broken.read_bytes()
    broken.unlink()
    if fault == "damaged":
        broken.write_bytes(content[: len(content) // 2])
    assert find_last_checkpoint(copy) == copy / "checkpoint-6"
    assert "checkpoint-8" in caplog.text and fault in caplog.text
    with pytest.raises(CheckpointError, match=fault):
        make_trainer(copy).train(resume_from_checkpoint=str(copy / "checkpoint-8"))


def test_a_flipped_bit_in_any_file_is_named_and_refused(copy, caplog):
    last = copy / "checkpoint-8"
    assert find_fault(last) is None
    names = [file.name for file in sorted(last.iterdir()) if file.name != "checksums.sha256"]
    assert {"model.safetensors", "optimizer.pt", "run.json", "training_args.bin"} < set(names)
    for name in names:
        file = last / name
        whole = file.read_bytes()
        for place in (len(whole) // 3, len(whole) - 2):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert f"'{name}'" in find_fault(last), (name, place)
        with pytest.raises(CheckpointError, match=f"'{name}"):
            make_trainer(copy).train(resume_from_checkpoint=str(last))
        assert find_last_checkpoint(copy) == copy / "checkpoint-6"
        file.write_bytes(whole)
    (last / "README.md").write_text("added by hand")
    assert find_fault(last) is None
    (last / "checksums.sha256").write_bytes(b"\xff\n")
    assert "'checksums.sha256'" in find_fault(last)
    (last / "checksums.sha256").unlink()  # as in checkpoints of earlier versions
    resumed = make_trainer(copy, max_steps=9)
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.state.global_step == 9


def test_resume_without_any_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 2


def test_a_checkpoint_of_another_configuration_is_refused(finished):
    with pytest.raises(CheckpointError, match="num_prototypes 8 there, 4 here"):
        make_trainer(finished[0], model_fields={"num_prototypes": 4}).train(resume_from_checkpoint=True)


OTHER_SETTINGS = {
    "learning_rate": (1e-3, 2e-3),
    "start_learning_rate": (2e-4, 1e-4),
    "weight_decay": (0.04, 0.01),
    "ema_momentum": (0.996, 0.9),
    "adam_beta1": (0.9, 0.8),
    "seed": (42, 7),
    "max_steps": (8, 12),
    "final_weight_decay": (0.4, None),
    "optim": ("adamw_torch_fused", "adamw_torch"),
}


@pytest.mark.slow
def test_other_settings_are_named_hold_and_are_recorded(tmp_path, copy, caplog):
    after = {name: values[1] for name, values in OTHER_SETTINGS.items()}
    trainer = make_trainer(copy, **after, report_to="none")
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-3"))
    for name, (there, here) in OTHER_SETTINGS.items():
        assert f"{name} {there} there, {here} here" in caplog.text
    found = make_trainer(tmp_path / "new", **after, save_strategy="no")
    found.train()
    for name in ("learning_rate", "weight_decay", "ema_momentum"):
        expected = {step: value for step, value in logged(found, name).items() if step > 3}
        assert {step: value for step, value in logged(trainer, name).items() if step > 3} == expected, name
    assert {group["betas"][0] for group in trainer.optimizer.param_groups} == {0.8}

    (resumed,) = read_json(copy / "checkpoint-12" / "run.json")["resumes"]
    assert resumed["step"] == 3 and resumed["settings"].keys() == OTHER_SETTINGS.keys()
    assert resumed["settings"]["learning_rate"] == {"before": 1e-3, "after": 2e-3}
    assert resumed["settings"]["optim"] == {"before": "adamw_torch_fused", "after": "adamw_torch"}
    caplog.clear()
    make_trainer(copy, **{**after, "max_steps": 13, "save_steps": 13}).train(resume_from_checkpoint=True)
    assert "other settings: max_steps 12 there, 13 here." in caplog.text
    assert [entry["step"] for entry in read_json(copy / "checkpoint-13" / "run.json")["resumes"]] == [3, 12]


@pytest.mark.slow
@pytest.mark.parametrize("views", [RandomViews, drawn_views])
def test_another_data_set_is_refused_unless_it_is_allowed(tmp_path, views):
    make_trainer(tmp_path, views(), max_steps=2, save_steps=2).train()
    other = RandomViews(16)
    if views is drawn_views:
        other = MultiViewDataset(digits().select(range(1, 21)), views().transform, seed=3)  # as many, but not the same
    with pytest.raises(CheckpointError, match=r"\(20 images\) there.*resume_on_other_data"):
        make_trainer(tmp_path, other).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, other, max_steps=4, save_steps=4, resume_on_other_data=True)
    trainer.train(resume_from_checkpoint=True)
    resumed = read_json(tmp_path / "checkpoint-4" / "run.json")["resumes"][0]["settings"]
    expected = {"num_images": {"before": 20, "after": 16}}
    if views is drawn_views:
        before = views().sample_sha256
        expected = {"data_sample_sha256": {"before": before, "after": other.sample_sha256}}
    assert {name: resumed[name] for name in resumed if name != "max_steps"} == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_other_views_are_named_and_a_renamed_data_set_is_the_same(tmp_path, caplog, streamed):
    make_trainer(tmp_path, drawn_views(streamed), max_steps=2, save_steps=2).train()
    views = drawn_views(streamed)
    views.transform.grayscale, views.info.dataset_name, views.seed = 0.5, "moved", 4
    if streamed:
        views.shuffle_buffer = 7
    make_trainer(tmp_path, views, max_steps=2).train(resume_from_checkpoint=True)
    buffer = "shuffle_buffer 1000 there, 7 here" if streamed else ""
    named = ["grayscale 0.0 there, 0.5 here", "view_seed 3 there, 4 here", buffer]
    assert f"other settings: {', '.join(filter(None, named))}." in caplog.text


def test_another_stream_is_refused_unless_it_is_allowed(tmp_path):
    def stream(rows, shards=1):
        images = digits().select(rows).to_iterable_dataset(num_shards=shards)
        return multi_view_dataset(images, drawn_views().transform, seed=3)

    make_trainer(tmp_path, stream(range(13)), max_steps=2, save_steps=2).train()
    record = read_json(tmp_path / "checkpoint-2" / "run.json")
    assert record["data"]["num_shards"] == 1
    for other in (stream(range(1, 14)), stream(range(13), shards=2)):
        with pytest.raises(CheckpointError, match="resume_on_other_data"):
            make_trainer(tmp_path, other).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, other, max_steps=3, save_steps=3, resume_on_other_data=True).train(
        resume_from_checkpoint=True
    )
    (resumed,) = read_json(tmp_path / "checkpoint-3" / "run.json")["resumes"]
    assert resumed["settings"]["num_shards"] == {"before": 1, "after": 2}

    for name in ("checksums.sha256", "run.json"):  # as in a checkpoint of an earlier version
        (tmp_path / "checkpoint-3" / name).unlink()
    record["data"].pop("num_shards"), record.pop("data_sample_sha256")
    write_json(tmp_path / "checkpoint-3" / "run.json", record)
    make_trainer(tmp_path, other, max_steps=4).train(resume_from_checkpoint=True)


def test_an_output_dir_of_an_earlier_run_asks_for_a_decision(tmp_path, copy):
    with pytest.raises(ValueError, match="checkpoint-8"):
        make_trainer(copy).train()
    again = make_trainer(copy, overwrite_output_dir=True, max_steps=2)
    again.train()
    assert again.state.global_step == 2
    again.save_model(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"`output_dir` .* a model"):
        make_trainer(tmp_path / "model").train()


def test_the_best_checkpoint_has_its_final_name(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    settings["metric_for_best_model"] = "loss"
    trainer = make_trainer(tmp_path, eval_dataset=RandomViews(8), **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in {str(tmp_path / "checkpoint-3"), str(tmp_path / "checkpoint-6"), str(tmp_path / "checkpoint-8")}
    assert_same_weights(trainer.model, type(trainer.model).from_pretrained(best))


TWO_RANKS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}


def _resume_on_this_rank(rank, folder):
    trainers = [make_trainer(f"{folder}/{name}", **TWO_RANKS) for name in ("whole", "resumed")]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=f"{folder}/whole/checkpoint-2")
    return [(trainer.model.state_dict(), logged(trainer)) for trainer in trainers]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_resume_bit_exactly_and_one_goes_on(tmp_path, caplog):
    results = [result for rank in run_ranks(_resume_on_this_rank, 2, str(tmp_path), timeout=120) for result in rank]
    weights, losses = results[0]
    assert sorted(losses) == [1, 2, 3, 4]
    for others, other_losses in results[1:]:
        assert all(torch.equal(others[name], value) for name, value in weights.items())
        assert other_losses == losses

    alone = make_trainer(tmp_path / "whole", **TWO_RANKS)
    alone.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert "saved by 2 ranks and goes on with 1: one update now has 4 images" in caplog.text
    assert alone.state.global_step == 4
