"""`run.json` has the settings of the training, and no token and no folder."""

import json
import os
from pathlib import Path

import pytest
from tiny import tiny_model
from transformers.training_args import OptimizerNames

from hf_msn import (
    MSNTrainer,
    MSNTrainingArguments,
    MultiViewDataset,
    MultiViewTransform,
    load_images,
)
from hf_msn.hub.run_record import read_run, write_run
from hf_msn.trainers.callbacks.run_record import RunRecordCallback

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "warmup_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
VIEWS = MultiViewTransform(image_size=16, focal_size=8, focal_views=1)


def make_trainer(folder, **fields) -> MSNTrainer:
    images = load_images("digits", split="train[:16]")
    return MSNTrainer(
        tiny_model(),
        MSNTrainingArguments(str(folder), **{**SETTINGS, **fields}),
        train_dataset=MultiViewDataset(images, VIEWS),
        processing_class=VIEWS.evaluation_image_processor(),
    )


def record_in(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def test_a_run_from_python_records_data_batch_steps_and_changed_arguments(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, learning_rate=3e-4, seed=5)
    trainer.train()
    trainer.save_model()
    record = record_in(tmp_path)
    assert record["method"] == "msn" and "recipe" not in record and "sync" not in record and "start" not in record
    assert record["data"] == {"name": "digits", "split": "train[:16]", "num_images": 16}
    assert record["batch"] == {"per_device": 4, "gradient_accumulation_steps": 2, "ranks": 1, "images_per_update": 8}
    assert (record["steps"], record["planned_steps"], record["epochs"], record["seed"]) == (4, 4, 2.0, 5)
    assert record["hardware"]["device"] == "cpu" and record["hardware"]["cpu_count"] == os.cpu_count()
    assert record["arguments"]["learning_rate"] == 3e-4 and record["precision"] == "float32"
    assert not any("dir" in name or "report" in name or name.startswith("save") for name in record["arguments"])
    assert record_in(tmp_path / "checkpoint-2")["steps"] == 2


@pytest.mark.slow
def test_wall_time_continues_from_that_of_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = record_in(tmp_path / "checkpoint-4")["wall_time_seconds"]
    assert 0 < record_in(tmp_path / "checkpoint-2")["wall_time_seconds"] < first < 600
    file = tmp_path / "checkpoint-2" / "run.json"
    file.write_text(file.read_text().replace('"wall_time_seconds": ', '"wall_time_seconds": 1000'))
    (tmp_path / "checkpoint-2" / "checksums.sha256").unlink()
    (tmp_path / "checkpoint-4").rename(tmp_path / "away")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    before = record_in(tmp_path / "checkpoint-2")["wall_time_seconds"]
    assert before >= 1000 and before < record_in(tmp_path)["wall_time_seconds"] < before + 600


@pytest.mark.slow
def test_wall_time_is_left_out_where_an_earlier_part_is_not_known(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "checksums.sha256").unlink()
    (tmp_path / "checkpoint-2" / "run.json").write_text("{")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert "wall_time_seconds" not in record_in(tmp_path) and record_in(tmp_path)["steps"] == 4


def test_the_clock_stops_after_training(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("hf_msn.trainers.callbacks.run_record.time.monotonic", lambda: now[0])
    clock = RunRecordCallback(None)
    clock.on_train_begin(None, None, None)
    now[0] = 13.5
    assert clock.seconds == 3.5
    clock.on_train_end(None, None, None)
    now[0] = 99.0
    assert clock.seconds == 3.5


def test_only_known_text_and_numbers_are_written(tmp_path):
    recipe = {
        "hub_token": "hf_x",
        "output_dir": "/home/alice/runs",
        "run_name": "alice-on-gpu7",
        "push_to_hub": True,
        "dataset": "/home/alice/data/imagenet",
        "from_backbone": "timm:/home/alice/net",
        "optim": OptimizerNames.ADAMW_TORCH,
        "optim_args": "betas=(0.9,0.99)",
        "start_layer": "fc1",
        "timm_options": {"drop_path_rate": 0.1, "note": "/root/secret"},
        "global_scale": (0.3, 1.0),
        "mask_ratio": float("nan"),
    }
    write_run(tmp_path, {"recipe": recipe, "start": "/home/alice/models/small", "steps": 3, "command": "train hf_y"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert {"torch", "hf_msn"} <= record.pop("versions").keys()
    kept = {"dataset": "imagenet", "from_backbone": "net", "optim": "adamw_torch", "start_layer": "fc1"}
    kept |= {"optim_args": "betas=(0.9,0.99)"}
    kept |= {"timm_options": {"drop_path_rate": 0.1}, "global_scale": [0.3, 1.0]}
    assert record == {"format": "hf_msn run 1", "start": "small", "steps": 3, "recipe": kept}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "hf_msn run 9"}', '{"steps": 1}'])
def test_a_damaged_record_is_an_error(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run(tmp_path)
