"""Schedules of sequence compression, and their callback: stages, log, resume, misuse."""

import json

import pytest
import torch
from launch import run_ranks
from semi_supervised_runs import make_run
from short_runs import assert_same_weights, logged, make_trainer
from transformers import Trainer, TrainingArguments

from hf_msn import SequenceCompressionCallback, compression_stages

STAGES = [
    {"progress": 0, "dropout": 0.5, "views": {"focal": {}, "target": {"dropout": 0.25}}},
    {"progress": 0.5, "patch_size": 8},
]


def shapes(schedule, patch_size: int = 16) -> list[tuple]:
    stages = compression_stages(schedule, patch_size)
    return [(begins, stage.views["global"].dropout, stage.views["global"].patch_size) for begins, stage in stages]


def test_named_schedules():
    assert shapes("none") == [(0, 0.0, None)]
    assert shapes("constant:0.5@24") == [(0, 0.5, 24)]
    assert shapes("constant:0.25") == [(0, 0.25, None)]
    assert shapes("constant@24") == [(0, 0.0, 24)]
    begins, dropouts, patch_sizes = zip(*shapes("linear"))
    assert begins == (0, 0.2, 0.4, 0.6, 0.8) and patch_sizes == (16,) * 5
    assert dropouts == (0.75, 0.5625, 0.375, 0.1875, 0)
    begins, dropouts, patch_sizes = zip(*shapes("linear:0.4@32"))
    assert dropouts == pytest.approx((0.4, 0.3, 0.2, 0.1, 0.0)) and patch_sizes == (32, 28, 24, 20, 16)
    assert compression_stages("linear", 16)[0][1].views["target"].dropout == 0


def test_schedules_in_files(tmp_path):
    file = tmp_path / "schedule.json"
    for content in (STAGES, {"stages": STAGES, "measured": "x"}):
        file.write_text(json.dumps(content))
        assert shapes(str(file)) == shapes(file) == shapes(STAGES) == [(0, 0.5, None), (0.5, 0.0, 8)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("constant:1.5", "`dropout`.*1.5"),
        ("constant:half", "`dropout`.*half"),
        ("linear:-1", "`dropout`.*-1"),
        ("constnat:0.5", "constnat:0.5"),
        ("constant", "constant"),
        ("constant:", "`dropout`"),
        ([{"progress": 0, "views": {"focal": 0.5}}], "focal views.*0.5"),
        ("no_such_file.json", "no_such_file.json"),
        ([], r"\[\]"),
        ({"progress": 0}, "progress"),
        ([{"dropout": 0.5}], "dropout"),
        ([{"progress": 0.5}], "0.5 comes first"),
        ([{"progress": 0}, {"progress": 0.5}, {"progress": 0.5}], "0.5 comes after 0.5"),
        ([{"progress": 0}, {"progress": 1}], "`progress`.*1"),
        ([{"progress": 0, "droput": 0.5}], "'droput'.*'dropout'"),
        ([{"progress": 0, "patch_size": 0}], "`patch_size`.*0"),
    ],
)
def test_a_bad_schedule_is_an_error(schedule, message):
    with pytest.raises(ValueError, match=message):
        compression_stages(schedule, 16)


def test_a_bad_file_is_an_error(tmp_path):
    file = tmp_path / "schedule.json"
    for content in ("[{", '"constant"', "{}"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"schedule"):
            compression_stages(file, 16)


def compressed(output_dir, schedule=STAGES, method="msn", **arguments):
    arguments = {"save_strategy": "no", "max_steps": 4, **arguments}
    trainer = make_trainer(output_dir, **arguments) if method == "msn" else make_run(output_dir, method, **arguments)
    trainer.add_callback(SequenceCompressionCallback(trainer, schedule))
    return trainer


