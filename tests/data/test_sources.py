import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from hf_msn.data.decoding import decode_image
from hf_msn.data.sources import image_file_names, load_images


@pytest.fixture
def folder(tmp_path, picture):
    """Make image files: `{"train/cat/1.png": 5}` stores picture 5 there."""

    def make(files: dict[str, int], name: str = "photos [1]") -> str:
        for path, number in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(target)
        return str(tmp_path / name)

    return make


@pytest.fixture
def parquet(tmp_path, image_rows):
    def make(path: str, count: int = 3, **columns) -> str:
        dataset = image_rows(count)
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(str(target))
        return str(target)

    return make


def _tar(path, examples: list[dict[str, bytes]], compression: str = "") -> str:
    with tarfile.open(path, f"w:{compression}") as archive:
        for number, example in enumerate(examples):
            for extension, data in example.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def _pixels(dataset) -> list[np.ndarray]:
    return [np.asarray(decode_image(row["image"])) for row in dataset]


def _assert_pictures(dataset, numbers, picture):
    pixels = _pixels(dataset)
    assert len(pixels) == len(numbers)
    for seen, number in zip(pixels, numbers):
        np.testing.assert_array_equal(seen, np.asarray(picture(number)))


def test_digits_have_a_fixed_stratified_split():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    assert train.features["image"] == datasets.Image(decode=False)
    rows = [int(name[7:11]) for name in image_file_names(train) + image_file_names(test)]
    assert sorted(rows) == list(range(1797))
    digits = load_digits()
    np.testing.assert_array_equal(np.concatenate([train["label"][:], test["label"][:]]), digits.target[rows])
    share = np.bincount(test["label"][:]) / np.bincount(digits.target)
    assert np.abs(share - 360 / 1797).max() < 0.006
    assert image_file_names(test)[:3] == ["digits/0012.png", "digits/0014.png", "digits/0017.png"]
    pixels = np.asarray(decode_image(test[0]["image"]))[:, :, 0]
    np.testing.assert_array_equal(pixels, np.round(digits.images[12] / 16 * 255))


def test_digits_can_be_sliced_and_streamed():
    whole = load_images("digits")
    assert image_file_names(load_images("digits", split="train[:100]")) == image_file_names(whole)[:100]
    assert len(load_images("digits", split="train+test")) == 1797
    streamed = list(load_images("digits", streaming=True))
    assert [row["label"] for row in streamed] == whole["label"][:]


def test_class_folders_are_labels_in_alphabetical_order(folder, picture):
    root = folder({"dog/1.png": 0, "cat/1.PNG": 1, "cat/2.bmp": 2})
    dataset = load_images(root)
    assert dataset.column_names == ["image", "label"]
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [0, 0, 1]
    _assert_pictures(dataset, [1, 2, 0], picture)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.WebP", "a.bmp", "a.tif", "a.TIFF"])
def test_image_files_are_found_by_extension_in_any_case(folder, name):
    dataset = load_images(folder({name: 1}))
    assert len(dataset) == 1
    assert decode_image(dataset[0]["image"]).size == (8, 6)


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
    _assert_pictures(train, [1, 2, 3], picture)
    _assert_pictures(val, [4, 5], picture)
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


def test_saved_dataset_and_dict_are_read(tmp_path, image_rows, picture):
    image_rows(3).save_to_disk(str(tmp_path / "one"))
    _assert_pictures(load_images(tmp_path / "one"), [0, 1, 2], picture)
    both = datasets.DatasetDict(train=image_rows(3), test=image_rows(2))
    both.save_to_disk(str(tmp_path / "both"))
    assert len(load_images(tmp_path / "both", split="test")) == 2
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "both", split="val")
    with pytest.raises(ValueError, match=r"'train' .*'test'"):
        load_images(tmp_path / "one", split="test")


def test_parquet_is_read_by_file_glob_and_folder(parquet, tmp_path, picture):
    file = parquet("shards/train-00000-of-00001.parquet")
    parquet("shards/test-00000-of-00001.parquet", count=2)
    _assert_pictures(load_images(file), [0, 1, 2], picture)
    _assert_pictures(load_images(tmp_path / "shards", split="test"), [0, 1], picture)
    assert len(load_images(str(tmp_path / "shards" / "*.parquet"))) == 5
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "shards", split="val")
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "shards", split="val", streaming=True)


