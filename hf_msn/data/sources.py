"""Load images from any source: bundled, a folder, saved datasets, shards, the Hub."""

import glob
import io
import itertools
import os
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import load_digits

from .columns import image_and_label
from .folders import FolderSplit, check_file_names, is_image_file, read_folder

_SHARD_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_NUM_TEST_DIGITS = 360
_STREAMED_SHARDS = 8
_CHECKED_FILES = 200  # of each tar
_SAMPLES_FOR_COLUMNS = 5  # from which `datasets` takes the columns


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
    | folder, glob or file of `.parquet` or `.tar` | `parquet` or `webdataset`; a folder's splits by file names |
    | anything else | a Hub id for `datasets.load_dataset` |

    A folder of images is labelled if, in the requested split, every image lies in a folder at the same depth (one
    class is enough). The class is the first level at which these folders differ, as in torchvision's `ImageFolder`:
    `train/<class>/images/1.jpg` is read, too. The class names are those of all labelled splits together, so that a
    class missing in one split shifts no number. With a `metadata.csv` or `.jsonl`, the labels are its columns.
    Links are followed. Archives beside the images are not read, with a warning.

    Args:
        source (`str` or `os.PathLike`): The source, see above.
        split (`str`, *optional*, defaults to `"train"`):
            The split, or a part of it (`"train[:10%]"`) unless the data is streamed. Sources without splits have one,
            `"train"`.
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
    source = os.path.expanduser(os.fspath(source))
    if not source:
        raise ValueError("`source` is empty. Give a folder, shards, a Hub id such as 'owner/name', or 'digits'.")
    name = source
    if source == "digits":
        dataset = _select_split(_digits(), split, source)
    elif os.path.exists(source) or glob.glob(source, recursive=True):
        dataset, name = _load_local(source, split, config, streaming, data_files), _local_name(source)
    else:
        _check_hub_id(source)
        settings = {"name": config, "revision": revision, "data_files": data_files, "token": token}
        dataset = _load(source, split, streaming, source, **settings)
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(_STREAMED_SHARDS, len(dataset))))
    dataset = image_and_label(dataset, source, image_column=image_column, label_column=label_column)
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise _no_images(split, source)
    dataset.info.dataset_name = name
    if dataset.split is None:  # not read by load_dataset
        dataset._split = datasets.NamedSplit(split)
    return dataset


def image_file_names(dataset: datasets.Dataset) -> list[str | None]:
    """Return the file name of every row, or `None`, without reading the images."""
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
                f"`source` must hold images or shards, but '{source}' holds both (such as '{shards[0]}'). Give the "
                "folder of the images, or the shards as a glob."
            )
        if layout:
            return _load_image_folder(layout, split, streaming, source)
        if not shards:
            raise FileNotFoundError(
                f"`source` must hold images, but '{source}' has no image file, no .parquet or .tar shard, and is no "
                "saved dataset. Check the path."
            )
        builder = _shard_builder(source, {Path(shard).suffix.lower() for shard in shards})
        _check_shards(shards)
        return _load(builder, split, streaming, source, data_dir=source)
    files = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    suffixes = {Path(path).suffix.lower() for path in files}
    if all(is_image_file(path) for path in files):
        layout = {"train": FolderSplit(files, classes=None, class_names=[], metadata_files=[])}
        return _load_image_folder(layout, split, streaming, source)
    builder = _shard_builder(source, suffixes)
    _check_shards(files)
    return _load(builder, split, streaming, source, data_files={"train": files})


def _shard_builder(source: str, suffixes: set[str]) -> str:
    if len(suffixes) > 1 or not suffixes <= set(_SHARD_BUILDERS):
        raise ValueError(
            f"`source` must be images, or shards of one kind, .parquet or .tar, but '{source}' is "
            f"{', '.join(sorted(suffixes)) or 'without extension'}. Give a folder or a glob of one kind."
        )
    return _SHARD_BUILDERS[next(iter(suffixes))]


