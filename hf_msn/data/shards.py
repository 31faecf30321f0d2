"""Shards of images: check that they are whole, and read the samples of webdataset tars."""

import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow.parquet

from .columns import LABEL_NAMES, find_image_column, find_label_column
from .folders import SPLIT_NAMES, check_file_names, is_image_file

SHARD_EXTENSIONS = (".parquet", ".tar")
_STREAM_CHECKS = 5  # samples of each shard that are read before a stream begins
_BROKEN = (pyarrow.ArrowInvalid, tarfile.TarError, OSError, EOFError, zlib.error)


def splits_of_shards(files: Sequence[str], root: str) -> dict[str, list[str]]:
    """Return shards by split: that of `test-00000-of-00002.parquet` or `test/0.tar` is `test`, else it is `train`."""
    by_split: dict[str, list[str]] = {name: [] for name in SPLIT_NAMES.values()}
    for path in files:
        relative = os.path.relpath(path, root).lower()
        words = [SPLIT_NAMES[word] for word in re.split("[^a-z]+", relative) if word in SPLIT_NAMES]
        numbered = re.search(r"(\w+)-\d{5}-of-\d{5}\.\w+$", relative)
        split = words[0] if words else numbered[1] if numbered else "train"
        by_split.setdefault(split, []).append(path)
    return {name: shards for name, shards in by_split.items() if shards}


def check_shards(files: Sequence[str]) -> None:
    """Check that shards are whole, as far as their ends tell; `datasets` names no file."""
    for path in files:
        try:
            if path.lower().endswith(".parquet"):
                pyarrow.parquet.read_metadata(path)
                continue
            with tarfile.open(path) as archive:
                is_empty = archive.next() is None
                if isinstance(archive.fileobj, io.BufferedReader):  # not compressed
                    archive.fileobj.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
                    if any(archive.fileobj.read()):
                        raise tarfile.ReadError("the zeros at the end of a tar are missing: it has been cut")
        except _BROKEN as error:
            raise _broken(path, error) from error
        if is_empty:
            raise ValueError(f"`source` must hold images, but the shard '{path}' has no files. Remove it.")


def read_tars(
    files: Sequence[str],
    source: str,
    *,
    streaming: bool,
    image_column: str | None = None,
    label_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the samples of webdataset tars with the columns `image` and, if the first sample has one, `label`.

    Columns are named by extension; `json.label` is a field of a `.json` file. Without `image_column` the image is the
    only file of a sample with an image's extension, whatever its format.

    Raises:
        ValueError: If a sample lacks image or label, or a label cannot be read: shard and sample are named. A stream
            raises it while it is read, unless it is one of the first samples of a shard.
    """
    path, name, sample = next(_samples(files), (None, None, {}))
    if path is None:
        raise ValueError(f"`source` must hold images, but the shards of '{source}' have no samples.")
    columns: dict[str, Any] = dict.fromkeys(sample, datasets.Value("string"))
    columns |= {extension: datasets.Image() for extension in _images_of(sample)}
    if "json" in sample:
        columns["json"] = _json_of(sample, path, name)
    image = find_image_column(columns, image_column, path)
    label = find_label_column(columns, image, label_column, path)
    names = image_column or "image", label_column or "label"
    features = datasets.Features({names[0]: datasets.Image(decode=False)})
    if label is not None:
        is_text = isinstance(_label_of(sample, label, path, name), str)
        features[names[1]] = datasets.Value("string" if is_text else "int64")
    settings = {
        "shards": [(shard, os.stat(shard).st_mtime_ns) for shard in files],  # the time is a part of the cache's key
        "columns": (image, label),
        "features": features,
        "mixes_formats": image_column is None,
    }
    if streaming:
        for shard in settings["shards"]:
            list(itertools.islice(_rows(**{**settings, "shards": [shard]}), _STREAM_CHECKS))
        return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=settings)
    try:
        return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=settings)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _rows(
    shards: list[tuple[str, int]], columns: tuple[str, str | None], features: datasets.Features, mixes_formats: bool
) -> Iterator[dict[str, Any]]:
    image, label = columns
    for path, name, sample in _samples([path for path, _ in shards]):
        images = _images_of(sample) if mixes_formats else [image]
        # formats may differ, but a longer extension such as `mask.png` is another column
        if len(images) != 1 or images[0] not in sample or (images[0] != image and "." in image + images[0]):
            raise _differing(path, name, sample, f"image '{image}'")
        values = [{"bytes": sample[images[0]], "path": f"{name}.{images[0]}"}]
        if label is not None:
            values.append(_label_of(sample, label, path, name))
            dtype = features[list(features)[1]].dtype
            if isinstance(values[1], str) != (dtype == "string"):
                raise _unreadable(path, name, label, f"{values[1]!r}, but the first sample has {dtype}")
        elif not sample.keys().isdisjoint(LABEL_NAMES):
            raise _differing(path, name, sample, "no label")
        yield dict(zip(features, values))


def _samples(files: Sequence[str]) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield shard, name and the files by extension of each sample. As in webdataset, a name ends at its first dot."""
    for path in files:
        last, sample = None, {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    stem, dot, extension = file.partition(".")
                    if not (member.isfile() and stem and dot):
                        continue
                    name = f"{folder}/{stem}" if folder else stem
                    check_file_names([f"{path}/{member.name}"])
                    if name != last and sample:
                        yield path, last, sample
                        sample = {}
                    if extension.lower() in sample:
                        raise _differing(path, name, sample, f"one file '{extension}'")
                    last, sample[extension.lower()] = name, archive.extractfile(member).read()
        except _BROKEN as error:
            raise _broken(path, error) from error
        if sample:
            yield path, last, sample


def _images_of(sample: dict[str, bytes]) -> list[str]:
    return [extension for extension in sample if is_image_file(f"image.{extension}")]


def _json_of(sample: dict[str, bytes], path: str, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(sample["json"])
    except ValueError as error:
        raise _unreadable(path, name, "json", error) from error
    if not isinstance(fields, dict):
        raise _unreadable(path, name, "json", f"a {type(fields).__name__} instead of named fields")
    return fields


def _label_of(sample: dict[str, bytes], column: str, path: str, name: str) -> int | str:
    if column in sample:
        try:
            text = sample[column].decode().strip()
            return text if column in ("txt", "text") else int(text)
        except ValueError as error:  # UnicodeDecodeError is one
            raise _unreadable(path, name, column, error) from error
    extension, _, field = column.partition(".")
    if extension not in sample:
        raise _differing(path, name, sample, f"label '{column}'")
    label = _json_of(sample, path, name).get(field)
    if not isinstance(label, int | str):
        raise _unreadable(path, name, column, repr(label))
    return label


def _broken(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"`source` must hold whole shards, but '{path}' is broken: {error}. Copy it again, or remove it."
    )


def _unreadable(path: str, name: str, column: str, problem: Exception | str) -> ValueError:
    return ValueError(
        f"Labels must be class numbers, or class names in '.txt' or '.json', but '{column}' of sample '{name}' in "
        f"'{path}' cannot be read: {problem}. Mend this sample, or name another column with `label_column`."
    )


def _differing(path: str, name: str, sample: dict[str, bytes], expected: str) -> ValueError:
    return ValueError(
        f"Each sample of webdataset shards must have the files of the first, {expected}, but '{name}' in '{path}' has "
        f"{sorted(sample)}. The files of a sample lie next to each other: sort the tar by name. The name of a sample "
        "ends at its first dot: rename those with more dots."
    )
