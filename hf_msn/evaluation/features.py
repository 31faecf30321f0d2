"""One pass of a frozen backbone over images: shared by all ranks, given to all ranks, cached on request."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.decoding import BrokenImageError
from ..distributed.collectives import rank
from .backbones import (
    describe_image_processor,
    evaluated_module,
    evaluation_mode,
    resolve_image_processor,
    weights_sha256,
)
from .feature_cache import cache_path, read_cache, write_cache
from .gathering import gather_objects, gather_rows, run_on_every_rank
from .image_loading import NO_LABEL, ImageLoading

logger = logging.getLogger(__name__)

_SHOWN = 3
# of features that wait on the device for their copy to the host
_BYTES_ON_DEVICE = 2**28


@dataclass(frozen=True)
class Features:
    """Features of the images of a data set, in the order of its rows.

    Args:
        features (`np.ndarray` of shape `(N, D)`): float32.
        labels (`np.ndarray` of shape `(N,)`, *optional*): int64; `None` if the data has none. -1: this row has none.
        rows (`np.ndarray` of shape `(N,)`): Row of each image in the data set. Rows that were skipped are missing.
        skipped (`list[BrokenImageError]`): The images that could not be read.
        weights_sha256 (`str`, *optional*): Of the backbone, for projections of the whole model; `None` for pixels.
        data_fingerprint (`str`, *optional*): Of the data set; `None` for streams.
    """

    features: np.ndarray
    labels: np.ndarray | None
    rows: np.ndarray
    skipped: list[BrokenImageError] = field(default_factory=list)
    weights_sha256: str | None = None
    data_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.rows)


def extract_features(
    model: nn.Module,
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    features: Literal["backbone", "projection"] = "backbone",
    num_last_layers: int = 1,
    rows: np.ndarray | None = None,
    cache_dir: str | os.PathLike | None = None,
    on_broken_image: Literal["skip", "raise"] = "skip",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Features:
    """Features of all images, as `feature_function` defines them, or their projections.

    With `torch.distributed` initialised every rank must call this; it takes the rows `rank::world_size`, and all ranks
    get all features. The model leaves as it came: training flags, device and the random state are untouched.

    Args:
        model (`nn.Module`):
            A pretraining model of hf_msn (its `evaluation_encoder` is used), a vision model of transformers or a timm
            model.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With a column `image` and, if labelled, `label`, as `load_images` gives it. Of a stream, each rank reads
            everything but decodes only its rows; `num_workers` above 1 counts as 1, and nothing is cached.
        image_processor (*optional*):
            An image processor of transformers or a function from an RGB `PIL.Image` to a tensor (C, H, W). By default
            the one saved with the model, or timm's own.
        batch_size (`int`, *optional*, defaults to 64):
            Images at a time on each rank.
        num_workers (`int`, *optional*):
            Processes that decode images, on each rank. By default none where the model computes on the CPU, which
            they would slow down, or the images are few; on a GPU this rank's share of the cores, at most 16.
        features (`"backbone"` or `"projection"`, *optional*, defaults to `"backbone"`):
            "projection" takes `model.project(pixels)`, the space in which PAWS predicts, not the backbone's output.
        num_last_layers (`int`, *optional*, defaults to 1):
            Concatenates [CLS] of the last n blocks, the earliest first.
        rows (`np.ndarray`, *optional*):
            Only these rows of `dataset`, each once; not for streams. By default all.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder for the features, keyed by weights, data, image processor and the settings here. Only rank 0 reads
            and writes it.
        on_broken_image (`"skip"` or `"raise"`, *optional*, defaults to `"skip"`):
            "skip" leaves the row out, names it in a warning and in `Features.skipped`; "raise" stops at it.
        device (`str` or `torch.device`, *optional*):
            Where to compute; by default where the model is.
        dtype (`torch.dtype`, *optional*):
            By default that of the weights. `torch.bfloat16` or `torch.float16` on float32 weights: under autocast. The
            result is float32 in every case.

    Raises:
        `BrokenImageError`: on all ranks, if an image cannot be read and `on_broken_image="raise"`.
        `ValueError`: if there are no images or none is readable, the images of a batch differ in size, or an argument
            is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` counts images and must be >= 1, but is {batch_size}. The default is 64.")
    module, forward = evaluated_module(model, features, num_last_layers)
    image_processor = resolve_image_processor(model) if image_processor is None else image_processor
    weights_dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    if dtype is not None and weights_dtype != torch.float32 and dtype != weights_dtype:
        raise ValueError(
            f"`dtype` must be that of the weights, {weights_dtype}, unless they are float32, but is {dtype}. Load the "
            "model with dtype=torch.float32."
        )
    images = _images(dataset)
    rows = _rows(images, rows)
    fingerprint = getattr(images, "_fingerprint", None)
    sha256 = gather_objects(weights_sha256(module) if rank() == 0 else None)[0]
    processor = describe_image_processor(image_processor)
    key = {
        "weights": sha256,
        # equal weights in another class, or another attention, may differ in the last digit
        "computed_by": [type(module).__name__, getattr(getattr(module, "config", None), "_attn_implementation", None)],
        "data": fingerprint,
        "rows": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest(),
        "image_processor": processor,
        "features": features,
        "num_last_layers": num_last_layers,
        "dtype": str(dtype or weights_dtype),
        "format": 2,
    }
    path = None
    if cache_dir is not None and fingerprint is not None and " at 0x" not in processor:
        path = cache_path(cache_dir, key)
    elif cache_dir is not None and rank() == 0:
        logger.warning("Features of a stream, or through a function that cannot be told apart, are not cached.")

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(device_now, non_blocking=True).to(weights_dtype)
        with torch.autocast(device_now.type, dtype=dtype or weights_dtype, enabled=dtype not in (None, weights_dtype)):
            return forward(pixels)

    with evaluation_mode(module, device) as device_now:
        loading = ImageLoading(images, rows, image_processor, batch_size, num_workers, device_now)
        return _extract(loading, compute, on_broken_image, path, sha256)


def pixel_features(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    on_broken_image: Literal["skip", "raise"] = "skip",
) -> Features:
    """The pixels themselves as features: the baseline that a representation has to beat.

    Args:
        dataset: As for `extract_features`.
        image_processor (*optional*):
            As for `extract_features`. By default RGB values in [0, 1] of the images as they are, all of one size.

    Returns:
        [`Features`] of dimension `3 * H * W`.
    """
    image_processor = _unit_range if image_processor is None else image_processor
    images = _images(dataset)
    loading = ImageLoading(images, _rows(images), image_processor, batch_size, num_workers, torch.device("cpu"))
    return _extract(loading, lambda pixels: pixels.flatten(1), on_broken_image)


def _unit_range(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _images(dataset: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"`dataset` must be a datasets.Dataset or IterableDataset, but is {type(dataset)}. Use `load_images`."
        )
    columns = dataset.column_names
    if columns is not None and "image" not in columns:
        raise ValueError(
            f"The data must have a column 'image', but has {columns}. `load_images` finds and renames it."
        )
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise ValueError("The data has no images, so there are no features to extract. Look at its split and filters.")
    feature = (dataset.features or {}).get("image")
    if isinstance(feature, datasets.Image) and feature.decode:
        return dataset.cast_column("image", datasets.Image(decode=False))
    return dataset


def _rows(images: datasets.Dataset | datasets.IterableDataset, rows: np.ndarray | None = None) -> np.ndarray | None:
    """The rows to extract, in ascending order; `None` for a stream, of which all are."""
    if isinstance(images, datasets.IterableDataset):
        if rows is not None:
            raise ValueError("`rows` picks rows by number, which a stream does not have. Load with streaming=False.")
        return None
    if rows is None:
        return np.arange(len(images))
    rows = np.unique(np.asarray(rows, dtype=np.int64))
    if len(rows) == 0 or rows[0] < 0 or rows[-1] >= len(images):
        raise ValueError(f"`rows` must be at least one number from 0 to {len(images) - 1}, but is {rows[:5]}...")
    return rows


def _extract(
    loading: ImageLoading,
    compute: Callable[[torch.Tensor], torch.Tensor],
    on_broken_image: str,
    path: os.PathLike | None = None,
    sha256: str | None = None,
) -> Features:
    if on_broken_image not in ("skip", "raise"):
        raise ValueError(f"`on_broken_image` must be 'skip' or 'raise', but is {on_broken_image!r}.")
    # rank 0 hands on what it found in the cache as if it alone had computed all rows
    cached = read_cache(path) if path is not None and rank() == 0 else None
    hit = gather_objects(cached is not None)[0]

    def work() -> _RankRows:
        if hit:
            return _RankRows.from_cache(cached)
        return _pass(loading, compute, on_broken_image == "raise")

    own, summaries = run_on_every_rank(work, lambda own: (len(own.features), own.features.shape[1], own.skipped))
    counts, widths, skipped_by_rank = zip(*summaries)
    skipped = sorted((error for errors in skipped_by_rank for error in errors), key=lambda error: error.row)
    if skipped and on_broken_image == "raise":
        raise skipped[0]
    if sum(counts) == 0:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"Features need at least one readable image, but there is none among {len(skipped)}{first}")
    if skipped and rank() == 0:
        shown = "; ".join(str(error) for error in skipped[:_SHOWN])
        logger.warning("%d images are skipped, %d remain. The first skipped: %s", len(skipped), sum(counts), shown)
    # a rank without rows does not know the width
    own_features = own.features if len(own.features) else np.zeros((0, max(widths)), dtype=np.float32)
    features = gather_rows(own_features, list(counts))
    rows_and_labels = gather_rows(own.rows_and_labels, list(counts))
    order = np.argsort(rows_and_labels[:, 0])
    features, rows_and_labels = features[order], rows_and_labels[order]
    if path is not None and not hit and rank() == 0:
        skipped_in_json = [(error.row, error.path, error.reason) for error in skipped]
        write_cache(path, {"features": features, "rows_and_labels": rows_and_labels}, skipped_in_json)
    rows, labels = rows_and_labels.T
    return Features(
        features=features,
        labels=labels if (labels != NO_LABEL).any() else None,
        rows=rows,
        skipped=skipped,
        weights_sha256=sha256,
        data_fingerprint=getattr(loading.images, "_fingerprint", None),
    )


@dataclass(frozen=True)
class _RankRows:
    """What one rank contributes: features (n, D), row numbers and labels (n, 2), the rows that could not be read."""

    features: np.ndarray
    rows_and_labels: np.ndarray
    skipped: list[BrokenImageError]

    @classmethod
    def from_cache(cls, cached: tuple[dict[str, np.ndarray], list[Any]] | None) -> "_RankRows":
        if cached is None:
            return cls(np.zeros((0, 0), dtype=np.float32), np.zeros((0, 2), dtype=np.int64), [])
        arrays, skipped = cached
        errors = [BrokenImageError(reason, row=row, path=path) for row, path, reason in skipped]
        return cls(arrays["features"], arrays["rows_and_labels"], errors)


def _pass(loading: ImageLoading, compute: Callable[[torch.Tensor], torch.Tensor], stop_at_broken: bool) -> _RankRows:
    # None: no bar where nobody looks at a terminal
    progress = tqdm(
        loading.batches(), desc="Features", unit="batch", leave=False, disable=None if rank() == 0 else True
    )
    # features stay on the device for a while: each copy to the host waits until the device is done with its batch
    on_device, size_on_device = [], 0
    features, rows_and_labels, skipped = [], [], []
    for pixels, of_batch, broken in progress:
        skipped += broken
        if broken and stop_at_broken:
            break
        if pixels is not None:
            of_pixels = compute(pixels).float()
            on_device.append(of_pixels)
            size_on_device += of_pixels.nbytes
            rows_and_labels.append(of_batch)
        if size_on_device > _BYTES_ON_DEVICE:
            features.append(torch.cat(on_device).cpu().numpy())
            on_device, size_on_device = [], 0
    if on_device:
        features.append(torch.cat(on_device).cpu().numpy())
    if not features:
        empty = _RankRows.from_cache(None)
        return _RankRows(empty.features, empty.rows_and_labels, skipped)
    return _RankRows(np.concatenate(features), np.concatenate(rows_and_labels), skipped)
