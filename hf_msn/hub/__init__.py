"""To and from the checkpoints that others read."""

from .export import export_backbone

__all__ = ["export_backbone"]
