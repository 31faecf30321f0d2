"""Model cards contain measured numbers of the very weights, and lines that load them."""

import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from card_runs import edited, measure, msn, save, table, with_value
from finetuning_runs import ENCODER, PROCESSOR, VIEWS, classifier_arguments
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_msn import (
    BYOLConfig,
    BYOLForPreTraining,
    LogisticProbe,
    MSNConfig,
    MSNForPreTraining,
    MultiViewTransform,
    PAWSConfig,
    PAWSForPreTraining,
    SuNCEtConfig,
    SuNCEtForPreTraining,
    create_model_card,
    export_backbone,
    export_classifier,
    extract_features,
    finetune_classifier,
    load_images,
    plot_low_shot,
    save_model_card,
)
from hf_msn.cli.sync import SYNC_METHODS
from hf_msn.data.decoding import decode_image
from hf_msn.evaluation.backbones import checkpoint_weights_sha256
from hf_msn.hub.run_record import write_run

ROOT = Path(__file__).parents[2]
PROCESSOR_32 = MultiViewTransform(image_size=32).evaluation_image_processor()


@pytest.mark.slow
def test_the_table_has_the_numbers_of_the_file_to_the_printed_digit(made):
    card = create_model_card(made["checkpoint"], made["results"])
    record = json.loads(made["results"].read_text())
    rows = table(card, "labelled images")
    assert [row[0] for row in rows] == ["1 image per class", "2 images per class"]
    for row, task in zip(rows, record["tasks"]):
        top1 = [split["top1"] for split in task["splits"]]
        mean = math.fsum(top1) / 3
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in top1) / 2)
        half = 4.302652729911275 * std / math.sqrt(3)
        top5 = math.fsum(split["top5"] for split in task["splits"]) / 3
        assert row[1] == f"{mean:.1f} ± {std:.1f}" and std > 0
        assert row[2] == f"{max(0, mean - half):.1f} to {min(100, mean + half):.1f}"
        assert row[3:] == [f"{top5:.1f}", "3", str(task["splits"][0]["num_images"])]
    assert "with seeds 0, 1, 2" in card.text and "l2 0.0025" in card.text
    assert "60 images of 10 classes" in card.text and record["data"]["test"]["fingerprint"] in card.text


@pytest.mark.slow
def test_baselines_are_a_table_but_no_results_of_the_model(made, tmp_path):
    measured = measure(msn(), tmp_path / "low_shot.json", baselines=("knn", "untrained", "pixels"))
    card = create_model_card(made["checkpoint"], measured)
    record = json.loads(measured.read_text())
    assert len(table(card, "labelled images")) == 2
    rows = table(card, "baseline")
    assert [row[0] for row in rows] == ["nearest neighbours", "untrained network", "raw pixels"]
    for row, name in zip(rows, ("knn", "untrained", "pixels")):
        for cell, task in zip(row[1:], ("1_per_class", "2_per_class")):
            assert cell.startswith(f"{record['metrics'][f'low_shot/{task}/{name}_top1']:.1f} ± ")
    assert len(card.data.eval_results) == 4  # top-1 and top-5 of two tasks


