"""The pretraining methods. A new one is one entry here."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..models.configuration_msn import MSNConfig
from ..models.configuration_paws import PAWSConfig
from ..models.configuration_suncet import SuNCEtConfig
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_paws import PAWSForPreTraining
from ..models.modeling_suncet import SuNCEtForPreTraining
from ..trainers.msn_arguments import MSNTrainingArguments
from ..trainers.msn_trainer import MSNTrainer
from ..trainers.paws_arguments import PAWSTrainingArguments
from ..trainers.paws_trainer import PAWSTrainer
from ..trainers.suncet_arguments import SuNCEtTrainingArguments
from ..trainers.suncet_trainer import SuNCEtTrainer


@dataclass(frozen=True)
class Method:
    """The classes of a pretraining method, and the views of its paper where they differ from the transform's."""

    title: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    arguments: type[TrainingArguments]
    trainer: type
    has_labels: bool = False
    views: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "msn": Method(
        "Masked Siamese Networks, without labels", MSNConfig, MSNForPreTraining, MSNTrainingArguments, MSNTrainer
    ),
    "paws": Method(
        "PAWS, with a few labelled images",
        PAWSConfig,
        PAWSForPreTraining,
        PAWSTrainingArguments,
        PAWSTrainer,
        has_labels=True,
        views={"global_scale": (0.14, 1.0), "focal_scale": (0.05, 0.14), "focal_views": 6, "color_jitter": 1.0},
    ),
    "suncet": Method(
        "SimCLR + SuNCEt, with a few labelled images",
        SuNCEtConfig,
        SuNCEtForPreTraining,
        SuNCEtTrainingArguments,
        SuNCEtTrainer,
        has_labels=True,
        views={"global_scale": (0.08, 1.0), "focal_views": 0, "color_jitter": 1.0},
    ),
}
