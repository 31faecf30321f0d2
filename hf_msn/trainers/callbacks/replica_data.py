"""Which rows a replica trains and is evaluated on, where accelerate would share them out over all ranks."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import prepare_data_loader
from transformers import Trainer
from transformers.trainer_utils import seed_worker


@contextmanager
def rows_shared_by(trainer: Trainer, size: int, place: int, loaders: dict[str, Any]) -> Iterator[None]:
    """Loaders that the trainer makes inside give this rank its part of the rows as if there were `size` ranks.

    Args:
        trainer (`Trainer`): Its accelerator prepares the loaders.
        size (`int`): Ranks that share the rows; 1 gives this rank all of them.
        place (`int`): This rank's place among them. The workers of a loader draw from a seed of it.
        loaders (`dict[str, Any]`): Those for evaluations that are kept, see `dataloader_persistent_workers`.
    """
    accelerator = trainer.accelerator

    def prepare(loader, device_placement=None, slice_fn_for_dispatch=None):
        init = loader.worker_init_fn
        if isinstance(init, functools.partial) and init.func is seed_worker:
            # Augmentations must be the same in all replicas.
            loader.worker_init_fn = functools.partial(seed_worker, **{**init.keywords, "rank": place})
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=size,
            process_index=place,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    # Loaders with persistent workers are kept for the next time, which may be another one's.
    with replaced(accelerator, prepare_data_loader=prepare), replaced(trainer, _eval_dataloaders=loaders):
        yield


@contextmanager
def nothing_gathered(trainer: Trainer) -> Iterator[None]:
    """What the trainer gathers over the ranks inside stays this rank's own."""

    def own(tensor: Any, *args, **kwargs) -> Any:
        return tensor

    with replaced(trainer.accelerator, gather=own, pad_across_processes=own):
        yield


@contextmanager
def replaced(thing: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of this one object take the place of its own, or hide those of its class, for now."""
    before = {name: vars(thing)[name] for name in attributes if name in vars(thing)}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(thing).pop(name, None)
        vars(thing).update(before)
