"""Shards of images: check that they are whole, and read the samples of webdataset tars."""

import collections
import contextlib
import glob
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow.parquet
from PIL import Image

from .columns import LABEL_NAMES, find_image_column, find_label_column
from .folders import SPLIT_NAMES, check_file_names, is_image_file
from .map_style import AnyDataset

SHARD_EXTENSIONS = (".parquet", ".tar")
_STREAM_CHECKS = 5  # samples of each shard that are read before a stream begins
_BROKEN = (pyarrow.ArrowInvalid, tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def shards_by_split(files: Sequence[str], root: str) -> dict[str, list[str]]:
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


def read_parquet(files: Sequence[str], *, streaming: bool) -> AnyDataset:
    """Return the rows of parquet files."""
    names = {path: set(pyarrow.parquet.read_schema(path).names) for path in files}
    for path in files:
        if names[path] != names[files[0]]:
            raise ValueError(
                f"The shards of a split must have the same columns, but '{files[0]}' has {sorted(names[files[0]])}, "
                f"and '{path}' has {sorted(names[path])}. Write them alike, or give one kind as a glob."
            )
    escaped = [glob.escape(path) for path in files]
    try:
        return datasets.load_dataset("parquet", data_files=escaped, split="train", streaming=streaming)
    except datasets.exceptions.DatasetGenerationError:
        for path in files:  # `datasets` does not name the broken one
            try:
                collections.deque(pyarrow.parquet.ParquetFile(path).iter_batches(), maxlen=0)
            except _BROKEN as error:
                raise _broken(path, error) from error
        raise


def read_tars(
    files: Sequence[str],
    *,
    streaming: bool,
    image_column: str | None = None,
    label_column: str | None = None,
) -> AnyDataset:
    """Return the samples of webdataset tars with the columns `image` and, if the first sample has one, `label`.

    Columns are named by extension; `json.label` is a field of a `.json` file. Without `image_column` the image is the
    only file of a sample with an image's extension, whatever its format.

    Raises:
        ValueError: If a sample lacks image or label, or a label cannot be read: shard and sample are named. A stream
            raises it while it is read, unless it is one of the first samples of a shard.
    """
    path, name, sample = next(_samples(files), (None, None, {}))
    if path is None:
        raise ValueError(f"`source` must hold images, but shards such as '{files[0]}' have no samples.")
    columns: dict[str, Any] = dict.fromkeys(sample, datasets.Value("string"))
    columns |= {extension: datasets.Image() for extension in _images_of(sample)}
    with _sample_named(path, name, sample):
        columns |= {"json": json.loads(sample["json"])} if "json" in sample else {}
    image = find_image_column(columns, image_column, path)
    if image not in _images_of(sample) and not _is_image(sample[image]):
        raise ValueError(
            f"`image_column` must hold images, but '{image}' of '{name}' in '{path}' is none. It has "
            f"{', '.join(map(repr, sample))}."
        )
    label = find_label_column(columns, image, label_column, path)
    names = image_column or "image", label_column or "label"
    features = datasets.Features({names[0]: datasets.Image(decode=False)})
    if label is not None:
        with _sample_named(path, name, sample):
            is_text = isinstance(_label_of(sample, label), str)
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
        with _sample_named(path, name, sample):
            images = _images_of(sample) if mixes_formats else [image]
            # formats may differ, but a longer extension such as `mask.png` is another column
            if len(images) != 1 or images[0] not in sample or (images[0] != image and "." in image + images[0]):
                raise ValueError(f"it must have one image, '{image}'")
            row = [{"bytes": sample[images[0]], "path": f"{name}.{images[0]}"}]
            if label is not None:
                row.append(_label_of(sample, label))
                if isinstance(row[1], str) != (features[list(features)[1]].dtype == "string"):
                    raise ValueError(f"'{label}' is {row[1]!r}, of another type than that of the first sample")
            elif not sample.keys().isdisjoint(LABEL_NAMES):
                raise ValueError("it has a label, but the first sample has none")
        yield dict(zip(features, row))


def _samples(files: Sequence[str]) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield shard, name and the files by extension of each sample. As in webdataset, a name ends at its first dot."""
    for path in files:
        last, sample = None, {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    archive.members.clear()  # else the headers of a large shard fill the memory
                    folder, _, file = member.name.rpartition("/")
                    stem, dot, extension = file.partition(".")
                    if not (member.isfile() and stem and dot):
                        continue
                    name = f"{folder}/{stem}" if folder else stem
                    check_file_names([f"{path}/{member.name}"])
                    if name != last and sample:
                        yield path, last, sample
                        sample = {}
                    with _sample_named(path, name, sample):
                        if extension.lower() in sample:
                            raise ValueError(f"it has two files '{extension}'")
                    last, sample[extension.lower()] = name, archive.extractfile(member).read()
                archive.fileobj.seek(archive.offset)
                if any(archive.fileobj.read(2 * tarfile.RECORDSIZE)):  # tarfile takes a broken header for the end
                    raise tarfile.ReadError(f"there is no header at byte {archive.offset:,}")
        except _BROKEN as error:
            raise _broken(path, error) from error
        if sample:
            yield path, last, sample


def _images_of(sample: dict[str, bytes]) -> list[str]:
    return [extension for extension in sample if is_image_file(f"image.{extension}")]


def _is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception:  # Pillow raises nearly every built-in error on other bytes
        return False
    return True


def _label_of(sample: dict[str, bytes], column: str) -> int | str:
    extension, _, field = column.partition(".")
    if column in sample:
        text = sample[column].decode().strip()
        return text if column in ("txt", "text") else int(text)
    if extension not in sample:
        raise ValueError(f"it has no '{extension}'")
    label = json.loads(sample[extension])[field]
    if not isinstance(label, int | str):
        raise ValueError(f"'{column}' is {label!r}")
    return label


@contextlib.contextmanager
def _sample_named(path: str, name: str, sample: dict[str, bytes]) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "Samples of webdataset shards must have an image and, all or none of them, a label (an integer, or a name "
            f"in '.txt' or '.json'), but '{name}' in '{path}' with {sorted(sample)} is wrong: {error}. The files of a "
            "sample lie next to each other: sort the tar by name. Its name ends at its first dot: rename samples with "
            "more dots."
        ) from error


def _broken(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"`source` must hold whole shards, but '{path}' is broken: {error}. Copy it again, or remove it."
    )
