"""Trainers: a pair of files a method, arguments and trainer, over what they share."""

from .checkpoints import CheckpointError, find_last_checkpoint
from .msn_arguments import MSNTrainingArguments
from .msn_trainer import MSNTrainer
from .pretraining_trainer import NonFiniteLossError

__all__ = ["CheckpointError", "MSNTrainer", "MSNTrainingArguments", "NonFiniteLossError", "find_last_checkpoint"]