def test_parquet_of_plain_bytes_is_read(tmp_path, encoded, picture):
    plain = datasets.Dataset.from_dict({"picture": [encoded(4), encoded(5)], "target": [3, 4]})
    plain.to_parquet(str(tmp_path / "plain.parquet"))
    dataset = load_images(tmp_path / "plain.parquet")
    _assert_pictures(dataset, [4, 5], picture)
    assert dataset["label"][:] == [3, 4]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([], "no files"),
        (["0.jpg", "0.cls", "1.png", "1.cls", "2.jpg"], r"'2' in .*shard-0.tar' with \['jpg'\].*no 'cls'"),
        (["0.jpg", "1.jpg", "1.cls"], r"'1' in .*shard-0.tar' with \['cls', 'jpg'\]"),
        (["0.txt", "1.jpg"], "shard-0.tar' has no column of images.*'txt'"),
        (["a/cat.1.jpg", "a/dog.2.jpg", "a/fox.3.jpg"], "'a/dog' in .*shard-0.tar.*first dot"),
        (["a/cat.jpg", "a/cat.jpg"], "'a/cat' in .*shard-0.tar"),
        (["caf\udce9.jpg"], r"shard-0.tar/caf\\xe9"),
        ([*(f"{number}.jpg" for number in range(300)), "0.cls", "1.cls"], "'0' in .*shard-0.tar' .*sort the tar"),
        (["0.jpg", "0.cls", "1.jpg", "1.cls=cat"], "'1' in .*shard-0.tar'.*'cat'"),
        (["0.jpg", "0.cls="], "'0' in .*shard-0.tar'"),
        (["0.jpg", '0.json={"label": 1}', "1.jpg", "1.json={'label': 1}"], "'1' in .*shard-0.tar'"),
        (
            ["0.jpg", '0.json={"label": 1}', "1.jpg", '1.json={"label": "a"}'],
            "'1' in .*shard-0.tar'.*'a'",
        ),
        (["0.jpg", '0.json={"label": 1}', "1.jpg", "1.json=[1]"], "'1' in .*shard-0.tar'"),
    ],
)
def test_shards_whose_samples_differ_are_refused_by_name(tmp_path, encoded, streaming, names, named):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for name in names:
            name, has_text, text = name.partition("=")
            data = text.encode() if has_text else b"1" if name.endswith("cls") else encoded(0)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for source in (tmp_path / "shard-0.tar", tmp_path):
        with pytest.raises(ValueError, match=named):
            list(load_images(source, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_samples_of_webdataset_shards_are_images_of_any_format_and_labels(tmp_path, encoded, label, streaming):
    images = [{"png": encoded(0)[:50]}, {"JPG": encoded(1, "JPEG")}, {"png": encoded(2)}]  # the first one is broken
    labels = [str(number + 7) if label == "cls" else json.dumps({"label": number + 7}) for number in range(3)]
    (tmp_path / "shards").mkdir()
    _tar(tmp_path / "shards" / "0.tar", [{**image, label: text.encode()} for image, text in zip(images, labels)])
    for settings in ({}, {"label_column": "cls" if label == "cls" else "json.label"}):
        rows = list(load_images(tmp_path / "shards", streaming=streaming, **settings))
        assert [row["label"] for row in rows] == [7, 8, 9]
        assert [row["image"]["path"] for row in rows] == ["00000.png", "00001.jpg", "00002.png"]
        assert [row["image"]["bytes"] for row in rows] == [next(iter(image.values())) for image in images]


def test_columns_of_shards_can_be_named(tmp_path, encoded):
    examples = [{"jpg": encoded(0), "mask.png": encoded(1), "txt": b"cat", "id": b"7"} for _ in range(2)]
    path = _tar(tmp_path / "a.tar", examples)
    with pytest.raises(ValueError, match=r"jpg, mask\.png"):
        load_images(path)
    with pytest.raises(ValueError, match=r"'klass'.*'jpg', 'mask\.png', 'txt', 'id'"):
        load_images(path, image_column="jpg", label_column="klass")
    named = load_images(path, image_column="mask.png", label_column="txt")
    assert named.features["label"].names == ["cat"] and named[1]["image"]["path"] == "00001.mask.png"
    assert load_images(path, image_column="jpg", label_column="id")["label"][:] == [7, 7]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_shards_are_words_of_their_paths_below_the_source(parquet, tmp_path, encoded, kind, streaming):
    names = ("cats-0", "val-0", "dev/1", "unlabelled-00000-of-00001")
    for name in names:
        path = parquet(f"my test [1]/{name}.{kind}", count=1)
        if kind == "tar":
            _tar(path, [{"png": encoded(0)}])
    lengths = {
        split: len(list(load_images(tmp_path / "my test [1]", split=split, streaming=streaming)))
        for split in ("train", "validation", "unlabelled", "train+validation")
    }
    assert lengths == {"train": 1, "validation": 2, "unlabelled": 1, "train+validation": 3}
    with pytest.raises(ValueError, match=r"'train', 'validation', 'unlabelled' of .*'test'"):
        load_images(tmp_path / "my test [1]", split="test", streaming=streaming)
    assert len(list(load_images(tmp_path / "my test [1]" / f"cats-0.{kind}", streaming=streaming))) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("part", ["text", "nothing", "half", "less than half"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_broken_shard_is_named(parquet, tmp_path, encoded, kind, part, streaming):
    for number in range(2):
        if kind == "parquet":
            file = Path(parquet(f"shards/train-{number}.parquet"))
        else:
            (tmp_path / "shards").mkdir(exist_ok=True)
            file = Path(_tar(tmp_path / "shards" / f"train-{number}.tar", [{"png": encoded(number)}] * 20))
    whole = file.read_bytes()
    parts = {"text": b"hello", "nothing": b"", "half": whole[: len(whole) // 2]}
    file.write_bytes(parts.get(part, whole[: len(whole) // 2 - 700]))
    for source in (file.parent, file.parent / f"*.{kind}"):
        with pytest.raises(ValueError, match=rf"train-1\.{kind}' is broken"):
            load_images(str(source), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", ["", "xz"])
def test_tar_that_is_broken_in_the_middle_is_not_read_as_a_shorter_one(tmp_path, compression, streaming):
    noise = np.random.default_rng(0).bytes(20_000)
    file = Path(_tar(tmp_path / "a.tar", [{"jpg": noise}] * 20, compression))
    content = bytearray(file.read_bytes())
    place = len(content) // 2 if compression else content.index(b"00011.jpg")
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar' is broken"):
        list(load_images(file, streaming=streaming))


def test_parquet_with_broken_pages_is_named(parquet, tmp_path):
    files = [Path(parquet(f"shards/{number}.parquet", count=50)) for number in range(2)]
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(ValueError, match=r"1\.parquet' is broken"):
        load_images(tmp_path / "shards")


def test_unknown_columns_are_refused(parquet):
    file = parquet("a.parquet")
    with pytest.raises(ValueError, match=r"'klass'.*'image', 'label'"):
        load_images(file, label_column="klass")
    with pytest.raises(ValueError, match=r"'img'.*'image', 'label'"):
        load_images(file, image_column="img")
    with pytest.raises(ValueError, match=r"`image_column` .*'label'"):
        load_images(file, image_column="label")
    with pytest.raises(ValueError, match=r"train.:0.*none"):
        load_images(file, split="train[:0]")
    datasets.Dataset.from_dict({"image": [[1, 2]], "other": ["a"]}).to_parquet(file)
    for column in (None, "image"):
        with pytest.raises(ValueError, match=r"'image'.* holds .*int64"):
            load_images(file, image_column=column)


def test_glob_of_image_files_is_read_without_labels(folder, picture):
    root = folder({"a/1.png": 1, "a/2.jpg": 2, "b/3.png": 3}, name="photos")
    _assert_pictures(load_images(f"{root}/**/*.png"), [1, 3], picture)


def test_missing_empty_and_foreign_sources_are_refused(tmp_path, folder, encoded):
    root = folder({"1.png": 1})
    with pytest.raises(ValueError, match="'label'"):
        load_images(root, label_column="label")
    _tar(os.path.join(root, "more.tar"), [{"png": encoded(1)}])
    with pytest.raises(ValueError, match=r"more\.tar"):
        load_images(root)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"shard.parquet"):
        load_images("shard.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="empty"):
        load_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"\.txt"):
        load_images(tmp_path / "empty" / "notes.txt")
    with pytest.raises(ValueError, match="`source` is empty"):
        load_images("")


@pytest.mark.parametrize("split", ["val", "train2[:10%]"])
def test_unknown_split_is_refused(folder, split):
    root = folder({"train/1.png": 1, "test/2.png": 2})
    with pytest.raises(ValueError, match=r"'train'.* but is '(val|train2)"):
        load_images(root, split=split)
    with pytest.raises(ValueError, match="'train', 'test' of 'digits'"):
        load_images("digits", split=split)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_id_without_network_raises(monkeypatch, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="someone/photos"):
        load_images("someone/photos", streaming=streaming)


def test_hub_settings_are_passed_on(monkeypatch, image_rows):
    seen = {}

    def load_dataset(path, **settings):
        seen.update(path=path, **settings)
        return image_rows(2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_images("ILSVRC/imagenet-1k", split="validation", config="default", revision="abc", token="secret")
    given = {"name": "default", "revision": "abc", "token": "secret", "data_files": None}
    assert seen == {"path": "ILSVRC/imagenet-1k", "split": "validation", "streaming": False, **given}


@pytest.mark.parametrize("relative", [False, True])
def test_local_data_is_named_by_the_last_component_of_its_path(folder, monkeypatch, relative):
    root = folder({"1.png": 1}, name="photos")
    monkeypatch.chdir(root)
    assert load_images("." if relative else root + "/").info.dataset_name == "photos"
    assert load_images("digits").info.dataset_name == "digits"
    monkeypatch.setenv("HOME", root)
    assert load_images("~").info.dataset_name == "(local)"
