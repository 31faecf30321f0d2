"""Feature extraction: one pass of a frozen backbone over images, split over the ranks and optionally cached."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_choice, check_integer
from ..data.columns import undecoded
from ..data.decoding import BrokenImageError, decode_image
from ..data.labels import check_rows
from ..data.map_style import AnyDataset
from ..data.spare_cores import spare_cores
from ..distributed.collectives import rank, world_size
from ..files import whole_file
from .backbones import (
    FeatureSpace,
    describe_image_processor,
    evaluated_module,
    evaluation_mode,
    resolve_image_processor,
    weights_sha256,
)
from .gathering import gather_objects, gather_rows, run_on_every_rank

logger = logging.get_logger(__name__)

NO_LABEL = -1
# features that wait on the device for their copy to the host
_BYTES_ON_DEVICE = 2**28
# below this number of images, workers take longer to start than they save
_MIN_IMAGES_FOR_WORKERS = 1024


@dataclass(frozen=True)
class Features:
    """Features of the images of a dataset, in the order of its rows."""

    features: np.ndarray  # (N, D), float32
    labels: np.ndarray | None  # (N,), int64, -1 for a row without a label; `None` for data without labels
    rows: np.ndarray  # (N,): row of each image in the dataset; skipped rows are missing
    skipped: list[BrokenImageError] = field(default_factory=list)
    weights_sha256: str | None = None  # of the backbone, behind a head of the whole model; `None` for pixels
    data_fingerprint: str | None = None  # of the dataset; `None` for streams

    def __len__(self) -> int:
        return len(self.rows)


def extract_features(
    model: nn.Module,
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    features: FeatureSpace = "backbone",
    num_last_layers: int = 1,
    rows: np.ndarray | None = None,
    cache_dir: str | os.PathLike | None = None,
    on_broken_image: Literal["skip", "raise"] = "skip",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Features:
    """Extract the features of all images, as `feature_function` defines them, or their projections.

    With `torch.distributed` initialised every rank must call this; it takes the rows `rank::world_size`, and all ranks
    get all features. Training flags, device and random state of the model are unchanged afterwards.

    Args:
        model (`nn.Module`): A model that [`find_backbone`] knows.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): With a column `image` and, if labelled, `label`,
            from `load_images`. A stream has at most one worker, and its features are not cached.
        image_processor (*optional*): An image processor of transformers or a function from an RGB `PIL.Image` to a
            tensor (C, H, W). By default the one saved with the model, or timm's own.
        batch_size (`int`, *optional*, defaults to 64): Images per batch on each rank.
        num_workers (`int`, *optional*): Processes per rank that decode images. By default none on the CPU or for few
            images, on a GPU this rank's share of the cores.
        features (`str`, *optional*, defaults to `"backbone"`): "projection" is the space in which PAWS compares
            images, "prediction" the output of the prediction head behind it.
        num_last_layers (`int`, *optional*, defaults to 1): Blocks whose [CLS] is concatenated, the earliest first.
        rows (`np.ndarray`, *optional*): Only these rows of `dataset`, each once; not for streams. By default all.
        cache_dir (`str` or `os.PathLike`, *optional*): Folder for the features, keyed by weights, data, image
            processor and the settings here. Only rank 0 reads and writes it.
        on_broken_image (`"skip"` or `"raise"`, *optional*, defaults to `"skip"`): "skip" leaves the row out, with a
            warning and an entry of `Features.skipped`.
        device (`str` or `torch.device`, *optional*): Device of the computation; by default the model's.
        dtype (`torch.dtype`, *optional*): By default that of the weights; `torch.bfloat16` or `torch.float16` on
            float32 weights is autocast. The result is float32 in every case.

    Raises:
        BrokenImageError: On all ranks, if an image cannot be read and `on_broken_image="raise"`.
        ValueError: If there are no images or none is readable, the images of a batch differ in size, or an argument is
            out of range.
    """
    check_integer("batch_size", batch_size, meaning="counts images")
    module, forward = evaluated_module(model, features, num_last_layers)
    image_processor = resolve_image_processor(model) if image_processor is None else image_processor
    weights_dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    autocast = (torch.bfloat16, torch.float16) if weights_dtype == torch.float32 else ()
    remedy = "Only float32 weights are computed in another dtype: load the model with dtype=torch.float32."
    check_choice("dtype", dtype, (None, weights_dtype, *autocast), remedy=remedy)
    images = undecoded(dataset)
    rows = _selected_rows(images, rows)
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
        "format": 3,  # 2: crops that began half a pixel earlier
    }
    path = None
    if cache_dir is not None and fingerprint is not None and " at 0x" not in str(processor):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = Path(cache_dir) / f"features-{digest[:40]}.safetensors"
    elif cache_dir is not None and rank() == 0:
        logger.warning("Features of a stream, or of an image processor without a repr of its own, are not cached.")

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(device_now, non_blocking=True).to(weights_dtype)
        with torch.autocast(device_now.type, dtype=dtype or weights_dtype, enabled=dtype not in (None, weights_dtype)):
            return forward(pixels)

    with evaluation_mode(module, device) as device_now:
        loader = _image_loader(images, rows, image_processor, batch_size, num_workers, device_now)
        return _extract(images, loader, compute, on_broken_image, path, sha256)


def pixel_features(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    rows: np.ndarray | None = None,
    on_broken_image: Literal["skip", "raise"] = "skip",
) -> Features:
    """Return the pixels themselves as features: the baseline of every representation.

    The arguments are those of `extract_features`. By default features are the RGB values in [0, 1] of the unchanged
    images, all of one size: dimension `3 * H * W`.
    """
    image_processor = unit_range if image_processor is None else image_processor
    images = undecoded(dataset)
    device = torch.device("cpu")
    loader = _image_loader(images, _selected_rows(images, rows), image_processor, batch_size, num_workers, device)
    return _extract(images, loader, lambda pixels: pixels.flatten(1), on_broken_image)


def unit_range(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image as they are: (3, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def _selected_rows(images: AnyDataset, rows: np.ndarray | None = None) -> np.ndarray | None:
    """Return the rows to extract, ascending; `None` for a stream, of which all are."""
    if isinstance(images, datasets.IterableDataset):
        if rows is not None:
            raise ValueError("`rows` are row numbers, which a stream does not have. Load it with streaming=False.")
        return None
    return np.arange(len(images)) if rows is None else check_rows("rows", np.unique(rows), len(images))


def _extract(
    images: AnyDataset,
    loader: DataLoader,
    compute: Callable[[torch.Tensor], torch.Tensor],
    on_broken_image: str,
    path: Path | None = None,
    sha256: str | None = None,
) -> Features:
    check_choice("on_broken_image", on_broken_image, ("skip", "raise"))
    # rank 0 contributes the cached rows as if it alone had computed all of them
    cached = _read_cache(path) if path is not None and rank() == 0 else None
    hit = gather_objects(cached is not None)[0]

    def work() -> _RankRows:
        return (cached or _RankRows()) if hit else _pass(loader, compute, on_broken_image == "raise")

    own, summaries = run_on_every_rank(work, lambda own: (len(own.features), own.features.shape[1], own.skipped))
    counts, widths, skipped_by_rank = zip(*summaries)
    skipped = sorted((error for errors in skipped_by_rank for error in errors), key=lambda error: error.row)
    if skipped and on_broken_image == "raise":
        raise skipped[0]
    if sum(counts) == 0:
        first = f" The first: {skipped[0]}" if skipped else ""
        raise ValueError(f"`dataset` must have a readable image, but none of {len(skipped)} is readable.{first}")
    if skipped and rank() == 0:
        shown = "; ".join(str(error) for error in skipped[:3])
        logger.warning("%d images are skipped, %d remain. The first: %s", len(skipped), sum(counts), shown)
    # a rank without rows does not know the width
    own_features = own.features if len(own.features) else np.zeros((0, max(widths)), dtype=np.float32)
    features = gather_rows(own_features, list(counts))
    rows_and_labels = gather_rows(own.rows_and_labels, list(counts))
    order = np.argsort(rows_and_labels[:, 0])
    features, rows_and_labels = features[order], rows_and_labels[order]
    if path is not None and not hit and rank() == 0:
        _write_cache(path, _RankRows(features, rows_and_labels, skipped))
    rows, labels = rows_and_labels.T
    return Features(
        features=features,
        labels=labels if (labels != NO_LABEL).any() else None,
        rows=rows,
        skipped=skipped,
        weights_sha256=sha256,
        data_fingerprint=getattr(images, "_fingerprint", None),
    )


@dataclass(frozen=True)
class _RankRows:
    """The part of one rank: features (n, D), row numbers and labels (n, 2), the rows that could not be read."""

    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    rows_and_labels: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    skipped: list[BrokenImageError] = field(default_factory=list)


def _pass(loader: DataLoader, compute: Callable[[torch.Tensor], torch.Tensor], stop_at_broken: bool) -> _RankRows:
    # disable=None: no bar unless the output is a terminal
    progress = tqdm(loader, desc="Features", unit="batch", leave=False, disable=None if rank() == 0 else True)
    # features stay on the device for a while: each copy to the host waits until the device is done with its batch
    on_device, features, rows_and_labels, skipped = [], [], [], []
    for pixels, of_batch, broken in progress:
        skipped += broken
        if broken and stop_at_broken:
            break
        if pixels is not None:
            on_device.append(compute(pixels).float())
            rows_and_labels.append(of_batch)
        if sum(tensor.nbytes for tensor in on_device) > _BYTES_ON_DEVICE:
            features.append(torch.cat(on_device).cpu().numpy())
            on_device = []
    if on_device:
        features.append(torch.cat(on_device).cpu().numpy())
    if not features:
        return _RankRows(skipped=skipped)
    return _RankRows(np.concatenate(features), np.concatenate(rows_and_labels), skipped)


def _read_cache(path: Path) -> _RankRows | None:
    """Return the stored features; `None` if the file is missing or broken. `_write_cache` replaces a broken file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            features, rows_and_labels = file.get_tensor("features"), file.get_tensor("rows_and_labels")
            skipped = json.loads(file.metadata()["skipped"])
        errors = [BrokenImageError(reason, row=row, path=image_path) for row, image_path, reason in skipped]
        return _RankRows(features, rows_and_labels, errors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The cached features in %s are broken (%s) and will be extracted again.", path, error)
        return None


def _write_cache(path: Path, rows: _RankRows) -> None:
    skipped = json.dumps([(error.row, error.path, error.reason) for error in rows.skipped])
    try:
        with whole_file(path, "cache_dir", overwrite=True) as staging:
            arrays = {"features": rows.features, "rows_and_labels": rows.rows_and_labels}
            save_file(arrays, staging, metadata={"skipped": skipped})
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("The features cannot be cached in %s (%s); evaluation continues without.", path, error)


def _image_loader(
    images: AnyDataset,
    rows: np.ndarray | None,
    image_processor: Any,
    batch_size: int,
    num_workers: int | None,
    device: torch.device,
) -> DataLoader:
    """Return batches of this rank's rows: pixels or `None`, row numbers and labels (n, 2), broken images."""
    own: _StreamRows | _MapRows
    if rows is None:
        own = _StreamRows(images, rank(), world_size(), image_processor)
        num_workers = min(num_workers or 0, 1)
    else:
        rows = rows[rank() :: world_size()]
        own = _MapRows(images, rows, image_processor)
        if num_workers is None:
            on_cpu_or_few = device.type == "cpu" or len(rows) < _MIN_IMAGES_FOR_WORKERS
            num_workers = 0 if on_cpu_or_few else spare_cores()
    return DataLoader(
        own,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        # only from pinned memory does the copy to a GPU run beside the model
        pin_memory=device.type == "cuda",
        # the loader draws its workers' seed; drawn from the global generator it would change the training around it
        generator=torch.Generator(),
    )


_Item = tuple[int, int, torch.Tensor | BrokenImageError]  # row, label, pixels


class _MapRows(Dataset):
    """Item i is the decoded image in row `rows[i]`."""

    def __init__(self, images: datasets.Dataset, rows: np.ndarray, image_processor: Any):
        self.images, self.rows, self.image_processor = images, rows, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> _Item:
        row = int(self.rows[index])
        return _read(self.images[row], row, self.image_processor)


class _StreamRows(IterableDataset):
    """Every `world_size`-th row of a stream, from row `rank` on, decoded."""

    def __init__(self, images: datasets.IterableDataset, rank: int, world_size: int, image_processor: Any):
        self.images, self.rank, self.world_size, self.image_processor = images, rank, world_size, image_processor

    def __iter__(self) -> Iterator[_Item]:
        for row, example in enumerate(self.images):
            if row % self.world_size == self.rank:
                yield _read(example, row, self.image_processor)


def _read(example: dict[str, Any], row: int, image_processor: Any) -> _Item:
    label = example.get("label")
    label = NO_LABEL if label is None else int(label)
    try:
        image = decode_image(example["image"], row=row)
    except BrokenImageError as error:
        return row, label, error
    return row, label, process_image(image_processor, image)


def process_image(image_processor: Any, image: Image.Image) -> torch.Tensor:
    """Return the pixels (C, H, W) that an image processor of transformers, or a function, makes of an RGB image."""
    # the AutoProcessor of an image-text model holds its image processor
    image_processor = getattr(image_processor, "image_processor", image_processor)
    if hasattr(image_processor, "preprocess"):
        return image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    return image_processor(image)


def _collate(items: list[_Item]) -> tuple[torch.Tensor | None, np.ndarray, list[BrokenImageError]]:
    broken = [pixels for *_, pixels in items if isinstance(pixels, BrokenImageError)]
    good = [(row, label, pixels) for row, label, pixels in items if not isinstance(pixels, BrokenImageError)]
    sizes = sorted({tuple(pixels.shape) for *_, pixels in good})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor must return images of one size, but returned {sizes[0]} and {sizes[1]} in a batch. "
            "Use one that resizes and crops, such as `evaluation_image_processor(image_size=...)`."
        )
    rows_and_labels = np.array([(row, label) for row, label, _ in good], dtype=np.int64).reshape(-1, 2)
    return torch.stack([pixels for *_, pixels in good]) if good else None, rows_and_labels, broken
