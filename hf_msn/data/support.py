"""The labelled images of a step: the support set of PAWS and SuNCEt, read without a look at any other label."""

import functools
import logging
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch
from PIL import Image

from .datasets import encoded_images, hash_numbers, seeded, views_of
from .decoding import BrokenImageError, decode_reduced_image
from .labels import class_names, class_numbers, labelled_rows
from .samplers import ClassStratifiedSampler
from .transforms import MultiViewTransform, gives_crops

logger = logging.getLogger(__name__)

SupportKey = tuple[int, int, int]


class SupportDataset(torch.utils.data.Dataset):
    """The views and the class of each labelled image. The label of a row that is not among `rows` is never read.

    An image is asked for by its position in `rows`, or by a key (step, place in the global support, position) as
    [`SupportBatches`] makes them. Its views depend on (`seed`, step, place, row) alone: the number of workers or
    ranks, the order and a resumed run cannot change them, and an image that is twice in a support gets other views.
    A position alone means step 0 and place 0.

    An unreadable image is replaced by the next readable one of its class, so that the support keeps its classes.

    Args:
        dataset (`datasets.Dataset`):
            Data set with the columns `image` and `label`, as [`~hf_msn.data.load_images`] gives it.
        rows (`Sequence[int]`, `Sequence[bool]` or `numpy.ndarray`):
            The labelled rows: their numbers, or a mask; see [`~hf_msn.data.labelled_rows`].
        transform ([`~hf_msn.data.MultiViewTransform`]):
            Its `global_views` makes the views.
        views_per_image (`int`, *optional*, defaults to 1):
            Views V of each image.
        seed (`int`, *optional*, defaults to 0):
            Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`):
            `"skip"` warns once for each broken row, counts it and takes the next readable one of its class; `"raise"`
            stops.

    Attributes:
        rows (`numpy.ndarray`):
            The labelled rows, (N,), ascending, int64.
        labels (`numpy.ndarray`):
            Their class numbers, (N,), int64.
        class_names (`list[str]`, *optional*):
            Names by class number, where the data set has them.

    Raises:
        ValueError: no labelled row, rows that are not there, no column `image` or `label`, a label of these rows that
            is no class number or beyond the names, `views_per_image` < 1, another `on_broken_image`.
        BrokenImageError: while reading: a broken image under `"raise"`, or under `"skip"` a class without any image
            that can be read.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        rows: Sequence[int] | Sequence[bool] | np.ndarray,
        transform: MultiViewTransform,
        *,
        views_per_image: int = 1,
        seed: int = 0,
        on_broken_image: str = "skip",
    ):
        if views_per_image < 1:
            raise ValueError(f"`views_per_image` is a number of views and must be >= 1, but is {views_per_image}.")
        self.rows = labelled_rows(dataset, mask=rows)
        self.labels = class_numbers(dataset, self.rows)
        self.class_names = class_names(dataset)
        self._dataset = encoded_images(dataset.select(self.rows), seed, on_broken_image)
        self.info, self.split = self._dataset.info, self._dataset.split
        self.transform = transform
        self.views_per_image = views_per_image
        self.seed = seed
        self.on_broken_image = on_broken_image
        self.gives_crops = False
        # shared memory: the main process sees what the workers found broken
        self._is_broken = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_broken(self) -> int:
        """Number of labelled rows found broken so far, by all workers of this process."""
        return int(self._is_broken.sum())

    def __getitem__(self, key: int | SupportKey) -> dict[str, torch.Tensor | int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SupportKey]) -> list[dict[str, torch.Tensor | int]]:
        """Reads a batch, which is what a DataLoader calls: one access to the table instead of one for each image.

        Args:
            keys (`Sequence[tuple[int, int, int]]` or `Sequence[int]`):
                (step, place in the global support, position) of each image, or its position alone.

        Returns:
            For each key, `support_pixel_values` (V, 3, H, H) and `support_labels`, the class number.
        """
        keys = [self._key(key) for key in keys]
        values = self._dataset[[position for _, _, position in keys]]["image"]
        return [self._item(*key, value) for key, value in zip(keys, values)]

    def _key(self, key: int | SupportKey) -> SupportKey:
        step, place, position = key if isinstance(key, tuple | list) else (0, 0, key)
        position = int(position)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Position {position} is not there; the support has {len(self)} labelled images.")
        return int(step), int(place), position % len(self)

    def _item(self, step: int, place: int, position: int, value) -> dict[str, torch.Tensor | int]:
        seed = hash_numbers(self.seed, step, place, int(self.rows[position]))
        if gives_crops(self.transform):
            draw = functools.partial(self.transform.draw_support, self.views_per_image)
            decode = functools.partial(self._readable_image, position, value)
            views = views_of(self.transform, decode, seed, self.gives_crops, draw)
        else:
            image, _ = self._readable_image(position, value)
            with seeded(seed):
                views = {"support_pixel_values": self.transform.global_views(image, self.views_per_image)}
        return {**views, "support_labels": int(self.labels[position])}

    def _readable_image(self, position: int, value, reduction=None) -> tuple[Image.Image, tuple[int, int]]:
        image = self._decoded(position, value, reduction)
        if image is not None:
            return image
        of_class = np.flatnonzero(self.labels == self.labels[position])
        start = int(np.searchsorted(of_class, position))
        for candidate in np.roll(of_class, -start).tolist()[1:]:
            image = self._decoded(candidate, self._dataset[candidate]["image"], reduction)
            if image is not None:
                return image
        number = int(self.labels[position])
        name = f"class {number}" if self.class_names is None else f"class {number} ('{self.class_names[number]}')"
        raise BrokenImageError(
            f"no labelled image of {name} can be read ({len(of_class)} tried, this one the first)",
            row=int(self.rows[position]),
            path=(value or {}).get("path"),
        )

    def _decoded(self, position: int, value: dict, reduction) -> tuple[Image.Image, tuple[int, int]] | None:
        try:
            return decode_reduced_image(value, reduction, row=int(self.rows[position]))
        except BrokenImageError as error:
            if self.on_broken_image == "raise":
                raise
            if not self._is_broken[position]:
                self._is_broken[position] = True
                logger.warning("Skipped: %s", error)
            return None


class SupportBatches(torch.utils.data.Sampler[list[SupportKey]]):
    """Turns the rows of a [`ClassStratifiedSampler`] into the keys of a [`SupportDataset`]: a batch sampler.

    Args:
        sampler ([`ClassStratifiedSampler`]):
            Draws each step's rows.
    """

    def __init__(self, sampler: ClassStratifiedSampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[SupportKey]]:
        places = self.sampler.places.tolist()
        for step in self.sampler.steps():
            yield [(step, place, position) for place, position in zip(places, self.sampler.batch(step))]


class SupportCollator:
    """Stacks the views of S support images into the support of a batch, the views of one image next to each other.

    Example:

    ```python
    >>> batch = SupportCollator()([support[0], support[1]])
    >>> batch["support_pixel_values"].shape, batch["support_labels"]
    (torch.Size([4, 3, 224, 224]), tensor([7, 7, 2, 2]))
    ```
    """

    def __call__(self, items: Sequence[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
        """
        Args:
            items (`Sequence[dict]`):
                What [`SupportDataset`] gives for each image.

        Returns:
            `dict[str, torch.Tensor]`: `support_pixel_values` (S * V, C, H, W) and `support_labels` (S * V,), int64.

        Raises:
            ValueError: no items, or items whose views have different shapes.
        """
        if not items:
            raise ValueError("A support needs at least one image, but the list of items is empty.")
        shape = items[0]["support_pixel_values"].shape
        for position, item in enumerate(items):
            if item["support_pixel_values"].shape != shape:
                raise ValueError(
                    f"`support_pixel_values` of item {position} has shape "
                    f"{tuple(item['support_pixel_values'].shape)}, but that of item 0 has {tuple(shape)}; all images "
                    "of a support need the same views: use one transform."
                )
        labels = torch.tensor([item["support_labels"] for item in items], dtype=torch.int64)
        names = [name for name in items[0] if name != "support_labels"]  # parameters too, where views are unfinished
        return {
            **{name: torch.cat([item[name] for item in items]) for name in names},
            "support_labels": labels.repeat_interleave(shape[0]),
        }


def support_loader(
    support: SupportDataset,
    sampler: ClassStratifiedSampler,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> torch.utils.data.DataLoader:
    """Makes the loader of this rank's supports, one a step from the sampler's `start_step` on.

    It is shared out over the ranks already: do not hand it to `accelerator.prepare`. Torch's generator is left alone.

    Args:
        support ([`SupportDataset`]):
            The labelled images.
        sampler ([`ClassStratifiedSampler`]):
            Draws from `support.labels`.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that read ahead; they do not change the batches.
        pin_memory (`bool`, *optional*, defaults to `False`):
            Puts the batches into page-locked memory, from which they are copied to a GPU faster.

    Returns:
        `torch.utils.data.DataLoader`: gives `support_pixel_values` (S * V, 3, H, H) and `support_labels` (S * V,).

    Raises:
        ValueError: the sampler draws from other labels than the support's.
    """
    if not np.array_equal(sampler.labels, support.labels):
        raise ValueError(
            f"The sampler draws from {len(sampler.labels)} labels that are not those of the support's {len(support)} "
            "images; make it from `support.labels`."
        )
    return torch.utils.data.DataLoader(
        support,
        batch_sampler=SupportBatches(sampler),
        num_workers=num_workers,
        collate_fn=SupportCollator(),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # a loader takes its workers' seed from torch's generator, and would move what the run draws next
        generator=torch.Generator().manual_seed(support.seed),
    )
