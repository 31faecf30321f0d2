import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from hf_msn import (
    LowShotEvaluator,
    MultiViewDataset,
    MultiViewTransform,
    SupportDataset,
    draw_labelled_rows,
    load_images,
    pixel_features,
)
from hf_msn.data.decoding import decode_image
from hf_msn.data.map_style import image_dataset

TRANSFORM = MultiViewTransform(image_size=8, focal_views=0)


@pytest.fixture
def root(tmp_path, picture):
    for number, name in enumerate(("cat/1", "cat/2", "dog/3", "dog/4")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(number).save(tmp_path / f"{name}.png")
    return tmp_path


def _kinds(root, picture) -> dict:
    """The same four labelled images in several kinds of datasets."""
    pictures, labels = [picture(number) for number in range(4)], [0, 0, 1, 1]
    folder = ImageFolder(str(root))
    return {
        "image folder": folder,
        "subset": Subset(Subset(ImageFolder(str(root)), [3, 2, 1, 0]), [3, 2, 1, 0]),
        "pairs": list(zip(pictures, labels)),
        "named": list(zip(pictures, ["cat", "cat", "dog", "dog"])),
        "dicts": [{"image": np.asarray(image), "label": np.int64(label)} for image, label in zip(pictures, labels)],
        "files": [(path, label) for path, label in folder.samples],
    }


@pytest.mark.parametrize("kind", ["image folder", "subset", "pairs", "named", "dicts", "files"])
def test_map_style_datasets_are_read_as_images_and_labels(root, picture, kind):
    dataset = _kinds(root, picture)[kind]
    read = image_dataset(dataset)
    assert read["label"][:] == [0, 0, 1, 1]
    for number, value in enumerate(read["image"]):
        np.testing.assert_array_equal(np.asarray(decode_image(value)), np.asarray(picture(number)))
    assert getattr(read.features["label"], "names", None) == (
        ["cat", "dog"] if kind in ("image folder", "subset", "named") else None
    )
    views, expected = MultiViewDataset(dataset, TRANSFORM), MultiViewDataset(load_images(root), TRANSFORM)
    assert torch.equal(views[3]["pixel_values"], expected[3]["pixel_values"])
    assert SupportDataset(dataset, [1, 2], TRANSFORM)[1]["support_labels"] == 1
    assert len(draw_labelled_rows(dataset, images_per_class=1, seed=0)) == 2
    evaluator = LowShotEvaluator(dataset, dataset, images_per_class=(2,), num_splits=1)
    assert evaluator.evaluate_features(*[pixel_features(dataset)] * 2)["low_shot/2_per_class/top1"] == 100


def test_images_without_labels_are_read(picture):
    for dataset in ([picture(0), picture(1)], np.stack([np.asarray(picture(0)), np.asarray(picture(1))])):
        assert image_dataset(dataset).column_names == ["image"]
        assert len(MultiViewDataset(dataset, TRANSFORM)[1]["pixel_values"]) == 3


def test_transform_of_an_image_folder_is_not_applied_and_named(root, picture, caplog):
    read = image_dataset(ImageFolder(str(root), transform=ToTensor()))
    assert read["label"][:] == [0, 0, 1, 1] and "ImageFolder" in caplog.text


def test_transformed_labels_lose_their_names(root):
    read = image_dataset(ImageFolder(str(root), target_transform=lambda label: 1 - label))
    assert read["label"][:] == [1, 1, 0, 0] and read.features["label"] == datasets.Value("int64")


@pytest.mark.parametrize("kind", ["transform", "pandas"])
def test_format_of_a_dataset_does_not_matter(image_rows, kind):
    rows = image_rows(2)
    formatted = rows.with_format("pandas") if kind == "pandas" else rows.with_transform(lambda batch: {"x": [1]})
    np.testing.assert_array_equal(pixel_features(formatted).features, pixel_features(rows).features)


@pytest.mark.parametrize("label", [0, "cat"])
def test_rows_without_label_keep_the_labels_of_others(picture, label):
    read = image_dataset([(picture(0), label), (picture(1), None)])
    assert read["label"][:] == [0, None]
    assert len(MultiViewDataset(read, TRANSFORM)[1]["pixel_values"]) == 3
    with pytest.raises(ValueError, match="row 1 has label None"):
        draw_labelled_rows(read, images_per_class=1, seed=0)


def test_labels_of_other_types_are_left_out_and_named(picture, caplog):
    assert image_dataset([(picture(0), 0), (picture(1), 0.5)]).column_names == ["image"]
    assert "float, int" in caplog.text


def test_broken_files_of_a_list_are_skipped_when_they_are_read(root, picture):
    (root / "cat" / "1.png").write_bytes(b"no image")
    dataset = MultiViewDataset([str(root / "cat" / "1.png"), str(root / "cat" / "2.png")], TRANSFORM)
    assert len(dataset[0]["pixel_values"]) == 3 and dataset.num_broken == 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda images: datasets.DatasetDict(train=images, test=images), "DatasetDict of 'train', 'test'"),
        (lambda images: datasets.IterableDatasetDict(a=images.to_iterable_dataset()), "IterableDatasetDict of 'a'"),
        (lambda images: "digits", "str"),
        (lambda images: iter([1]), "iterator"),
        (lambda images: torch.utils.data.DataLoader(images), "DataLoader"),
        (lambda images: [], "no rows"),
        (lambda images: [(torch.zeros(3, 8, 8), 0)], "list whose row 0 has a Tensor"),
        (lambda images: [{"pixels": 1}], "list whose row 0 has a dict"),
    ],
)
def test_what_cannot_be_read_is_named(image_rows, make, named):
    dataset = make(image_rows(2))
    for read in (lambda data: MultiViewDataset(data, TRANSFORM), lambda data: LowShotEvaluator(data, data)):
        with pytest.raises(ValueError, match=named):
            read(dataset)
