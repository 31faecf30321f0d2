"""Load images from any source: bundled, a folder, saved datasets, shards, the Hub."""

import glob
import io
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from .columns import image_and_label, number_labels
from .folders import image_files, is_image_file, read_folder
from .map_style import AnyDataset
from .shards import SHARD_EXTENSIONS, check_shards, read_parquet, read_tars, shards_by_split

_NUM_TEST_DIGITS = 360
_STREAMED_SHARDS = 8


def load_images(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    data_files: str | list[str] | dict | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the images of one split from any source.

    `source` is tried in this order:

    | source | read as |
    |---|---|
    | `"digits"` | scikit-learn's 1,797 digits, 8 x 8, gray: 1,437 train and 360 test (a folder is `./digits`) |
    | folder made by `save_to_disk` | that `Dataset` or `DatasetDict` |
    | folder with images | folders `train`, `val`, `test`, ... are splits, those below classes |
    | folder, glob or file of `.parquet` or `.tar` | `parquet` or `webdataset`; a folder's splits by words of paths |
    | anything else | a Hub id for `datasets.load_dataset` |

    A folder of images is labelled if, in the requested split, every image lies in a folder at the same depth (one
    class is enough). The class is the first level at which these folders differ, as in torchvision's `ImageFolder`:
    `train/<class>/images/1.jpg` is read, too. The class names are those of all labelled splits together, so that a
    class missing in one split shifts no number. With a `metadata.csv` or `.jsonl`, the labels are its columns.
    Links are followed. Archives beside the images are not read, with a warning.

    Args:
        source (`str` or `os.PathLike`): The source, see above.
        split (`str`, *optional*, defaults to `"train"`):
            The split, or a part of it (`"train[:10%]"`) unless the data is streamed; several (`"train+test"`) if their
            images and labels are of one kind. Sources without splits have one, `"train"`.
        config (`str`, *optional*): Configuration of a Hub dataset that has several.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        streaming (`bool`, *optional*, defaults to `False`): Read while iterating, and keep nothing on disk.
        image_column (`str`, *optional*): Column of the images. By default the only image column.
        label_column (`str`, *optional*):
            Column of the labels; `"json.label"` reaches into a nested column. By default `label`, else the only column
            of class labels, else one named `labels`, `fine_label`, `cls`, `class` or `target`; without any the result
            has no labels.
        data_files (`str`, `list[str]` or `dict`, *optional*):
            Files of a Hub dataset or of a folder, as for `datasets.load_dataset`.
        token (`str` or `bool`, *optional*): Hub token for gated data such as `ILSVRC/imagenet-1k`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the columns `image` (`datasets.Image(decode=False)`:
        `{"bytes", "path"}`, for [`~hf_msn.decode_image`]) and, if the data is labelled, `label` (`ClassLabel` if the
        names are known, else `int64`). `info.dataset_name` is the Hub id, or the last component of a local path.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no images.
        ConnectionError: If the source is a Hub id and the Hub cannot be reached.
        ValueError: If the split or a column does not exist, a column is ambiguous, or there are no rows.
    """
    source, split = os.path.expanduser(os.fspath(source)), str(split)  # of a `datasets.Split`
    if not source:
        raise ValueError("`source` is empty. Give a folder, shards, a Hub id such as 'owner/name', or 'digits'.")
    columns = {"image_column": image_column, "label_column": label_column}
    if source == "digits":
        name, parts = source, _select_split(_digits(), split, source)
    elif os.path.isdir(source) and (config is not None or data_files is not None):
        name, parts = _local_name(source), [_load(source, split, streaming, name=config, data_files=data_files)]
    elif os.path.exists(source) or glob.glob(source, recursive=True):
        name, parts = _local_name(source), _select_split(_local_splits(source, streaming, columns), split, source)
    else:
        _check_hub_id(source)
        settings = {"name": config, "revision": revision, "data_files": data_files, "token": token}
        name, parts = source, [_load(source, split, streaming, **settings)]
    if streaming:
        parts = [_stream(part) for part in parts]
    parts = [image_and_label(part, source, **columns) for part in parts]
    dataset = number_labels(_concatenate(parts, split, source))
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise _no_images(split, source)
    dataset.info.dataset_name = name
    dataset._split = datasets.NamedSplit(re.sub(r"\s*\+\s*", "+", split.strip()))
    return dataset


def image_file_names(dataset: datasets.Dataset) -> list[str | None]:
    """Return the file name of every row, or `None`, without reading the images."""
    # flatten() splits the undecoded image into its two Arrow columns, so that the bytes stay on disk
    return dataset.select_columns("image").flatten()["image.path"][:]


@cache  # the images are encoded once per process
def _digits() -> dict[str, Callable]:
    digits = load_digits()
    values = np.round(digits.images * (255 / 16)).astype(np.uint8)
    by_class = np.argsort(digits.target, kind="stable")
    # every 1797/360-th image in the order of the classes: stratified, and the same with any version of any library
    steps = (np.arange(_NUM_TEST_DIGITS) + 0.5) * len(by_class) / _NUM_TEST_DIGITS
    test = np.sort(by_class[steps.astype(int)])
    train = np.setdiff1d(np.arange(len(values)), test)
    features = datasets.Features(
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=[str(name) for name in digits.target_names]),
    )
    parts = {
        name: {
            "image": [{"bytes": _png(values[row]), "path": f"digits/{row:04d}.png"} for row in rows],
            "label": [int(digits.target[row]) for row in rows],
        }
        for name, rows in (("train", train), ("test", test))
    }
    return {name: partial(datasets.Dataset.from_dict, part, features) for name, part in parts.items()}


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _local_splits(source: str, streaming: bool, columns: dict[str, str | None]) -> dict[str, Callable]:
    """Return what loads each split of a local source, by name."""
    if not os.path.isdir(source):
        files = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if all(is_image_file(path) for path in files):
            return {"train": partial(image_files, files)}
        return _splits_of_shards({"train": files}, source, streaming, columns)
    if os.path.exists(os.path.join(source, "dataset_dict.json")):
        saved = datasets.load_from_disk(source)
        return {name: partial(saved.get, name) for name in saved}
    if os.path.exists(os.path.join(source, "state.json")):
        dataset = datasets.load_from_disk(source)
        return {str(dataset.split or "train").split("[")[0]: lambda: dataset}
    layout, shards = read_folder(source, SHARD_EXTENSIONS)
    if layout and shards:
        raise ValueError(
            f"`source` must hold images or shards, but '{source}' holds both (such as '{shards[0]}'). Give the folder "
            "of the images, or the shards as a glob."
        )
    if not layout and not shards:
        raise FileNotFoundError(
            f"`source` must hold images, but '{source}' has no image file, no .parquet or .tar shard, and is no saved "
            "dataset. Check the path."
        )
    if shards:
        return _splits_of_shards(shards_by_split(shards, source), source, streaming, columns)
    return {name: partial(part.load, streaming) for name, part in layout.items()}


def _splits_of_shards(
    by_split: dict[str, list[str]], source: str, streaming: bool, columns: dict[str, Any]
) -> dict[str, Callable]:
    files = [path for shards in by_split.values() for path in shards]
    suffixes = {Path(path).suffix.lower() for path in files}
    if suffixes not in ({".parquet"}, {".tar"}):
        raise ValueError(
            f"`source` must be images, or shards of one kind, .parquet or .tar, but '{source}' is "
            f"{', '.join(sorted(suffixes)) or 'without extension'}. Give a folder or a glob of one kind."
        )
    check_shards(files)
    read = partial(read_tars, **columns) if suffixes == {".tar"} else read_parquet
    return {name: partial(read, shards, streaming=streaming) for name, shards in by_split.items()}


def _select_split(splits: dict[str, Callable], split: str, source: str) -> list[AnyDataset]:
    """Load the splits that `split` names, such as "train[:10%]+test", and return its parts."""
    names = dict.fromkeys(part.strip().split("[")[0] for part in split.split("+"))
    if not names.keys() <= splits.keys():
        raise _unknown_split(split, source, splits)
    loaded = {name: splits[name]() for name in names}
    try:
        if any(isinstance(dataset, datasets.IterableDataset) for dataset in loaded.values()):
            return [loaded[part.strip()] for part in split.split("+")]  # a stream has no parts
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: len(dataset) for name, dataset in loaded.items()})
        return [loaded[part.splitname].select(range(part.from_, part.to)) for part in parts]
    except (KeyError, ValueError) as error:
        raise _unknown_split(split, source, splits) from error


def _concatenate(parts: list, split: str, source: str) -> AnyDataset:
    for name, part in zip(split.split("+"), parts):
        if part.features != parts[0].features:
            first, other = ({**features} for features in (parts[0].features, part.features))
            raise ValueError(
                f"The parts of `split` '{split}' must have images and labels of the same kinds, but of '{source}' the "
                f"first has {first}, and '{name.strip()}' has {other}. Write them alike, or load one of them."
            )
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _stream(dataset: AnyDataset) -> datasets.IterableDataset:
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    return dataset.to_iterable_dataset(num_shards=max(1, min(_STREAMED_SHARDS, len(dataset))))


def _load(source: str, split: str, streaming: bool, **settings) -> AnyDataset:
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming, **settings)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise _no_images(split, source) from error
        # the two messages of datasets for an unknown split, eager and streamed
        if not re.match(r"Unknown split|Bad split", str(error)):
            raise
        names = re.findall(r"'([^']+)'", str(error).rsplit("[", 1)[-1])
        raise _unknown_split(split, source, names) from error


def _unknown_split(split: str, source: str, names) -> ValueError:
    return ValueError(
        f"`split` must be one of {', '.join(repr(str(name)) for name in names) or 'none'} of '{source}', but is "
        f"'{split}'. Put test images into a folder or split of their own."
    )


def _no_images(split: str, source: str) -> ValueError:
    return ValueError(f"`split` must hold images, but '{split}' of '{source}' has none. Give another split or source.")


def _local_name(source: str) -> str:
    path = os.path.abspath(source)
    return "(local)" if path == os.path.expanduser("~") else os.path.basename(path)


def _check_hub_id(source: str) -> None:
    looks_local = (
        os.path.isabs(source)
        or source.startswith(".")
        or source.count("/") > 1
        or any(character in source for character in "*?[\\")
        or Path(source).suffix.lower() in SHARD_EXTENSIONS
        or is_image_file(source)
    )
    if looks_local:
        raise FileNotFoundError(f"`source` must exist, but '{source}' does not (in {os.getcwd()}). Check the path.")
