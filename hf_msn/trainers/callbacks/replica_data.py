"""Data loaders and evaluations of one replica, where accelerate would use all ranks."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import prepare_data_loader
from transformers import Trainer
from transformers.trainer_utils import seed_worker


@contextmanager
def rows_shared_by(trainer: Trainer, size: int, place: int, loaders: dict[str, Any]) -> Iterator[None]:
    """Shard the rows of the data loaders made in the block as if this rank were at `place` of `size` ranks.

    `place` also seeds the workers. `loaders` keeps the evaluation loaders for `dataloader_persistent_workers`.
    """
    accelerator = trainer.accelerator

    def prepare(loader, device_placement=None, slice_fn_for_dispatch=None):
        init = loader.worker_init_fn
        if isinstance(init, functools.partial) and init.func is seed_worker:
            # The augmentations are the same in all replicas.
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

    with _replaced(accelerator, prepare_data_loader=prepare), _replaced(trainer, _eval_dataloaders=loaders):
        yield


@contextmanager
def not_gathered(trainer: Trainer) -> Iterator[None]:
    """Keep the results of an evaluation in the block on their rank."""

    def own(tensor: Any, *args, **kwargs) -> Any:
        return tensor

    with _replaced(trainer.accelerator, gather=own, pad_across_processes=own):
        yield


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replace attributes of one object in the block, or hide those of its class."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(owner).pop(name, None)
        vars(owner).update(before)
