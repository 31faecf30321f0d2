"""The page of an evaluation: its numbers, and that it needs nothing beside itself."""

import base64
import io
import json
import re

import datasets
import numpy as np
import pytest
from html_page import Page
from PIL import Image

from hf_msn.data.decoding import decode_image
from hf_msn.evaluation.features import Features, extract_features
from hf_msn.evaluation.low_shot import LowShotEvaluator
from hf_msn.evaluation.probes import KNNProbe
from hf_msn.evaluation.report import save_report

NAMES = ["<script>alert(1)</script>", "cats & dogs", '"quoted"', *map(str, range(3, 10))]


def named(part):
    return part.cast_column("label", datasets.ClassLabel(names=NAMES))


def reported(evaluator, model, path):
    features = evaluator.extract(model)
    evaluator(model, features)
    save_report(evaluator, features, path)
    return Page(path.read_text()), features


@pytest.fixture
def page(few, tiny_vit, processor, tmp_path):
    parts = [named(part) for part in few]
    evaluator = LowShotEvaluator(*parts, image_processor=processor, images_per_class=(1, 3), baselines=("pixels",))
    made, features = reported(evaluator, tiny_vit, tmp_path / "report.html")
    return made, evaluator, features


def test_a_page_has_the_numbers_of_the_json_file_and_escapes_names(page, tmp_path):
    made, evaluator, (_, test) = page
    evaluator.results.save(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    rows = made.tables[0][1:]
    assert [row[0] for row in rows] == ["1 image per class", "raw pixels", "3 images per class", "raw pixels"]
    for row, (task, of) in zip(rows, [(t, of) for t in (0, 1) for of in ("tasks", "pixels")]):
        part = saved["tasks"] if of == "tasks" else saved["baselines"]["pixels"]
        summary = part[task]["summary"]
        assert row[1] == f"{summary['top1']:.1f} ± {summary['top1_std']:.1f}"
        low, high = max(0, summary["top1"] - summary["top1_ci95"]), min(100, summary["top1"] + summary["top1_ci95"])
        assert row[2:] == [f"{low:.1f} to {high:.1f}", f"{summary['top5']:.1f}", "3"]
    header, *matrix = made.tables[1]
    assert header[1:] == [row[0] for row in matrix] == NAMES
    counts = np.array([[int(count or 0) for count in row[1:]] for row in matrix])
    assert counts.sum(axis=1).tolist() == np.bincount(test.labels).tolist()
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(saved["tasks"][1]["splits"][0]["top1"])
    settings = json.loads(re.search(r"\{\s+\"model\".*\}", made.text, re.DOTALL)[0])
    assert settings["probe"] == saved["probe"] and settings["versions"] == saved["versions"]
    assert "script" not in made.tags


def test_a_page_loads_nothing_and_describes_its_pictures(page):
    made, _, _ = page
    assert made.links and all(link.startswith("data:image/") for link in made.links)
    assert not re.search(r"@import|url\(|https?://", made.text)
    assert not made.tags & {"script", "link", "iframe", "object", "embed"}
    charts = made.described
    assert "nearest" not in charts[0] and re.search(r"the model [\d.]+ at 1, [\d.]+ at 3; raw pixels", charts[0])
    assert "t-SNE map of the features of 40 test images of 10 classes" in charts[1]


def test_the_pictures_are_those_of_the_nearest_labelled_images(page):
    made, evaluator, (train, test) = page
    split = evaluator.splits(train)["3_per_class"][0].rows
    shown = [(alt.split()[0], int(re.search(r"row (\d+)", alt)[1]), source) for alt, source in made.images]
    labels = np.array(evaluator.train_dataset["label"][:])
    for start in range(0, len(shown), 6):
        (kind, row, source), *neighbours = shown[start : start + 6]
        assert kind == "Test" and {other for other, *_ in neighbours} == {"Labelled"}
        query = test.features[row].astype(np.float64)
        similarity = {}
        for labelled in split:
            vector = train.features[train.rows.tolist().index(labelled)].astype(np.float64)
            similarity[labelled] = query @ vector / np.sqrt((query @ query) * (vector @ vector))
        expected = sorted(split, key=lambda labelled: -similarity[labelled])[:5]
        assert [similarity[row] for _, row, _ in neighbours] == pytest.approx([similarity[row] for row in expected])
        pixels = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert np.array_equal(pixels, decode_image(evaluator.test_dataset[row]["image"]))
    assert len(shown) > 60 and {labels[row] for kind, row, _ in shown if kind == "Labelled"} > {0}


def test_a_stream_is_reported_without_pictures(few, tiny_vit, processor, tmp_path):
    streams = [part.to_iterable_dataset() for part in few]
    evaluator = LowShotEvaluator(
        *streams, image_processor=processor, images_per_class=(2,), num_splits=1, probe=KNNProbe(3)
    )
    made, _ = reported(evaluator, tiny_vit, tmp_path / "report.html")
    assert made.images == [] and [row[0] for row in made.tables[0][1:]] == ["2 images per class"]


def test_many_classes_are_reported_by_their_confusions(few, tmp_path):
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(40), 3)
    columns = {"image": [few[0][0]["image"]] * 120, "label": labels}
    types = datasets.Features(image=few[0].features["image"], label=datasets.Value("int64"))
    dataset = datasets.Dataset.from_dict(columns, types)
    features = Features(random.normal(size=(120, 8)).astype(np.float32), labels, np.arange(120))
    evaluator = LowShotEvaluator(dataset, dataset.select(range(120)), images_per_class=(1,), num_splits=1)
    evaluator.evaluate_features(features, features)
    save_report(evaluator, (features, features), tmp_path / "report.html")
    made = Page((tmp_path / "report.html").read_text())
    wrong = sum(int(row[2]) for row in made.tables[1][1:])
    assert made.tables[1][0][0] == "class" and 0 < wrong <= round(
        1.2 * (100 - evaluator.results.tasks[0].splits[0].top1)
    )
    assert all(row[0] != row[1] and row[3] == "3" for row in made.tables[1][1:])


