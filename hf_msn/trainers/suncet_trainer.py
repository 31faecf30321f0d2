"""The Trainer of SimCLR + SuNCEt (arXiv 2006.10803)."""

import torch
from transformers.trainer_utils import has_length

from ..models.modeling_suncet import SuNCEtForPreTraining, SuNCEtForPreTrainingOutput
from .semi_supervised_trainer import SemiSupervisedTrainer
from .suncet_arguments import SuNCEtTrainingArguments


class SuNCEtTrainer(SemiSupervisedTrainer):
    """Train a [`SuNCEtForPreTraining`]; see [`SemiSupervisedTrainer`] for the arguments.

    After `supervised_epochs` the loss is that of SimCLR. As in the authors' code, the labelled images then still take
    part in the batch statistics; with `supervised_epochs=0` none is read.
    """

    args: SuNCEtTrainingArguments
    arguments_class = SuNCEtTrainingArguments
    model_class = SuNCEtForPreTraining

    def needs_support(self) -> bool:
        return self.args.supervised_epochs != 0

    def is_supervised(self) -> bool:
        """Return whether the SuNCEt term is part of the loss of the next micro-batch."""
        return self.args.supervised_epochs is None or (self.state.epoch or 0.0) < self.args.supervised_epochs - 1e-6

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "supervised": self.is_supervised()}, *args, **kwargs)

    def values_to_log(self, outputs: SuNCEtForPreTrainingOutput) -> dict[str, torch.Tensor]:
        # 0 for a part that is left out, so that all micro-batches between two logs count alike.
        return {"suncet": torch.zeros_like(outputs.loss), **super().values_to_log(outputs)}

    def check_before_training(self) -> None:
        super().check_before_training()
        if self.args.supervised_epochs and not has_length(self.train_dataset):
            raise ValueError(
                "`supervised_epochs` needs the number of images, which a streamed data set does not have. Leave it "
                "out, or load the data without streaming."
            )
        focal_views = getattr(getattr(self.train_dataset, "transform", None), "focal_views", 0)
        if focal_views:
            raise ValueError(
                f"`focal_views` of the views must be 0, but is {focal_views}: SimCLR compares two views of each image "
                "and has no small crops."
            )
        if self.args.global_support_images_per_class * self.support_dataset.views_per_image < 2:
            raise ValueError(
                "`global_support_images_per_class` is 1, with 1 view per image, but SuNCEt compares each labelled "
                "image with others of its class. Raise it, or the views per image, to at least 2."
            )
