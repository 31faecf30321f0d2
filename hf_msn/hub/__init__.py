"""To and from the checkpoints that others read."""

from .convert import convert_checkpoint, convert_to_original
from .export import export_backbone
from .export_classifier import export_classifier

__all__ = ["convert_checkpoint", "convert_to_original", "export_backbone", "export_classifier"]
