"""Codistilled models: their average on the Hub and back over HTTP, and what their cards say."""

import json
import re
import shutil

import pytest
import torch
from card_runs import FIELDS, PROCESSOR, measure, msn, save
from huggingface_hub import ModelCard
from transformers import ViTConfig, ViTForImageClassification

from hf_msn import MSNForPreTraining, PredictionAverage, create_model_card, load_images, publish_checkpoint
from hf_msn.data.decoding import decode_image
from hf_msn.hub.run_record import write_run

NAME = "alice/average"
OF_A_MODEL = ["config.json", "model.safetensors", "preprocessor_config.json"]
SIZES = {name: FIELDS[name] for name in list(FIELDS)[:6]}
METRICS = {
    "eval_loss": {"replicas": [0.5, 0.4375], "average": 0.375},
    "eval_a|b": {"replicas": [71.25, float("nan")], "average": None},
}


def classifier(seed: int, **fields) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(**{**SIZES, "num_labels": 3, "initializer_range": 0.5, **fields})
    ).eval()


def save_average(folder, seeds=(0, 1), shards=(), **said):
    """As `CodistillationCallback(publish="average")` leaves an `output_dir`."""
    for place, seed in enumerate(seeds):
        names = [folder / f"replica_{place}", *([folder] if place == 0 else [])]
        for name in names:
            save(classifier(seed), name)
            if place in shards:
                (name / "model.safetensors").unlink()
                classifier(seed).save_pretrained(name, max_shard_size="30KB")
            (name / "training_args.bin").write_text("private")
            (name / "notes.txt").write_text("private")
    said = {
        "replicas": len(seeds),
        "published": "average",
        "publish": "average",
        "folders": [f"replica_{place}" for place in range(len(seeds))],
        "step": 40,
        "settings": {"method": "Codistillation", "alpha": 0.5},
        **said,
    }
    (folder / "codistillation.json").write_text(json.dumps(said))
    return folder


def mean_of(seeds, pixels) -> torch.Tensor:
    with torch.no_grad():
        return sum(classifier(seed)(pixel_values=pixels).logits.double().softmax(-1) for seed in seeds) / len(seeds)


def assert_loads(seeds, **settings):
    pixels = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        found = PredictionAverage.from_pretrained(NAME, **settings)(pixel_values=pixels).logits.double().softmax(-1)
    torch.testing.assert_close(found, mean_of(seeds, pixels), rtol=1e-5, atol=1e-6)


def test_an_average_is_published_whole_and_loads_from_the_hub_of_any_revision(hub, tmp_path):
    folder = save_average(tmp_path / "first", shards=(1,))
    for name in ("config.json", "replica_1/config.json"):
        fields = {**json.loads((folder / name).read_text()), "_name_or_path": str(folder)}
        (folder / name).write_text(json.dumps(fields))
    done = publish_checkpoint(folder, NAME, without_results=True)
    files = hub.files(NAME)
    shards = [f"replica_1/{file.name}" for file in (folder / "replica_1").glob("model-*")]
    expected = [*OF_A_MODEL, "README.md", "codistillation.json", *(f"replica_0/{name}" for name in OF_A_MODEL)]
    expected += ["replica_1/config.json", "replica_1/preprocessor_config.json"]
    expected += ["replica_1/model.safetensors.index.json", *shards]
    assert len(shards) > 1 and sorted(files) == sorted(expected) == [file.path for file in done.files]
    assert len(hub.repos[NAME].messages) == 2  # all in one commit
    assert str(tmp_path).encode() not in hub.sent_bytes()
    assert_loads((0, 1))
    asked = [request.path for request in hub.requests if "/resolve/" in request.path and "/replica_" in request.path]
    commit = hub.repos[NAME].branches["main"]
    assert asked and all(f"/resolve/{commit}/" in path for path in asked)  # of one push, whatever comes in between
    pixels = torch.randn(2, 3, 8, 8)
    alone = ViTForImageClassification.from_pretrained(NAME)(pixel_values=pixels).logits
    torch.testing.assert_close(alone, classifier(0)(pixel_values=pixels).logits)

    publish_checkpoint(save_average(tmp_path / "other", (3, 4, 5)), NAME, without_results=True, revision="v2")
    assert_loads((3, 4, 5), revision="v2")
    assert_loads((0, 1), revision=commit)
    assert_loads((0, 1))