def test_few_test_images_are_mapped_by_their_principal_components(few, tiny_vit, processor, tmp_path):
    train, test = (part.select(np.flatnonzero(np.array(part["label"][:]) < 2)) for part in few)
    evaluator = LowShotEvaluator(train, test, image_processor=processor, images_per_class=(1,), num_splits=1)
    made, _ = reported(evaluator, tiny_vit, tmp_path / "report.html")
    assert any("PCA map of the features of 8 test images" in value for name, value in made.attributes if value)


def test_other_features_than_the_measured_ones_are_refused(few, tiny_vit, processor, tmp_path):
    evaluator = LowShotEvaluator(*few, image_processor=processor, images_per_class=(2,), num_splits=1)
    features = evaluator.extract(tiny_vit)
    with pytest.raises(ValueError, match="`evaluator`"):
        save_report(evaluator, features, tmp_path / "report.html")
    evaluator(tiny_vit, features)
    random = np.random.RandomState(0).normal(size=features[1].features.shape).astype(np.float32)
    others = (features[0], Features(random, features[1].labels, features[1].rows))
    with pytest.raises(ValueError, match="`features`"):
        save_report(evaluator, others, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_given_features_give_the_metrics_of_the_model(few, tiny_vit, processor):
    evaluator = LowShotEvaluator(
        *few, image_processor=processor, images_per_class=(2,), baselines=("knn", "untrained")
    )
    metrics = evaluator(tiny_vit)
    train, test = evaluator.extract(tiny_vit)
    assert np.array_equal(test.features, extract_features(tiny_vit, few[1], processor).features)
    assert evaluator(tiny_vit, (train, test)) == metrics