def _check_shards(files: list[str]) -> None:
    """Check that shards are whole, as far as their ends tell; `datasets` names no file, and drops the end of a tar."""
    formats: set[str] = set()
    for path in files:
        try:
            if path.lower().endswith(".parquet"):
                pyarrow.parquet.read_metadata(path)
                continue
            with tarfile.open(path) as archive:
                if isinstance(archive.fileobj, io.BufferedReader):  # not compressed
                    archive.fileobj.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
                    if any(archive.fileobj.read()):
                        raise tarfile.ReadError("the zeros at the end of a tar are missing: it has been cut")
            with tarfile.open(path) as archive:
                samples = _first_samples(path, archive)
        except (pyarrow.ArrowInvalid, tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"`source` must hold whole shards, but '{path}' is broken: {error}. Copy it again, or remove it."
            ) from error
        _check_samples(path, samples, formats)


def _first_samples(path: str, archive: tarfile.TarFile) -> dict[str, set[str]]:
    """Return the extensions of the first samples by name. As in webdataset, a name ends at its first dot."""
    samples: dict[str, set[str]] = {}
    last = None
    for member in itertools.islice((member for member in archive if member.isfile()), _CHECKED_FILES):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if stem and dot:
            sample = f"{folder}/{stem}" if folder else stem
            if sample in samples and sample != last:
                raise ValueError(
                    f"Members of a sample must be adjacent in a webdataset shard, but in '{path}' '{member.name}' "
                    f"comes after '{last}'. Sort the members of the tar by name."
                )
            samples.setdefault(sample, set()).add(extension)
            last = sample
    if len(samples) > 1:
        samples.popitem()  # it may go on
    return samples


def _check_samples(path: str, samples: dict[str, set[str]], formats: set[str]) -> None:
    """Check the first samples of a shard. `formats` collects the extensions of images in all shards."""
    if not samples:
        raise ValueError(f"`source` must hold images, but the shard '{path}' has no files. Remove it.")
    check_file_names(f"{path}/{name}" for name in samples)
    first = next(iter(samples))
    if not formats:
        formats |= _images_among(samples[first])
    for place, (name, extensions) in enumerate(samples.items()):
        # datasets takes the columns from the first samples, and the images from no other column
        differs = place < _SAMPLES_FOR_COLUMNS and extensions != samples[first]
        if differs or (formats and not formats & _images_among(extensions)):
            raise ValueError(
                f"Samples of webdataset shards must have the same extensions, but in '{path}' '{first}' has "
                f"{sorted(samples[first])} and '{name}' has {sorted(extensions)} (images so far: {sorted(formats)}). "
                "The name of a sample ends at its first dot: rename those with more dots, and use one image format."
            )


def _images_among(extensions: set[str]) -> set[str]:
    return {extension for extension in extensions if is_image_file(f"image.{extension}")}


def _load_image_folder(
    layout: dict[str, FolderSplit], split: str, streaming: bool, source: str
) -> datasets.Dataset | datasets.IterableDataset:
    if not any(part.metadata_files for part in layout.values()):
        return _select_split({name: part.load() for name, part in layout.items()}, split, source)
    if "+" in split:
        return datasets.concatenate_datasets(
            [_load_image_folder(layout, part.strip(), streaming, source) for part in split.split("+")]
        )
    name = split.split("[")[0]
    if name not in layout:
        raise _unknown_split(split, source, layout)
    if not layout[name].metadata_files:
        return _select_split({name: layout[name].load()}, split, source)
    # without the images beside them: a metadata file names its own
    patterns = [glob.escape(path) for path in layout[name].metadata_files]
    return _load("imagefolder", split, streaming, source, data_files={name: patterns})


def _load(builder: str, split: str, streaming: bool, source: str, **settings) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, split=split, streaming=streaming, **settings)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise _no_images(split, source) from error
        # the two messages of datasets for an unknown split, eager and streamed
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
        or Path(source).suffix.lower() in _SHARD_BUILDERS
        or is_image_file(source)
    )
    if looks_local:
        raise FileNotFoundError(f"`source` must exist, but '{source}' does not (in {os.getcwd()}). Check the path.")
