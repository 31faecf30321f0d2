"""Which labelled images a step sees: the support set, drawn class by class."""

import itertools
import numbers
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..distributed import collectives
from .labels import check_labels

_NUM_SHOWN = 5
# low_shot_indices draws from (seed, class): a third number keeps the steps' streams apart from those
_STREAM = 1


class ClassStratifiedSampler(torch.utils.data.Sampler[list[int]]):
    """Draws the support set of each step: `global_classes` classes, `global_images_per_class` images of each.

    Both numbers are of the support over ALL ranks, whatever the number of ranks. What a step draws is a function of
    (`seed`, step) alone, from a fresh generator: a resumed run begins at its step and replays nothing, and the ranks
    together draw what one rank would draw alone. Each class is drawn equally often, however many images it has, and
    of a class each image.

    A class with n < k images gives all n of them floor(k / n) times, and k mod n different ones once more.

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each labelled image, (N,), such as `SupportDataset.labels`; any whole numbers >= 0.
        global_classes (`int`, *optional*):
            Different classes C in a step's support, over all ranks. By default all that there are.
        global_images_per_class (`int`):
            Images k of each of these classes, over all ranks.
        shard (`str`, *optional*, defaults to `"classes"`):
            `"classes"`: each rank holds C / ranks classes of its own, with all k images. `"images"`: every rank holds
            all C classes, with k / ranks images of each.
        on_small_class (`str`, *optional*, defaults to `"repeat"`):
            `"repeat"` repeats the images of classes with fewer than k (see above); `"raise"` refuses such classes.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws, the same on every rank.
        rank, world_size (`int`, *optional*):
            This rank and the number of ranks; by default those of `torch.distributed`.
        num_steps (`int`, *optional*):
            Steps to yield. By default without end.
        start_step (`int`, *optional*, defaults to 0):
            First step to yield: of a resumed run, the number of steps done.

    Attributes:
        places (`numpy.ndarray`):
            Place in the global support of each row of this rank's batch, (S,): the same in every step.

    Raises:
        ValueError: labels that are no class numbers, more classes than there are, a number out of its range, C or k
            that the ranks cannot share out, a class with fewer than k images under `"raise"` (up to five named).

    Example:

    ```python
    >>> sampler = ClassStratifiedSampler(support.labels, global_images_per_class=5)
    >>> logger.info(sampler.describe(views_per_image=2))
    >>> rows = sampler.batch(step=100)
    ```
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
        self._check(on_small_class, all_classes=global_classes is None)
        self._num_small = sum(count < global_images_per_class for count in counts)

        places = np.arange(self.global_classes * global_images_per_class)
        places = places.reshape(self.global_classes, global_images_per_class)
        self.places = np.array_split(places, self.world_size, axis=0 if shard == "classes" else 1)[self.rank].ravel()

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("A ClassStratifiedSampler without `num_steps` has no length: it goes on without end.")
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            yield self.batch(step)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that iterating yields: `start_step`, `start_step + 1`, ..."""
        return itertools.islice(itertools.count(self.start_step), self.num_steps)

    def batch(self, step: int) -> list[int]:
        """This rank's part of a step's support.

        Args:
            step (`int`):
                Number of the step, >= 0.

        Returns:
            `list[int]`: positions into `labels`; the i-th is at `places[i]` of the global support.

        Raises:
            ValueError: a negative step.
        """
        _check_whole("step", step, 0, "a number of a step")
        sequence = np.random.SeedSequence([int(self.seed), int(step), _STREAM])
        # RandomState is frozen by numpy: its streams are the same in every version
        random = np.random.RandomState(np.random.MT19937(sequence))
        drawn = random.permutation(len(self._rows))[: self.global_classes]
        # resize goes round the shuffled class again where it is too small
        rows = [np.resize(random.permutation(self._rows[number]), self.global_images_per_class) for number in drawn]
        return np.concatenate(rows)[self.places].tolist()

    def describe(self, views_per_image: int) -> str:
        """What the global support is, in the one line that is logged at start-up.

        Args:
            views_per_image (`int`):
                Views of each support image.
        """

        def size(classes: int, images: int) -> str:
            counts = (
                f"{_counted(classes, 'class')} x {_counted(images, 'image')} x {_counted(views_per_image, 'view')}"
            )
            return f"{counts} = {classes * images * views_per_image}"

        classes, images, ranks = self.global_classes, self.global_images_per_class, self.world_size
        if ranks == 1:
            text = f"Support of each step: {size(classes, images)} images."
        else:
            by_class = self.shard == "classes"
            part = size(classes // ranks, images) if by_class else size(classes, images // ranks)
            remark = "classes differ between ranks" if by_class else "the same classes on every rank"
            text = (
                f"Support of each step, over all {ranks} ranks: {size(classes, images)} images; each of the {ranks} "
                f"ranks holds {part} ({remark})."
            )
        smallest, largest = min(self.class_sizes.values()), max(self.class_sizes.values())
        held = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        text += f" Labelled images: {len(self.labels)} of {_counted(len(self.class_sizes), 'class')}, {held} a class."
        if self._num_small:
            verb = "has" if self._num_small == 1 else "have"
            text += (
                f" {_counted(self._num_small, 'class')} {verb} fewer than {images}: their images repeat within a "
                "step, each time in other views."
            )
        return text

    def _check(self, on_small_class: str, all_classes: bool) -> None:
        for name, value, allowed in (
            ("shard", self.shard, ("classes", "images")),
            ("on_small_class", on_small_class, ("repeat", "raise")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is '{allowed[0]}' or '{allowed[1]}', but is {value!r}.")
        _check_whole("global_classes", self.global_classes, 1, "the number of classes in a step's support")
        _check_whole("global_images_per_class", self.global_images_per_class, 1, "a number of images")
        _check_whole("seed", self.seed, 0, "a seed")
        _check_whole("start_step", self.start_step, 0, "a number of steps")
        if self.num_steps is not None:
            _check_whole("num_steps", self.num_steps, 0, "a number of steps")
        _check_whole("world_size", self.world_size, 1, "a number of ranks")
        _check_whole("rank", self.rank, 0, "the number of a rank")
        if self.rank >= self.world_size:
            raise ValueError(
                f"`rank` is {self.rank}, but must be less than `world_size`, which is {self.world_size}: ranks count "
                "from 0."
            )
        if self.global_classes > len(self._rows):
            raise ValueError(
                f"`global_classes` is {self.global_classes}, but the labelled images are of "
                f"{_counted(len(self._rows), 'class')}; take at most that many, or None for all."
            )
        self._check_shares(all_classes)
        if on_small_class == "raise":
            self._refuse_small_classes()

    def _check_shares(self, all_classes: bool) -> None:
        by_class = self.shard == "classes"
        name = "global_classes" if by_class else "global_images_per_class"
        value, ranks = getattr(self, name), self.world_size
        if value % ranks == 0:
            return
        nearest = [n for n in (value // ranks * ranks, (value // ranks + 1) * ranks) if n > 0]
        if by_class:
            nearest = [n for n in nearest if n <= len(self._rows)]
        # the other way of sharing out is a remedy only where it divides
        other_value = self.global_images_per_class if by_class else self.global_classes
        other = f"shard='{'images' if by_class else 'classes'}'"
        if other_value % ranks:
            other += f" with a `global_{'images_per_class' if by_class else 'classes'}` that is a multiple of {ranks}"
        remedies = [f"Use {' or '.join(map(str, nearest))}"] if nearest else []
        remedies.append(f"{'or ' if remedies else 'Use '}{other}")
        is_all = " (all that there are)" if by_class and all_classes else ""
        raise ValueError(
            f"`{name}` is {value}{is_all}, but with shard='{self.shard}' it must be divisible by the {ranks} ranks, "
            f"each of which takes an equal part. {', '.join(remedies)}."
        )

    def _refuse_small_classes(self) -> None:
        small = [
            f"{number} has {size}" for number, size in self.class_sizes.items() if size < self.global_images_per_class
        ]
        if small:
            raise ValueError(
                f"{_counted(len(small), 'class')} of the labelled images {'has' if len(small) == 1 else 'have'} fewer "
                f"than `global_images_per_class` = {self.global_images_per_class} images: "
                f"{', '.join(small[:_NUM_SHOWN])}{', ...' if len(small) > _NUM_SHOWN else ''}. Take fewer images of "
                "each class, label more, or let them repeat with on_small_class='repeat'."
            )


def _check_whole(name: str, value, lowest: int, meaning: str) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"`{name}` is {meaning} and must be a whole number >= {lowest}, but is {value!r}.")


def _counted(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
