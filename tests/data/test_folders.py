import os
import zipfile
from pathlib import Path

import datasets
import pytest
from source_files import assert_pictures

from hf_msn.data.decoding import decode_image
from hf_msn.data.sources import image_file_names, load_images


def test_class_folders_are_labels_in_alphabetical_order(folder, picture):
    root = folder({"dog/1.png": 0, "cat/1.PNG": 1, "cat/2.bmp": 2})
    dataset = load_images(root)
    assert dataset.column_names == ["image", "label"]
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [0, 0, 1]
    assert_pictures(dataset, [1, 2, 0], picture)


def test_image_files_are_found_by_extension_in_any_case(folder):
    names = ["a.jpg", "b.JPEG", "c.png", "d.WebP", "e.bmp", "f.tif", "g.TIFF"]
    dataset = load_images(folder(dict.fromkeys(names, 1)))
    assert [decode_image(image).size for image in dataset["image"]] == [(8, 6)] * 7


@pytest.mark.parametrize(
    ("files", "split", "names"),
    [
        (["cat/1.png", "cat/2.png"], "train", ["cat"]),
        (["1.png", "2.png"], "train", None),
        (["1.png", "cat/2.png", "dog/3.png"], "train", None),
        (["bus/1.png", "train/2.png", "car/3.png"], "train", ["bus", "car", "train"]),
        (["test_1.png", "train_1.png", "other.png"], "train", None),
        (["train/a/1.png", "train/b/2.png", "test/4.png"], "train", ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/4.png"], "test", None),
        (["a/images/1.png", "b/images/2.png"], "train", ["a", "b"]),
        (["photos/a/1.png", "photos/b/2.png"], "train", ["a", "b"]),
        (["a/x/1.png", "a/y/2.png", "b/x/3.png"], "train", ["a", "b"]),  # as torchvision's ImageFolder
        (["train/a/images/1.png", "train/b/images/2.png", "test/b/images/4.png"], "test", ["a", "b"]),
        (["train/a/images/1.png", "train/b/images/2.png", "test/images/4.png"], "test", None),  # Tiny ImageNet
    ],
)
def test_class_folders_at_one_depth_are_labels(folder, files, split, names):
    root = folder(dict.fromkeys(files, 1))
    dataset = load_images(root, split=split)
    in_split = [file for file in files if file.startswith(f"{split}/")]
    assert len(dataset) == (len(in_split) if any(file.startswith("test/") for file in files) else len(files))
    if names is None:
        assert dataset.column_names == ["image"]
    else:
        assert dataset.features["label"].names == names
        level = 1 if "/x/" in files[0] else None
        classes = [Path(name).relative_to(root).parts for name in image_file_names(dataset)]
        assert all(names[label] in parts for label, parts in zip(dataset["label"][:], classes))
        assert level is None or dataset["label"][:] == [0, 0, 1]


def test_folders_at_different_depths_are_named_where_they_prevent_labels(folder, caplog):
    root = folder(dict.fromkeys(["train/cat/1.png", "train/cat/crops/2.png", "test/cat/3.png"], 1))
    assert load_images(root).column_names == ["image"] and load_images(root, split="test")["label"][:] == [0]
    assert "'train/cat' and in 'train/cat/crops'" in caplog.text and "'test'" not in caplog.text


def test_classes_of_all_splits_lie_at_the_same_level(folder):
    names = [f"train/{name}/{part}/0.png" for name in ("cat", "dog") for part in ("images", "crops")]
    root = folder(dict.fromkeys([*names, "test/cat/images/0.png", "test/cat/crops/0.png"], 1))
    test = load_images(root, split="test")
    assert test.features["label"].names == ["cat", "dog"] and test["label"][:] == [0, 0]


def test_metadata_file_beside_the_splits_is_refused(folder):
    root = folder({"train/1.png": 1, "test/2.png": 2})
    Path(root, "metadata.csv").write_text("file_name,label\ntrain/1.png,dog\ntest/2.png,cat\n")
    with pytest.raises(ValueError, match=r"metadata\.csv.*test, train"):
        load_images(root)


def test_folders_named_like_splits_are_splits(folder, picture):
    root = folder({"train/a/1.png": 1, "train/b/2.png": 2, "train/c/3.png": 3, "val/b/4.png": 4, "val/c/5.png": 5})
    train, val = load_images(root), load_images(root, split="val")
    assert_pictures(train, [1, 2, 3], picture)
    assert_pictures(val, [4, 5], picture)
    assert val.features["label"].names == train.features["label"].names == ["a", "b", "c"]
    assert val["label"][:] == [1, 2]
    assert load_images(root, split="validation")["label"][:] == [1, 2]
    assert len(load_images(root, split="train[:2]")) == 2
    assert load_images(root, split="train+val")["label"][:] == [0, 1, 2, 1, 2]
    streamed = load_images(root, split="val", streaming=True)
    assert isinstance(streamed, datasets.IterableDataset) and [row["label"] for row in streamed] == [1, 2]


def test_names_of_class_folders_may_be_unusual_but_hidden_images_are_left_out_and_named(folder, tmp_path, caplog):
    classes = [" a", "*", "[a]", "_b", "__c", "a ", "a.b", "{x}"]
    root = folder(dict.fromkeys([*(f"{name}/1 [x]*.png" for name in classes), "a /._1.png"], 1))
    assert load_images(root).features["label"].names == sorted(classes) and caplog.text == ""
    folder(dict.fromkeys([".d/1.png", "_b/.2.png"], 1))
    assert load_images(root).features["label"].names == sorted(classes)
    assert "2, such as" in caplog.text and ".d/1.png" in caplog.text


def test_links_are_followed_but_not_upwards(folder, tmp_path):
    real = folder({"cat/1.png": 1, "dog/2.png": 2}, name="real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        os.symlink(os.path.join(real, name), linked / name)
    os.symlink(linked, linked / "cat" / "round")
    assert load_images(linked)["label"][:] == [0, 1]

    splits = Path(folder({"train/a/1.png": 1, "train/b/2.png": 2, "val/a/3.png": 3}, name="splits"))
    os.symlink(splits / "val", splits / "test")
    names = {split: image_file_names(load_images(splits, split=split)) for split in ("train", "val", "test")}
    assert [[Path(name).name for name in files] for files in names.values()] == [
        ["1.png", "2.png"],
        ["3.png"],
        ["3.png"],
    ]


def test_archives_beside_images_are_left_out_and_named(folder, encoded, caplog):
    root = folder({"cat/1.png": 1, "dog/2.png": 2})
    for name in ("cat/all.zip", "more.ZIP"):
        with zipfile.ZipFile(os.path.join(root, name), "w") as archive:
            archive.writestr("3.png", encoded(3))
    assert load_images(root)["label"][:] == [0, 1]
    assert "2, such as" in caplog.text and ".zip'" in caplog.text.lower()
    with open(os.path.join(root, "metadata.csv"), "w") as file:
        file.write("file_name,label\ncat/1.png,x\n")
    assert len(load_images(root)) == 1


def test_file_name_that_is_not_utf8_is_named(folder):
    root = folder({"cat/1.png": 1})
    os.link(os.path.join(root, "cat/1.png"), os.fsencode(os.path.join(root, "cat/")) + b"caf\xe9.png")
    with pytest.raises(ValueError, match=r"caf\\xe9\.png"):
        load_images(root)


def test_data_of_changed_files_has_another_fingerprint(folder):
    root = folder({"cat/1.png": 1, "dog/2.png": 2})
    first, same = load_images(root), load_images(root)
    assert first._fingerprint == same._fingerprint
    os.utime(os.path.join(root, "cat/1.png"), (1, 1))
    assert load_images(root)._fingerprint != first._fingerprint


def test_metadata_file_gives_the_labels(folder):
    root = folder({"1.png": 1, "2.png": 2})
    with open(os.path.join(root, "metadata.csv"), "w") as file:
        file.write("file_name,label\n1.png,dog\n2.png,cat\n")
    dataset = load_images(root)
    assert [dataset.features["label"].int2str(label) for label in dataset["label"]] == ["dog", "cat"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"", b"file_name,label\n", b"name\n1.png\n", b"file_name,label\n1.png,caf\xe9\n"])
def test_metadata_file_that_cannot_be_read_is_named(folder, content, streaming):
    root = folder({"1.png": 1})
    Path(root, "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata\.csv cannot be read"):
        load_images(root, streaming=streaming)
