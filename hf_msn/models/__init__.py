"""Models in the form of transformers: a configuration, and a PreTrainedModel whose forward returns the loss."""

from .configuration_msn import MSNConfig
from .configuration_paws import PAWSConfig
from .configuration_suncet import SuNCEtConfig
from .modeling_msn import MSNForPreTraining, MSNForPreTrainingOutput
from .modeling_paws import PAWSForPreTraining, PAWSForPreTrainingOutput
from .modeling_suncet import SuNCEtForPreTraining, SuNCEtForPreTrainingOutput
from .patch_dropping import PatchDroppingViTMSNModel
from .prediction_average import PredictionAverage

__all__ = [
    "MSNConfig",
    "MSNForPreTraining",
    "MSNForPreTrainingOutput",
    "PAWSConfig",
    "PAWSForPreTraining",
    "PAWSForPreTrainingOutput",
    "PatchDroppingViTMSNModel",
    "PredictionAverage",
    "SuNCEtConfig",
    "SuNCEtForPreTraining",
    "SuNCEtForPreTrainingOutput",
]
