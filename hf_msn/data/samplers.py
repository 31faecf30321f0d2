"""Draw the labelled images of each step: the support set, class by class."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..checks import check_choice, check_integer
from ..distributed import collectives
from .splits import check_labels, first_few, random_stream

# low_shot_indices draws from (seed, class): a third number separates the steps' streams from those
_STREAM = 1


class ClassStratifiedSampler(torch.utils.data.Sampler[list[int]]):
    """Draw the support set of each step: `global_classes` classes, `global_images_per_class` images of each.

    Both numbers count the support over ALL ranks, whatever the number of ranks. The draw of a step is a function of
    (`seed`, step) alone: a resumed run begins at its step and replays nothing, and the ranks together draw the same
    as one rank alone. The classes take turns, in an order that is drawn anew for each cycle: with N classes, each
    ceil(N / `global_classes`) steps have all of them, however many images they have. Each image of a class is drawn
    equally often.

    Of a class with n < k images, all n are drawn floor(k / n) times, and k mod n different ones once more.

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each labelled image, (N,), such as `SupportDataset.labels`; any integers >= 0.
        global_classes (`int`, *optional*): Different classes C in a step's support, over all ranks. By default all.
        global_images_per_class (`int`): Images k of each of these classes, over all ranks.
        shard (`str`, *optional*, defaults to `"classes"`):
            `"classes"`: each rank holds C / ranks classes of its own, with all k images. `"images"`: every rank holds
            all C classes, with k / ranks images of each.
        on_small_class (`str`, *optional*, defaults to `"repeat"`):
            `"repeat"` repeats the images of classes with fewer than k (see above); `"raise"` raises.
        seed (`int`, *optional*, defaults to 0): Seed of the draws, the same on every rank.
        rank, world_size (`int`, *optional*):
            This rank and the number of ranks; by default those of `torch.distributed`.
        num_steps (`int`, *optional*): Steps to yield. By default infinite.
        start_step (`int`, *optional*, defaults to 0): First step to yield: in a resumed run, the number of steps done.

    Attributes:
        places (`numpy.ndarray`):
            Place in the global support of each row of this rank's batch, (S,): the same in every step.

    Raises:
        ValueError: If labels are not class numbers, an argument is out of range, C or k is not divisible by the ranks,
            or a class has fewer than k images under `"raise"` (up to five are named).
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        global_classes: int | None = None,
        global_images_per_class: int,
        shard: str = "classes",
        on_small_class: str = "repeat",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_steps: int | None = None,
        start_step: int = 0,
    ):
        self.labels = check_labels(labels)
        classes, counts = np.unique(self.labels, return_counts=True)
        self.class_sizes = dict(zip(classes.tolist(), counts.tolist()))
        self._rows = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])
        self.world_size = collectives.world_size() if world_size is None else world_size
        self.rank = collectives.rank() if rank is None else rank
        self.global_classes = len(classes) if global_classes is None else global_classes
        self.global_images_per_class = global_images_per_class
        self.shard = shard
        self.seed = seed
        self.num_steps = num_steps
        self.start_step = start_step
        self._check_settings()
        per_class = global_images_per_class
        small = [f"{number} has {count}" for number, count in self.class_sizes.items() if count < per_class]
        if check_choice("on_small_class", on_small_class, ("repeat", "raise")) == "raise" and small:
            raise ValueError(
                f"Each class must have at least `global_images_per_class` = {per_class} labelled images, but "
                f"{len(small)} have fewer: {first_few(small)}. Label more, or use on_small_class='repeat'."
            )
        self._num_small = len(small)

        places = np.arange(self.global_classes * global_images_per_class).reshape(-1, global_images_per_class)
        self.places = np.array_split(places, self.world_size, axis=0 if shard == "classes" else 1)[self.rank].ravel()

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("A ClassStratifiedSampler without `num_steps` is infinite and has no length.")
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield self.batch(step)

    def steps(self) -> Iterator[int]:
        """Return the numbers of the steps to yield: `start_step`, `start_step + 1`, ..."""
        return itertools.islice(itertools.count(self.start_step), self.num_steps)

    def batch(self, step: int) -> list[int]:
        """Return this rank's part of a step's support: positions in `labels`, whose places in it are `places`."""
        num_classes, drawn_classes = len(self._rows), self.global_classes
        random = random_stream(self.seed, step, _STREAM)
        order = random.permutation(num_classes)
        turn = step % -(-num_classes // drawn_classes)
        if turn:
            first = random_stream(self.seed, step - turn, _STREAM)  # of the cycle
            order = first.permutation(num_classes)
        drawn = order.take(range(turn * drawn_classes, (turn + 1) * drawn_classes), mode="wrap")
        # resize repeats the shuffled class if it is too small
        rows = [np.resize(random.permutation(self._rows[number]), self.global_images_per_class) for number in drawn]
        return np.concatenate(rows)[self.places].tolist()

    def describe(self, views_per_image: int) -> str:
        """Return the global support in one line, for the log."""

        def size(classes: int, images: int) -> str:
            product = classes * images * views_per_image
            return f"{classes} classes x {images} images x {views_per_image} views = {product}"

        classes, images, ranks = self.global_classes, self.global_images_per_class, self.world_size
        text = f"Support of each step: {size(classes, images)} images"
        if ranks > 1:
            part = (classes // ranks, images) if self.shard == "classes" else (classes, images // ranks)
            text += f" over all {ranks} ranks, {size(*part)} on each (shard='{self.shard}')"
        sizes = self.class_sizes.values()
        text += (
            f". Labelled images: {len(self.labels)} of {len(sizes)} classes, {min(sizes)} to {max(sizes)} per class."
        )
        if self._num_small:
            text += f" Classes with fewer than {images}: {self._num_small}; their images repeat, with different views."
        return text

    def _check_settings(self) -> None:
        check_choice("shard", self.shard, ("classes", "images"))
        check_integer("global_classes", self.global_classes)
        check_integer("global_images_per_class", self.global_images_per_class)
        check_integer("seed", self.seed, 0)
        check_integer("start_step", self.start_step, 0)
        if self.num_steps is not None:
            check_integer("num_steps", self.num_steps, 0)
        if self.global_classes > len(self._rows):
            raise ValueError(
                f"`global_classes` must be at most {len(self._rows)}, the classes of the labelled images, but is "
                f"{self.global_classes}."
            )
        by_class = self.shard == "classes"
        name, other = ("global_classes", "images") if by_class else ("global_images_per_class", "classes")
        value, ranks = getattr(self, name), self.world_size
        if value % ranks:
            raise ValueError(
                f"`{name}` must be divisible by the {ranks} ranks with shard='{self.shard}', but is {value}. Use "
                f"{max(value // ranks, 1) * ranks}, or shard='{other}'."
            )
