"""Models in the form of transformers: a configuration, and a PreTrainedModel whose forward returns the loss.

Importing this package registers the models with the Auto classes of transformers, and the networks of PAWS
with timm.
"""

from . import (  # noqa: F401
    modeling_byol,
    modeling_head_classifier,
    modeling_msn,
    modeling_paws,
    modeling_suncet,
    paws_resnets,
)