def test_replicas_of_an_earlier_push_do_not_stay(hub, tmp_path):
    publish_checkpoint(save_average(tmp_path / "three", (0, 1, 2)), NAME, without_results=True)
    publish_checkpoint(save_average(tmp_path / "two", (0, 3)), NAME, without_results=True, update=True)
    assert {path.split("/")[0] for path in hub.files(NAME) if "/" in path} == {"replica_0", "replica_1"}
    assert_loads((0, 3))
    (tmp_path / "two" / "codistillation.json").write_text('{"published": 0, "publish": "first", "replicas": 2}')
    publish_checkpoint(tmp_path / "two", NAME, without_results=True)
    assert not [path for path in hub.files(NAME) if "/" in path]  # the replicas' folders are no part of it now


def damage(file):
    file.write_bytes(file.read_bytes()[:-10])


def link_out(folder, name):
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run / "replica_1"), "names 'replica_1', which is not there. An average needs all"),
        (lambda run: (run / "replica_1/config.json").unlink(), "'replica_1', which has no 'config.json'"),
        (lambda run: (run / "replica_1/config.json").write_text("{"), "'config.json' of .*replica_1' does not parse"),
        (lambda run: (run / "replica_1/model.safetensors").unlink(), "replica_1' has no 'model.safetensors'"),
        (lambda run: damage(run / "replica_1/model.safetensors"), "'model.safetensors' of .*replica_1' is damaged"),
        (
            lambda run: save(classifier(1, num_labels=4), run / "replica_1"),
            "no replica of the model beside it: `id2la",
        ),
        (lambda run: link_out(run, "replica_1"), "'replica_1' of .* is a link that leads out of the folder"),
        (lambda run: link_out(run, "replica_1/model.safetensors"), "'replica_1/model.safetensors' of .* is a link"),
        (
            lambda run: save_average(run, folders=["replica_0", "../replica_1"]),
            "`folders` of 'codistillation.json' of",
        ),
        (lambda run: save_average(run, folders=["replica_0"]), "but are 1 of 2"),
        (lambda run: (run / "codistillation.json").write_text("[]"), "must be a JSON object"),
    ],
)
def test_replicas_that_are_missing_or_damaged_are_named_before_anything_is_sent(hub, tmp_path, change, message):
    folder = save_average(tmp_path / "run")
    change(folder)
    with pytest.raises(ValueError, match=message):
        publish_checkpoint(folder, NAME, without_results=True)
    assert not hub.requests


def test_an_encoder_alone_is_not_exported_where_an_average_is_published(hub, tmp_path):
    folder = save(msn(), tmp_path / "run")
    save(msn(seed=1), folder / "replica_0")
    (folder / "codistillation.json").write_text('{"published": "average", "replicas": 1, "folders": ["replica_0"]}')
    with pytest.raises(ValueError, match=r"holds an average of 1 replicas, but `what` is 'backbone'"):
        publish_checkpoint(folder, NAME, without_results=True)
    assert hub.repos == {}
    publish_checkpoint(folder, NAME, what="pretraining", without_results=True)
    assert "replica_0/model.safetensors" in hub.files(NAME)
    average = PredictionAverage.from_pretrained
    with pytest.raises(ValueError, match="which is no model of transformers"):
        average(NAME)
    assert MSNForPreTraining.from_pretrained(NAME, subfolder="replica_0").config.hidden_size == 32


# Cards


