"""Models in the form of transformers: a configuration, and a PreTrainedModel whose forward returns the loss.

Importing this package registers every pretraining model with the Auto classes of transformers.
"""

from . import modeling_msn, modeling_paws, modeling_suncet

__all__ = ["modeling_msn", "modeling_paws", "modeling_suncet"]
