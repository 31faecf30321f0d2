"""The Trainer of PAWS (arXiv 2104.13963)."""

import torch

from ..models.modeling_paws import PAWSForPreTraining, PAWSForPreTrainingOutput
from .paws_arguments import PAWSTrainingArguments
from .semi_supervised_trainer import SemiSupervisedTrainer


class PAWSTrainer(SemiSupervisedTrainer):
    """Train a [`PAWSForPreTraining`]; see [`SemiSupervisedTrainer`] for the arguments.

    Logged beside the loss and its parts: `mean_max_target_probability`; `view_agreement`, the share of images whose
    two global views have the same class; `classes_in_use`, the effective number of classes among the targets of a
    micro-batch (the exponential of the entropy of their mean).

    Example:

    ```python
    >>> images = load_images("digits")
    >>> transform = MultiViewTransform.for_small_grayscale(8)
    >>> trainer = PAWSTrainer(
    ...     PAWSForPreTraining(config),
    ...     PAWSTrainingArguments("runs/paws", max_steps=1000, global_support_images_per_class=5),
    ...     train_dataset=MultiViewDataset(images, transform),
    ...     support_dataset=SupportDataset(images, labelled_rows, transform),
    ... )
    >>> trainer.train()
    ```
    """

    args: PAWSTrainingArguments
    arguments_class = PAWSTrainingArguments
    model_class = PAWSForPreTraining

    def values_to_log(self, outputs: PAWSForPreTrainingOutput) -> dict[str, torch.Tensor]:
        target = outputs.target_probabilities
        first, second = target.argmax(dim=-1).chunk(2)
        return {
            **super().values_to_log(outputs),
            "mean_max_target_probability": target.amax(dim=-1).mean(),
            "view_agreement": (first == second).float().mean(),
            "classes_in_use": torch.special.entr(target.mean(dim=0)).sum().exp(),
        }
