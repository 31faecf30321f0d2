"""The pretraining methods. A new one is one entry here."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..trainers.byol_trainer import BYOLTrainer
from ..trainers.msn_trainer import MSNTrainer
from ..trainers.paws_trainer import PAWSTrainer
from ..trainers.pretraining_trainer import PretrainingTrainer
from ..trainers.semi_supervised_trainer import SemiSupervisedTrainer
from ..trainers.suncet_trainer import SuNCEtTrainer


@dataclass(frozen=True)
class Method:
    """A pretraining method: its trainer, and the views of its paper where they differ from the transform's."""

    title: str
    trainer: type[PretrainingTrainer]
    views: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> type[TrainingArguments]:
        return self.trainer.arguments_class

    @property
    def model(self) -> type[PreTrainedModel]:
        return self.trainer.model_class

    @property
    def config(self) -> type[PreTrainedConfig]:
        return self.model.config_class

    @property
    def has_labels(self) -> bool:
        return issubclass(self.trainer, SemiSupervisedTrainer)


METHODS = {
    "msn": Method("Masked Siamese Networks, without labels", MSNTrainer),
    "byol": Method(
        "BYOL or SimSiam, without labels",
        BYOLTrainer,
        {"global_scale": (0.08, 1.0), "focal_scale": (0.05, 0.14), "focal_views": 0},
    ),
    "paws": Method(
        "PAWS, with a few labelled images",
        PAWSTrainer,
        {"global_scale": (0.14, 1.0), "focal_scale": (0.05, 0.14), "focal_views": 6, "color_jitter": 1.0},
    ),
    "suncet": Method(
        "SimCLR + SuNCEt, with a few labelled images",
        SuNCEtTrainer,
        {"global_scale": (0.08, 1.0), "focal_views": 0, "color_jitter": 1.0},
    ),
}
