"""Label-efficient vision pretraining for transformers.Trainer and accelerate."""

from .callbacks import LowShotCallback
from .data import (
    BrokenImageError,
    ClassStratifiedSampler,
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    SupportDataset,
    draw_labelled_rows,
    evaluation_image_processor,
    labelled_rows,
    load_images,
    multi_view_dataset,
    support_loader,
)
from .evaluation import (
    KNNProbe,
    LinearProbe,
    LogisticProbe,
    LowShotEvaluator,
    SoftNearestNeighborProbe,
    extract_features,
    load_vision_model,
    pixel_features,
)
from .finetuning import (
    ClassifierFinetuningArguments,
    FinetuningResult,
    SuNCEtFinetuningArguments,
    finetune_classifier,
    finetune_suncet,
    parse_finetuning_recipe,
)
from .hub import export_backbone
from .losses import msn_loss, nt_xent_loss, paws_loss, sharpen, sinkhorn, soft_nearest_neighbor, suncet_loss
from .models import (
    MSNConfig,
    MSNForPreTraining,
    PAWSConfig,
    PAWSForPreTraining,
    SuNCEtConfig,
    SuNCEtForPreTraining,
)
from .optim import LARS
from .recipe_parsing import parse_recipe, read_recipe
from .trainers import (
    MSNTrainer,
    MSNTrainingArguments,
    PAWSTrainer,
    PAWSTrainingArguments,
    SuNCEtTrainer,
    SuNCEtTrainingArguments,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "LARS",
    "BrokenImageError",
    "ClassStratifiedSampler",
    "ClassifierFinetuningArguments",
    "FinetuningResult",
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
    "PAWSConfig",
    "PAWSForPreTraining",
    "PAWSTrainer",
    "PAWSTrainingArguments",
    "SoftNearestNeighborProbe",
    "SuNCEtConfig",
    "SuNCEtFinetuningArguments",
    "SuNCEtForPreTraining",
    "SuNCEtTrainer",
    "SuNCEtTrainingArguments",
    "SupportDataset",
    "draw_labelled_rows",
    "evaluation_image_processor",
    "export_backbone",
    "extract_features",
    "finetune_classifier",
    "finetune_suncet",
    "labelled_rows",
    "load_images",
    "load_vision_model",
    "msn_loss",
    "multi_view_dataset",
    "nt_xent_loss",
    "parse_finetuning_recipe",
    "parse_recipe",
    "paws_loss",
    "pixel_features",
    "read_recipe",
    "sharpen",
    "sinkhorn",
    "soft_nearest_neighbor",
    "suncet_loss",
    "support_loader",
]