def test_the_metadata_has_the_numbers_of_the_file_and_survives_the_hub_client(made, tmp_path):
    written = save_model_card(
        made["checkpoint"], made["results"], output=tmp_path, repo_id="someone/tiny", license="mit"
    )
    assert written == [tmp_path / ".eval_results" / "hf_msn.yaml", tmp_path / "README.md"]
    card = create_model_card(made["checkpoint"], made["results"], repo_id="someone/tiny", license="mit")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict() == metadata_load(tmp_path / "README.md")
    assert loaded.data.library_name == "hf_msn" and loaded.data.license == "mit" and "msn" in loaded.data.tags
    metrics = json.loads(made["results"].read_text())["metrics"]
    name, evaluated = model_index_to_eval_results(loaded.data.to_dict()["model-index"])
    assert name == "tiny" and all('"someone/tiny"' in block for block in code_blocks(card))
    expected = [metrics[f"low_shot/{n}_per_class/{top}"] for n in (1, 2) for top in ("top1", "top5")]
    assert [one.metric_value for one in evaluated] == expected
    assert [one.metric_args["std"] for one in evaluated][::2] == [
        metrics[f"low_shot/{n}_per_class/top1_std"] for n in (1, 2)
    ]
    assert {(one.dataset_name, one.dataset_split, one.metric_type) for one in evaluated} == {
        ("digits", "test[:60]", "accuracy")
    }
    assert evaluated[0].metric_args["weights_sha256"] == checkpoint_weights_sha256(made["checkpoint"])
    entries = parse_eval_result_entries(yaml.safe_load(written[0].read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("digits", f"{n}_per_class", metrics[f"low_shot/{n}_per_class/top1"]) for n in (1, 2)
    ]


def test_the_export_may_have_the_numbers_of_its_checkpoint(made):
    rows = table(create_model_card(made["export"], made["results"]), "labelled images")
    assert rows == table(create_model_card(made["checkpoint"], made["results"]), "labelled images")
    assert create_model_card(made["export"], made["results"]).data.library_name == "transformers"


def test_a_card_without_results_must_be_asked_for(made, tmp_path):
    with pytest.raises(ValueError, match="without_results"):
        create_model_card(made["checkpoint"])
    with pytest.raises(ValueError, match="without_results"):
        create_model_card(made["checkpoint"], made["results"], without_results=True)
    save_model_card(made["checkpoint"], made["results"], output=tmp_path)
    save_model_card(made["checkpoint"], output=tmp_path, without_results=True)
    text = (tmp_path / "README.md").read_text()
    assert "> **Not measured.**" in text.split("## Results")[0] and "model-index" not in text
    assert "%" not in text.split("## Use")[0]
    assert not (tmp_path / ".eval_results" / "hf_msn.yaml").exists()  # of the card before


@pytest.mark.slow
def test_a_fine_tuned_card_has_the_numbers_of_its_own_file(tuned):
    card = create_model_card(tuned)
    record = json.loads((tuned / "finetune.json").read_text())
    ((where, count, _, accuracy, interval),) = table(card, "measured on")
    share, z = record["test_accuracy"]["top1"] / 100, 1.959963984540054
    # the shares p with |share - p| <= z * sqrt(p (1 - p) / n), by search
    inside = [p for p in np.linspace(0, 1, 100001) if (share - p) ** 2 <= z * z * p * (1 - p) / 60 + 1e-15]
    assert (where, count, accuracy) == ("digits, split test\\[:60\\]", "60", f"{100 * share:.1f}")
    assert interval == f"{100 * inside[0]:.1f} to {100 * inside[-1]:.1f}"
    assert record["weights_sha256"] == checkpoint_weights_sha256(tuned) and record["weights_sha256"] in card.text
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert [one.metric_value for one in card.data.eval_results] == [record["test_accuracy"]["top1"]]
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card.text and "trained on 20 labelled images" in card.text


def test_a_converted_card_lists_what_was_kept_left_out_and_made_up(made, tmp_path):
    folder = shutil.copytree(made["checkpoint"], tmp_path / "converted")
    record = {
        "source": {"file": "/home/alice/msn/vits16.pth.tar", "sha256": "ab" * 32},
        "method": "msn",
        "architecture": "ViT | <b>S/16",
        "heads_assumed": True,
        "num_attention_heads": 2,
        "epoch": 800,
        "kept": ["target_encoder", "prototypes"],
        "left_out": [f"opt.{row}" for row in range(40)],
        "made_up": ["encoder"],
    }
    (folder / "conversion.json").write_text(json.dumps(record))
    card = create_model_card(folder, made["results"])
    text = card.text
    assert "Converted, not trained, by hf_msn" in text and "| converted from | vits16.pth.tar |" in text
    assert "| architecture | ViT \\| &lt;b&gt;S/16 |" in text and "64 dimensions per head are assumed" in text
    assert "opt.11 and 28 more" in text and "but made up: encoder" in text and "alice" not in text
    assert "Converting changes no licence" in text and card.data.license is None


def test_the_training_is_described_as_the_record_has_it(made, tmp_path):
    export = made["export"]
    assert "contain no record of its training" in create_model_card(export, made["results"]).text
    write_run(
        tmp_path,
        {
            "method": "msn",
            "data": {"name": "ILSVRC/imagenet-1k", "split": "train", "num_images": 1281167, "num_broken": 3},
            "start": "facebook/vit-msn-small",
            "sync": {"method": "SlowMo", "sync_every": 12},
            "steps": 70,
            "planned_steps": 100,
            "wall_time_seconds": 5400.0,
            "hardware": {"device_name": "NVIDIA H200", "ranks": 8},
            "recipe": {"dataset": "```\n# evil\n---", "mask_ratio": 0.15, "output_dir": "/home/alice"},
        },
    )
    card = create_model_card(export, made["results"], run=tmp_path)
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card.text.split("## Training")[1], re.MULTILINE))
    assert rows["data"] == "ILSVRC/imagenet-1k, split train (1,281,167 images, 3 of them unreadable)"
    assert rows["communication"] == "SlowMo: sync\\_every 12" and rows["hardware"] == "NVIDIA H200, 8 ranks"
    assert rows["steps"] == "70 of 100 planned" and rows["wall time of training"] == "90.0 min"
    assert "epochs" not in rows and "precision" not in rows
    assert card.data.datasets == ["ILSVRC/imagenet-1k"] and card.data.base_model == "facebook/vit-msn-small"
    assert "arXiv:1910.00643" in card.text and "````yaml" in card.text and "alice" not in card.text


