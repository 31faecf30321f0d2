import math

import datasets
import numpy as np
import pytest
import torch

from hf_msn.data.splits import low_shot_indices
from hf_msn.data.transforms import evaluation_image_processor
from hf_msn.evaluation.features import Features, extract_features, pixel_features
from hf_msn.evaluation.low_shot import LowShotEvaluator
from hf_msn.evaluation.probes import KNNProbe, LogisticProbe, SoftNearestNeighborProbe


@pytest.fixture(scope="module")
def pixels(digits):
    return pixel_features(digits[0]), pixel_features(digits[1])


@pytest.fixture
def listed(few):
    """The images of `few`, named as in ImageNet: class, underscore, number."""
    train = few[0].to_dict()
    seen = {}
    for image, label in zip(train["image"], train["label"]):
        seen[label] = seen.get(label, -1) + 1
        image["path"] = f"c{label}_{seen[label]}.png"
    return datasets.Dataset.from_dict(train, features=few[0].features), few[1]


def write_list(path, images_per_class, offset=0):
    path.parent.mkdir(exist_ok=True)
    names = [f"c{label}_{i + offset}.png" for label in range(10) for i in range(images_per_class)]
    path.write_text("\n".join(names) + "\n")
    return path


@pytest.mark.slow
def test_raw_pixels_of_the_digits_reach_88_percent_with_5_labels_per_class(digits, pixels):
    evaluator = LowShotEvaluator(*digits, images_per_class=(1, 5, 10), num_splits=5)
    metrics = evaluator.evaluate_features(*pixels)
    assert metrics["low_shot/5_per_class/top1"] == pytest.approx(88, abs=2)
    assert 60 < metrics["low_shot/1_per_class/top1"] < 70
    assert metrics["low_shot/10_per_class/top1"] > 90
    assert metrics["low_shot/5_per_class/top5"] > 98


def test_accuracy_of_each_split_is_that_of_its_probe(digits, pixels):
    evaluator = LowShotEvaluator(*digits, images_per_class=(2,), num_splits=3, seed=7)
    metrics = evaluator.evaluate_features(*pixels)
    train, test = pixels
    accuracies = []
    for seed in (7, 8, 9):
        rows = low_shot_indices(train.labels, images_per_class=2, seed=seed)
        probe = LogisticProbe().fit(train.features[rows], train.labels[rows])
        accuracies.append(100 * (probe.predict_scores(test.features).argmax(axis=1) == test.labels).mean())
    splits = evaluator.results.tasks[0].splits
    assert [split.top1 for split in splits] == pytest.approx(accuracies)
    assert [split.seed for split in splits] == [7, 8, 9]
    mean = sum(accuracies) / 3
    assert metrics["low_shot/2_per_class/top1"] == pytest.approx(mean)
    std = math.sqrt(sum((accuracy - mean) ** 2 for accuracy in accuracies) / 2)
    assert metrics["low_shot/2_per_class/top1_std"] == pytest.approx(std)


def test_unlabelled_rows_of_a_stream_are_refused(few, tiny_vit, processor):
    hidden = few[1].cast_column("label", datasets.Value("int64"))
    hidden = hidden.map(
        lambda row, i: {"label": -1 if i == 3 else row["label"]}, with_indices=True, new_fingerprint="h"
    )
    evaluator = LowShotEvaluator(few[0], hidden.to_iterable_dataset(), image_processor=processor)
    with pytest.raises(ValueError, match="1 do not: -1"):
        evaluator(tiny_vit)


def test_features_are_extracted_only_for_the_rows_of_the_splits(few, tiny_vit, processor):
    evaluator = LowShotEvaluator(*few, image_processor=processor, images_per_class=(1, 2), num_splits=2)
    metrics = evaluator(tiny_vit)
    seeds = (0, 1)
    labels = np.array(few[0]["label"][:])
    needed = set().union(*(low_shot_indices(labels, images_per_class=2, seed=seed).tolist() for seed in seeds))
    assert evaluator.results.data["train"]["num_images"] == len(needed) < len(few[0])
    everything = [extract_features(tiny_vit, part, processor) for part in few]
    again = evaluator.evaluate_features(*everything)
    assert again == pytest.approx(metrics)


