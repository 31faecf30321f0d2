"""Sequence compression as a function of progress, at the events of a Trainer."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from ...distributed.gradient_sync import find_wrapper
from ...models.modeling_pretraining import PretrainingModel
from ...models.sequence_compression import compression_stages
from .local_update import check_trainer


class SequenceCompressionCallback(TrainerCallback):
    """Compress the views of a pretraining model by a schedule (arXiv 2410.22364).

    ```python
    trainer.add_callback(SequenceCompressionCallback(trainer, "constant:0.5@24"))
    ```

    The stage depends on the progress of the training alone, and the draws are in the state dict of the model, so that
    a resumed run goes on bit for bit. Logged with the loss, on this rank: `tokens_per_image`, the mean length of the
    sequences in the layers of the encoders over all encoded images (views), and `relative_cost`, the FLOPs of the
    encoders relative to those without compression.

    Args:
        trainer (`Trainer`): The trainer of a pretraining model of this package.
        schedule (`str`, `Path` or a list of stages): As in [`compression_stages`]: "none", "constant:0.5@24",
            "linear", or a JSON file.

    Raises:
        ValueError: If the schedule is not one, or the model cannot lose what it says.
        TypeError: If `trainer` is no Trainer, or not one of a pretraining model.
    """

    def __init__(self, trainer: Trainer, schedule: str | os.PathLike | Sequence[Mapping[str, Any]]):
        check_trainer(self, trainer)
        model = find_wrapper(trainer.model)[1]
        if not isinstance(model, PretrainingModel):
            raise TypeError(
                "The model of a SequenceCompressionCallback must be a pretraining model of this package, which knows "
                f"its views, but is a {type(model).__name__}."
            )
        self.stages = compression_stages(schedule, model.config.patch_size)
        self.counts: Counter[str] = Counter()
        sizes = trainer.view_sizes() if hasattr(trainer, "view_sizes") else {}
        for _, stage in self.stages:
            stage.check(model, sizes)
            stage.counts = self.counts

    def on_train_begin(self, args, state, control, **kwargs):
        self.counts.clear()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        progress = state.global_step / state.max_steps
        find_wrapper(model)[1].compression = [stage for begins, stage in self.stages if begins <= progress][-1]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.counts:
            counts = self.counts
            values = {
                "tokens_per_image": counts["tokens"] / counts["images"],
                "relative_cost": counts["flops"] / counts["plain_flops"],
            }
            counts.clear()
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        find_wrapper(model)[1].compression = None
