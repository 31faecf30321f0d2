"""Data sets of views: what a DataLoader reads in pretraining."""

import contextlib
import copy
import functools
import itertools
import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from PIL import Image

from .decoding import BrokenImageError, decode_reduced_image
from .drawn_views import DrawnViews
from .labels import class_names
from .transforms import gives_crops

logger = logging.getLogger(__name__)

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
    """Makes the data set of views: [`MultiViewDataset`], or [`StreamingMultiViewDataset`] for a streamed source.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Result of [`~hf_msn.data.load_images`].
        transform (`Callable`):
            Makes the views of one image, such as [`~hf_msn.data.MultiViewTransform`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` or `"raise"`.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Images among which a streamed source is shuffled; 0 keeps the source's order. Others are shuffled by their
            sampler.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return StreamingMultiViewDataset(
            dataset, transform, seed=seed, on_broken_image=on_broken_image, shuffle_buffer=shuffle_buffer
        )
    return MultiViewDataset(dataset, transform, seed=seed, on_broken_image=on_broken_image)


class MultiViewDataset(torch.utils.data.Dataset):
    """The views of each image of a data set; labels are not read.

    The views of row i in epoch e depend on (`seed`, e, i) alone: the three are hashed into the seed of torch's
    generator, whose state is put back after the row. The number of workers, the order, the rank and a resumed run
    cannot change them. An unreadable image is replaced by the next readable row, so that batches keep their size.

    Args:
        dataset (`datasets.Dataset`):
            Data set with a column `image`, as [`~hf_msn.data.load_images`] gives it.
        transform (`Callable`):
            Makes the views of one image from torch's global generator.
        seed (`int`, *optional*, defaults to 0):
            Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns once for each broken row, counts it and takes the next readable one; `"raise"` stops.

    Raises:
        ValueError: no rows, no column `image`, another `on_broken_image`.
        BrokenImageError: while reading: a broken image under `"raise"`, or under `"skip"` none of the rows (or of 1000
            in succession) can be read.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[[Image.Image], dict[str, torch.Tensor]],
        *,
        seed: int = 0,
        on_broken_image: str = "skip",
    ):
        self._dataset = encoded_images(dataset, seed, on_broken_image)
        self.info, self.split = self._dataset.info, self._dataset.split
        if len(dataset) == 0:
            raise ValueError("The data set has no images, but at least one is needed; check the source and the split.")
        self.class_names = class_names(dataset)  # what the labels would mean, without a look at one
        self.transform = transform
        self.seed = seed
        self.on_broken_image = on_broken_image
        self.gives_crops = False
        # shared memory: workers that outlive an epoch see its number, and the main process what they found broken
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._is_broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the views of an epoch, in running workers too; Trainer and Accelerate call it."""
        self._epoch.fill_(epoch)

    @property
    def num_broken(self) -> int:
        """Number of rows found broken so far, by all workers of this process."""
        return int(self._is_broken.sum())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """Reads a batch of rows, which is what a DataLoader calls: one access to the table instead of one for each."""
        indices = [self._row(index) for index in indices]
        values = self._dataset[indices]["image"]
        return [self._views(row, value) for row, value in zip(indices, values)]

    def _row(self, index: int) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} is not there; the data set has {len(self)} rows.")
        return index % len(self)

    def _views(self, row: int, value) -> dict[str, torch.Tensor]:
        def readable(reduction=None):
            return self._readable_image(row, value, reduction)

        return views_of(self.transform, readable, hash_numbers(self.seed, self.epoch, row), self.gives_crops)

    def _readable_image(self, row: int, value, reduction) -> tuple[Image.Image, tuple[int, int]]:
        limit = min(len(self), _MOST_BROKEN_IN_SUCCESSION)
        for step in range(limit):
            candidate = (row + step) % len(self)
            try:
                encoded = value if step == 0 else self._dataset[candidate]["image"]
                return decode_reduced_image(encoded, reduction, row=candidate)
            except BrokenImageError as error:
                if self.on_broken_image == "raise":
                    raise
                last = error
                if not self._is_broken[candidate]:
                    self._is_broken[candidate] = True
                    logger.warning("Skipped: %s", error)
        which = "no image of the data set" if limit == len(self) else f"none of {limit} rows in succession"
        raise BrokenImageError(f"{which} can be read; this one: {last.reason}", row=last.row, path=last.path) from last


class StreamingMultiViewDataset(torch.utils.data.IterableDataset):
    """The views of each image of a stream; labels are not read.

    The views of an image depend on (`seed`, epoch, the image's path and bytes) alone, so that neither the workers nor
    the order can change them. `datasets` shares the shards out over the workers of a DataLoader; with fewer shards
    than workers some stay idle. The order is that of `datasets`' shuffle buffer, a function of (`seed`, epoch, number
    of workers). Broken images are dropped.

    Args:
        dataset (`datasets.IterableDataset`):
            Stream with a column `image`, as `load_images(..., streaming=True)` gives it.
        transform (`Callable`):
            Makes the views of one image from torch's global generator.
        seed (`int`, *optional*, defaults to 0):
            Seed of the views and of the order.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns, counts and drops; `"raise"` stops. The row in the message counts within the worker's part
            of the stream.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Images held in memory by each worker to shuffle among; 0 keeps the source's order.

    Attributes:
        repeat (`bool`, defaults to `False`):
            Go through the stream again and again, each pass as the next epoch. The pretraining trainers turn it on:
            batches are then all whole, and a resumed run finds its place by counting batches.

    Raises:
        ValueError: no images, no column `image`, another `on_broken_image`, a negative buffer.
        BrokenImageError: while reading: a broken image under `"raise"`, or under `"skip"` 1000 in succession, or all
            of a worker's part.
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
        self._dataset = encoded_images(dataset, seed, on_broken_image)
        self.info, self.split = self._dataset.info, self._dataset.split
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` is a number of images and must be >= 0, but is {shuffle_buffer}.")
        self.shuffle_buffer = shuffle_buffer
        self.repeat = False
        self.class_names = class_names(dataset)  # what the labels would mean, without a look at one
        self.transform = transform
        self.seed = seed
        self.on_broken_image = on_broken_image
        self.gives_crops = False
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # one place for each worker, as adding to a shared number from several is not safe
        self._broken = torch.zeros(_MOST_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the views and the order of an epoch, in running workers too; Trainer and Accelerate call it."""
        self._epoch.fill_(epoch)

    @property
    def num_broken(self) -> int:
        """Number of images found broken since the last pass began, by all workers of this process."""
        return int(self._broken.sum())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for epoch in itertools.count(self.epoch):
            some = False
            for views in self._pass(epoch):
                some = True
                yield views
            if not (self.repeat and some):  # a worker without a shard would go round for ever
                return

    def _pass(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id
        self._broken[place] = 0
        dataset = self._dataset
        if self.shuffle_buffer > 0:
            # not `datasets`' own epoch, which all workers share: they do not come to the next pass at the same time
            dataset = dataset.shuffle(seed=hash_numbers(self.seed, epoch) >> 32, buffer_size=self.shuffle_buffer)
        row, in_succession, last = -1, 0, None
        for row, value in enumerate(dataset):
            seed = hash_numbers(self.seed, epoch, _fingerprint(value["image"]))
            try:
                views = views_of(
                    self.transform,
                    functools.partial(decode_reduced_image, value["image"], row=row),
                    seed,
                    self.gives_crops,
                )
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
            raise ValueError("The stream has no images, but at least one is needed; check the source and the split.")
        if in_succession > 0 and in_succession in (row + 1, _MOST_BROKEN_IN_SUCCESSION):
            raise BrokenImageError(
                f"none of {in_succession} images in succession can be read; this one: {last.reason}",
                row=last.row,
                path=last.path,
            ) from last


def as_crops(dataset: Any) -> Any:
    """The same data set of views, but its items are uint8 crops and parameters, to be finished by its transform.

    The two share epoch and count of broken images. A quarter of the bytes goes through the workers' memory, and colour
    and blur are left to the device of the batch: `dataset.transform.finish(batch)`.

    Args:
        dataset ([`MultiViewDataset`], [`StreamingMultiViewDataset`] or [`SupportDataset`]):
            With a [`~hf_msn.data.MultiViewTransform`] for its transform.

    Raises:
        ValueError: another transform, or a subclass that makes the views itself.
    """
    if not gives_crops(dataset.transform):
        raise ValueError(
            f"Only the views of a `MultiViewTransform` can be cut in one place and finished in another, but the "
            f"transform is {type(dataset.transform).__name__}. Take the data set as it is."
        )
    cut = copy.copy(dataset)
    cut.gives_crops = True
    return cut


def views_of(
    transform: Callable[[Image.Image], dict[str, torch.Tensor]],
    decode: Callable[..., tuple[Image.Image, tuple[int, int]]],
    seed: int,
    as_crops: bool,
    draw: Callable[[], DrawnViews] | None = None,
) -> dict[str, torch.Tensor]:
    """The views of one image. What a [`~hf_msn.data.MultiViewTransform`] draws says how large the image is decoded.

    Args:
        transform (`Callable`):
            Makes the views of one image.
        decode (`Callable`):
            Reads the image, and takes the function that says how it may be reduced.
        seed (`int`):
            Seed of the views.
        as_crops (`bool`):
            Leave the views unfinished.
        draw (`Callable[[], DrawnViews]`, *optional*):
            Draws them, if not as `transform.draw` does.
    """
    if not gives_crops(transform):
        image, _ = decode()
        with seeded(seed):
            return transform(image)
    with seeded(seed):
        drawn = (draw or transform.draw)()
    crops = drawn.crops(*decode(drawn.reduction))
    return crops if as_crops else transform.finish(crops)


def encoded_images(dataset, seed: int, on_broken_image: str):
    """Checks the settings of a data set of views, and leaves of its columns only the undecoded images."""
    if on_broken_image not in ("skip", "raise"):
        raise ValueError(f"`on_broken_image` is 'skip' or 'raise', but is {on_broken_image!r}.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0, but is {seed}.")
    columns = list(dataset.features or ())
    if "image" not in columns:
        raise ValueError(
            f"The data set has no column 'image'; it has {', '.join(columns) or 'none that are known'}. "
            "Load it with `load_images`."
        )
    if isinstance(dataset.features["image"], datasets.Image) and dataset.features["image"].decode:
        # decoded by `datasets`, a broken image would end the run without its row
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return dataset.with_format(None).select_columns("image")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator for the views of one image, and puts its state back after them."""
    # torch.manual_seed would seed the accelerators too; a view needs the CPU's generator alone
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def hash_numbers(*numbers: int) -> int:
    """Mixes whole numbers into 64 bits by SplitMix64's finaliser, so that neighbouring rows get unrelated seeds."""
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
