"""What the models of all pretraining methods share: how weights start, and how checkpoints load."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_pretraining import PretrainingConfig
from .patch_dropping import PatchDroppingViTMSNModel
from .trunks import copy_trunk, fields_for, load_trunk


class PretrainingModel(PreTrainedModel):
    """Base of the pretraining models: `model(**batch).loss` is enough for any loop.

    A method adds its modules, `forward`, `evaluation_encoder` and `project`.
    """

    config: PretrainingConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer must not rescale it
    _no_split_modules = PatchDroppingViTMSNModel._no_split_modules
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # A ViTMSN initialises its own layers, and transformers skips a module without parameters of its own, as a head
        # is: what comes here beside the layers of a timm encoder are the layers of the heads.
        if getattr(module, "_is_of_timm", False):
            # Its weights are as timm drew them. Tables that no checkpoint holds must be made after loading.
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # As torch.nn.Linear does by itself; transformers' narrow normal distribution is meant for the encoder.
            bound = module.in_features**-0.5
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.uniform_(module.bias, -bound, bound)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint of another method, or without some weights, is an error, not a warning.

        Raises:
            ValueError: If the checkpoint is of another architecture.
        """
        found, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **_where(kwargs))
        if found.get("model_type", cls.config_class.model_type) != cls.config_class.model_type:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is a checkpoint of type '{found['model_type']}', but "
                f"{cls.__name__} is of type '{cls.config_class.model_type}'. To start from its trunk, call "
                f"`{cls.__name__}.from_backbone`."
            )
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is not a checkpoint of {cls.__name__}: {len(missing)} tensors are "
                f"missing, first {missing[:3]}. To start from the trunk of another model, call "
                f"`{cls.__name__}.from_backbone`."
            )
        model._after_loading()
        return (model, info) if output_loading_info else model

    trunk_from: str | None = None  # what `from_backbone` was given

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields):
        """Starts from a pretrained trunk; the heads are fresh.

        Args:
            name_or_path (`str` or `Path`): Hub id or folder of a ViTMSN model, such as "facebook/vit-msn-small", of a
                network in timm's form, of a classifier on one of these, or of a pretraining model of this package,
                whose evaluated encoder is taken; or "timm:resnet50", with timm's released weights.
            **config_fields: Fields of the configuration that differ from the trunk's or from the defaults.

        Raises:
            ValueError: If the checkpoint is of another architecture, or a field would change the shape of the trunk.
        """
        trunk, fields = load_trunk(name_or_path)
        fields = fields_for(cls.config_class, fields, name_or_path)
        model = cls(cls.config_class(**{**fields, **config_fields}))
        copy_trunk(trunk, model.encoder, model.config, fields, name_or_path)
        model.trunk_from = str(name_or_path)
        return model

    def _after_loading(self) -> None:
        """What a method puts right after `from_pretrained`, which makes every floating-point parameter trainable."""


def _where(kwargs: dict) -> dict:
    """Those of the arguments of `from_pretrained` that say where a checkpoint is."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
    return {name: kwargs[name] for name in names if name in kwargs}
