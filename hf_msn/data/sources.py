"""One door to images: bundled, a folder, saved data sets, shards, the Hub."""

import glob
import io
import os
import re
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..privacy import public_name
from .columns import image_and_label
from .decoding import BrokenImageError, decode_image
from .folders import FolderSplit, is_image_file, read_folder

__all__ = ["BrokenImageError", "decode_image", "image_file_names", "load_images"]

_SHARD_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
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
    """Loads the images of one split from anywhere.

    What `source` may be, looked at in this order:

    | source | read as |
    |---|---|
    | `"digits"` | scikit-learn's 1,797 digits, 8 x 8, gray: 1,437 train and 360 test (a folder is `./digits`) |
    | folder made by `save_to_disk` | that `Dataset` or `DatasetDict` |
    | folder with images | `imagefolder`: folders `train`, `val`, `test`, ... are splits, those below classes |
    | folder, glob or file of `.parquet` or `.tar` | `parquet` or `webdataset`; a folder's splits by file names |
    | anything else | a Hub id for `datasets.load_dataset` |

    A folder of images is labelled if, in the split that is asked for, every image lies in a class folder at the same
    depth (one class is enough). The class names are those of all labelled splits together, so that a class that one
    split lacks moves no number. With a `metadata.csv` or `.jsonl`, the labels are its columns.

    Args:
        source (`str` or `os.PathLike`):
            Where the images are, see above.
        split (`str`, *optional*, defaults to `"train"`):
            The split, also a part of it (`"train[:10%]"`) except where the data is streamed. What knows no splits is
            `"train"`.
        config (`str`, *optional*):
            Configuration of a Hub data set that has several.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Reads while iterating and keeps nothing on disk.
        image_column (`str`, *optional*):
            Column of the images. By default the only image column there is.
        label_column (`str`, *optional*):
            Column of the labels; `"json.label"` reaches into a nested column. By default `label`, else the only column
            of class labels, else one named `labels`, `fine_label`, `cls`, `class` or `target`; without any the result
            has no labels.
        data_files (`str`, `list[str]` or `dict`, *optional*):
            Files of a Hub data set or of a folder, as for `datasets.load_dataset`.
        token (`str` or `bool`, *optional*):
            Hub token for gated data such as `ILSVRC/imagenet-1k`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the columns `image` (`datasets.Image(decode=False)`:
        `{"bytes", "path"}`, for [`decode_image`]) and, where the data is labelled, `label` (`ClassLabel` where the
        names are known, else `int64`). `info.dataset_name` is the Hub id, or of anything local the last name alone.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
        ConnectionError: a Hub id, and the Hub cannot be reached.
        ValueError: no such split or column, columns that cannot be told apart, labels asked of unlabelled data, no
            rows.
    """
    source = os.path.expanduser(os.fspath(source))
    if not source:
        raise ValueError(
            "`source` is empty; give a folder, shards, a Hub id such as 'ILSVRC/imagenet-1k', or 'digits'."
        )
    name = source
    if source == "digits":
        dataset = _select_split(_digits(), split, source)
    elif os.path.exists(source) or glob.glob(source, recursive=True):
        dataset, name = _load_local(source, split, config, streaming, data_files), public_name(source)
    else:
        _refuse_missing_path(source)
        dataset = _load_from_hub(source, split, config, revision, streaming, data_files, token)
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(_STREAMED_SHARDS, len(dataset))))
    dataset = image_and_label(dataset, source, image_column=image_column, label_column=label_column)
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise _no_images(split, source)
    dataset.info.dataset_name = name
    if dataset.split is None:  # of what is not read by load_dataset
        dataset._split = datasets.NamedSplit(split)
    return dataset


def image_file_names(dataset: datasets.Dataset) -> list[str | None]:
    """Reads the file name of every row without reading the images.

    Args:
        dataset (`datasets.Dataset`):
            Result of [`load_images`], not streamed.

    Returns:
        `list[str | None]`: path of each row as the source gives it, None where it gives none.
    """
    # flatten() splits the undecoded image into its two Arrow columns, so that the bytes stay on disk
    return dataset.select_columns("image").flatten()["image.path"][:]


