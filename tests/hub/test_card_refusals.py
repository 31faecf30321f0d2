"""Cards that would say what was not measured, or what is private, are not made."""

import shutil

import pytest
import torch
from card_runs import edited, msn, save, with_value
from transformers import AutoModelForImageClassification

from hf_msn import (
    create_model_card,
    save_model_card,
)
from hf_msn.evaluation.backbones import checkpoint_weights_sha256


def test_projections_are_held_against_the_whole_model(made, tmp_path):
    card = create_model_card(made["checkpoint"], [made["results"], made["projection"]])
    assert "the projections of the model's head" in card.text and len(card.data.eval_results) == 8
    head = msn()
    with torch.no_grad():
        next(head.target_projection_head.parameters()).add_(1)
    with pytest.raises(ValueError, match="measured other weights"):
        create_model_card(save(head, tmp_path / "head"), made["projection"])


def test_numbers_of_another_checkpoint_are_refused(made, tmp_path):
    with pytest.raises(ValueError) as error:
        save_model_card(made["checkpoint"], [made["results"], made["foreign"]], output=tmp_path / "new")
    said = str(error.value)
    for part in (
        *(checkpoint_weights_sha256(made[name]) for name in ("checkpoint", "other")),
        *(str(made["foreign"]), str(made["checkpoint"])),
        f"python scripts/evaluate_low_shot.py --model {made['checkpoint']} --dataset digits --output",
    ):
        assert part in said
    assert not (tmp_path / "new").exists()


def _summary(said):
    said["tasks"][0]["summary"]["top1"] += 5


def _metric(said):
    said["metrics"]["low_shot/2_per_class/top1"] += 0.1


def _split(said):
    said["tasks"][0]["splits"][0]["top1"] += 5


def _all_to_a_number_that_cannot_be(said):
    for split in said["tasks"][0]["splits"]:
        split["top1"] = 77.7
    values = {"top1": 77.7, "top1_std": 0.0, "top1_ci95": 0.0}
    said["tasks"][0]["summary"].update(values)
    said["metrics"].update({f"low_shot/1_per_class/{name}": value for name, value in values.items()})


@pytest.mark.parametrize("change", [_summary, _metric, _split, _all_to_a_number_that_cannot_be])
def test_numbers_changed_by_hand_are_refused(change, made):
    with pytest.raises(ValueError, match="changed by hand"):
        create_model_card(made["checkpoint"], edited(made["results"], change))


def _without(*keys):
    def change(said):
        for key in keys[:-1]:
            said = said[key]
        del said[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("data"), "lacks 'data'"),
        (_without("model", "weights_sha256"), "lacks 'weights_sha256'"),
        (_without("tasks", 0, "splits", 1, "seed"), "lacks 'seed'"),
        (_without("tasks", 0, "summary"), "lacks 'summary'"),
        (with_value(float("nan"), "metrics", "low_shot/1_per_class/top1"), "a number that is NaN"),
        (with_value(float("inf"), "tasks", 0, "splits", 0, "top1"), "a number that is Infinity"),
        (with_value(101.0, "tasks", 0, "splits", 0, "top1"), "not between 0 and 100"),
        (with_value("70", "tasks", 0, "splits", 0, "top1"), "not between 0 and 100"),
        (with_value([], "tasks"), "cannot be"),
        (with_value([], "tasks", 0, "splits"), "no splits"),
        (with_value(None, "data"), "cannot be"),
        (with_value("hf_msn low-shot results 2", "format"), "says 'hf_msn low-shot results 2'"),
        (with_value(None, "model", "weights_sha256"), "raw pixels"),
    ],
)
def test_a_broken_file_is_an_error_that_says_how_to_measure(change, message, made):
    with pytest.raises(ValueError, match=message) as error:
        create_model_card(made["checkpoint"], edited(made["results"], change))
    assert "edited.json" in str(error.value) and "python scripts/evaluate_low_shot.py --model" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no file"),
        ("", "whole JSON"),
        ('{"format": "hf_msn low-shot resu', "whole JSON"),
        ("[1, 2]", "holds a list"),
        ('{"msn": {"1": {"mean": 70.3}}}', "has 'msn'"),
        ('{"format": "hf_msn fine-tuning 1"}', "says 'hf_msn fine-tuning 1'"),
    ],
)
def test_a_file_of_another_kind_is_an_error(text, message, made, tmp_path):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        create_model_card(made["checkpoint"], path)