def test_stages_and_log_follow_the_progress(tmp_path):
    trainer = compressed(tmp_path)
    trainer.train()
    # per image: an anchor of 16 patches, a quarter masked; two focal views of 4; the target
    first, second = (1 + 6) + 2 * (1 + 4) + (1 + 12), (1 + 3) + 2 * (1 + 1) + (1 + 16)
    expected = {1: first / 4, 2: first / 4, 3: second / 4, 4: second / 4}
    assert logged(trainer, "tokens_per_image") == pytest.approx(expected)
    costs = logged(trainer, "relative_cost")
    assert 0.5 < costs[1] == costs[2] < 0.9 and 0.3 < costs[3] == costs[4] < 0.7
    assert trainer.model.compression is None
    assert set(logged(trainer, "images_per_second")) == {1, 2, 3, 4}


def test_without_compression_the_run_is_the_plain_one(tmp_path):
    plain = make_trainer(tmp_path / "plain", save_strategy="no", max_steps=4)
    compressed_by_name = make_trainer(tmp_path / "none", save_strategy="no", max_steps=4, compression="constant:0@4")
    for trainer in (plain, compressed_by_name):
        trainer.train()
    assert_same_weights(compressed_by_name.model, plain.model)
    assert set(logged(compressed_by_name, "relative_cost").values()) == {1.0}
    assert not logged(plain, "relative_cost")


@pytest.mark.parametrize("method", ["msn", "suncet"])
def test_resume_inside_a_schedule_is_bit_exact(tmp_path, method):
    stages = [{"progress": 0, "dropout": 0.5}, {"progress": 0.5, "dropout": 0.25}]
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps(stages))
    settings = {"compression": str(schedule), "gradient_accumulation_steps": 2}
    if method == "suncet":
        make = make_run
        settings |= {"method": method, "model_fields": {"patch_size": 2}, "save_strategy": "steps"}
    else:
        make = make_trainer
    whole = make(tmp_path / "whole", save_steps=1, max_steps=6, **settings)
    whole.train()
    for step in (2, 3):
        resumed = make(tmp_path / f"resumed-{step}", save_steps=10, max_steps=6, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(resumed.model, whole.model)
        after = {at: loss for at, loss in logged(whole).items() if at > step}
        assert {at: loss for at, loss in logged(resumed).items() if at > step} == after


def test_with_a_gradient_cache_a_run_is_the_compressed_one(tmp_path):
    runs = []
    for chunk_size in (None, 2):
        trainer = compressed(tmp_path / str(chunk_size), encoder_chunk_size=chunk_size)
        trainer.model.double()
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "relative_cost")))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    assert runs[1][1] == runs[0][1]


def _train_on_a_rank(rank, folder):
    model = {"patch_size": 2}
    trainer = compressed(folder, method="suncet", schedule="constant:0.5", model_fields=model, support_shard="images")
    draws = []
    draw = trainer.model._draw_kept_patches
    trainer.model._draw_kept_patches = lambda *args: draws.append(draw(*args)) or draws[-1]
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, draws[0]


@pytest.mark.slow
def test_ranks_draw_their_own_patches_and_keep_the_same_weights(tmp_path):
    (first, draws), (second, others) = run_ranks(_train_on_a_rank, 2, str(tmp_path))
    assert torch.equal(first, second)
    assert draws.shape == others.shape and not torch.equal(draws, others)


def test_misuse_is_an_error_before_training(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"0.8.*4 patches of the focal views of 8"):
        with_focal_views(trainer, "constant:0.8")
    with pytest.raises(ValueError, match="'support'"):
        SequenceCompressionCallback(trainer, [{"progress": 0}, {"progress": 0.5, "views": {"support": {}}}])
    with pytest.raises(TypeError, match="Trainer"):
        SequenceCompressionCallback(trainer.model, "none")
    plain = Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(TypeError, match="Linear"):
        SequenceCompressionCallback(plain, "none")
    with pytest.raises(ValueError, match="constnat"):
        make_trainer(tmp_path, compression="constnat")


def with_focal_views(trainer, schedule):
    trainer.view_sizes = lambda: {"image_size": 16, "focal_size": 8}
    return SequenceCompressionCallback(trainer, schedule)
