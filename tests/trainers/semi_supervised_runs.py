"""Short runs of PAWSTrainer, SuNCEtTrainer and BYOLTrainer on the bundled digits, 8 pixels wide."""

import functools

import torch
from short_runs import SHORT
from tiny_semi_supervised import HEADS

from hf_msn import (
    BYOLConfig,
    BYOLForPreTraining,
    BYOLTrainer,
    BYOLTrainingArguments,
    MultiViewDataset,
    MultiViewTransform,
    PAWSConfig,
    PAWSForPreTraining,
    PAWSTrainer,
    PAWSTrainingArguments,
    SuNCEtConfig,
    SuNCEtForPreTraining,
    SuNCEtTrainer,
    SuNCEtTrainingArguments,
    SupportDataset,
    load_images,
)

METHODS = {
    "paws": (PAWSConfig, PAWSForPreTraining, PAWSTrainingArguments, PAWSTrainer),
    "suncet": (SuNCEtConfig, SuNCEtForPreTraining, SuNCEtTrainingArguments, SuNCEtTrainer),
    "byol": (BYOLConfig, BYOLForPreTraining, BYOLTrainingArguments, BYOLTrainer),
}
SMALL_VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
# Of the classes 1, 5 and 9: three, three and two images.
LABELLED_ROWS = [1, 5, 9, 11, 13, 16, 17, 21]


digits = functools.cache(lambda: load_images("digits"))


def transform(method: str = "paws", **settings) -> MultiViewTransform:
    settings = {"image_size": 8, "focal_views": 1 if method == "paws" else 0, **settings}
    return MultiViewTransform.for_small_grayscale(**settings)


def support(rows=None, method: str = "paws", views_per_image: int = 1, **settings) -> SupportDataset:
    rows = LABELLED_ROWS if rows is None else rows
    return SupportDataset(digits(), rows, transform(method), views_per_image=views_per_image, **settings)


def make_run(
    output_dir,
    method="paws",
    *,
    rows=None,
    views_per_image=1,
    model_fields=None,
    num_images=20,
    changes=None,
    **arguments,
):
    """Return a trainer of a tiny model: 4 images per batch, 8 updates; supports of 3 classes x 2 images but for BYOL.

    `changes` are further arguments of the trainer.
    """
    config, model, training_arguments, trainer = METHODS[method]
    arguments = {**SHORT, "save_strategy": "no", **arguments}
    if method != "byol":
        arguments = {"global_support_images_per_class": 2, **arguments}
    torch.manual_seed(0)
    images = digits().select(range(num_images))
    settings = {
        "train_dataset": MultiViewDataset(images, transform(method), seed=3),
        **({} if method == "byol" else {"support_dataset": support(rows, method, views_per_image)}),
        **(changes or {}),
    }
    return trainer(
        model(config(**{**SMALL_VIT, **HEADS, **(model_fields or {})})),
        training_arguments(str(output_dir), **arguments),
        **settings,
    )


def watch(trainer) -> list[dict[str, torch.Tensor]]:
    """Collect the inputs of every training micro-batch, as the model gets them."""
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        if model.training:
            seen.append({name: value.clone() for name, value in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    return seen