def test_tasks_and_the_primary_metric_are_named_after_the_sizes(few, pixels):
    evaluator = LowShotEvaluator(*few, images_per_class=(5, 1), fractions=(0.5, 0.125), name="shots")
    assert evaluator.primary_metric == "shots/5_per_class/top1"
    assert (
        LowShotEvaluator(*few, images_per_class=(), fractions=(0.1, 0.5)).primary_metric == "low_shot/50_percent/top1"
    )
    metrics = evaluator.evaluate_features(*(pixel_features(part) for part in few))
    assert {name.split("/")[1] for name in metrics} == {"5_per_class", "1_per_class", "50_percent", "12.5_percent"}
    counts = {task.name: task.splits[0].num_images for task in evaluator.results.tasks}
    assert counts == {"5_per_class": 50, "1_per_class": 10, "50_percent": 60, "12.5_percent": 20}


def test_lists_of_one_name_are_the_splits_of_one_task(listed, tmp_path):
    files = [write_list(tmp_path / f"subset{i}" / "2imgs_class.txt", 2, offset=i) for i in range(3)]
    evaluator = LowShotEvaluator(*listed, images_per_class=(), list_files=files)
    metrics = evaluator.evaluate_features(*(pixel_features(part) for part in listed))
    assert evaluator.primary_metric == "low_shot/2imgs_class/top1"
    assert metrics["low_shot/2imgs_class/num_splits"] == 3
    splits = evaluator.results.tasks[0].splits
    assert [split.list_file for split in splits] == [str(file) for file in files]
    train = pixel_features(listed[0])
    names = [image["path"] for image in listed[0]["image"]]
    rows = [row for row, name in enumerate(names) if int(name.split("_")[1][:-4]) in (2, 3)]
    test = pixel_features(listed[1])
    probe = LogisticProbe().fit(train.features[rows], train.labels[rows])
    accuracy = 100 * (probe.predict_scores(test.features).argmax(axis=1) == test.labels).mean()
    assert splits[2].top1 == pytest.approx(accuracy)


def test_given_rows_give_the_numbers_of_a_draw_of_the_same_rows(digits, pixels):
    drawn = LowShotEvaluator(*digits, images_per_class=(2, 5), num_splits=1, seed=4)
    expected = drawn.evaluate_features(*pixels)
    rows = {
        name: np.random.RandomState(0).permutation(low_shot_indices(digits[0]["label"][:], images_per_class=k, seed=4))
        for name, k in (("two", 2), ("support", 5))
    }
    given = LowShotEvaluator(*digits, images_per_class=(), rows=rows)
    found = given.evaluate_features(*pixels)
    assert given.primary_metric == "low_shot/support/top1"
    renamed = {"two": "2_per_class", "support": "5_per_class"}
    assert found == {
        name: expected[name.replace(task, renamed[task])] for name in found for task in [name.split("/")[1]]
    }
    assert len(found) == len(expected) == 14
    assert found["low_shot/support/num_splits"] == 1 and found["low_shot/support/top1_std"] == 0
    split = given.results.tasks[1].splits[0]
    assert (split.seed, split.list_file, split.num_images, split.fewest_per_class) == (None, None, 50, 5)


