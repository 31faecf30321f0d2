"""To and from the checkpoints that others read."""

from .export import export_backbone
from .export_classifier import export_classifier

__all__ = ["export_backbone", "export_classifier"]
