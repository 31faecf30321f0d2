"""The Trainer of both heads, and the callback that keeps the weights of the best epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..distributed.batch_norm import synchronize_batch_norm
from ..distributed.collectives import all_reduce_sum
from ..optim.by_name import optimizer_class_and_settings, show_averages
from ..trainers.callbacks.dataset_epoch import DatasetEpochCallback
from ..trainers.callbacks.non_finite import NonFiniteLossCallback
from ..trainers.checkpoints import CheckpointError, WholeCheckpointMixin
from .arguments import FinetuningArguments
from .models import unshared_weights

BEST_EPOCH_FILE = "best_epoch.pt"


class FinetuningTrainer(WholeCheckpointMixin, Trainer):
    """Train on the batches of a loader that distributes them over the ranks; the loss is `model(**batch).loss`.

    `head` returns the part of the model that trains with `freeze_encoder`.
    """

    args: FinetuningArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: FinetuningArguments,
        loader: torch.utils.data.DataLoader,
        head: Callable[[PreTrainedModel], nn.Module],
    ):
        if args.world_size > 1:
            # else the running means of the ranks would differ, and with them their accuracies
            model = synchronize_batch_norm(model, args.device)
        self._head = head(model) if args.freeze_encoder else None
        if self._head is not None:
            model.requires_grad_(False)
            self._head.requires_grad_(True)
        super().__init__(model=model, args=args, train_dataset=loader.dataset)
        self._loader = loader
        self.loss_is_scaled_for_ga = False  # every micro-batch gives a mean
        self.model_accepts_loss_kwargs = False
        self.non_finite = NonFiniteLossCallback(self)
        for callback in (DatasetEpochCallback(loader.batch_sampler), self.non_finite):
            self.add_callback(callback)
        self.remove_callback(PrinterCallback)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: the result is pushed, not the model of the last epoch."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay: all but biases and norms (any 1-D tensor)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.args.use_lars:
            optimizer.param_groups[0]["always_adapt"] = True  # also where the weight decay is 0
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: FinetuningArguments, model: nn.Module | None = None):
        """Return SGD with Nesterov momentum for "sgd"."""
        if args.optim == "sgd" and not args.use_lars:
            settings = {"momentum": args.momentum, "nesterov": args.momentum > 0}
            return torch.optim.SGD, {"lr": args.learning_rate, **settings}
        return optimizer_class_and_settings(args, model, args.momentum)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._head is not None:  # running means of batch normalisation stay too, and nothing is dropped
            self.model.eval()
            self._head.train()
        if self.args.freeze_batch_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        outputs = model(**inputs)
        self.non_finite.observe(outputs.loss.detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def add_to_checkpoint(self, folder: Path) -> None:
        torch.save(self.best.state_dict(), folder / BEST_EPOCH_FILE)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, unshared_weights(self.model) if state_dict is None else state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        best = Path(resume_from_checkpoint, BEST_EPOCH_FILE)
        if not best.is_file():
            raise CheckpointError(
                f"'{resume_from_checkpoint}' is no checkpoint of a fine-tuning: it has no '{BEST_EPOCH_FILE}'. "
                "Give another one."
            )
        self.best.load_state_dict(torch.load(best, map_location="cpu", weights_only=True))
        self.model.load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint).state_dict())


class BestEpochCallback(TrainerCallback):
    """Measure the accuracy every few epochs and after the last, and keep the weights of the first best epoch.

    `measure` returns the accuracies of a model in percent, of which the first one decides, and the number of images.
    Without it the last epoch counts as the best. A run is resumed with the same `settings` only.
    """

    def __init__(self, trainer: FinetuningTrainer, measure: Callable | None = None, settings: dict | None = None):
        self.trainer, self.measure, self.settings = trainer, measure, json.dumps(settings or {})
        trainer.best = self
        self.by_epoch: dict[int, dict[str, float]] = {}
        self.best_epoch: int | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.num_measured = 0  # images
        self.is_broken = torch.zeros(len(trainer.train_dataset), dtype=torch.bool)  # images, on any rank so far
        self._best = -1.0

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        epoch = round(state.epoch)
        show_averages(self.trainer.optimizer)
        self.trainer.non_finite.check()
        is_broken = self.is_broken | self.trainer.train_dataset.is_broken
        self.is_broken = all_reduce_sum(is_broken.to(args.device, torch.float32)).cpu() > 0
        if self.measure is None:
            self.best_epoch = epoch
            return
        if epoch < args.num_train_epochs and epoch % args.eval_every_epochs:
            return
        accuracies, self.num_measured = self.measure(model)
        self.by_epoch[epoch] = accuracies
        self.trainer.log({f"eval_{name}": value for name, value in accuracies.items()})
        decisive = next(iter(accuracies.values()))
        if decisive > self._best:
            self._best, self.best_epoch = decisive, epoch
            self.best_weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        names = ("settings", "by_epoch", "best_epoch", "best_weights", "num_measured", "is_broken", "_best")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, after a check that the settings are the same."""
        there, here = json.loads(state.pop("settings")), json.loads(self.settings)
        there.pop("per_device_train_batch_size", None)  # earlier versions saved it
        for name in sorted({**there, **here}, key="start".__eq__):  # last: other settings change its weights
            if there.get(name) != here.get(name):
                saved, given = (f"{settings.get(name, 'the default')!s:.80}" for settings in (there, here))
                raise ValueError(
                    f"`{name}` must be that of the checkpoint to resume from, {saved}, but is {given}. Start again by "
                    "`overwrite_output_dir`."
                )
        vars(self).update(state)
