"""Fine-tuning on a few labelled images: a linear classifier, or SuNCEt."""

from .arguments import ClassifierFinetuningArguments, FinetuningArguments, SuNCEtFinetuningArguments
from .parsing import parse_finetuning_recipe
from .result import FinetuningResult
from .tuning import finetune_classifier, finetune_suncet

__all__ = [
    "ClassifierFinetuningArguments",
    "FinetuningArguments",
    "FinetuningResult",
    "SuNCEtFinetuningArguments",
    "finetune_classifier",
    "finetune_suncet",
    "parse_finetuning_recipe",
]