def _digits() -> datasets.DatasetDict:
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
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(part, features) for name, part in parts.items()})


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _load_local(source: str, split: str, config: str | None, streaming: bool, data_files) -> datasets.Dataset:
    if os.path.isdir(source):
        if os.path.exists(os.path.join(source, "dataset_dict.json")):
            return _select_split(datasets.load_from_disk(source), split, source)
        if os.path.exists(os.path.join(source, "state.json")):
            dataset = datasets.load_from_disk(source)
            name = str(dataset.split or "train").split("[")[0]
            return _select_split({name: dataset}, split, source)
        if config is not None or data_files is not None:
            return _load(source, split, streaming, source, name=config, data_files=data_files)
        layout, shards = read_folder(source, _SHARD_BUILDERS)
        if layout and shards:
            raise ValueError(
                f"'{source}' holds both images and shards (such as '{shards[0]}'); give the folder of the images, or "
                "the shards as a glob."
            )
        if layout:
            return _load_image_folder(layout, split, streaming, source)
        if not shards:
            raise FileNotFoundError(
                f"'{source}' holds no images: no image file, no .parquet or .tar shard, no saved data set. "
                "Check the path."
            )
        builder = _shard_builder(source, {Path(shard).suffix.lower() for shard in shards})
        return _load(builder, split, streaming, source, data_dir=source)
    files = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    suffixes = {Path(path).suffix.lower() for path in files}
    if suffixes & set(_SHARD_BUILDERS):
        builder = _shard_builder(source, suffixes)
        return _load(builder, split, streaming, source, data_files={"train": files})
    if all(is_image_file(path) for path in files):
        return _load(
            "imagefolder",
            split,
            streaming,
            source,
            data_files={"train": [glob.escape(path) for path in files]},
            drop_labels=True,
        )
    raise ValueError(
        f"'{source}' is neither images nor .parquet or .tar shards ({', '.join(sorted(suffixes)) or 'no extension'}); "
        "give a folder of images, or shards of one kind."
    )


def _shard_builder(source: str, suffixes: set[str]) -> str:
    if len(suffixes) > 1:
        raise ValueError(f"'{source}' mixes files of {', '.join(sorted(suffixes))}; give shards of one kind.")
    return _SHARD_BUILDERS[next(iter(suffixes))]


def _load_image_folder(
    layout: dict[str, FolderSplit], split: str, streaming: bool, source: str
) -> datasets.Dataset | datasets.IterableDataset:
    if "+" in split:
        return datasets.concatenate_datasets(
            [_load_image_folder(layout, part.strip(), streaming, source) for part in split.split("+")]
        )
    name = split.split("[")[0]
    if name not in layout:
        raise _unknown_split(split, source, layout)
    part = layout[name]
    features = None
    if not part.has_metadata:
        features = datasets.Features(image=datasets.Image(decode=False))
        if part.class_names:
            features["label"] = datasets.ClassLabel(names=part.class_names)
    patterns = [os.path.join(glob.escape(folder), "*") for folder in part.folders]
    return _load(
        "imagefolder",
        split,
        streaming,
        source,
        data_files={name: patterns},
        drop_labels=None if part.has_metadata else not part.class_names,
        features=features,
    )


def _load_from_hub(source, split, config, revision, streaming, data_files, token) -> datasets.Dataset:
    try:
        return _load(
            source, split, streaming, source, name=config, revision=revision, data_files=data_files, token=token
        )
    except (ConnectionError, FileNotFoundError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        raise kind(
            f"'{source}' is no folder or file here, and as a Hub id it cannot be loaded: {error}. Check the spelling "
            "and the network (HF_HUB_OFFLINE must not be set), log in for gated data, or give a local folder."
        ) from error


def _load(builder: str, split: str, streaming: bool, source: str, **settings) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, split=split, streaming=streaming, **settings)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise _no_images(split, source) from error
        # the two messages of datasets for a split that is not there, eager and streamed
        if not re.match(r"Unknown split|Bad split", str(error)):
            raise
        names = re.findall(r"'([^']+)'", str(error).rsplit("[", 1)[-1])
        raise _unknown_split(split, source, names) from error


def _select_split(splits: dict[str, datasets.Dataset], split: str, source: str) -> datasets.Dataset:
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: len(dataset) for name, dataset in splits.items()})
    except ValueError as error:
        raise _unknown_split(split, source, splits) from error
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _unknown_split(split: str, source: str, names) -> ValueError:
    return ValueError(
        f"'{source}' has no split '{split}'; it has {', '.join(repr(str(name)) for name in names) or 'none'}. "
        "Name one of these, or put the images to test on into a folder or split of their own."
    )


def _no_images(split: str, source: str) -> ValueError:
    return ValueError(f"Split '{split}' of '{source}' holds no images; give another split or source.")


def _refuse_missing_path(source: str) -> None:
    looks_local = (
        os.path.isabs(source)
        or source.startswith(".")
        or source.count("/") > 1
        or any(character in source for character in "*?[\\")
        or Path(source).suffix.lower() in _SHARD_BUILDERS
        or is_image_file(source)
    )
    if looks_local:
        raise FileNotFoundError(f"'{source}' does not exist (looked from {os.getcwd()}). Check the path.")
