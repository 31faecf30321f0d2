"""What every pretraining method needs of a Trainer: schedules, optimizer, a stop on NaN, a log."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.collators import MultiViewCollator
from ..data.datasets import MultiViewDataset, StreamingMultiViewDataset, as_crops
from ..data.transforms import gives_crops
from ..distributed.batch_norm import synchronize_batch_norm
from ..distributed.collectives import all_reduce_mean, all_reduce_sum
from ..hub.run_record import RunRecorder
from ..optim.lars import LARS
from ..schedules import cosine, warmup_cosine
from .callbacks.dataset_epoch import DatasetEpochCallback
from .callbacks.non_finite import NonFiniteLossCallback
from .callbacks.throughput import ThroughputCallback, ThroughputProgressCallback
from .checkpointing_trainer import CheckpointingTrainer
from .checkpoints import CheckpointError
from .freed_memory import keep_freed_memory
from .pretraining_arguments import PretrainingArguments

logger = logging.get_logger(__name__)


class PretrainingTrainer(CheckpointingTrainer):
    """Base of the pretraining trainers. A method adds `compute_loss`, and calls `record` with what it wants logged.

    Where the data sets have a [`MultiViewTransform`] and the collator is [`MultiViewCollator`], the loaders give uint8
    crops, and the trainer finishes them (colour, blur, normalisation) on its device; any other transform or collator
    gets and gives finished views.

    Logged beside the loss: `images_per_second` of all ranks; `data_wait_seconds`, how long a rank has waited for its
    loaders since the last log, as a mean over the ranks; schedules and broken images.
    """

    args: PretrainingArguments

    def __init__(self, model: nn.Module, args: PretrainingArguments, **kwargs):
        if args.sync_batch_norm and args.world_size > 1:
            model = synchronize_batch_norm(model, args.device)
        super().__init__(model=model, args=args, **kwargs)
        self.loss_is_scaled_for_ga = False  # every micro-batch gives a mean
        self.can_return_loss = True  # without labels: an eval_dataset of views gives eval_loss
        self._recorded: dict[str, torch.Tensor] = {}
        self._num_recorded = 0
        self.run_record = RunRecorder()
        if isinstance(self.train_dataset, StreamingMultiViewDataset):
            self.train_dataset.repeat = True  # one endless epoch, in which a resumed run finds its place
        self.throughput, self.non_finite = ThroughputCallback(), NonFiniteLossCallback(self)
        for callback in (DatasetEpochCallback(self.train_dataset), self.throughput, self.non_finite):
            self.add_callback(callback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ThroughputProgressCallback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`, but resumes from the last checkpoint that is whole, and checks the data first.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint folder, `True` for the last whole one of
                `output_dir`, or `"auto"` for that one if there is any. By default `args.resume_from_checkpoint`.

        Raises:
            ValueError: If the data does not fill one batch, or `output_dir` has checkpoints and no resume is asked.
            CheckpointError: If there is no whole checkpoint to resume from.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self.check_before_training()
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint or None)
        if resume_from_checkpoint is None and not self.args.overwrite_output_dir and self.state.global_step == 0:
            self._check_output_dir()
        self._forget_earlier_replicas()
        if self.args.keep_freed_memory and self.args.device.type == "cpu":
            keep_freed_memory()
        self.run_record.begin(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.run_record.end()

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # Trainer takes one step more if that is within an epoch
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def check_before_training(self) -> None:
        """Raises a `ValueError` if the training set cannot fill one update. Methods add their own checks."""
        if self.train_dataset is None:
            raise ValueError(
                "There is no `train_dataset`. Pass one, for example `MultiViewDataset(images, transform)`."
            )
        if not has_length(self.train_dataset):
            return
        needed = self.args.per_device_train_batch_size * self.args.world_size
        if len(self.train_dataset) < max(needed, 2):
            raise ValueError(
                f"The training set has {len(self.train_dataset)} images, but one batch takes {max(needed, 2)}: "
                f"{self.args.per_device_train_batch_size} on each of {self.args.world_size} ranks. Lower "
                "`per_device_train_batch_size` or give more images."
            )

    # Data

    def finishes_views_of(self, dataset) -> bool:
        """Whether the crops of a data set can be finished here, by the transform of the training set."""
        transform = getattr(dataset, "transform", None)
        return (
            type(self.data_collator) is MultiViewCollator
            and gives_crops(transform)
            and transform.finishes_as(getattr(self.train_dataset, "transform", None))
        )

    def _get_dataloader(self, dataset, *args, **kwargs):
        if type(dataset) in (MultiViewDataset, StreamingMultiViewDataset) and self.finishes_views_of(dataset):
            dataset = as_crops(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "view_parameters" in inputs or "support_view_parameters" in inputs:
            inputs = self.train_dataset.transform.finish(inputs)
        return inputs

    def get_batch_samples(self, *args, **kwargs):
        with self.throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    # Optimizer and schedules

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: all but biases, norms (any 1-D tensor) and prototypes."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and name != "prototypes"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        decayed, *others = optimizer.param_groups
        decayed["scheduled_weight_decay"] = True
        if self.args.use_lars:
            decayed["always_adapt"] = True  # also where the weight decay is 0
        for group in others:
            group["scheduled_weight_decay"] = False
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: PretrainingArguments, model: nn.Module | None = None):
        """LARS where `use_lars` asks for it, else what `optim` names."""
        if not args.use_lars:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return LARS, {
            "lr": args.learning_rate,
            "momentum": args.lars_momentum,
            "trust_coeff": args.lars_trust_coefficient,
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            args = self.args
            scale = self.images_per_update() / args.learning_rate_batch_size if args.learning_rate_batch_size else 1.0
            horizon = num_training_steps * args.schedule_stretch
            warmup = self._warmup_steps(num_training_steps) / horizon

            def factor(step: int) -> float:
                # The first update already has gone one step of the warm-up, as in the authors' code.
                progress = min((step + 1) / horizon, 1.0)
                value = warmup_cosine(
                    progress,
                    warmup=warmup,
                    start=args.start_learning_rate,
                    peak=args.learning_rate,
                    end=args.final_learning_rate,
                )
                return value * scale / args.learning_rate

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and Path(checkpoint, OPTIMIZER_NAME).is_file():
            self._check_optimizer_of(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _check_optimizer_of(self, checkpoint: str) -> None:
        # torch takes any state whose groups have as many tensors, and the first update would miss its settings.
        saved = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", mmap=True, weights_only=True)
        missing = sorted(set(self.optimizer.param_groups[0]).difference(saved["param_groups"][0]))
        if missing:
            here = "LARS (`use_lars`)" if self.args.use_lars else f"`optim` {self.args.optim}"
            raise CheckpointError(
                f"'{checkpoint}' was trained with another optimizer: its state has no {', '.join(missing)}, which "
                f"{here} needs. Give the same `use_lars` and `optim`, or start a new run in another `output_dir`."
            )

    def _warmup_steps(self, num_training_steps: int) -> int:
        if self.args.warmup_steps:
            steps = self.args.get_warmup_steps(num_training_steps)
        elif has_length(self.train_dataset):
            steps = round(self.args.warmup_epochs * len(self.train_dataset) / self.images_per_update())
        else:
            raise ValueError(
                "`warmup_epochs` needs to know how many images there are, which a streamed data set does not tell. "
                "Give `warmup_steps`."
            )
        if steps >= num_training_steps:
            logger.warning(
                f"The warm-up takes {steps} steps, but training has {num_training_steps}: it ends before the peak "
                "learning rate. Lower `warmup_epochs`."
            )
        return steps

    def stretched_progress(self) -> float:
        """Part of the stretched horizon that lies before the next update, in [0, 1]."""
        return min(self.state.global_step / (max(self.state.max_steps, 1) * self.args.schedule_stretch), 1.0)

    def weight_decay_now(self) -> float:
        """Weight decay of the next update."""
        args = self.args
        if args.final_weight_decay is None:
            return args.weight_decay
        horizon = max(self.state.max_steps, 1) * args.schedule_stretch
        return cosine(min((self.state.global_step + 1) / horizon, 1.0), args.weight_decay, args.final_weight_decay)

    def parameters_to_clip(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters whose gradients are clipped: encoder and head, not the prototypes."""
        return [parameter for name, parameter in model.named_parameters() if not name.endswith("prototypes")]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self.accelerator.clip_grad_norm_(self.parameters_to_clip(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self.parameters_to_clip(model), float("inf"))
        return grad_norm

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        weight_decay = self.weight_decay_now()
        for group in self.optimizer.param_groups:
            if group["scheduled_weight_decay"]:
                group["weight_decay"] = weight_decay
        if self.run_record.sync is None:
            self._note_sync()
        self.throughput.images += len(inputs["pixel_values"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.non_finite.observe(loss)
        return loss

    # Log

    @torch.no_grad()
    def record(self, **values: torch.Tensor) -> None:
        """Adds a micro-batch's values to the means of the next log. Nothing is read from the device here."""
        for name, value in values.items():
            value = value.detach().float()
            self._recorded[name] = self._recorded[name] + value if name in self._recorded else value
        self._num_recorded += 1

    def extra_logs(self) -> dict[str, float]:
        """What else to log at each logging step; called on all ranks. Methods add to it."""
        logs = {"weight_decay": self.weight_decay_now()}
        if hasattr(self.train_dataset, "num_broken"):
            broken = torch.tensor(float(self.train_dataset.num_broken), device=self.args.device)
            logs["broken_images"] = int(all_reduce_sum(broken).item())  # as each rank has met them
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_recorded:
            names = sorted(self._recorded)
            means = torch.stack([self._recorded[name] for name in names]) / self._num_recorded
            logs.update(zip(names, all_reduce_mean(means).tolist()))
            logs.update(self.throughput.measure(self.args))
            logs.update(self.extra_logs())
            self._recorded, self._num_recorded = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.clock_stopped():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time inside out of the images per second, which are those of training alone."""
        with self.throughput.paused():
            yield

    def _note_sync(self) -> None:
        """Keeps how the ranks train together, which the callback forgets at the end."""
        callback = self.per_rank_callback
        self.run_record.sync = None if callback is None else callback.record()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.run_record.save(self, output_dir or self.args.output_dir)

    def check_before_saving(self) -> None:
        self.non_finite.check(weights=True)
