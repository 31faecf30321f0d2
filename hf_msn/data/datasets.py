"""Datasets of views, which a DataLoader reads in pretraining."""

import contextlib
import copy
import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..checks import check_choice, check_integer
from .columns import undecoded
from .decoding import BrokenImageError, Decoded, decode_reduced_image
from .labels import class_names
from .map_style import AnyDataset
from .transforms import DrawnViews, gives_crops

logger = logging.get_logger(__name__)

_READABLE, _BROKEN = 1, 2  # states of a row; 0: not read yet
_FIRST_COUNT, _MANY_BROKEN = 10, 0.05  # number and share of broken images from which on a run says so
_ROWS_AHEAD = 1024
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
    """The encoded images of a dataset and the views drawn from them: the common part of the datasets of views."""

    dataset_class: type[AnyDataset]
    transform_method = "__call__"  # makes the views of one image

    def __init__(self, dataset, transform, seed: int, on_broken_image: str):
        check_choice("on_broken_image", on_broken_image, ("skip", "raise"))
        check_integer("seed", seed, 0)
        if not callable(getattr(transform, self.transform_method, None)):
            raise ValueError(
                f"`transform` must have the method `{self.transform_method}`, as a MultiViewTransform has, but is "
                f"{transform!r:.80}. Pass one, such as `MultiViewTransform()`."
            )
        dataset = undecoded(dataset)
        if not isinstance(dataset, self.dataset_class):
            raise ValueError(
                f"`dataset` must be a `{self.dataset_class.__name__}` for a {type(self).__name__}, but is a "
                f"`{type(dataset).__name__}`. Use `multi_view_dataset`, which takes both kinds."
            )
        self.class_names = class_names(dataset)  # from the features: no label is read
        self._dataset = dataset.with_format(None).select_columns("image")
        self.info, self.split = self._dataset.info, self._dataset.split
        self.transform = transform
        self.seed = seed
        self.on_broken_image = on_broken_image
        self.gives_crops = False
        self._says_many_broken = torch.zeros((), dtype=torch.bool).share_memory_()  # once for all workers

    @functools.cached_property
    def sample_sha256(self) -> str | None:
        """SHA-256 of the files of 16 images: the same wherever the data set lies.

        They are the first ones of a stream, and lie from the first to the last of other data. `None` if none of them
        can be read as a file.
        """
        digest, is_read = hashlib.sha256(), False
        for row in self._sample():
            value = row["image"] or {}
            with contextlib.suppress(OSError, TypeError):  # a row without a readable file
                digest.update(value.get("bytes") or Path(value.get("path", "")).read_bytes())
                is_read = True
        return digest.hexdigest() if is_read else None

    def _sample(self) -> Iterator[dict]:
        """Return the rows of 16 images."""
        raise NotImplementedError

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

    def _warn_of_many_broken(self, num_broken: int, num_read: int) -> None:
        if num_broken >= _FIRST_COUNT and num_broken >= _MANY_BROKEN * num_read and not self._says_many_broken:
            self._says_many_broken.fill_(True)
            logger.warning(
                "%d of the first %d images cannot be read (%.0f %%). They are skipped; the count goes on in the log.",
                *(num_broken, num_read, 100 * num_broken / num_read),
            )


