"""The images of a feature extraction: which rows a rank reads, decoded in which process, in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.decoding import BrokenImageError, decode_image
from ..data.spare_cores import spare_cores
from ..distributed.collectives import rank, world_size

NO_LABEL = -1
# images below which workers take longer to start than they save
_WORTH_WORKERS = 1024


@dataclass(frozen=True)
class ImageLoading:
    """What is read and how: the rows, `None` for all of a stream, and the device that the pixels go to."""

    images: datasets.Dataset | datasets.IterableDataset
    rows: np.ndarray | None
    image_processor: Any
    batch_size: int
    num_workers: int | None
    device: torch.device

    def batches(self) -> DataLoader:
        """Batches of this rank's rows."""
        if self.rows is not None:
            own = _MapRows(self.images, self.rows[rank() :: world_size()], self.image_processor)
            num_workers = _default_workers(len(own), self.device) if self.num_workers is None else self.num_workers
        else:
            own = _StreamRows(self.images, rank(), world_size(), self.image_processor)
            num_workers = 0 if self.num_workers is None else min(self.num_workers, 1)
        # the loader draws a seed for its workers; drawn from the global generator it would change the training around
        return DataLoader(
            own,
            batch_size=self.batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
            # only from pinned memory does the copy to a GPU run beside the model
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )


def _default_workers(num_images: int, device: torch.device) -> int:
    return 0 if device.type == "cpu" or num_images < _WORTH_WORKERS else spare_cores()


class _MapRows(Dataset):
    """Item i is the decoded image in row `rows[i]`."""

    def __init__(self, images: datasets.Dataset, rows: np.ndarray, image_processor: Any):
        self.images, self.rows, self.image_processor = images, rows, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int, torch.Tensor | BrokenImageError]:
        row = int(self.rows[index])
        return _read(self.images[row], row, self.image_processor)


class _StreamRows(IterableDataset):
    """Every `world_size`-th row of a stream, from row `rank` on, decoded."""

    def __init__(self, images: datasets.IterableDataset, rank: int, world_size: int, image_processor: Any):
        self.images, self.rank, self.world_size, self.image_processor = images, rank, world_size, image_processor

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor | BrokenImageError]]:
        for row, example in enumerate(self.images):
            if row % self.world_size == self.rank:
                yield _read(example, row, self.image_processor)


def _read(example: dict[str, Any], row: int, image_processor: Any) -> tuple[int, int, torch.Tensor | BrokenImageError]:
    label = example.get("label")
    label = NO_LABEL if label is None else int(label)
    try:
        image = decode_image(example["image"], row=row)
    except BrokenImageError as error:
        return row, label, error
    # an AutoProcessor of an image-text model carries its image processor
    image_processor = getattr(image_processor, "image_processor", image_processor)
    if hasattr(image_processor, "preprocess"):
        return row, label, image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    return row, label, image_processor(image)


def _collate(
    items: list[tuple[int, int, torch.Tensor | BrokenImageError]],
) -> tuple[torch.Tensor | None, np.ndarray, list[BrokenImageError]]:
    broken = [pixels for *_, pixels in items if isinstance(pixels, BrokenImageError)]
    good = [item for item in items if not isinstance(item[2], BrokenImageError)]
    sizes = sorted({tuple(pixels.shape) for *_, pixels in good})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor must bring all images to one size, but gave {sizes[0]} and {sizes[1]} in a batch. "
            "Use an image processor that resizes and crops, such as `evaluation_image_processor(image_size=...)`."
        )
    rows_and_labels = np.array([(row, label) for row, label, _ in good], dtype=np.int64).reshape(-1, 2)
    return torch.stack([pixels for *_, pixels in good]) if good else None, rows_and_labels, broken