def test_every_method_of_communication_has_its_paper(made, tmp_path):
    papers = []
    for method in SYNC_METHODS.values():
        write_run(tmp_path, {"method": "msn", "sync": {"method": method.core.__name__}})
        text = create_model_card(made["export"], made["results"], run=tmp_path).text
        (paper,) = set(re.findall(r"arXiv:([\d.]+)", text)) - {"2204.07141"}
        papers.append(paper)
    assert len(set(papers)) == len(papers) - 1  # Gossip and OverlapGossip are of one paper


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("checkpoint", 2), ("export", 2), ("classifier", 1)])
def test_the_lines_that_load_it_work(kind, count, made, tuned, tmp_path):
    folder = tuned if kind == "classifier" else made[kind]
    card = create_model_card(folder, () if kind == "classifier" else made["results"])
    image = decode_image(load_images("digits", split="test[:1]")[0]["image"])
    image.save(tmp_path / "digit.png")
    blocks = code_blocks(card)
    assert len(blocks) == count
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) == 3
        lines = block.replace(f"path/to/{folder.name}", str(folder)).replace("path/to/images", str(tmp_path))
        names = {"image": image}
        exec(lines, names)
        assert names.get("features", torch.zeros(1, 32)).shape == (1, 32)


@pytest.mark.slow
def test_a_classifier_on_a_projection_head_is_used_with_hf_msn(made, tmp_path):
    dataset = load_images("digits", split="train[:60]")
    args = classifier_arguments(tmp_path, num_train_epochs=1, start_layer="fc1")
    result = finetune_classifier(made["checkpoint"], dataset, np.arange(60), VIEWS, args, image_processor=PROCESSOR)
    result.test(load_images("digits", split="test[:60]"))
    result.save(tmp_path / "tuned")
    card = create_model_card(tmp_path / "tuned")
    assert card.data.library_name == "hf_msn" and card.data.pipeline_tag == "image-classification"
    (block,) = code_blocks(card)
    image = decode_image(dataset[3]["image"])
    names = {"image": image}
    exec(block.replace("path/to/tuned", str(tmp_path / "tuned")).replace("print(", "found = ("), names)
    with torch.no_grad():
        probabilities = result.model(PROCESSOR(image, return_tensors="pt")["pixel_values"]).logits[0].softmax(dim=0)
    assert names["found"][0]["label"] == str(int(probabilities.argmax()))
    assert names["found"][0]["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert "registers" in card.text


@pytest.mark.slow
def test_exports_of_a_network_of_timm_are_used_through_transformers_and_timm(tmp_path):
    torch.manual_seed(0)
    model = PAWSForPreTraining(PAWSConfig(timm_model="test_resnet", image_size=32, projection_dim=16)).eval()
    images = load_images("digits")
    features = extract_features(model, images, PROCESSOR_32, rows=np.arange(100))
    probe = LogisticProbe().fit(features.features, features.labels)
    export_backbone(model, tmp_path / "encoder", image_processor=PROCESSOR_32)
    export_classifier(model, probe, features, tmp_path / "classifier", image_processor=PROCESSOR_32)
    results = measure(model, tmp_path / "low_shot.json", image_processor=PROCESSOR_32)
    image = decode_image(images[0]["image"])
    cards = {name: create_model_card(tmp_path / name, results) for name in ("encoder", "classifier")}
    for name, card in cards.items():
        outputs = []
        for block in code_blocks(card):
            names = {"image": image, "pixels": PROCESSOR_32(image, return_tensors="pt")["pixel_values"]}
            exec(block.replace(f"path/to/{name}", str(tmp_path / name)), names)
            outputs += [names["features"].detach().flatten().numpy()] if "features" in names else []
        assert len(code_blocks(card)) == 2
        assert all(np.allclose(output, features.features[0], atol=1e-5) for output in outputs)
        assert len(outputs) == {"encoder": 2, "classifier": 1}[name]
    assert [card.data.pipeline_tag for card in cards.values()] == ["image-feature-extraction", "image-classification"]
    assert "It has a classifier." in cards["classifier"].text
    assert cards["encoder"].data.library_name == "timm" and "`test_resnet` of timm" in cards["encoder"].text


KINDS = [  # method, variant, and what the card says and cites
    (MSNConfig, MSNForPreTraining, {"num_prototypes": 8}, "Masked Siamese Networks", ["assran2022masked"]),
    (PAWSConfig, PAWSForPreTraining, {}, "by PAWS", ["assran2021semi"]),
    (SuNCEtConfig, SuNCEtForPreTraining, {}, "SimCLR + SuNCEt", ["assran2020supervision"]),
    (BYOLConfig, BYOLForPreTraining, {}, "by BYOL:", ["grill2020bootstrap"]),
    (
        BYOLConfig,
        BYOLForPreTraining,
        {"ema": False, "predictor": "direct_copy"},
        "by SimSiam with DirectCopy:",
        ["chen2020exploring", "wang2021towards"],
    ),
]


TIMM = {"timm_model": "test_resnet", "image_size": 32}


@pytest.mark.parametrize(("network", "kind"), [(ENCODER, KINDS[0]), *itertools.product((ENCODER, TIMM), KINDS[1:])])
def test_an_export_without_a_record_names_its_method(network, kind, tmp_path):
    config, model, fields, said, cited = kind
    made = model(config(**{**network, "projection_hidden_dim": 16, "projection_dim": 8, **fields}))
    processor = MultiViewTransform(image_size=network["image_size"]).evaluation_image_processor()
    export_backbone(made, tmp_path / "encoder", image_processor=processor)
    card = create_model_card(tmp_path / "encoder", without_results=True)
    assert said in card.text and re.findall(r"@article{(\w+),", card.text) == cited
    assert config.model_type in card.data.tags
    assert not hasattr(model.from_backbone(tmp_path / "encoder").config, "pretrained_by")


def test_markup_in_names_shows_as_text(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    evil = ["a|b", "new\nline", "<script>alert(1)</script>", "![x](http://evil/x.png)", "`code`", "---", "# head"]
    edited(
        folder / "finetune.json",
        with_value([*evil, "{{ 7 * 7 }}", "www.evil.com", "ok"], "class_names"),
        "finetune.json",
    )
    edited(folder / "finetune.json", with_value("x | <img src=y>\n\n# z", "test_data", "name"), "finetune.json")
    card = create_model_card(folder, model_name="n|a<b>\nm")
    listed = next(line for line in card.text.splitlines() if line.startswith("Classes: "))
    assert listed.startswith("Classes: a\\|b, new line, &lt;script&gt;alert\\(1\\)&lt;/script&gt;, \\!\\[x\\]")
    assert "\\{\\{ 7 \\* 7 \\}\\}" in listed and listed.endswith("ok.") and "http://" not in listed
    for line in card.text.splitlines():
        assert "<script" not in line and "<img" not in line
        assert not line.startswith(("---", "# z", "# head"))
    assert len(table(card, "measured on")[0]) == 5
    loaded = ModelCard(str(card))
    assert loaded.data.to_dict() == card.data.to_dict()


# Refusals


def test_projections_are_compared_with_the_whole_model(made, tmp_path):
    card = create_model_card(made["checkpoint"], [made["results"], made["projection"]])
    assert "the projections of the model's head" in card.text and len(card.data.eval_results) == 8
    head = msn()
    with torch.no_grad():
        next(head.target_projection_head.parameters()).add_(1)
    with pytest.raises(ValueError, match=checkpoint_weights_sha256(made["checkpoint"], "projection")):
        create_model_card(save(head, tmp_path / "head"), made["projection"])
    with pytest.raises(ValueError, match=r"projection\.json.*--what pretraining"):
        create_model_card(made["export"], made["projection"])


def test_results_of_other_weights_are_refused_with_both_hashes(made, tmp_path):
    with pytest.raises(ValueError) as error:
        save_model_card(made["checkpoint"], [made["results"], made["foreign"]], output=tmp_path / "new")
    for name in ("checkpoint", "other"):
        assert checkpoint_weights_sha256(made[name]) in str(error.value)
    assert str(made["foreign"]) in str(error.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("data"),
        lambda record: record["tasks"][0]["splits"][1].pop("seed"),
        with_value("hf_msn low-shot results 2", "format"),
        with_value(None, "model", "weights_sha256"),
        dict.clear,
    ],
)
def test_a_broken_file_of_results_is_named(change, made):
    with pytest.raises(ValueError, match=r"edited\.json"):
        create_model_card(made["checkpoint"], edited(made["results"], change))
    with pytest.raises(ValueError, match=r"absent\.json"):
        create_model_card(made["checkpoint"], "absent.json")


def test_a_fine_tuning_result_beside_other_weights_is_refused(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        classifier.classifier.bias.add_(1)  # which the hash of the encoder does not see
    classifier.save_pretrained(folder)
    assert checkpoint_weights_sha256(folder) == checkpoint_weights_sha256(tuned)
    with pytest.raises(ValueError, match=r"finetune\.json"):
        create_model_card(folder)


def test_a_validation_accuracy_alone_is_no_result(tuned, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "copy")
    edited(folder / "finetune.json", with_value(None, "test_accuracy"), "finetune.json")
    with pytest.raises(ValueError, match="without_results"):
        create_model_card(folder)
    assert "Not measured" in create_model_card(folder, without_results=True).text


def test_paths_in_results_are_reduced_to_their_last_component(made, tmp_path):
    def change(record):
        record["data"]["test"]["name"] = "/home/alice/sets/birds"
        record["data"]["train"]["name"] = "C:\\Users\\alice\\birds"
        record["model"]["name_or_path"] = "/home/alice/runs/hf_abcdefgh123456"
        for split in record["tasks"][0]["splits"]:
            split.update(seed=None, list_file="/home/alice/lists/1shot.txt")

    save_model_card(made["checkpoint"], edited(made["results"], change, "private.json"), output=tmp_path)
    for file in (tmp_path / "README.md", tmp_path / ".eval_results" / "hf_msn.yaml"):
        text = file.read_text()
        assert "birds" in text
        for word in ("alice", "/home", "Users", "hf_abc", str(made["checkpoint"].parent)):
            assert word not in text, (file, word)
    assert "from the list files 1shot.txt, 1shot.txt, 1shot.txt" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repo_id": "tiny"}, "tiny"),
        ({"repo_id": "a/b/c"}, "a/b/c"),
        ({"base_model": "not an id"}, "not an id"),
        ({"license": "Apache License\n"}, "license"),
        ({"run": "/nowhere"}, "/nowhere"),
        ({"figures": ["nowhere.png"]}, "nowhere.png"),
        ({"figures": [__file__]}, "PNG"),
    ],
)
def test_an_invalid_argument_is_named(settings, named, made):
    with pytest.raises(ValueError, match=named):
        create_model_card(made["checkpoint"], made["results"], **settings)


