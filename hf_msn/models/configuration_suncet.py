"""Configuration of SimCLR + SuNCEt: the settings of the forward pass."""

from huggingface_hub.dataclasses import strict

from .configuration_pretraining import SemiSupervisedConfig


@strict
class SuNCEtConfig(SemiSupervisedConfig):
    r"""
    Configuration of a [`SuNCEtForPreTraining`] (arXiv 2006.10803). The encoder is a ViTMSN, described by the fields of
    `ViTMSNConfig`, or a network of timm: see [`SemiSupervisedConfig`], which has all fields.
    """

    model_type = "suncet"
