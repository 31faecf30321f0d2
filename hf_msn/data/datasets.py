"""Datasets of views, which a DataLoader reads in pretraining."""

import contextlib
import copy
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import torch
from PIL import Image
from transformers.utils import logging

from ..checks import check_choice, check_integer
from .columns import undecoded
from .decoding import BrokenImageError, decode_reduced_image
from .labels import class_names
from .transforms import DrawnViews, gives_crops

logger = logging.get_logger(__name__)

_MOST_BROKEN_IN_SUCCESSION = 1000
_MOST_WORKERS = 1024
_MASK = (1 << 64) - 1


def multi_view_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset,
    transform: Callable[[Image.Image], dict[str, torch.Tensor]],
    *,
    seed: int = 0,
    on_broken_image: str = "skip",
    shuffle_buffer: int = 1000,
) -> "MultiViewDataset | StreamingMultiViewDataset":
    """Return a dataset of views: [`MultiViewDataset`], or [`StreamingMultiViewDataset`] for a stream.

    The arguments are theirs. `shuffle_buffer` matters for streams alone: other data is shuffled by the sampler.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return StreamingMultiViewDataset(
            dataset, transform, seed=seed, on_broken_image=on_broken_image, shuffle_buffer=shuffle_buffer
        )
    return MultiViewDataset(dataset, transform, seed=seed, on_broken_image=on_broken_image)


class EncodedImages:
    """The encoded images of a dataset and the views drawn from them: the common part of the datasets of views.

    `num_counts` is the length of the shared tensor in which broken images are counted.
    """

    def __init__(self, dataset, transform, seed: int, on_broken_image: str, num_counts: int):
        check_choice("on_broken_image", on_broken_image, ("skip", "raise"))
        check_integer("seed", seed, 0)
        self.class_names = class_names(dataset)  # from the features: no label is read
        self._dataset = undecoded(dataset).with_format(None).select_columns("image")
        self.info, self.split = self._dataset.info, self._dataset.split
        self.transform = transform
        self.seed = seed
        self.on_broken_image = on_broken_image
        self.gives_crops = False
        # shared memory: the main process sees what the workers found broken
        self._broken = torch.zeros(num_counts, dtype=torch.int64).share_memory_()

    @property
    def num_broken(self) -> int:
        """Number of images found broken so far, by all workers of this process; of a stream, in the current pass."""
        return int(self._broken.sum())

    def _views(self, decode: Callable, seed: int) -> dict[str, torch.Tensor]:
        """Return the views of one image. The draws decide how large `decode(reduction)` decodes it."""
        if not gives_crops(self.transform):
            image, _ = decode()
            with seeded(seed):
                return self._views_of_other_transform(image)
        with seeded(seed):
            drawn = self._draw()
        crops = drawn.crops(*decode(drawn.reduction))
        return crops if self.gives_crops else self.transform.finish(crops)

    def _draw(self) -> DrawnViews:
        return self.transform.draw()

    def _views_of_other_transform(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return self.transform(image)

    def _first_readable(self, positions: Iterable[int], value: dict, reduction) -> tuple | BrokenImageError:
        """Decode the first readable image, or return the last error. `value` is that of the first position."""
        for place, position in enumerate(positions):
            encoded = self._dataset[position]["image"] if place else value
            try:
                return decode_reduced_image(encoded, reduction, row=int(self.rows[position]))
            except BrokenImageError as error:
                if self.on_broken_image == "raise":
                    raise
                if not self._broken[position]:
                    self._broken[position] = 1
                    logger.warning("Skipped: %s", error)
                last = error
        return last


class _EpochViews(EncodedImages):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Select the views (of a stream, the order too) of an epoch, also in running workers. Trainer calls it."""
        self._epoch.fill_(epoch)


