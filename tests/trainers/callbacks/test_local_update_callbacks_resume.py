"""Resuming ranks that train locally: bit for bit inside a period; broken and foreign checkpoints are refused."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import short_runs
import torch
from launch import run_ranks
from states import same
from sync_runs import logged, make_trainer, saved_states, train_whole_and_resumed, weights

from hf_msn import LocalSGDCallback, SlowMoCallback
from hf_msn.trainers.checkpoints import CheckpointError, find_fault


def slowmo_on_msn(folder, **arguments):
    """Return a trainer with a checkpoint every 3 updates and an outer step every 4."""
    trainer = short_runs.make_trainer(folder, dataset=short_runs.RandomViews(40), save_steps=3, **arguments)
    trainer.add_callback(SlowMoCallback(trainer, sync_every=4, slow_momentum=0.6))
    return trainer


def local_sgd_on_images(folder, **arguments):
    """Return a plain Trainer, whose first step has averaged gradients."""
    trainer = make_trainer(folder, save_strategy="steps", save_steps=3, **arguments)
    trainer.add_callback(LocalSGDCallback(trainer, sync_every=4, sync_start_step=1))
    return trainer


RUNS = {"slowmo": slowmo_on_msn, "local_sgd": local_sgd_on_images}


def _resume(rank, folder):
    results = {}
    for name, make in RUNS.items():
        accumulated = {"gradient_accumulation_steps": 2 if name == "slowmo" else 1}
        trainers = train_whole_and_resumed(partial(make, **accumulated), f"{folder}/{name}", step=6)
        saved = torch.load(f"{folder}/{name}_whole/checkpoint-6/sync_state_{rank}.pt", weights_only=True)
        results[name] = {
            "weights": [weights(trainer.model) for trainer in trainers],
            "losses": [logged(trainer, "loss") for trainer in trainers],
            "own": [
                {"sync": state["sync"], "optimizer": state["optimizer"], "schedule": state["lr_scheduler"]}
                for state in saved_states(f"{folder}/{name}", rank)
            ],
            "local_steps": saved["sync"]["local_steps"],
        }
    return results


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_run_resumes_bit_for_bit_inside_a_period(tmp_path, num_ranks):
    results = run_ranks(_resume, num_ranks, str(tmp_path), timeout=120.0)
    for name in RUNS:
        moments = []
        for rank, result in enumerate(result[name] for result in results):
            assert result["local_steps"] == (2 if name == "slowmo" else 1), name
            assert len(result["losses"][0]) == 8
            for kind in ("weights", "losses", "own"):
                assert same(*result[kind]), (name, rank, kind)
            moments.append(result["own"][0]["optimizer"])
        # optimizer.pt holds rank 0's
        assert moments[0] is None and (num_ranks == 1 or not same(moments[1], moments[2])), name


def _broken(rank, folder):
    """Return the error of each way to spoil a checkpoint of two ranks."""
    local_sgd_on_images(f"{folder}/run", max_steps=3).train()
    torch.distributed.barrier()
    checkpoint, errors = Path(folder, "run", "checkpoint-3"), {}

    def try_it(name, spoil, callback=LocalSGDCallback, sync_every=4):
        copy = Path(folder, name, "checkpoint-3")
        if rank == 0:
            shutil.copytree(checkpoint, copy)
            spoil(copy)
        torch.distributed.barrier()
        trainer = make_trainer(f"{folder}/{name}", max_steps=5)
        trainer.add_callback(callback(trainer, sync_every=sync_every, sync_start_step=1))
        try:
            trainer.train(resume_from_checkpoint=str(copy))
            errors[name] = None
        except ValueError as error:
            errors[name] = str(error)
        torch.distributed.barrier()

    def halve(copy):
        file = copy / "sync_state_1.pt"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def flip_a_bit(copy):
        file = copy / "sync_state_1.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def drop(copy):
        file = copy / "sync_state_1.pt"
        state = torch.load(file, weights_only=True)
        del state["settings"]
        torch.save(state, file)

    try_it("same", lambda copy: None)
    try_it("older", drop)
    try_it("missing", lambda copy: (copy / "sync_state_1.pt").unlink())
    try_it("half", halve)
    try_it("flipped", flip_a_bit)
    try_it("other_method", lambda copy: None, SlowMoCallback)
    try_it("other_setting", lambda copy: None, sync_every=5)
    try_it("none", lambda copy: [file.unlink() for file in copy.glob("sync_state_*.pt")])
    return errors


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_that_a_rank_cannot_resume_is_refused_by_all_ranks(tmp_path):
    for errors in run_ranks(_broken, 2, str(tmp_path)):
        assert errors["same"] is None and errors["none"] is None
        assert "'sync_state_1.pt'" in errors["older"] and "no settings" in errors["older"]
        for name, fault in (("missing", "is missing"), ("half", "is damaged"), ("flipped", "is damaged")):
            assert "'sync_state_1.pt'" in errors[name] and fault in errors[name]
        assert "method LocalSGD there, SlowMo here" in errors["other_method"]
        assert "sync_every 4 there, 5 here" in errors["other_setting"]


def _resume_with_other_settings(rank, folder):
    slowmo_on_msn(folder, max_steps=3).train()
    torch.distributed.barrier()
    trainer = slowmo_on_msn(folder, learning_rate=2e-3, adam_beta1=0.8)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    groups = trainer.optimizer.param_groups
    return trainer.lr_scheduler.base_lrs, [(group["lr"], group["betas"]) for group in groups]


@pytest.mark.distributed
@pytest.mark.slow
def test_other_settings_hold_on_every_rank(tmp_path):
    (initial, groups), others = run_ranks(_resume_with_other_settings, 2, str(tmp_path))
    assert others == (initial, groups) and set(initial) == {2e-3}
    assert {betas for _, betas in groups} == {(0.8, 0.999)}


def _train(rank, make, folder, max_steps):
    RUNS[make](folder, max_steps=max_steps).train()


@pytest.mark.distributed
@pytest.mark.slow
def test_another_number_of_ranks_starts_from_consensus_with_a_warning(tmp_path, caplog):
    run_ranks(_train, 2, "slowmo", str(tmp_path / "run"), 6)
    trainer = slowmo_on_msn(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert "saved by 2 ranks, and now there are 1" in caplog.text
    assert trainer.state.global_step == 8
    alone = short_runs.make_trainer(tmp_path / "run", dataset=short_runs.RandomViews(40), max_steps=9)
    alone.train(resume_from_checkpoint=True)
    assert "other settings: max_steps 8 there, 9 here, sync SlowMo there, None here." in caplog.text


def test_local_steps_can_start_from_a_checkpoint_without_them(tmp_path, caplog):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=6).train()
    trainer = make_trainer(tmp_path, max_steps=8)
    callback = SlowMoCallback(trainer, sync_every=4, sync_start_step=5)
    trainer.add_callback(callback)
    seen, step = [], callback.on_optimizer_step

    def watched(*args, **kwargs):
        step(*args, **kwargs)
        seen.append((callback.sync.steps, callback.sync.local_steps))

    callback.on_optimizer_step = watched
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "has no 'sync_state_*.pt'" in caplog.text
    assert seen == [(4, 0), (5, 0), (6, 1), (7, 2), (8, 3)]  # `sync_start_step` counts the updates of the whole run


@pytest.mark.slow
def test_a_plain_trainer_finds_the_checkpoint_in_another_folder_if_it_is_named(tmp_path):
    local_sgd_on_images(tmp_path / "first", max_steps=3).train()
    local_sgd_on_images(tmp_path / "other", max_steps=3, seed=1).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    with pytest.raises(ValueError, match="other/checkpoint-3"):
        local_sgd_on_images(tmp_path / "other").train(resume_from_checkpoint=checkpoint)
    local_sgd_on_images(tmp_path / "third", resume_from_checkpoint=checkpoint).train(resume_from_checkpoint=checkpoint)


def test_a_broken_file_of_a_rank_makes_a_checkpoint_broken(tmp_path, caplog):
    slowmo_on_msn(tmp_path).train()
    last, before = tmp_path / "checkpoint-8" / "sync_state_0.pt", tmp_path / "checkpoint-6" / "sync_state_0.pt"
    assert find_fault(last.parent) is None
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert "'sync_state_0.pt' is damaged" in find_fault(last.parent)
    (last.parent / "checksums.sha256").unlink()
    assert find_fault(last.parent) == "'sync_state_0.pt' is damaged (its end is missing)"
    with pytest.raises(CheckpointError, match=r"sync_state_0.pt' is damaged"):
        slowmo_on_msn(tmp_path).train(resume_from_checkpoint=str(last.parent))
    before.rename(before.with_name("sync_state_1.pt"))
    assert find_fault(before.parent) == "'sync_state_0.pt' is missing"
    trainer = slowmo_on_msn(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "Skipping the broken checkpoint" in caplog.text and trainer.state.global_step == 8