def test_the_card_of_an_average_says_what_lies_where_and_what_the_run_measured(tmp_path):
    folder = save_average(tmp_path / "run", metrics=METRICS)
    card = create_model_card(folder, without_results=True, repo_id="alice/average")
    training = card.text.split("## Training")[1].split("## Limits")[0]
    assert "An image classifier, trained by a method that its files do not name" in card.text
    assert "the average of 2 codistilled replicas, in `replica_0/` to `replica_1/`" in card.text.split("## Results")[0]
    assert "holds the first replica alone; the replicas lie in `replica_0/`, `replica_1/`" in training
    assert "own evaluation of these very weights, after its last update (step 40)" in training
    assert "no result of hf_msn's evaluator" in training
    rows = [line.split(" | ") for line in training.splitlines() if line.startswith("| ")]
    assert [cell.strip("| ") for cell in rows[-3]] == ["metric", "replica 0", "replica 1", "average"]
    assert [cell.strip("| ") for cell in rows[-2]] == ["eval\\_loss", "0.5", "0.4375", "0.375"]
    assert [cell.strip("| ") for cell in rows[-1]] == ["eval\\_a\\|b", "71.25", "nan", "-"]
    assert "alpha 0.5" in training and "arXiv:2010.02838" in card.text
    # told by the run is not measured by the evaluator
    assert "model-index" not in str(card.data) and "**Not measured.**" in card.text and "0.375" not in str(card.data)
    assert 'PredictionAverage.from_pretrained("alice/average")' in card.text.replace(
        '(kind.from_pretrained("alice/average") for kind in (AutoImageProcessor, PredictionAverage))',
        'PredictionAverage.from_pretrained("alice/average")',
    )


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_lines_that_load_an_average_work(tmp_path, has_processor):
    folder = save_average(tmp_path / "run")
    if not has_processor:
        (folder / "preprocessor_config.json").unlink()
    block = re.findall(r"```python\n(.*?)```", create_model_card(folder, without_results=True).text, re.DOTALL)[0]
    image = decode_image(load_images("digits", split="test[:1]")[0]["image"])
    pixels = PROCESSOR(image, return_tensors="pt").pixel_values
    names = {"image": image} if has_processor else {"pixels": pixels}
    exec(block.replace("path/to/run", str(folder)), names)
    torch.testing.assert_close(names["probabilities"].double(), mean_of((0, 1), pixels), rtol=1e-5, atol=1e-6)


def test_numbers_of_the_evaluator_are_said_to_be_of_the_first_replica(tmp_path):
    folder = save_average(tmp_path / "run")
    card = create_model_card(folder, measure(ViTForImageClassification.from_pretrained(folder), tmp_path / "low.json"))
    assert "measured on the first replica alone, not on the average" in card.text
    assert card.text.count("The first replica alone. ") == 1


def test_the_replica_that_is_published_alone_is_named(tmp_path):
    folder = save(msn(), tmp_path / "codistilled")
    said = {"replicas": 2, "published": 1, "publish": "best", "metric": "eval_x", "values": [1.5, 2.5], "settings": {}}
    (folder / "codistillation.json").write_text(json.dumps(said))
    text = create_model_card(folder, without_results=True).text
    assert "replica 1 of 2 (counted from 0) is published, the best by eval\\_x (by replica: 1.5, 2.5)" in text
    assert "arXiv:2010.02838" in text and "PredictionAverage" not in text
    said |= {"published": 0, "checkpoint": str(tmp_path / "checkpoint-7"), "metric": None}
    (folder / "codistillation.json").write_text(json.dumps(said))
    text = create_model_card(folder, without_results=True).text
    assert "replica 0 of 2 (counted from 0) is published, as it was in checkpoint-7." in text


@pytest.mark.parametrize(
    "said",
    [
        {"metrics": [1], "settings": "<b>", "step": {"a": "<b>"}},
        {"metrics": {"<b>": 3, "![x](http://evil)": {"replicas": 3, "average": ["<b>"]}}},
        {"metrics": {f"m{number}": {"replicas": [1, 2, 3]} for number in range(60)}, "settings": ["<b>"]},
    ],
)
def test_a_strangers_record_shows_as_text_or_not_at_all(tmp_path, said):
    card = create_model_card(save_average(tmp_path / "run", **said), without_results=True)
    assert "<b>" not in card.text and "](http" not in card.text
    assert "m50" not in card.text and ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    ("sync", "papers"),
    [
        ({"method": "LocalSGD"}, ["1805.09767"]),
        ({"method": "SlowMo"}, ["1910.00643"]),
        ({"method": "SlowMo", "base method": "Gossip", "base push_sum": False}, ["1910.00643", "1705.09056"]),
        ({"method": "Gossip", "push_sum": True}, ["1811.10792"]),
        ({"method": "OverlapGossip"}, ["1811.10792"]),
        ({"method": "AsyncGossip", "async_method": "ad_psgd"}, ["1710.06952"]),
        ({"method": "AsyncGossip", "async_method": "push_sum"}, ["1803.08950"]),
        ({"method": "Codistillation"}, ["2010.02838"]),
        ({"method": "DistributedDataParallel"}, []),
    ],
)
def test_the_paper_of_the_ranks_method_is_cited(tmp_path, sync, papers):
    folder = save(msn(), tmp_path / "run")
    write_run(folder, {"method": "msn", "sync": sync})
    citations = create_model_card(folder, without_results=True).text.split("## Citation")[1]
    assert re.findall(r"arXiv:([\d.]+\d)", citations) == ["2204.07141", *papers]