class MultiViewDataset(_EpochViews, torch.utils.data.Dataset):
    """The views of each image of a dataset. Labels are not read.

    The views of row i in epoch e depend on (`seed`, e, i) alone: the three are hashed into the seed of torch's
    generator, whose state is restored after the row. The number of workers, the order, the rank and a resumed run
    cannot change them. An unreadable image is replaced by the next readable row, so that batches keep their size.

    Args:
        dataset (`datasets.Dataset`): Dataset with a column `image`, from [`~hf_msn.load_images`].
        transform (`Callable`): Makes the views of one image from torch's global generator.
        seed (`int`, *optional*, defaults to 0): Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns once per broken row, counts it and takes the next readable one; `"raise"` stops.

    Raises:
        ValueError: If there are no rows or no column `image`, or `on_broken_image` is unknown.
        BrokenImageError: While reading, for a broken image under `"raise"`, or under `"skip"` if none of the rows (or
            of 1000 in succession) is readable.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[[Image.Image], dict[str, torch.Tensor]],
        *,
        seed: int = 0,
        on_broken_image: str = "skip",
    ):
        super().__init__(dataset, transform, seed, on_broken_image, num_counts=len(dataset))
        self.rows = range(len(dataset))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """Read a batch of rows, as a DataLoader does: one access to the table instead of one per row."""
        indices = [self.rows[index] for index in indices]
        values = self._dataset[indices]["image"]
        return [
            self._views(functools.partial(self._readable, row, value), hash_numbers(self.seed, self.epoch, row))
            for row, value in zip(indices, values)
        ]

    def _readable(self, row: int, value, reduction=None) -> tuple[Image.Image, tuple[int, int]]:
        limit = min(len(self), _MOST_BROKEN_IN_SUCCESSION)
        image = self._first_readable((position % len(self) for position in range(row, row + limit)), value, reduction)
        if not isinstance(image, BrokenImageError):
            return image
        reason = f"none of {limit} rows in succession is readable; the last: {image.reason}"
        raise BrokenImageError(reason, row=image.row, path=image.path)


class StreamingMultiViewDataset(_EpochViews, torch.utils.data.IterableDataset):
    """The views of each image of a stream. Labels are not read.

    The views of an image depend on (`seed`, epoch, the image's path and bytes) alone, so that neither the workers nor
    the order can change them. `datasets` distributes the shards over the workers of a DataLoader; with fewer shards
    than workers some stay idle. The order is that of `datasets`' shuffle buffer, a function of (`seed`, epoch, number
    of workers). Broken images are dropped.

    Args:
        dataset (`datasets.IterableDataset`): Stream with a column `image`, from `load_images(..., streaming=True)`.
        transform, seed: As in [`MultiViewDataset`]; the order depends on the seed too.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns, counts and drops; `"raise"` stops. Rows are counted within the worker's part of the stream.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Images that each worker holds in memory to shuffle among; 0 keeps the source's order.

    Attributes:
        repeat (`bool`, defaults to `False`):
            Repeat the stream without end, each pass as the next epoch. The pretraining trainers turn it on.

    Raises:
        ValueError: If there are no images or no column `image`, `on_broken_image` is unknown, or the buffer negative.
        BrokenImageError: While reading, for a broken image under `"raise"`, or under `"skip"` if 1000 in succession,
            or all of a worker's part, are broken.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[Image.Image], dict[str, torch.Tensor]],
        *,
        seed: int = 0,
        on_broken_image: str = "skip",
        shuffle_buffer: int = 1000,
    ):
        # one count per worker, as several cannot safely add to one number
        super().__init__(dataset, transform, seed, on_broken_image, num_counts=_MOST_WORKERS)
        self.shuffle_buffer = check_integer("shuffle_buffer", shuffle_buffer, 0, meaning="counts images")
        self.repeat = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for epoch in itertools.count(self.epoch):
            is_empty = True
            for views in self._pass(epoch):
                is_empty = False
                yield views
            if is_empty or not self.repeat:  # a worker without a shard would repeat without end
                return

    def _pass(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id
        self._broken[place] = 0
        dataset = self._dataset
        if self.shuffle_buffer > 0:
            # not `datasets`' own epoch, which all workers share: they do not reach the next pass at the same time
            dataset = dataset.shuffle(seed=hash_numbers(self.seed, epoch) >> 32, buffer_size=self.shuffle_buffer)
        row, in_succession, last = -1, 0, None
        for row, value in enumerate(dataset):
            value = value["image"]
            decode = functools.partial(decode_reduced_image, value, row=row)
            try:
                views = self._views(decode, hash_numbers(self.seed, epoch, _fingerprint(value)))
            except BrokenImageError as error:
                if self.on_broken_image == "raise":
                    raise
                logger.warning("Skipped: %s", error)
                self._broken[place] += 1
                in_succession, last = in_succession + 1, error
                if in_succession == _MOST_BROKEN_IN_SUCCESSION:
                    break
                continue
            in_succession = 0
            yield views
        if row < 0 and worker is None:
            raise ValueError("The stream must have at least one image, but has none. Check the source and the split.")
        if in_succession > 0 and in_succession in (row + 1, _MOST_BROKEN_IN_SUCCESSION):
            raise BrokenImageError(
                f"none of {in_succession} images in succession is readable; the last: {last.reason}",
                row=last.row,
                path=last.path,
            ) from last


def as_crops(dataset: Any) -> Any:
    """Return the same dataset with uint8 crops and parameters as items, to be finished by its transform.

    The two share epoch and count of broken images. A quarter of the bytes passes through the workers' memory, and
    colour and blur are left to the device of the batch: `dataset.transform.finish(batch)`.

    Raises:
        ValueError: If the transform is no [`~hf_msn.MultiViewTransform`], or a subclass that makes the views itself.
    """
    if not gives_crops(dataset.transform):
        raise ValueError(
            "The transform of crops must be a `MultiViewTransform` that does not override how views are drawn, but is "
            f"{type(dataset.transform).__name__}. Use the dataset as it is."
        )
    cut = copy.copy(dataset)
    cut.gives_crops = True
    return cut


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for the views of one image, and restore its state after them."""
    # torch.manual_seed would seed the accelerators too; a view needs the CPU's generator alone
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def hash_numbers(*numbers: int) -> int:
    """Mix integers into 64 bits with SplitMix64's finaliser, so that neighbouring rows get unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _fingerprint(value: dict) -> int:
    path = zlib.crc32((value.get("path") or "").encode())
    return path << 32 | zlib.crc32(value.get("bytes") or b"")
