import datasets
import pytest

from hf_msn.data.columns import image_and_label, number_labels


@pytest.fixture
def table(encoded):
    def make(images: tuple[str, ...] = ("image",), **columns) -> datasets.Dataset:
        features = datasets.Features({name: datasets.Image() for name in images})
        values = {name: [{"bytes": encoded(0), "path": None}] * 2 for name in images}
        for name, (feature, content) in columns.items():
            features[name], values[name] = feature, content
        return datasets.Dataset.from_dict(values, features)

    return make


CLASSES = datasets.ClassLabel(names=["cat", "dog"])
INTEGER = datasets.Value("int32")
TEXT = datasets.Value("string")


def test_image_column_is_the_only_one_or_named_image_or_given(table):
    images_only = datasets.Features(image=datasets.Image(decode=False))
    assert image_and_label(table(("img",), caption=(TEXT, ["a", "b"])), "x").features == images_only
    assert image_and_label(table(("mask", "image")), "x").column_names == ["image"]
    assert image_and_label(table(("left", "right")), "x", image_column="right").column_names == ["image"]
    with pytest.raises(ValueError, match="left, right"):
        image_and_label(table(("left", "right")), "x")
    with pytest.raises(ValueError, match="'text', 'score'"):
        image_and_label(datasets.Dataset.from_dict({"text": ["a"], "score": [1]}), "x")


def test_label_column_is_named_label_or_the_only_class_label(table):
    dataset = image_and_label(table(breed=(CLASSES, [1, 0]), age=(INTEGER, [3, 4])), "x")
    assert dataset.features["label"] == CLASSES and dataset["label"][:] == [1, 0]
    dataset = image_and_label(table(label=(INTEGER, [4, 2]), breed=(CLASSES, [1, 0])), "x")
    assert dataset["label"][:] == [4, 2]


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "cls", "class", "target"])
def test_label_is_found_by_its_usual_names(table, name):
    dataset = image_and_label(table(**{name: (INTEGER, [4, 2]), "age": (INTEGER, [3, 4])}), "x")
    assert dataset.features["label"] == datasets.Value("int64")
    assert dataset["label"][:] == [4, 2]


def test_ambiguous_label_columns_are_listed(table):
    both = table(fine_label=(CLASSES, [1, 0]), coarse_label=(CLASSES, [0, 0]))
    with pytest.raises(ValueError, match="fine_label, coarse_label"):
        image_and_label(both, "x")
    assert image_and_label(both, "x", label_column="coarse_label")["label"][:] == [0, 0]


def test_text_labels_are_numbered_in_alphabetical_order_and_left_out_of_a_stream(table, caplog):
    named = table(label=(TEXT, ["dog", "cat"]))
    dataset = number_labels(image_and_label(named, "x"))
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [1, 0]
    for column in (None, "label"):
        stream = image_and_label(named.to_iterable_dataset(), "x", label_column=column)
        assert stream.column_names == ["image"] and "'label' of 'x'" in caplog.text
        caplog.clear()


def test_column_of_floats_is_ignored_or_refused(table):
    scores = table(label=(datasets.Value("float32"), [0.5, 0.25]))
    assert image_and_label(scores, "x").column_names == ["image"]
    with pytest.raises(ValueError, match="'label' of 'x'"):
        image_and_label(scores, "x", label_column="label")
