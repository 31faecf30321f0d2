"""Fine-tuning on a few of the bundled digits, small enough for a second."""

import numpy as np
import torch
import transformers
from states import same

from hf_msn import (
    ClassifierFinetuningArguments,
    MultiViewTransform,
    PAWSConfig,
    SuNCEtConfig,
    SuNCEtFinetuningArguments,
    draw_labelled_rows,
    load_images,
)
from hf_msn.data.decoding import decode_image

ENCODER = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.12,
    "projection_hidden_dim": 32,
    "projection_dim": 16,
}
VIEWS = MultiViewTransform.for_small_grayscale()
PROCESSOR = VIEWS.evaluation_image_processor(crop_fraction=1.0)
SETTINGS = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 3, "num_train_epochs": 4}


def suncet_config(**fields) -> SuNCEtConfig:
    return SuNCEtConfig(**{**ENCODER, **fields})


def paws_config(**fields) -> PAWSConfig:
    return PAWSConfig(**{**ENCODER, **fields})


def classifier_arguments(output_dir, **fields) -> ClassifierFinetuningArguments:
    settings = {"learning_rate": 0.05, "global_batch_size": 20, **SETTINGS, **fields}
    return ClassifierFinetuningArguments(str(output_dir), **settings)


def suncet_arguments(output_dir, **fields) -> SuNCEtFinetuningArguments:
    return SuNCEtFinetuningArguments(str(output_dir), **{**SETTINGS, **fields})


def digits(images_per_class: int = 5) -> tuple:
    """The training digits, and the rows of a few of each class."""
    dataset = load_images("digits")
    return dataset, draw_labelled_rows(dataset, images_per_class=images_per_class, seed=0)


def with_labels(dataset, labels: np.ndarray):
    """The same images with other labels."""
    column = dataset.features["label"]
    return dataset.remove_columns("label").add_column("label", labels.tolist()).cast_column("label", column)


def images_and_labels(dataset, rows) -> tuple[torch.Tensor, np.ndarray]:
    examples = [dataset[int(row)] for row in rows]
    images = [decode_image(example["image"]) for example in examples]
    return PROCESSOR(images, return_tensors="pt")["pixel_values"], np.array([e["label"] for e in examples])


def states_are_equal(first: transformers.PreTrainedModel, second: transformers.PreTrainedModel) -> bool:
    """Bitwise, buffers included."""
    return same(first.state_dict(), second.state_dict())