def test_other_rows_than_the_given_ones_are_never_read(few, with_broken, tiny_vit, processor):
    labels = np.array(few[0]["label"][:])
    rows = low_shot_indices(labels, images_per_class=4, seed=1)
    others = np.setdiff1d(np.arange(len(labels)), rows)
    settings = {"image_processor": processor, "images_per_class": (), "on_broken_image": "raise"}
    expected = LowShotEvaluator(*few, rows={"support": rows}, **settings)(tiny_vit)

    hidden = np.where(np.isin(np.arange(len(labels)), rows), labels, 99)
    columns = with_broken(few[0], tuple(others.tolist())).to_dict() | {"label": hidden}
    types = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))

    def watch(batch):
        assert 99 not in batch["label"], "read the label of a row that was not given"
        return batch

    train = datasets.Dataset.from_dict(columns, features=types).with_transform(watch)
    with pytest.raises(AssertionError, match="not given"):
        train["label"][:]
    test = few[1].cast_column("label", datasets.Value("int64"))
    evaluator = LowShotEvaluator(train, test, rows={"support": rows}, **settings)
    assert evaluator(tiny_vit) == expected
    assert evaluator.results.data["train"]["num_images"] == 40


@pytest.mark.parametrize("space", ["projection", "prediction"])
def test_projections_and_predictions_are_classified_by_the_vote_of_the_supports(few, around_timm, space):
    processor = evaluation_image_processor(32, crop_fraction=1.0)
    rows = low_shot_indices(few[0]["label"][:], images_per_class=3, seed=2)
    evaluator = LowShotEvaluator(
        *few,
        image_processor=processor,
        images_per_class=(),
        rows={"support": rows},
        probe=SoftNearestNeighborProbe(0.05),
        features=space,
    )
    metrics = evaluator(around_timm)
    train, test = (extract_features(around_timm, part, processor, features=space) for part in few)

    def unit(vectors):
        return vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)

    votes = np.exp(unit(test.features) @ unit(train.features[rows]).T / 0.05) @ np.eye(10)[train.labels[rows]]
    assert metrics["low_shot/support/top1"] == pytest.approx(100 * (votes.argmax(axis=1) == test.labels).mean())
    results = evaluator.results.to_dict()
    assert results["settings"]["features"] == space
    assert results["model"]["weights_sha256"] == train.weights_sha256
    assert results["model"]["backbone"] == type(around_timm.encoder).__name__
    assert results["probe"] == {"probe": "soft_nearest_neighbor", "temperature": 0.05}
    assert results["tasks"][0]["splits"][0]["fit"] == {"num_supports": 30}


def test_streams_give_the_numbers_of_the_same_data_in_memory(few, tiny_vit, processor):
    in_memory = LowShotEvaluator(*few, image_processor=processor)(tiny_vit)
    streams = [part.to_iterable_dataset() for part in few]
    assert LowShotEvaluator(*streams, image_processor=processor)(tiny_vit) == pytest.approx(in_memory)


def test_skipped_images_are_missing_from_their_split_and_counted(few, with_broken, tiny_vit, processor):
    labels = np.array(few[0]["label"][:])
    row = int(low_shot_indices(labels, images_per_class=5, seed=0)[3])
    evaluator = LowShotEvaluator(
        with_broken(few[0], (row,)), few[1], image_processor=processor, images_per_class=(5,), num_splits=1
    )
    evaluator(tiny_vit)
    (split,) = evaluator.results.tasks[0].splits
    assert (split.num_images, split.num_skipped, split.fewest_per_class, split.most_per_class) == (49, 1, 4, 5)
    assert evaluator.results.data["train"]["num_skipped"] == 1
    assert f"row {row} " in evaluator.results.data["train"]["skipped"][0]


def test_class_without_a_readable_image_is_named(few, with_broken, tiny_vit, processor):
    labels = np.array(few[0]["label"][:])
    row = int(low_shot_indices(labels, images_per_class=1, seed=0)[0])
    broken = with_broken(few[0], (row,))
    evaluator = LowShotEvaluator(broken, few[1], image_processor=processor, images_per_class=(1,), num_splits=1)
    with pytest.raises(ValueError, match=f"'1_per_class', but 1 do not: {labels[row]}"):
        evaluator(tiny_vit)


def test_top5_is_given_from_6_classes_on(few):
    labels = [np.array(part["label"][:]) for part in few]
    for num_classes in (5, 6):
        part = [part.select(np.flatnonzero(of_part < num_classes)) for part, of_part in zip(few, labels)]
        metrics = LowShotEvaluator(*part).evaluate_features(*(pixel_features(images) for images in part))
        assert ("low_shot/5_per_class/top5" in metrics) == (num_classes == 6)


