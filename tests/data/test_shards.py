import io
import json
import tarfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from source_files import assert_pictures, write_tar

from hf_msn.data.sources import load_images


def test_parquet_is_read_by_file_glob_and_folder(parquet, tmp_path, picture):
    file = parquet("shards/train-00000-of-00001.parquet")
    parquet("shards/test-00000-of-00001.parquet", count=2)
    assert_pictures(load_images(file), [0, 1, 2], picture)
    assert_pictures(load_images(tmp_path / "shards", split="test"), [0, 1], picture)
    assert len(load_images(str(tmp_path / "shards" / "*.parquet"))) == 5
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "shards", split="val")
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "shards", split="val", streaming=True)


def test_parquet_of_plain_bytes_is_read(tmp_path, encoded, picture):
    plain = datasets.Dataset.from_dict({"picture": [encoded(4), encoded(5)], "target": [3, 4]})
    plain.to_parquet(str(tmp_path / "plain.parquet"))
    dataset = load_images(tmp_path / "plain.parquet")
    assert_pictures(dataset, [4, 5], picture)
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
    write_tar(tmp_path / "shards" / "0.tar", [{**image, label: text.encode()} for image, text in zip(images, labels)])
    for settings in ({}, {"label_column": "cls" if label == "cls" else "json.label"}):
        rows = list(load_images(tmp_path / "shards", streaming=streaming, **settings))
        assert [row["label"] for row in rows] == [7, 8, 9]
        assert [row["image"]["path"] for row in rows] == ["00000.png", "00001.jpg", "00002.png"]
        assert [row["image"]["bytes"] for row in rows] == [next(iter(image.values())) for image in images]


def test_columns_of_shards_can_be_named(tmp_path, encoded):
    examples = [{"jpg": encoded(0), "mask.png": encoded(1), "txt": b"cat", "id": b"7"} for _ in range(2)]
    path = write_tar(tmp_path / "a.tar", examples)
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
            write_tar(path, [{"png": encoded(0)}])
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
            file = Path(write_tar(tmp_path / "shards" / f"train-{number}.tar", [{"png": encoded(number)}] * 20))
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
    file = Path(write_tar(tmp_path / "a.tar", [{"jpg": noise}] * 20, compression))
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


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_with_other_columns_are_named(parquet, tmp_path, streaming):
    parquet("shards/0.parquet")
    parquet("shards/1.parquet", extra=[1, 2, 3])
    with pytest.raises(ValueError, match=r"0\.parquet.*1\.parquet.*'extra'"):
        load_images(tmp_path / "shards", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["cls", "txt", "npy"])
def test_a_file_of_samples_that_is_no_image_cannot_be_the_image(tmp_path, encoded, picture, streaming, column):
    samples = [{"jpg": encoded(0), "img": encoded(0), "cls": b"1", "txt": b"a", "npy": b"\x93NUMPY"}]
    load = partial(load_images, write_tar(tmp_path / "a.tar", samples), label_column="cls", streaming=streaming)
    assert_pictures(load(image_column="img"), [0], picture)  # an image under another extension
    with pytest.raises(ValueError, match=f"`image_column` .*'{column}'.*00000.*'jpg'"):
        load(image_column=column, label_column=None)