def test_a_fine_tuning_result_beside_other_weights_is_refused(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        classifier.classifier.bias.add_(1)  # which the hash of the encoder does not see
    classifier.save_pretrained(folder)
    assert checkpoint_weights_sha256(folder) == checkpoint_weights_sha256(tuned)
    with pytest.raises(ValueError, match="is of other weights than those beside it"):
        create_model_card(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value(99.0, "validation_accuracy"), "changed by hand"),
        (with_value({"top1": 123.0}, "test_accuracy"), "not between 0 and 100"),
        (_without("weights_sha256"), "lacks 'weights_sha256'"),
        (_without("files"), "lacks 'files'"),
        (with_value("hf_msn fine-tuning 0", "format"), "hf_msn fine-tuning 0"),
    ],
)
def test_a_broken_fine_tuning_result_is_refused(change, message, tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    edited(folder / "finetune.json", change, "finetune.json")
    with pytest.raises(ValueError, match=message):
        create_model_card(folder)


def test_a_validation_accuracy_alone_is_no_result(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    edited(folder / "finetune.json", with_value(None, "test_accuracy"), "finetune.json")
    with pytest.raises(ValueError, match="needs results"):
        create_model_card(folder)
    assert "Not measured" in create_model_card(folder, without_results=True).text


def test_nothing_private_of_the_results_gets_in(made, tmp_path):
    def change(said):
        said["data"]["test"]["name"] = "/home/alice/sets/birds"
        said["data"]["train"]["name"] = "C:\\Users\\alice\\birds"
        said["model"]["name_or_path"] = "/home/alice/runs/hf_abcdefgh123456"
        for split in said["tasks"][0]["splits"]:
            split.update(seed=None, list_file="/home/alice/lists/1shot.txt")

    path = edited(made["results"], change, "private.json")
    save_model_card(made["checkpoint"], path, output=tmp_path)
    for file in (tmp_path / "README.md", tmp_path / ".eval_results" / "hf_msn.yaml"):
        text = file.read_text()
        assert "birds" in text
        for word in ("alice", "/home", "Users", "hf_abc", str(made["checkpoint"].parent)):
            assert word not in text, (file, word)
    assert "of the list files 1shot.txt, 1shot.txt, 1shot.txt" in (tmp_path / "README.md").read_text()


def test_a_token_that_would_get_in_is_an_error(made):
    with pytest.raises(ValueError, match="what looks like a token"):
        create_model_card(made["checkpoint"], made["results"], model_name="hf_abcdefghijklmnop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "tiny"}, "`repo_id` must be `owner/name`"),
        ({"repo_id": "a/b/c"}, "`repo_id` must be an id of the Hub"),
        ({"base_model": "not an id"}, "`base_model` must be an id"),
        ({"license": "Apache License\n"}, "`license` must be an identifier"),
        ({"run": "/nowhere"}, "`run` must be a folder"),
        ({"figures": ["nowhere.png"]}, "There is no figure"),
        ({"figures": [__file__]}, "must be a PNG"),
        ({"results": "nowhere.json"}, "There is no file of results"),
    ],
)
def test_what_is_none_is_refused(settings, message, made):
    with pytest.raises(ValueError, match=message):
        create_model_card(made["checkpoint"], **{"results": made["results"], **settings})


def test_a_folder_that_is_no_checkpoint_and_a_file_given_twice_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        create_model_card(tmp_path, made["results"])
    with pytest.raises(ValueError, match=r"has no config\.json"):
        create_model_card(made["results"], made["results"])
    with pytest.raises(ValueError, match="given more often"):
        create_model_card(made["checkpoint"], [made["results"], made["results"]])


def test_damaged_or_missing_weights_are_named(made, tmp_path):
    folder = shutil.copytree(made["checkpoint"], tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged"):
        create_model_card(folder, made["results"])
    weights.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        create_model_card(folder, made["results"])
