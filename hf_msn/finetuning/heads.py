"""A linear head that sees standardised features while it is trained, and is a plain one afterwards."""

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from .arguments import ClassifierFinetuningArguments
from .measuring import extract_head_inputs
from .starts import linear_head


class StandardizingLinear(nn.Linear):
    """`W (x - mean) / scale + b`: the functions of a linear layer, with steps that are of use in every direction.

    The features of a pretrained ViT have a common mean that is many times their spread; gradients of a plain linear
    layer point along it, and hardly along what tells images apart.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias)


def standardize_head(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    rows: np.ndarray,
    image_processor: BaseImageProcessor,
    args: ClassifierFinetuningArguments,
    on_broken_image: str = "skip",
) -> None:
    """Makes the head of `model` a [`StandardizingLinear`], by the features of the images to train on.

    `mean` is theirs; `scale` is one number, the root of their mean squared distance from it, by dimension.
    """
    head = linear_head(model)
    features = extract_head_inputs(model, head, dataset, image_processor, args, rows, on_broken_image)
    mean = features.astype(np.float64).mean(axis=0)
    scale = max(float(np.sqrt(((features - mean) ** 2).mean())), 1e-6)
    head.__class__ = StandardizingLinear  # the module, its parameters and their names stay
    head.register_buffer("mean", torch.from_numpy(mean).to(head.weight), persistent=False)
    head.register_buffer("scale", torch.tensor(scale).to(head.weight), persistent=False)


@torch.no_grad()
def fold_head(model: PreTrainedModel) -> None:
    """Makes a standardising head a plain `nn.Linear` that computes the same: W / scale, and b - W mean / scale."""
    head = linear_head(model)
    if not isinstance(head, StandardizingLinear):
        return
    weight = head.weight.double() / head.scale.double()
    head.bias.copy_(head.bias.double() - weight @ head.mean.double())
    head.weight.copy_(weight)
    del head.mean, head.scale
    head.__class__ = nn.Linear
