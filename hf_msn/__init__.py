"""Label-efficient vision pretraining for transformers.Trainer and accelerate."""

from .callbacks import LowShotCallback
from .data import (
    BrokenImageError,
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    evaluation_image_processor,
    load_images,
    multi_view_dataset,
)
from .evaluation import (
    KNNProbe,
    LinearProbe,
    LogisticProbe,
    LowShotEvaluator,
    extract_features,
    load_vision_model,
    pixel_features,
)
from .hub import export_backbone
from .losses import msn_loss, sharpen, sinkhorn, soft_nearest_neighbor
from .models import MSNConfig, MSNForPreTraining
from .recipe_parsing import parse_recipe, read_recipe
from .trainers import MSNTrainer, MSNTrainingArguments

__version__ = "0.1.0.dev0"

__all__ = [
    "BrokenImageError",
    "KNNProbe",
    "LinearProbe",
    "LogisticProbe",
    "LowShotCallback",
    "LowShotEvaluator",
    "MSNConfig",
    "MSNForPreTraining",
    "MSNTrainer",
    "MSNTrainingArguments",
    "MultiViewCollator",
    "MultiViewDataset",
    "MultiViewTransform",
    "evaluation_image_processor",
    "export_backbone",
    "extract_features",
    "load_images",
    "load_vision_model",
    "msn_loss",
    "multi_view_dataset",
    "parse_recipe",
    "pixel_features",
    "read_recipe",
    "sharpen",
    "sinkhorn",
    "soft_nearest_neighbor",
]
