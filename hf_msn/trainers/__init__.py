"""Trainers: a pair of files a method, arguments and trainer, over what they share."""

from .checkpoints import CheckpointError, find_last_checkpoint
from .msn_arguments import MSNTrainingArguments
from .msn_trainer import MSNTrainer
from .paws_arguments import PAWSTrainingArguments
from .paws_trainer import PAWSTrainer
from .pretraining_trainer import NonFiniteLossError
from .suncet_arguments import SuNCEtTrainingArguments
from .suncet_trainer import SuNCEtTrainer

__all__ = [
    "CheckpointError",
    "MSNTrainer",
    "MSNTrainingArguments",
    "NonFiniteLossError",
    "PAWSTrainer",
    "PAWSTrainingArguments",
    "SuNCEtTrainer",
    "SuNCEtTrainingArguments",
    "find_last_checkpoint",
]
