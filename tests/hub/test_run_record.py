import json
import os
import re
import socket
from pathlib import Path

import pytest
from tiny import tiny_model

from hf_msn import (
    MSNTrainer,
    MSNTrainingArguments,
    MultiViewDataset,
    MultiViewTransform,
    SlowMoCallback,
    load_images,
    parse_recipe,
)
from hf_msn.hub.run_record import RunRecorder, read_run, write_run
from hf_msn.privacy import find_private, public_name, without_private

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


def said_in(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def test_a_run_from_python_says_data_batch_steps_and_changed_arguments(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, learning_rate=3e-4, seed=5)
    trainer.train()
    trainer.save_model()
    said = said_in(tmp_path)
    assert said["method"] == "msn" and "recipe" not in said and "sync" not in said and "start" not in said
    assert said["data"] == {"name": "digits", "split": "train[:16]", "num_images": 16}
    assert said["batch"] == {"per_device": 4, "gradient_accumulation_steps": 2, "ranks": 1, "images_per_update": 8}
    assert (said["steps"], said["planned_steps"], said["epochs"], said["seed"]) == (4, 4, 2.0, 5)
    assert said["hardware"]["device"] == "cpu" and said["hardware"]["cpu_count"] == os.cpu_count()
    assert said["arguments"]["learning_rate"] == 3e-4 and said["precision"] == "float32"
    assert not any("dir" in name or "report" in name or name.startswith("save") for name in said["arguments"])
    assert said_in(tmp_path / "checkpoint-2")["steps"] == 2


def test_wall_time_goes_on_where_the_checkpoint_stopped(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = said_in(tmp_path / "checkpoint-4")["wall_time_seconds"]
    assert 0 < said_in(tmp_path / "checkpoint-2")["wall_time_seconds"] < first < 600
    file = tmp_path / "checkpoint-2" / "run.json"
    file.write_text(file.read_text().replace('"wall_time_seconds": ', '"wall_time_seconds": 1000'))
    (tmp_path / "checkpoint-4").rename(tmp_path / "away")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    before = said_in(tmp_path / "checkpoint-2")["wall_time_seconds"]
    assert before >= 1000 and before < said_in(tmp_path)["wall_time_seconds"] < before + 600


def test_wall_time_is_left_out_where_an_earlier_part_is_not_known(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "run.json").write_text("{")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert "wall_time_seconds" not in said_in(tmp_path) and said_in(tmp_path)["steps"] == 4


def test_the_clock_stands_still_after_training(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("hf_msn.hub.run_record.time.monotonic", lambda: now[0])
    clock = RunRecorder()
    clock.begin()
    now[0] = 13.5
    assert clock.seconds == 3.5
    clock.end()
    now[0] = 99.0
    assert clock.seconds == 3.5


def test_the_sync_method_and_its_settings_are_kept_to_the_end(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(SlowMoCallback(trainer, sync_every=3, slow_momentum=0.6))
    trainer.train()
    trainer.save_model()
    sync = said_in(tmp_path)["sync"]
    assert (sync["method"], sync["sync_every"], sync["slow_momentum"]) == ("SlowMo", 3, 0.6)


def test_a_recipe_is_kept_as_it_was_given_without_what_is_private(tmp_path, monkeypatch):
    from PIL import Image

    place = tmp_path / "home" / "alice" / "birds"
    place.mkdir(parents=True)
    for row in range(4):
        Image.new("RGB", (16, 16), (row * 60, 0, 0)).save(place / f"{row}.png")
    monkeypatch.setenv("USER", "alice")
    fields = f"--dataset {place} --image_size 16 --focal_size 8 --focal_views 1 --patch_size 4 --hidden_size 32"
    fields += (
        " --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --num_prototypes 8 --mask_ratio 0.25"
    )
    fields += " --projection_hidden_dim 16 --projection_dim 8 --max_steps 1 --per_device_train_batch_size 2"
    fields += f" --warmup_steps 0 --use_cpu true --disable_tqdm true --report_to none --output_dir {tmp_path / 'run'}"
    fields += " --hub_token hf_abcdefghijklmnopqrstuvwxyz --hub_model_id alice/secret --run_name alice-on-gpu7"
    fields += " --warmup_epochs 0.25 --save_strategy no"
    trainer = parse_recipe(fields.split()).build_trainer()
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "run" / "run.json").read_text()
    said = json.loads(text)
    assert said["recipe"]["dataset"] == "birds" and said["data"]["name"] == "birds"
    assert said["recipe"]["mask_ratio"] == 0.25 and said["recipe"]["num_prototypes"] == 8
    for word in ("alice", "hf_abc", str(tmp_path), "home", "gpu7", "token"):
        assert word not in text, word
    assert find_private(text) is None


def test_nothing_private_gets_into_the_file(tmp_path):
    host, home = socket.gethostname(), str(Path.home())
    recipe = {
        "hub_token": "hf_x",
        "push_to_hub_token": "t",
        "wandb_api_key": "k",
        "output_dir": "/home/alice/runs",
        "dataset": "/home/alice/data/imagenet",
        "windows": "C:\\Users\\Alice\\pets",
        "url": "file:///home/alice/sets/cats",
        "shared": "\\\\server\\alice\\dogs",
        "home": "~/fish",
        "only_home": "~",
        "named_home": "/Users/alice",
        "trunk": "timm:/home/alice/net",
        "notes": f"see timm:/home/alice/x.txt, hf_abcdefgh12345 on {host} under {home}/a b",
        "nested": {"password": "p", "list": ["/root/secret/horses", {"token": 1, "lr": 0.5}]},
        "scale": (0.3, 1.0),
        "bad": float("nan"),
        "hub": "ILSVRC/imagenet-1k",
    }
    write_run(tmp_path, {"recipe": recipe, "start": "/home/alice/models/small", "steps": 3})
    text = (tmp_path / "run.json").read_text()
    kept = json.loads(text)["recipe"]
    assert (kept["dataset"], kept["windows"], kept["url"], kept["shared"]) == ("imagenet", "pets", "cats", "dogs")
    assert (kept["home"], kept["only_home"], kept["named_home"]) == ("fish", "(local)", "(local)")
    assert kept["nested"] == {"list": ["horses", {"lr": 0.5}]}
    assert (kept["scale"], kept["bad"], kept["hub"]) == ([0.3, 1.0], "nan", "ILSVRC/imagenet-1k")
    assert json.loads(text)["start"] == "small"
    for word in ("/home", "Users", "hf_abc", "/root", "secret/", "server", "password", "token", "api_key"):
        assert word not in text, word
    assert not re.search(rf"\b{re.escape(host)}\b", text) or len(host) < 3
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k"),
        ("/data/shards/train-*.parquet", "shards"),
        ("../alice/cats/", "cats"),
        ("s3://bucket/alice/birds", "birds"),
        ("/home/bob", "(local)"),
        ("~bob", "(local)"),
        ("D:\\", "(local)"),
        ("/", "(local)"),
    ],
)
def test_a_source_is_called_by_its_last_name(source, name):
    assert public_name(source) == name
    assert public_name(public_name(source)) == name


def test_a_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "alice" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/cats") == "cats" and without_private(["alice/cats"]) == ["cats"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "hf_msn run 9"}', '{"steps": 1}'])
def test_a_record_that_is_none_is_an_error(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json' must be"):
        read_run(tmp_path)
