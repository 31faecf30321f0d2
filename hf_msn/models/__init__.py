"""Models in the form of transformers: a configuration, and a PreTrainedModel whose forward returns the loss."""

from .configuration_msn import MSNConfig
from .modeling_msn import MSNForPreTraining, MSNForPreTrainingOutput
from .patch_dropping import PatchDroppingViTMSNModel

__all__ = ["MSNConfig", "MSNForPreTraining", "MSNForPreTrainingOutput", "PatchDroppingViTMSNModel"]
