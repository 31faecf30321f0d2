from .cli.finetune import parse_finetuning_recipe as parse_finetuning_recipe
from .cli.pretrain import parse_recipe as parse_recipe
from .cli.pretrain import read_recipe as read_recipe
from .data.datasets import MultiViewCollator as MultiViewCollator
from .data.datasets import (
    MultiViewDataset as MultiViewDataset,
)
from .data.datasets import (
    as_crops as as_crops,
)
from .data.datasets import (
    multi_view_dataset as multi_view_dataset,
)
from .data.decoding import BrokenImageError as BrokenImageError
from .data.decoding import decode_image as decode_image
from .data.labels import draw_labelled_rows as draw_labelled_rows
from .data.labels import labelled_rows as labelled_rows
from .data.samplers import ClassStratifiedSampler as ClassStratifiedSampler
from .data.sources import load_images as load_images
from .data.support import SupportDataset as SupportDataset
from .data.support import support_loader as support_loader
from .data.transforms import MultiViewTransform as MultiViewTransform
from .data.transforms import evaluation_image_processor as evaluation_image_processor
from .distributed.async_gossip import AsyncGossip as AsyncGossip
from .distributed.codistillation import Codistillation as Codistillation
from .distributed.comm.exchange import PeerError as PeerError
from .distributed.diloco import DiLoCo as DiLoCo
from .distributed.falling_weight_decay import FallingWeightDecay as FallingWeightDecay
from .distributed.gossip import Gossip as Gossip
from .distributed.local_sgd import LocalSGD as LocalSGD
from .distributed.noloco import NoLoCo as NoLoCo
from .distributed.overlap_gossip import OverlapGossip as OverlapGossip
from .distributed.slowmo import SlowMo as SlowMo
from .distributed.streaming_diloco import StreamingDiLoCo as StreamingDiLoCo
from .distributed.topology import (
    BipartiteExponentialTopology as BipartiteExponentialTopology,
)
from .distributed.topology import (
    CompleteTopology as CompleteTopology,
)
from .distributed.topology import (
    ExponentialTopology as ExponentialTopology,
)
from .distributed.topology import (
    RandomOnePeerTopology as RandomOnePeerTopology,
)
from .distributed.topology import (
    RingTopology as RingTopology,
)
from .distributed.topology import (
    Topology as Topology,
)
from .evaluation.backbones import load_vision_model as load_vision_model
from .evaluation.features import extract_features as extract_features
from .evaluation.features import pixel_features as pixel_features
from .evaluation.low_shot import LowShotEvaluator as LowShotEvaluator
from .evaluation.probes import (
    KNNProbe as KNNProbe,
)
from .evaluation.probes import (
    LinearProbe as LinearProbe,
)
from .evaluation.probes import (
    LogisticProbe as LogisticProbe,
)
from .evaluation.probes import (
    SoftNearestNeighborProbe as SoftNearestNeighborProbe,
)
from .evaluation.report import save_report as save_report
from .finetuning.arguments import (
    ClassifierFinetuningArguments as ClassifierFinetuningArguments,
)
from .finetuning.arguments import (
    SuNCEtFinetuningArguments as SuNCEtFinetuningArguments,
)
from .finetuning.result import FinetuningResult as FinetuningResult
from .finetuning.tuning import finetune_classifier as finetune_classifier
from .finetuning.tuning import finetune_suncet as finetune_suncet
from .hub.cards import create_model_card as create_model_card
from .hub.cards import save_model_card as save_model_card
from .hub.convert import convert_checkpoint as convert_checkpoint
from .hub.convert import convert_to_original as convert_to_original
from .hub.export import export_backbone as export_backbone
from .hub.export_classifier import export_classifier as export_classifier
from .hub.figures import plot_low_shot as plot_low_shot
from .hub.publish import Publication as Publication
from .hub.publish import PublishingError as PublishingError
from .hub.publish import publish_checkpoint as publish_checkpoint
from .losses.byol import byol_loss as byol_loss
from .losses.msn import msn_loss as msn_loss
from .losses.paws import paws_loss as paws_loss
from .losses.simclr import nt_xent_loss as nt_xent_loss
from .losses.sinkhorn import sinkhorn as sinkhorn
from .losses.soft_nearest_neighbor import sharpen as sharpen
from .losses.soft_nearest_neighbor import soft_nearest_neighbor as soft_nearest_neighbor
from .losses.suncet import suncet_loss as suncet_loss
from .models.configuration_byol import BYOLConfig as BYOLConfig
from .models.configuration_msn import MSNConfig as MSNConfig
from .models.configuration_paws import PAWSConfig as PAWSConfig
from .models.configuration_suncet import SuNCEtConfig as SuNCEtConfig
from .models.gradient_cache import GradientCache as GradientCache
from .models.modeling_byol import BYOLForPreTraining as BYOLForPreTraining
from .models.modeling_head_classifier import HeadForImageClassification as HeadForImageClassification
from .models.modeling_msn import MSNForPreTraining as MSNForPreTraining
from .models.modeling_paws import PAWSForPreTraining as PAWSForPreTraining
from .models.modeling_suncet import SuNCEtForPreTraining as SuNCEtForPreTraining
from .models.sequence_compression import (
    SequenceCompression as SequenceCompression,
)
from .models.sequence_compression import (
    compression_stages as compression_stages,
)
from .optim.critical_gradients import CriticalGradients as CriticalGradients
from .optim.lars import LARS as LARS
from .trainers.byol_arguments import BYOLTrainingArguments as BYOLTrainingArguments
from .trainers.byol_trainer import BYOLTrainer as BYOLTrainer
from .trainers.callbacks.codistillation import CodistillationCallback as CodistillationCallback
from .trainers.callbacks.local_update import (
    AsyncGossipCallback as AsyncGossipCallback,
)
from .trainers.callbacks.local_update import (
    DiLoCoCallback as DiLoCoCallback,
)
from .trainers.callbacks.local_update import (
    GossipCallback as GossipCallback,
)
from .trainers.callbacks.local_update import (
    LocalSGDCallback as LocalSGDCallback,
)
from .trainers.callbacks.local_update import (
    LocalUpdateCallback as LocalUpdateCallback,
)
from .trainers.callbacks.local_update import (
    NoLoCoCallback as NoLoCoCallback,
)
from .trainers.callbacks.local_update import (
    OverlapGossipCallback as OverlapGossipCallback,
)
from .trainers.callbacks.local_update import (
    SlowMoCallback as SlowMoCallback,
)
from .trainers.callbacks.local_update import (
    StreamingDiLoCoCallback as StreamingDiLoCoCallback,
)
from .trainers.callbacks.local_update import (
    bring_to_consensus as bring_to_consensus,
)
from .trainers.callbacks.low_shot import LowShotCallback as LowShotCallback
from .trainers.callbacks.sequence_compression import SequenceCompressionCallback as SequenceCompressionCallback
from .trainers.callbacks.set_predictor import SetPredictorCallback as SetPredictorCallback
from .trainers.find_compression import (
    compare_gradients as compare_gradients,
)
from .trainers.find_compression import (
    find_compression as find_compression,
)
from .trainers.local_update_mixin import LocalUpdateTrainerMixin as LocalUpdateTrainerMixin
from .trainers.msn_arguments import MSNTrainingArguments as MSNTrainingArguments
from .trainers.msn_trainer import MSNTrainer as MSNTrainer
from .trainers.paws_arguments import PAWSTrainingArguments as PAWSTrainingArguments
from .trainers.paws_trainer import PAWSTrainer as PAWSTrainer
from .trainers.suncet_arguments import SuNCEtTrainingArguments as SuNCEtTrainingArguments
from .trainers.suncet_trainer import SuNCEtTrainer as SuNCEtTrainer
