import os
from functools import partial

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits
from source_files import assert_pictures, write_tar

from hf_msn.data.decoding import decode_image
from hf_msn.data.sources import image_file_names, load_images


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
    assert len(load_images("digits", split=datasets.Split.TEST)) == 360
    streamed = list(load_images("digits", streaming=True))
    assert [row["label"] for row in streamed] == whole["label"][:]


def test_saved_dataset_and_dict_are_read(tmp_path, image_rows, picture):
    image_rows(3).save_to_disk(str(tmp_path / "one"))
    assert_pictures(load_images(tmp_path / "one"), [0, 1, 2], picture)
    both = datasets.DatasetDict(train=image_rows(3), test=image_rows(2))
    both.save_to_disk(str(tmp_path / "both"))
    assert len(load_images(tmp_path / "both", split="test")) == 2
    with pytest.raises(ValueError, match=r"'train', 'test' .*'val'"):
        load_images(tmp_path / "both", split="val")
    with pytest.raises(ValueError, match=r"'train' .*'test'"):
        load_images(tmp_path / "one", split="test")


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
    assert_pictures(load_images(f"{root}/**/*.png"), [1, 3], picture)


def test_missing_empty_and_foreign_sources_are_refused(tmp_path, folder, encoded):
    root = folder({"1.png": 1})
    with pytest.raises(ValueError, match="'label'"):
        load_images(root, label_column="label")
    write_tar(os.path.join(root, "more.tar"), [{"png": encoded(1)}])
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


@pytest.mark.parametrize("split", ["val", "train2[:10%]", None])
def test_unknown_split_is_refused(folder, split):
    root = folder({"train/1.png": 1, "test/2.png": 2})
    with pytest.raises(ValueError, match=r"'train'.* but is '(val|train2|None)"):
        load_images(root, split=split)
    with pytest.raises(ValueError, match="'train', 'test' of 'digits'"):
        load_images("digits", split=split)


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_split_need_equal_images_and_labels_and_no_more(parquet, tmp_path, streaming, image_rows, picture):
    parquet("shards/train.parquet", note=["a", "b", "c"])
    parquet("shards/test.parquet", 2, note=[1, 2], score=[0.5, 0.5])
    load = partial(load_images, tmp_path / "shards", streaming=streaming)
    both = load(split="train + test")
    assert [row["label"] for row in both] == [0, 1, 2, 0, 1]
    assert_pictures(both, [0, 1, 2, 0, 1], picture)
    image_rows(2).remove_columns("label").to_parquet(str(tmp_path / "shards" / "test.parquet"))
    with pytest.raises(ValueError, match=r"'train\+test'.*Value.*'test'"):
        load(split="train+test")
    named = image_rows(2).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    named.to_parquet(str(tmp_path / "shards" / "test.parquet"))
    with pytest.raises(ValueError, match=r"'train\+test'.*'test' has.*ClassLabel"):
        load(split="train+test")


def test_text_labels_are_numbered_over_all_parts(tmp_path, encoded):
    for split, names in (("train", ["dog", "cat"]), ("test", ["ant", "dog"])):
        rows = {"image": [encoded(0), encoded(1)], "label": names}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    both = load_images(tmp_path, split="train+test[:1]")
    assert both.features["label"].names == ["ant", "cat", "dog"] and both["label"][:] == [2, 1, 0]


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