# Files


@pytest.mark.slow
def test_figures_are_copied_beside_the_card_and_shown(made, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "my figure (1).png")
    out = tmp_path / "out"
    written = save_model_card(
        made["checkpoint"], made["results"], output=out, figures=[tmp_path / "my figure (1).png"], plot=True
    )
    names = ["figures/low_shot.png", "figures/my-figure-1.png", ".eval_results/hf_msn.yaml", "README.md"]
    assert [str(path.relative_to(out)) for path in written] == names
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", (out / "README.md").read_text())
    assert shown == names[:2] and all(Image.open(out / name).size[0] >= 4 for name in shown)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(names)


def test_the_plot_is_the_same_each_time_and_needs_matplotlib(made, tmp_path, monkeypatch):
    first, second = (plot_low_shot(made["results"], tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        save_model_card(made["checkpoint"], made["results"], output=tmp_path / "out", plot=True)
    assert not (tmp_path / "out").exists()


def test_a_readme_that_hf_msn_did_not_make_is_replaced_only_by_overwrite(made, tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(ValueError, match="overwrite"):
        save_model_card(made["checkpoint"], made["results"], output=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    save_model_card(made["checkpoint"], made["results"], output=tmp_path, overwrite=True)
    save_model_card(made["checkpoint"], made["results"], output=tmp_path)  # its own is replaced
    assert (tmp_path / "README.md").read_text().startswith("---")


def test_the_finished_card_has_the_numbers_of_the_results_beside_it():
    folder = ROOT / "model_cards" / "msn-vit-digits"
    record = json.loads((folder / "low_shot.json").read_text())
    card = ModelCard.load(folder / "README.md")
    rows = table(card, "labelled images")
    for row, task in zip(rows, record["tasks"]):
        top1 = [split["top1"] for split in task["splits"]]
        assert row[1] == f"{np.mean(top1):.1f} ± {np.std(top1, ddof=1):.1f}"
    assert len(rows) == 4 and record["model"]["weights_sha256"] in card.text
    expected = [task["summary"]["top1"] for task in record["tasks"]]
    assert [one.metric_value for one in card.data.eval_results][::2] == expected
    entries = yaml.safe_load((folder / ".eval_results" / "hf_msn.yaml").read_text())
    assert [entry["value"] for entry in entries] == expected
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", card.text)
    assert shown and all((folder / name).is_file() for name in shown)
