"""Base of the pretraining trainers: data, schedules, optimizer, log, checkpoints."""

import copy
import math
import os
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import ModelOutput, logging

from ..data.datasets import MultiViewCollator, MultiViewDataset, StreamingMultiViewDataset, as_crops
from ..data.transforms import gives_crops
from ..distributed.batch_norm import synchronize_batch_norm
from ..distributed.collectives import all_reduce_mean, all_reduce_sum, is_distributed
from ..distributed.gradient_sync import find_wrapper
from ..hub.cards import save_model_card
from ..models.gradient_cache import GradientCache
from ..models.onednn_linear import HAS_BFLOAT16
from ..optim.by_name import missing_in_state, name_of_optimizer, optimizer_class_and_settings, show_averages
from ..optim.critical_gradients import CriticalGradients
from ..optim.lars import LARS
from ..schedules import cosine, warmup_cosine
from .argument_names import in_terms_of
from .callbacks.collapse import CollapseCallback
from .callbacks.dataset_epoch import DatasetEpochCallback
from .callbacks.non_finite import NonFiniteLossCallback
from .callbacks.push import PushCallback
from .callbacks.run_record import RunRecordCallback
from .callbacks.sequence_compression import SequenceCompressionCallback
from .callbacks.throughput import ThroughputCallback, ThroughputProgressCallback
from .checkpoints import (
    CheckpointError,
    WholeCheckpointMixin,
    check_output_dir,
    find_config_differences,
    own_settings_kept,
    resolve_checkpoint,
    saved_world_size,
    staging_folder,
)
from .local_update_mixin import LocalUpdateTrainerMixin
from .pretraining_arguments import PretrainingArguments

logger = logging.get_logger(__name__)