def test_results_record_what_the_numbers_depend_on(few, tiny_vit, processor):
    evaluator = LowShotEvaluator(*few, image_processor=processor, probe=KNNProbe(k=3), cache_dir=None)
    evaluator(tiny_vit)
    results = evaluator.results.to_dict()
    assert results["probe"] == {"probe": "knn", "k": 3, "temperature": 0.07}
    assert results["model"]["backbone"] == "ViTMSNModel"
    assert len(results["model"]["weights_sha256"]) == 64
    assert results["data"]["train"]["fingerprint"] == few[0]._fingerprint
    assert results["data"]["test"]["num_images"] == 40
    assert results["data"]["class_names"] == [str(digit) for digit in range(10)]
    assert results["settings"]["image_processor"]["size"] == {"shortest_edge": 8}
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert results["tasks"][0]["splits"][0]["fit"] == {"k": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_class": ()}, "are empty"),
        ({"num_splits": 0}, "`num_splits` .* but is 0"),
        ({"images_per_class": (0,)}, "`images_per_class` .* but is 0"),
        ({"images_per_class": (), "fractions": (1.5,)}, "`fraction` .* but is 1.5"),
        ({"rows": {"support": [0, 120]}}, "from 0 to 119, but holds 120"),
        ({"rows": {"support": [True] * 120}}, "type bool"),
        ({"rows": [1, 2, 3]}, "but is a list"),
        ({"rows": {"1_per_class": [1]}}, "1_per_class"),
    ],
)
def test_settings_out_of_range_are_refused(few, arguments, message):
    with pytest.raises(ValueError, match=message):
        LowShotEvaluator(*few, **arguments)


def _hidden(data):
    return data.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1}, new_fingerprint="hidden")


def _swapped(data):
    return data.cast_column("label", datasets.ClassLabel(names=[*"0123456879"]))


def _without_6(data):
    return data.select(np.flatnonzero(np.array(data["label"][:]) != 6))


@pytest.mark.parametrize(
    ("change_train", "change_test", "settings", "message"),
    [
        (lambda train: train.remove_columns("label"), None, {}, r"train data .* \['image'\]"),
        (None, lambda test: test.to_iterable_dataset().remove_columns("label"), {}, r"test data .* \['image'\]"),
        (None, _hidden, {}, "test data .* row 0 has label -1 .* 40 of 40"),
        (None, lambda test: test.select([]), {}, "test data"),
        (_without_6, None, {}, "train data, but 1 do not: 6"),
        (None, _swapped, {}, "class 7 is '7' and '8'"),
        (lambda train: train.to_iterable_dataset(), None, {"list_files": ["list.txt"]}, "streaming=False"),
        (lambda train: train.to_iterable_dataset(), None, {"rows": {"support": [1]}}, "streaming=False"),
    ],
)
def test_data_that_does_not_fit_is_refused(few, change_train, change_test, settings, message):
    train, test = few
    train, test = change_train(train) if change_train else train, change_test(test) if change_test else test
    with pytest.raises(ValueError, match=message):
        LowShotEvaluator(train, test, **settings)


def test_features_that_lack_rows_of_the_splits_are_refused(few):
    train, test = (pixel_features(part) for part in few)
    half = Features(train.features[::2], train.labels[::2], train.rows[::2])
    with pytest.raises(ValueError, match="missing"):
        LowShotEvaluator(*few).evaluate_features(half, test)


def test_class_missing_in_the_given_rows_is_named_before_any_image_is_read(few):
    labels = np.array(few[0]["label"][:])
    with pytest.raises(ValueError, match="rows of 'support', but 2 do not: 4, 7"):
        LowShotEvaluator(*few, rows={"support": np.flatnonzero((labels != 4) & (labels != 7))})
