"""Batches of labelled images: functions of seed and epoch, distributed over the ranks."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from ..data.splits import random_stream
from ..data.support import SupportBatches, SupportCollator, SupportDataset, SupportKey
from ..distributed import collectives
from ..trainers.semi_supervised_trainer import make_support_sampler
from .arguments import ClassifierFinetuningArguments, SuNCEtFinetuningArguments

_STREAM = 3


class LabelledBatches(torch.utils.data.Sampler[list[SupportKey]]):
    """Keys of a [`SupportDataset`]: every labelled image once per epoch, in batches whose sizes differ by at most one.

    The order depends on (`seed`, epoch) alone, and the batches of all ranks together are those of one rank. A batch
    that cannot be distributed evenly is filled up from its own first images.
    """

    def __init__(self, num_images: int, global_batch_size: int, seed: int):
        self.num_images, self.seed, self.epoch = num_images, seed, 0
        self.num_batches = math.ceil(num_images / global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SupportKey]]:
        order = random_stream(self.seed, self.epoch, _STREAM).permutation(self.num_images)
        rank, world_size = collectives.rank(), collectives.world_size()
        for batch in np.array_split(order, self.num_batches):
            even = np.resize(batch, math.ceil(len(batch) / world_size) * world_size)
            yield [(self.epoch, 0, position) for position in even[rank::world_size].tolist()]


class EpochSupports(SupportBatches):
    """Supports that continue from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.start_step = epoch * len(self.sampler)


class ClassifierCollator:
    """Stack images into the batch of a classification model: `pixel_values (B, C, H, W)` and `labels (B,)`."""

    def __init__(self, classes: np.ndarray):
        self.classes = torch.from_numpy(classes)

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = SupportCollator()(items)
        labels = torch.searchsorted(self.classes, batch["support_labels"])
        return {"pixel_values": batch["support_pixel_values"], "labels": labels}


def classifier_loader(
    support: SupportDataset, classes: np.ndarray, args: ClassifierFinetuningArguments
) -> torch.utils.data.DataLoader:
    """Return the loader of this rank's batches, one view of each image; `batch_sampler.set_epoch` sets the epoch."""
    micro_batch = args.global_batch_size // args.gradient_accumulation_steps
    return _loader(support, LabelledBatches(len(support), micro_batch, args.seed), ClassifierCollator(classes), args)


def suncet_loader(support: SupportDataset, args: SuNCEtFinetuningArguments) -> torch.utils.data.DataLoader:
    """Return the loader of this rank's part of the supports; an epoch draws at least the number of labelled images."""
    num_classes = args.global_support_classes or len(np.unique(support.labels))
    num_steps = math.ceil(len(support) / (num_classes * args.global_support_images_per_class))
    sampler = make_support_sampler(support.labels, args, num_steps=num_steps)
    return _loader(support, EpochSupports(sampler), SupportCollator(), args)


def _loader(support, batches, collator, args) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        support,
        batch_sampler=batches,
        num_workers=args.dataloader_num_workers,
        collate_fn=collator,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        # without one, a loader draws its workers' seed from torch's global generator, and changes the draws after it
        generator=torch.Generator().manual_seed(args.seed),
    )
