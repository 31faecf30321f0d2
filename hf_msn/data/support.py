"""The support set of PAWS and SuNCEt: the views of the labelled images of a step. No other label is read."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ..checks import check_integer
from .datasets import RowImages, hash_numbers
from .decoding import BrokenImageError, Decoded
from .labels import class_names, class_numbers, labelled_rows
from .map_style import image_dataset
from .samplers import ClassStratifiedSampler
from .transforms import DrawnViews, MultiViewTransform

SupportKey = tuple[int, int, int]


class SupportDataset(RowImages, torch.utils.data.Dataset):
    """The views and the class of each labelled image. The label of a row that is not among `rows` is never read.

    An image is addressed by its position in `rows`, or by a key (step, place in the global support, position) from
    [`SupportBatches`]. Its views depend on (`seed`, step, place, row) alone: the number of workers or ranks, the order
    and a resumed run cannot change them, and an image that occurs twice in a support gets different views. A position
    alone means step 0 and place 0.

    An unreadable image is replaced by the next readable one of its class, so that the support keeps its classes.

    Args:
        dataset (`datasets.Dataset`): Dataset with the columns `image` and `label`, from [`~hf_msn.load_images`].
        rows (`Sequence[int]`, `Sequence[bool]` or `numpy.ndarray`):
            The labelled rows: their numbers, or a mask; see [`~hf_msn.labelled_rows`].
        transform ([`~hf_msn.MultiViewTransform`]): Its `global_views` makes the views.
        views_per_image (`int`, *optional*, defaults to 1): Views V per image.
        seed (`int`, *optional*, defaults to 0): Seed of the views.
        on_broken_image (`str`, *optional*, defaults to `"skip"`): As in [`~hf_msn.MultiViewDataset`].

    Attributes:
        rows (`numpy.ndarray`): The labelled rows, (N,), ascending, int64.
        labels (`numpy.ndarray`): Their class numbers, (N,), int64.
        class_names (`list[str]`, *optional*): Names by class number, if the dataset has them.

    Raises:
        ValueError: If a row does not exist, there is no labelled row or no column `image` or `label`, one of these
            labels is not a class number, `views_per_image` is below 1, or `on_broken_image` unknown.
        BrokenImageError: While reading, for a broken image under `"raise"`, or under `"skip"` for a class without any
            readable image.
    """

    transform_method = "global_views"

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
        self.views_per_image = check_integer("views_per_image", views_per_image, meaning="counts views")
        dataset = image_dataset(dataset)
        self.rows = labelled_rows(dataset, mask=rows)
        self.labels = class_numbers(dataset, self.rows)
        super().__init__(dataset.select(self.rows), transform, seed, on_broken_image)
        self.class_names = class_names(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | SupportKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SupportKey]) -> list[dict[str, Any]]:
        """Read a batch, as a DataLoader does: one access to the table instead of one per image.

        Returns per key `support_pixel_values` (V, 3, H, H) and `support_labels`, the class number.
        """
        whole = [key if isinstance(key, tuple | list) else (0, 0, key) for key in keys]
        drawn = [(int(step), int(place), range(len(self))[position]) for step, place, position in whole]
        values = self._dataset[[position for _, _, position in drawn]]["image"]
        items = []
        for (step, place, position), value in zip(drawn, values):
            seed = hash_numbers(self.seed, step, place, int(self.rows[position]))
            views = self._views(functools.partial(self._readable, position, value), seed)
            items.append({**views, "support_labels": int(self.labels[position])})
        return items

    def _draw(self) -> DrawnViews:
        return self.transform.draw_support(self.views_per_image)

    def _views_of_other_transform(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return {"support_pixel_values": self.transform.global_views(image, self.views_per_image)}

    def _readable(self, position: int, value, reduction=None) -> Decoded:
        of_class = np.flatnonzero(self.labels == self.labels[position])
        others = np.roll(of_class, -int(np.searchsorted(of_class, position)))[1:]
        decoded = self._first_readable(position, value, [others], reduction)
        if decoded is not None:
            return decoded
        number = int(self.labels[position])
        name = f"class {number}" if self.class_names is None else f"class {number} ('{self.class_names[number]}')"
        raise BrokenImageError(
            f"no labelled image of {name} is readable ({len(of_class)} tried, this one the first)",
            row=int(self.rows[position]),
            path=(value or {}).get("path"),
        )


class SupportBatches(torch.utils.data.Sampler[list[SupportKey]]):
    """A batch sampler: the rows of a [`ClassStratifiedSampler`] as keys of a [`SupportDataset`]."""

    def __init__(self, sampler: ClassStratifiedSampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[SupportKey]]:
        places = self.sampler.places.tolist()
        for step in self.sampler.steps():
            yield [(step, place, position) for place, position in zip(places, self.sampler.batch(step))]


class SupportCollator:
    """Stack the views of S support images into the support of a batch, the views of one image next to each other."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `support_pixel_values` (S * V, C, H, W) and `support_labels` (S * V,), int64."""
        labels = torch.tensor([item["support_labels"] for item in items], dtype=torch.int64)
        names = [name for name in items[0] if name != "support_labels"]  # of crops, the parameters too
        return {
            **{name: torch.cat([item[name] for item in items]) for name in names},
            "support_labels": labels.repeat_interleave(len(items[0]["support_pixel_values"])),
        }


def support_loader(
    support: SupportDataset, sampler: ClassStratifiedSampler, *, num_workers: int = 0, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Return the loader of this rank's supports, one per step, from the sampler's `start_step` on.

    It is sharded over the ranks already: do not pass it to `accelerator.prepare`. Torch's generator is left alone.

    Args:
        support ([`SupportDataset`]): The labelled images.
        sampler ([`ClassStratifiedSampler`]): Draws from `support.labels`.
        num_workers (`int`, *optional*, defaults to 0): Processes that read ahead; they do not change the batches.
        pin_memory (`bool`, *optional*, defaults to `False`): As in `torch.utils.data.DataLoader`.

    Returns:
        `torch.utils.data.DataLoader`: yields `support_pixel_values` (S * V, 3, H, H) and `support_labels` (S * V,).

    Raises:
        ValueError: If the sampler draws from other labels than the support's.
    """
    if not np.array_equal(sampler.labels, support.labels):
        raise ValueError(
            f"`sampler` must draw from the labels of the support's {len(support)} images, but draws from "
            f"{len(sampler.labels)} other labels. Make it from `support.labels`."
        )
    return torch.utils.data.DataLoader(
        support,
        batch_sampler=SupportBatches(sampler),
        num_workers=num_workers,
        collate_fn=SupportCollator(),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # a loader draws its workers' seed from torch's generator, which would change the draws of the run
        generator=torch.Generator().manual_seed(support.seed),
    )