class PretrainingTrainer(WholeCheckpointMixin, LocalUpdateTrainerMixin, Trainer):
    """Base of the pretraining trainers. A method adds its schedules, and to `values_to_log`.

    Where the data sets have a [`MultiViewTransform`] and the collator is [`MultiViewCollator`], the loaders return
    uint8 crops, and the trainer finishes them (colour, blur, normalisation) on its device. Any other transform or
    collator returns finished views.

    Logged beside the loss: `images_per_second` over all ranks; `data_wait_seconds`, the mean over ranks of the time
    spent waiting for data since the last log; schedules and broken images.

    A folder `checkpoint-<step>` is always whole, and has the checksums of its files, which a resume verifies.
    """

    args: PretrainingArguments
    arguments_class: type[PretrainingArguments] = PretrainingArguments
    model_class: type[nn.Module] = nn.Module
    _checked_batch: int | None = None
    _gradient_cache: GradientCache | None = None

    def __init__(self, model: nn.Module, args: PretrainingArguments, data_collator=None, **kwargs):
        if not isinstance(args, self.arguments_class):
            raise ValueError(
                f"`args` of {type(self).__name__} must be {self.arguments_class.__name__}, which have its schedules, "
                f"but are {type(args).__name__}."
            )
        _, unwrapped = find_wrapper(model)
        if not isinstance(unwrapped, self.model_class) and kwargs.get("model_init") is None:
            raise ValueError(
                f"`model` of {type(self).__name__} must be a {self.model_class.__name__}, but is a "
                f"{type(unwrapped).__name__}. Pass such a model, or use the trainer of its method."
            )
        if args.sync_batch_norm and args.world_size > 1:
            model = synchronize_batch_norm(model, args.device)
        super().__init__(model=model, args=args, data_collator=data_collator or MultiViewCollator(), **kwargs)
        self.model.seed_masks(args.seed)
        if args.compile_encoder:
            self.model.compile_encoders()
        self.loss_is_scaled_for_ga = False  # every micro-batch returns a mean
        self.can_return_loss = True  # without labels: an eval_dataset of views gives eval_loss
        if isinstance(self.train_dataset, StreamingMultiViewDataset):
            self.train_dataset.repeat = True  # one endless epoch, in which a resumed run finds its place
        self._recorded: dict[str, torch.Tensor] = {}
        self._num_recorded = 0
        self.throughput = ThroughputCallback()
        self.non_finite = NonFiniteLossCallback(self)
        self.run_record, self.collapse = RunRecordCallback(self), CollapseCallback(self)
        epoch = DatasetEpochCallback(self.train_dataset)
        for callback in (epoch, self.throughput, self.non_finite, self.run_record, self.collapse):
            self.add_callback(callback)
        if args.compression is not None:
            self.add_callback(SequenceCompressionCallback(self, args.compression))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ThroughputProgressCallback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train as `Trainer.train` does, but check the data first and resume from whole checkpoints only.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint folder, `True` for the last whole one of
                `output_dir`, or `"auto"` for that one if there is any. By default `args.resume_from_checkpoint`.

        Raises:
            ValueError: If the data does not fill one batch, or if `output_dir` holds an earlier run that is neither
                resumed nor overwritten.
            CheckpointError: If the checkpoint is not whole, does not fit this run, or is of another data set and
                `args.resume_on_other_data` is not set. Other settings are logged, and those of `args` hold.
        """
        args = self.args
        self.check_before_training()
        if args.bf16 and args.device.type == "cpu" and not HAS_BFLOAT16 and self.is_world_process_zero():
            logger.warning(
                "`bf16` is True, but this processor has no bfloat16: torch emulates it, many times slower than "
                "float32. Leave it off."
            )
        if resume_from_checkpoint is None:
            resume_from_checkpoint = args.resume_from_checkpoint
        checkpoint = resolve_checkpoint(resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
            logger.info(f"Resuming from '{checkpoint}'.")
        elif not args.overwrite_output_dir and self.state.global_step == 0:
            check_output_dir(args.output_dir)
        if args.should_save:
            # It describes the model of an earlier run.
            Path(args.output_dir, "codistillation.json").unlink(missing_ok=True)
        self.run_record.begin(checkpoint)
        output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        show_averages(self.optimizer)
        return output

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # Trainer takes one step more if that is within an epoch
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def check_before_training(self) -> None:
        """Raise a `ValueError` if the training set cannot fill one batch, or has views of a wrong size."""
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is missing. Pass one, such as `MultiViewDataset(images, transform)`.")
        if has_length(self.train_dataset):
            batch = max(self._train_batch_size * self.args.world_size, 2)
            if len(self.train_dataset) < batch:
                raise ValueError(
                    f"The training set has {len(self.train_dataset)} images, but one batch takes {batch}: "
                    f"`per_device_train_batch_size` {self._train_batch_size} on {self.args.world_size} "
                    "ranks. Lower it, or give more images."
                )
            self._check_last_batch()
        self.check_view_sizes()

    def _check_last_batch(self) -> None:
        """Raise a `ValueError` if batch normalisation fails because the last batch of an epoch has one image."""
        args, num_images, batch = self.args, len(self.train_dataset), self._train_batch_size
        self._checked_batch = batch
        num_updates = math.ceil(math.ceil(num_images / batch) / args.gradient_accumulation_steps)
        is_reached = args.max_steps <= 0 or args.max_steps >= num_updates
        # Several ranks fill their last batches from the first images.
        if args.dataloader_drop_last or self.support_ranks()[1] > 1 or num_images % batch != 1 or not is_reached:
            return
        model = copy.deepcopy(self.model).train()  # whose statistics may move
        devices = [args.device] if args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                model(**self.inputs_of_one_image())
        except ValueError as error:
            raise ValueError(
                f"`dataloader_drop_last` is False, and the last batch of an epoch has 1 of the {num_images} images, "
                f"but batch normalisation needs 2: {error} Set it to True, or choose another "
                f"`per_device_train_batch_size` than {batch}."
            ) from error

    def inputs_of_one_image(self) -> dict[str, torch.Tensor]:
        """Return a batch with the views of the first image, on the device. Methods add to it."""
        return self._prepare_inputs(self.data_collator([self.train_dataset[0]]))

    def view_sizes(self) -> dict[str, int]:
        """Return the sizes in pixels of the views of the training set, by the fields of their transform."""
        transform = getattr(self.train_dataset, "transform", None)
        names = ("image_size", "focal_size") if getattr(transform, "focal_views", 0) else ("image_size",)
        return {name: getattr(transform, name) for name in names if hasattr(transform, name)}

    def check_view_sizes(self) -> None:
        """Raise a `ValueError` if a view is not a whole number of patches of the model, or its network refuses it."""
        patch_size, timm_model = self.model.config.patch_size, getattr(self.model.config, "timm_model", None)
        for name, size in self.view_sizes().items():
            if timm_model is not None:
                self._check_size_by_trying(name, size)
            elif size < patch_size or size % patch_size:
                raise ValueError(
                    f"`{name}` of the views must be a multiple of the model's `patch_size` {patch_size}, but is "
                    f"{size} pixels. Choose another size."
                )

    @torch.no_grad()
    def _check_size_by_trying(self, name: str, size: int) -> None:
        encoder, weight = self.model.encoder, next(self.model.encoder.parameters())
        was_training = encoder.training
        try:
            encoder.eval()(torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:  # networks of timm differ in how they refuse
            raise ValueError(
                f"`{name}` of the views is {size} pixels, but '{self.model.config.timm_model}' of timm does not take "
                f"them: {error} Choose another size; a ViT of timm takes any with `timm_options` "
                '{"dynamic_img_size": true}.'
            ) from error
        finally:
            encoder.train(was_training)

    def check_two_global_views(self) -> None:
        """Raise a `ValueError` if the views have not one target and one anchor."""
        anchor_views = getattr(getattr(self.train_dataset, "transform", None), "anchor_views", 1)
        if anchor_views != 1:
            raise ValueError(
                f"`anchor_views` of the views must be 1, but is {anchor_views}: {type(self).__name__} compares two "
                "global views of each image, the target and one anchor."
            )

    # Data

    def finishes_views_of(self, dataset) -> bool:
        """Return whether the trainer can finish the crops of a data set by the transform of its training set."""
        transform = getattr(dataset, "transform", None)
        return (
            type(self.data_collator) is MultiViewCollator
            and gives_crops(transform)
            and transform.finishes_as(getattr(self.train_dataset, "transform", None))
        )

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        if type(dataset) in (MultiViewDataset, StreamingMultiViewDataset) and self.finishes_views_of(dataset):
            dataset = as_crops(dataset)
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # an evaluation reads every row
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "view_parameters" in inputs or "support_view_parameters" in inputs:
            inputs = self.train_dataset.transform.finish(inputs)
        for name in ("pixel_values", "anchor_pixel_values", "support_pixel_values"):
            if inputs.get(name) is not None:
                self._check_image_size(name, inputs[name])
        return inputs

    def _check_image_size(self, name: str, pixel_values: torch.Tensor) -> None:
        config = self.model.config
        wanted, sides = config.image_size, pixel_values.shape[-2:]
        if getattr(config, "timm_model", None) is None and set(sides) != {wanted}:
            found = " x ".join(map(str, sides))
            raise ValueError(
                f"`image_size` of the views must be the model's {wanted}, but is {found} pixels in `{name}`. Change "
                "one of them."
            )

    def get_batch_samples(self, *args, **kwargs):
        with self.throughput.waiting():
            return super().get_batch_samples(*args, **kwargs)

    # Optimizer and schedules

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay: all but 1-D tensors (biases, norms) and prototypes."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and name != "prototypes"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        decayed, *others = optimizer.param_groups
        decayed["scheduled_weight_decay"] = True
        if self.args.use_lars:
            decayed["always_adapt"] = True  # also with a weight decay of 0
        for group in others:
            group["scheduled_weight_decay"] = False
        if self.args.critical_gradients and "critical_gradients" not in optimizer.state_dict():
            rule = "sum" if isinstance(optimizer, (torch.optim.SGD, LARS)) else "mean"  # as in the paper
            CriticalGradients(optimizer, self.args.critical_gradients, aggregate=rule)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: PretrainingArguments, model: nn.Module | None = None):
        return optimizer_class_and_settings(args, model, args.lars_momentum)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            args = self.args
            scale = self.images_per_update() / args.learning_rate_batch_size if args.learning_rate_batch_size else 1.0
            horizon = self._whole_horizon(num_training_steps)
            warmup = self._warmup_steps(num_training_steps) / horizon

            def factor(step: int) -> float:
                value = warmup_cosine(
                    min((step + args.first_schedule_step) / horizon, 1.0),
                    warmup=warmup,
                    start=args.start_learning_rate,
                    peak=args.learning_rate,
                    end=args.final_learning_rate,
                )
                return value * scale / args.learning_rate

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _warmup_steps(self, num_training_steps: int) -> int:
        if self.args.warmup_steps:
            steps = self.args.get_warmup_steps(num_training_steps)
        elif self.args.warmup_epochs == 0:
            steps = 0
        elif has_length(self.train_dataset):
            steps = math.floor(self.args.warmup_epochs * self._updates_per_epoch() + 1e-9)
        else:
            raise ValueError(
                "`warmup_epochs` needs the number of images, which a streamed data set does not have. Set "
                "`warmup_steps`."
            )
        if steps >= num_training_steps:
            logger.warning(
                f"The warm-up takes {steps} steps, but training has {num_training_steps}: it ends before the peak "
                "learning rate. Lower `warmup_epochs`."
            )
        return steps

    def _updates_per_epoch(self) -> int:
        accumulated = self.args.gradient_accumulation_steps
        micro_batches = len(self.train_dataset) * accumulated / self.images_per_update()
        cut = math.floor if self.args.dataloader_drop_last else math.ceil
        return math.ceil(cut(micro_batches) / accumulated)

    def _whole_horizon(self, num_training_steps: int) -> int:
        """Return the steps of the stretched horizon, cut to whole ones as in the authors' code."""
        return math.floor(num_training_steps * self.args.schedule_stretch + 1e-9)

    def stretched_progress(self) -> float:
        """Return the part of the stretched horizon before the next update, in [0, 1]."""
        return min(self.state.global_step / (max(self.state.max_steps, 1) * self.args.schedule_stretch), 1.0)

    def weight_decay_now(self) -> float:
        """Return the weight decay of the next update."""
        args = self.args
        if args.final_weight_decay is None:
            return args.weight_decay
        horizon = self._whole_horizon(max(self.state.max_steps, 1))
        return cosine(min((self.state.global_step + 1) / horizon, 1.0), args.weight_decay, args.final_weight_decay)

    def parameters_to_clip(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped: encoder and head, not the prototypes."""
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
        self.throughput.images += len(inputs["pixel_values"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.non_finite.observe(loss)
        if self._checked_batch not in (None, self._train_batch_size):  # found now: there is memory enough
            self._check_last_batch()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._encoder_in_chunks():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            if self._gradient_cache is not None and len(inputs["pixel_values"]) == self._train_batch_size:
                self._gradient_cache.chunks.check_effect()
            self.record(**self.values_to_log(outputs), **self.collapse.observe(outputs))
        return (loss, outputs) if return_outputs else loss

    def _encoder_in_chunks(self) -> AbstractContextManager:
        if self.args.encoder_chunk_size is None:
            return nullcontext()
        if self._gradient_cache is None or self._gradient_cache.model is not self.model:  # `model_init` makes another
            self._gradient_cache = GradientCache(self.model, self.args.encoder_chunk_size)
        return self._gradient_cache

    # Log

    def values_to_log(self, outputs: ModelOutput) -> dict[str, torch.Tensor]:
        """Return the scalars of a forward pass whose means are logged: the parts of the loss. Methods add to them."""
        return {name: value for name, value in outputs.items() if name != "loss" and value.ndim == 0}

    @torch.no_grad()
    def record(self, **values: torch.Tensor) -> None:
        """Add the values of a micro-batch to the means of the next log. Nothing is read from the device here."""
        for name, value in values.items():
            value = value.detach().float()
            self._recorded[name] = self._recorded[name] + value if name in self._recorded else value
        self._num_recorded += 1

    def extra_logs(self) -> dict[str, float]:
        """Return further values for each log of the loss. All ranks call it. Methods add to it."""
        if is_distributed():
            self.collapse.report(self.args, self.state.global_step)
        rank = self.collapse.feature_rank
        ranks = {} if rank is None else {"feature_rank": rank}
        return {"weight_decay": self.weight_decay_now(), **ranks, **self.num_broken()}

    def num_broken(self) -> dict[str, int]:
        """Return the number of images found broken so far on all ranks. All call it. Methods add other data sets."""
        return self.count_broken("broken_images", self.train_dataset)

    def count_broken(self, name: str, dataset) -> dict[str, int]:
        """Return the number of images of a data set found broken on all ranks under `name`, if it counts them."""
        if not hasattr(dataset, "num_broken"):
            return {}
        number = int(all_reduce_sum(torch.tensor(dataset.num_broken, device=self.args.device)))
        if number and hasattr(dataset, "is_broken"):  # several ranks may have found the same row
            number = int((all_reduce_sum(dataset.is_broken.to(self.args.device, torch.int32)) > 0).sum())
        return {name: number}

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

    def clock_stopped(self) -> AbstractContextManager[None]:
        """Leave the time inside, in which the model is used and not trained, out of the images per second."""
        show_averages(self.optimizer)
        return self.throughput.paused()

    # Checkpoints

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raise a [`CheckpointError`] if a whole checkpoint does not fit this run. Methods add their own checks."""
        differing = find_config_differences(checkpoint, self.model.config)
        if differing:
            raise CheckpointError(
                f"'{checkpoint}' is a checkpoint of another configuration: {differing}. Give the same configuration, "
                "or start a new run in another `output_dir`."
            )
        saved, now = saved_world_size(checkpoint), self.args.world_size
        if saved != now:
            logger.warning(
                f"'{checkpoint}' was saved by {saved} ranks and goes on with {now}: one update now has "
                f"{self.images_per_update()} images, and the order of the images and the masks differ from those of "
                "the first run. Adapt `per_device_train_batch_size` or `gradient_accumulation_steps` to keep the "
                "batch."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer would load the weights whose names fit, and only warn of the others.
        model = self.model if model is None else model
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        show_averages(self.optimizer)  # whose next switch would change the weights that are loaded
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_optimizer_of(checkpoint)
        with own_settings_kept(self), in_terms_of({"capacity": "critical_gradients"}):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _check_optimizer_of(self, checkpoint: str) -> None:
        # torch loads any state whose groups have as many tensors.
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", mmap=True, weights_only=True)
        missing = set(self.optimizer.param_groups[0]).difference(state["param_groups"][0])
        missing |= missing_in_state(self.args, state)
        here = name_of_optimizer(self.optimizer)
        there = self.run_record.saved.get("optimizer", here)
        if there != here or missing:
            lacks = "" if there != here else f", but its state has no {', '.join(sorted(missing))}"
            raise CheckpointError(
                f"'{checkpoint}' must have the state of {here}{lacks or f', but was trained with {there}'}. Give the "
                "same `use_lars`, `optim` and `optim_args`, or start a new run in another `output_dir`."
            )

    def _save_checkpoint(self, model, trial) -> None:
        self.non_finite.check(weights=True)
        with self.clock_stopped():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does, but each file appears whole or not at all."""
        show_averages(self.optimizer)
        if _internal_call:  # into a folder that is renamed as a whole
            self.run_record.num_broken = self.num_broken()
            return super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or self.args.output_dir)
        self._save_whole_model(folder)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.push.push_model(folder, "Model save")

    def _save_whole_model(self, folder: Path) -> None:
        with staging_folder(self, folder) as staging:
            self.save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                for file in staging.iterdir():
                    os.replace(file, folder / file.name)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # it would be in training_args.bin
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            self.save_records(Path(output_dir or self.args.output_dir))

    def save_records(self, folder: Path) -> None:
        """Write the records of the run beside the model. One rank calls it. Methods add theirs."""
        self.run_record.save(folder)

    # Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Open the repo `hub_model_id`, to which [`PushCallback`] then pushes."""
        if self.is_world_process_zero():
            self.push = PushCallback(self, private, token)
            self.add_callback(self.push)
            self.hub_model_id = self.push.repository.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: [`PushCallback`] pushes a checkpoint when it is whole."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | Future | None:
        """Save the model to `output_dir` and push it with its card. All ranks must call it.

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload; else return a `Future`.
            token (`str`, *optional*), private (`bool`, *optional*): For a repo that is not open yet.
            card: `results`, `figures`, `license` and `tags` of the card.

        Raises:
            PublishingError: On rank 0, if the push failed. The model is saved.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._save_whole_model(Path(self.args.output_dir))
        if self.is_world_process_zero():
            return self.push.push_model(Path(self.args.output_dir), commit_message, blocking, **card)

    def create_model_card(self, **card) -> None:
        """Write the card of the saved model into `output_dir`. The arguments are those of [`save_model_card`]."""
        if self.is_world_process_zero():
            save_model_card(self.args.output_dir, **{"without_results": not card.get("results"), **card})