class RowImages(EncodedImages):
    """Images with row numbers, whose broken rows are remembered and not decoded again."""

    dataset_class = datasets.Dataset
    rows: Sequence[int] | np.ndarray  # of the source, by position

    def __init__(self, dataset, transform, seed: int, on_broken_image: str):
        super().__init__(dataset, transform, seed, on_broken_image)
        # shared memory: all processes see what one of them found broken
        self._states = torch.zeros(len(self._dataset), dtype=torch.uint8).share_memory_()

    @property
    def is_broken(self) -> torch.Tensor:
        """For each position, whether its image was found broken so far, by all workers of this process: (N,), bool."""
        return self._states == _BROKEN

    @property
    def num_broken(self) -> int:
        """Number of images found broken so far, by all workers of this process."""
        return int(self.is_broken.sum())

    def _sample(self) -> Iterator[dict]:
        last = len(self._dataset) - 1
        return (self._dataset[row] for row in sorted({last * part // 15 for part in range(16)}))

    def _first_readable(self, position: int, value: dict, others: Iterable[np.ndarray], reduction) -> Decoded | None:
        """Decode the image at a position, which holds `value`, or the first readable one of `others`, in chunks."""
        states = self._states.numpy()
        if states[position] != _BROKEN and (decoded := self._decoded(position, value, reduction)) is not None:
            return decoded
        for positions in others:
            for other in positions[states[positions] != _BROKEN].tolist():
                if (decoded := self._decoded(other, self._dataset[other]["image"], reduction)) is not None:
                    return decoded
        return None

    def _decoded(self, position: int, value: dict, reduction) -> Decoded | None:
        try:
            decoded = decode_reduced_image(value, reduction, row=int(self.rows[position]))
            self._states[position] = _READABLE
            return decoded
        except BrokenImageError as error:
            if self.on_broken_image == "raise":
                raise
            self._states[position] = _BROKEN
            logger.warning("Skipped: %s", error)
            self._warn_of_many_broken(self.num_broken, int((self._states > 0).sum()))
            return None


class _Epochs:
    def __init__(self, *args):
        super().__init__(*args)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Select the views (of a stream, the order too) of an epoch, also in running workers. Trainer calls it."""
        self._epoch.fill_(epoch)


class MultiViewDataset(_Epochs, RowImages, torch.utils.data.Dataset):
    """The views of each image of a dataset. Labels are not read.

    The views of row i in epoch e depend on (`seed`, e, i) alone: the three are hashed into the seed of torch's
    generator, whose state is restored after the row. The number of workers, the order, the rank and a resumed run
    cannot change them. An unreadable image is replaced by the next readable row, so that batches keep their size.

    Args:
        dataset (`datasets.Dataset`):
            Dataset with a column `image`, from [`~hf_msn.load_images`]. Other map-style datasets are read too:
            torchvision's `ImageFolder` (as its files) and others, `torch.utils.data.Subset`, a list; see
            [`~hf_msn.data.map_style.image_dataset`].
        transform (`Callable`): Makes the views of one image from torch's global generator.
        seed (`int`, *optional*, defaults to 0): Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns once per broken row, counts it, does not decode it again and takes the next readable one;
            `"raise"` stops.

    Raises:
        ValueError: If there are no rows or no column `image`, the dataset is of no known kind, or `on_broken_image` is
            unknown.
        BrokenImageError: While reading, for a broken image under `"raise"`, or under `"skip"` if none of the rows is
            readable.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[[Image.Image], dict[str, torch.Tensor]],
        *,
        seed: int = 0,
        on_broken_image: str = "skip",
    ):
        super().__init__(dataset, transform, seed, on_broken_image)
        self.rows = range(len(self._dataset))

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

    def _readable(self, row: int, value, reduction=None) -> Decoded:
        starts = range(row + 1, row + len(self), _ROWS_AHEAD)
        later = (np.arange(start, min(start + _ROWS_AHEAD, row + len(self))) % len(self) for start in starts)
        decoded = self._first_readable(row, value, later, reduction)
        if decoded is None:
            raise BrokenImageError(f"none of {len(self)} rows is readable", row=row, path=(value or {}).get("path"))
        return decoded


class StreamingMultiViewDataset(_Epochs, EncodedImages, torch.utils.data.IterableDataset):
    """The views of each image of a stream. Labels are not read.

    The views of an image depend on (`seed`, epoch, the image's path and bytes) alone, so that neither the workers nor
    the order can change them. `datasets` distributes the shards over the workers of a DataLoader; with fewer shards
    than workers some stay idle. The order is that of `datasets`' shuffle buffer, a function of (`seed`, epoch, number
    of workers). Broken images are dropped.

    Args:
        dataset (`datasets.IterableDataset`): Stream with a column `image`, from `load_images(..., streaming=True)`.
        transform, seed: As in [`MultiViewDataset`]; the order depends on the seed too.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns once per image, counts and drops; `"raise"` stops. Rows are counted within the worker's part
            of the stream.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Images that each worker holds in memory to shuffle among; 0 keeps the source's order.

    Attributes:
        repeat (`bool`, defaults to `False`):
            Repeat the stream without end, each pass as the next epoch. The pretraining trainers turn it on.

    Raises:
        ValueError: If there are no images or no column `image`, `on_broken_image` is unknown, or the buffer negative.
        BrokenImageError: While reading, for a broken image under `"raise"`, or under `"skip"` if all of a worker's
            part are broken.
    """

    dataset_class = datasets.IterableDataset

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[Image.Image], dict[str, torch.Tensor]],
        *,
        seed: int = 0,
        on_broken_image: str = "skip",
        shuffle_buffer: int = 1000,
    ):
        super().__init__(dataset, transform, seed, on_broken_image)
        # one count per worker, as several cannot safely add to one number
        self._broken = torch.zeros(_MOST_WORKERS, dtype=torch.int64).share_memory_()
        self._known_broken: set[int] = set()  # to this worker
        self.shuffle_buffer = check_integer("shuffle_buffer", shuffle_buffer, 0, meaning="counts images")
        self.repeat = False

    @property
    def num_broken(self) -> int:
        """Number of images found broken in the current pass, by all workers of this process."""
        return int(self._broken.sum())

    @property
    def num_shards(self) -> int:
        """Number of shards of the stream."""
        return self._dataset.num_shards

    def _sample(self) -> Iterator[dict]:
        return itertools.islice(self._dataset, 16)

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
        row, num_broken = -1, 0
        for row, value in enumerate(dataset):
            value = value["image"]
            content = _fingerprint(value)
            if content not in self._known_broken:
                decode = functools.partial(decode_reduced_image, value, row=row)
                try:
                    views = self._views(decode, hash_numbers(self.seed, epoch, content))
                except BrokenImageError as error:
                    if self.on_broken_image == "raise":
                        raise
                    logger.warning("Skipped: %s", error)
                    self._known_broken.add(content)
                else:
                    yield views
                    continue
            num_broken += 1
            self._broken[place] = num_broken
            self._warn_of_many_broken(num_broken, row + 1)
        if row < 0 and worker is None:
            raise ValueError("The stream must have at least one image, but has none. Check the source and the split.")
        if row >= 0 and num_broken == row + 1:
            raise BrokenImageError(f"none of {num_broken} images is readable", row=row, path=value.get("path"))


class MultiViewCollator:
    """Stack the views of B images into the batch that the model takes."""

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` (B, C, H, W), `anchor_pixel_values` (B, V, C, H, W) and, with focal views,
        `focal_pixel_values` (B, F, C, h, w). Crops are (B, ..., H, W, 3), with `view_parameters` (B, 1 + V + F, 12).

        Raises:
            ValueError: If the items are not dicts of views, or have different names.
        """
        if not isinstance(items[0], Mapping) or "pixel_values" not in items[0]:
            found = sorted(items[0]) if isinstance(items[0], Mapping) else type(items[0]).__name__
            raise ValueError(
                f"Each item of the data set must be a dict of views with `pixel_values`, but one is {found}. Wrap the "
                "images: `MultiViewDataset(images, transform)`."
            )
        for item in items:
            if item.keys() != items[0].keys():
                raise ValueError(
                    f"All images of a batch must have the same views, but one has {sorted(item)} and another "
                    f"{sorted(items[0])}. Use one transform."
                )
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


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
