"""To and from the checkpoints that others read, and their cards."""

from .card.figures import plot_low_shot
from .cards import create_model_card, save_model_card
from .convert import convert_checkpoint, convert_to_original
from .export import export_backbone
from .export_classifier import export_classifier
from .publishing import Publication, publish_checkpoint
from .upload.errors import PublishingError

__all__ = [
    "Publication",
    "PublishingError",
    "convert_checkpoint",
    "convert_to_original",
    "create_model_card",
    "export_backbone",
    "export_classifier",
    "plot_low_shot",
    "publish_checkpoint",
    "save_model_card",
]
