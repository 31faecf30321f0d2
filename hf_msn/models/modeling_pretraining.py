"""Bases of the pretraining models: initial weights and loading; moving averages; any encoder; support sets."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..checks import check_number
from ..distributed.batch_norm import track_statistics_once
from ..distributed.collectives import all_gather_cat, rank
from .configuration_pretraining import AnyEncoderConfig, PretrainingConfig, SemiSupervisedConfig
from .encoder import PatchDroppingViTMSNModel
from .gradient_cache import EncoderChunks, concatenate
from .heads import PredictionHead, ProjectionHead
from .masking import draw_kept_patches, patches_per_side
from .pretrained_encoders import build_encoder, copy_encoder, load_encoder, select_fields
from .sequence_compression import SequenceCompression, ViewCompression

# arguments of `from_pretrained` that locate a checkpoint
_LOCATION = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")


class PretrainingModel(PreTrainedModel):
    """Base of the pretraining models: `model(**batch).loss` is enough for any loop.

    A method adds its modules, `forward`, `evaluation_encoder`, `project` and `prediction_head`, which may be `None`.
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
    trunk_from: str | None = None  # the argument of `from_backbone`
    loaded_revision: str | None = None  # of the Hub, to which the image processor belongs
    encoder_chunks: EncoderChunks | None = None  # set by a GradientCache
    view_kinds: tuple[str, ...] = ("global", "focal", "target")  # that a SequenceCompression can compress
    _compression: SequenceCompression | None = None

    def __init__(self, config: PretrainingConfig):
        super().__init__(config)
        # Seed of the kept patches and number of draws so far. In the state dict, so that a resumed run draws what
        # comes next.
        self.register_buffer("mask_state", torch.zeros(2, dtype=torch.int64))
        # The host's copy of mask_state, read on demand: reading a GPU tensor at each step would stall it.
        self._mask_draw = None
        self.register_load_state_dict_post_hook(_forget_mask_draw)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Called for the layers of the heads: a ViTMSN initialises its own layers.
        super()._init_weights(module)
        if isinstance(module, PretrainingModel):
            init.zeros_(module.mask_state)
        if not isinstance(module, nn.Linear):
            return
        if self.config.head_initializer_range is None:
            bound = module.in_features**-0.5
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            init.trunc_normal_(module.weight, std=self.config.head_initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint as transformers does, but raise where it would leave weights at random values.

        Raises:
            ValueError: If the checkpoint is of another method, or lacks weights.
        """
        where = {name: kwargs[name] for name in _LOCATION if name in kwargs}
        fields, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **where)
        remedy = f"To start from its encoder, call `{cls.__name__}.from_backbone`."
        if fields.get("model_type", cls.config_class.model_type) != cls.config_class.model_type:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is a checkpoint of type '{fields['model_type']}', but "
                f"{cls.__name__} is of type '{cls.config_class.model_type}'. {remedy}"
            )
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is not a checkpoint of {cls.__name__}: {len(missing)} tensors are "
                f"missing, first {missing[:3]}. {remedy}"
            )
        model._after_loading()
        model.loaded_revision = kwargs.get("revision")
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields):
        """Start from a pretrained encoder; the heads are fresh.

        Args:
            name_or_path (`str` or `Path`): Hub id or folder of a ViTMSN model, such as "facebook/vit-msn-small", of a
                network in timm's form, of a classifier on one of these, or of a pretraining model of this package,
                whose evaluated encoder is taken; or "timm:resnet50", with timm's released weights.
            **config_fields: Fields of the configuration that differ from the checkpoint's or from the defaults. With
                another `image_size` the position embeddings of a ViTMSN are interpolated.

        Raises:
            ValueError: If the checkpoint is of another architecture, or a field changes the shape of the encoder.
        """
        _, encoder, fields = load_encoder(name_or_path)
        fields = select_fields(cls.config_class, fields, name_or_path)
        model = cls(cls.config_class(**{**fields, **config_fields}))
        copy_encoder(encoder, model.encoder, model.config, fields, name_or_path)
        model.trunk_from = str(name_or_path)
        return model

    def predict(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projections after the (target's) prediction head: `(B, C, H, W)` -> `(B, projection_dim)`."""
        head = getattr(self, "target_prediction_head", self.prediction_head)
        if head is None:
            raise ValueError(
                "`predict` needs the prediction head, but `prediction_head` of the configuration is off. Use "
                "`project`, or set `prediction_head` to True for a new model."
            )
        return head(self.project(pixel_values))

    def compile_encoders(self, **kwargs) -> None:
        """Compile the encoders in place: the state dict does not change. `kwargs` go to `torch.nn.Module.compile`."""
        for encoder in (self.encoder, getattr(self, "target_encoder", None)):
            if encoder is not None:
                encoder.compile(**kwargs)

    @property
    def compression(self) -> SequenceCompression | None:
        """The compression of the views in training mode, or `None`. A `ValueError` if it does not fit the model."""
        return self._compression

    @compression.setter
    def compression(self, compression: SequenceCompression | None) -> None:
        if compression is not None:
            compression.check(self)
        self._compression = compression

    def mask_ratio_of(self, kind: str | None) -> float:
        """Return the fraction of the patches that the method itself masks in a kind of view."""
        return getattr(self.config, "mask_ratio", 0.0) if kind == "global" else 0.0

    @torch.no_grad()
    def seed_masks(self, seed: int) -> None:
        """Restart the sequence of draws of kept patches from `seed`. Each rank draws its own."""
        self.mask_state.copy_(torch.tensor([seed, 0]))
        self._mask_draw = None

    def _features(
        self,
        encoder: nn.Module,
        images: torch.Tensor | Sequence[torch.Tensor],
        kinds: str | Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Return the features (N, D) of images of one size, masked and compressed by their kinds of view."""
        parts = [images] if isinstance(images, torch.Tensor) else list(images)
        kinds = [kinds] * len(parts) if kinds is None or isinstance(kinds, str) else kinds
        settings = [(self._compression_of(kind), self.mask_ratio_of(kind)) for kind in kinds]
        features = []
        # Neighbours that lose the same share a pass.
        for (view, mask_ratio), group in groupby(zip(settings, parts), key=itemgetter(0)):
            rows = [part for _, part in group]
            kept_patches = self._draw_kept_patches(rows, view.drop_ratio(mask_ratio), view.patch_size)
            if self.compression is not None and self.training:
                self.compression.count(self.config, view, rows, mask_ratio)
            features.append(self._encode(encoder, rows, kept_patches, view.patch_size))
        return concatenate(features)

    def _encode(
        self,
        encoder: nn.Module,
        parts: Sequence[torch.Tensor],
        kept_patches: torch.Tensor | None,
        patch_size: int | None,
    ) -> torch.Tensor:
        def encode(images: torch.Tensor, kept_patches: torch.Tensor | None) -> torch.Tensor:
            if not isinstance(encoder, PatchDroppingViTMSNModel):
                return encoder(images)
            outputs = encoder(images, kept_patches=kept_patches, cls_only=True, patch_size=patch_size)
            return outputs.last_hidden_state[:, 0]

        if self.encoder_chunks is None:
            return encode(concatenate(parts), kept_patches)
        return self.encoder_chunks.encode(encoder, encode, parts, kept_patches)

    def _compression_of(self, kind: str | None) -> ViewCompression:
        if self.compression is None or kind is None or not self.training:
            return ViewCompression()
        view = self.compression.views[kind]
        return replace(view, patch_size=None) if view.patch_size == self.config.patch_size else view

    def _draw_kept_patches(
        self, parts: Sequence[torch.Tensor], ratio: float, patch_size: int | None = None
    ) -> torch.Tensor | None:
        if ratio == 0:
            return None
        if self._mask_draw is None:
            self._mask_draw = tuple(self.mask_state.tolist())
        seed, draw = self._mask_draw
        shared = getattr(self.config, "shared_mask", False)
        sides = [patches_per_side(side, patch_size or self.config.patch_size) for side in parts[0].shape[-2:]]
        kept = draw_kept_patches(
            sum(map(len, parts)),
            math.prod(sides),
            ratio,
            seed=(seed, 0 if shared else rank(), draw),
            shared=shared,
        )
        if self.training:  # an evaluation does not advance the sequence
            self._mask_draw = (seed, draw + 1)
            self.mask_state[1].fill_(draw + 1)
        return kept.to(parts[0].device, non_blocking=True)

    def _apply_head(self, head: nn.Module, resolutions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Apply a head to the rows of each resolution: its batch statistics are theirs, or those of all rows."""
        if self.config.batch_norm_per_resolution:
            return [head(rows) for rows in resolutions]
        return list(head(torch.cat(resolutions)).split([len(rows) for rows in resolutions]))

    def _after_loading(self) -> None:
        """Called after `from_pretrained`, which makes every floating-point parameter trainable."""


class TargetModel(PretrainingModel):
    """Base of [`MSNForPreTraining`] and [`BYOLForPreTraining`]: views that lose patches, a moving average as target.

    The target of the module `encoder` or of a head is the module `target_encoder`, `target_projection_head`,
    `target_prediction_head`, where the method makes one.
    """

    @classmethod
    def from_backbone(cls, name_or_path: str | Path, **config_fields):
        """As [`PretrainingModel.from_backbone`]: online and target encoder get its weights."""
        model = super().from_backbone(name_or_path, **config_fields)
        model.start_target()
        return model

    def start_target(self) -> None:
        """Make the target a copy of the online encoder and heads, buffers included, without gradient."""
        for online, target in self._online_and_target():
            target.load_state_dict(online.state_dict())
        self._after_loading()

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """theta_target <- momentum * theta_target + (1 - momentum) * theta, for encoder and heads.

        Parameters only: the running statistics of batch normalisation follow the target's own forward passes.

        Raises:
            ValueError: If `momentum` is outside [0, 1], or the weights have 16 bits, which would lose most of a step.
        """
        check_number("momentum", momentum, minimum=0, maximum=1, remedy="The paper goes from 0.996 to 1.")
        pairs = self._online_and_target()
        online, target = ([p for modules in pairs for p in modules[side].parameters()] for side in (0, 1))
        if 0 < momentum < 1 and any(torch.finfo(parameter.dtype).bits < 32 for parameter in target):
            raise ValueError(
                f"The weights of the target must have at least 32 bits for a moving average, but are {target[0].dtype}"
                f": steps of 1 - momentum = {1 - momentum:.3g} would be lost to rounding. Load the model with "
                "`dtype=torch.float32`; `bf16` of the training arguments computes in 16 bits all the same."
            )
        if target:
            torch._foreach_lerp_(target, online, 1.0 - momentum)

    def _after_loading(self) -> None:
        for _, target in self._online_and_target():
            target.requires_grad_(False)

    def _online_and_target(self) -> list[tuple[nn.Module, nn.Module]]:
        names = ("encoder", "projection_head", "prediction_head")
        pairs = [(getattr(self, name), getattr(self, f"target_{name}", None)) for name in names]
        return [(online, target) for online, target in pairs if target is not None]


class AnyEncoderModel(PretrainingModel):
    """Base of the models with any encoder, and its heads.

    Attributes:
        encoder ([`PatchDroppingViTMSNModel`] or a network of timm): f.
        projection_head ([`ProjectionHead`]): h.
        prediction_head ([`PredictionHead`] or `None`): After it, if `prediction_head` of the configuration is on.
    """

    config: AnyEncoderConfig

    def __init__(self, config: AnyEncoderConfig):
        super().__init__(config)
        self.encoder, width = build_encoder(config)
        self._timm_modules = set() if config.timm_model is None else set(self.encoder.modules())
        self._tied_weights_keys = names_of_shared_tensors(self.encoder, "encoder.")  # left out of files
        self.projection_head = self._make_projection_head(width)
        self.prediction_head = None
        if getattr(config, "prediction_head", False):
            self.prediction_head = PredictionHead(
                config.projection_dim,
                config.prediction_width,
                config.projection_batch_norm,
                config.projection_activation,
            )

    def _make_projection_head(self, width: int, **settings) -> ProjectionHead:
        config = self.config
        return ProjectionHead(
            width,
            config.projection_hidden_dim,
            config.projection_dim,
            config.projection_batch_norm,
            config.projection_activation,
            **settings,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module not in self._timm_modules:
            super()._init_weights(module)
        elif hasattr(module, "init_non_persistent_buffers"):  # timm drew the weights; no checkpoint holds these
            module.init_non_persistent_buffers()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the tensors that the encoder has under a second name; transformers asks for those of embeddings."""
        return dict(self._tied_weights_keys)

    @property
    def evaluation_encoder(self) -> nn.Module:
        """The encoder whose features are evaluated: the one that is trained."""
        return self.encoder

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projections, in which images are compared: `(B, C, H, W)` -> `(B, projection_dim)`."""
        return self.projection_head(self._features(self.encoder, pixel_values))

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        if self.config.timm_model is None:
            return super()._set_gradient_checkpointing(enable, **kwargs)
        try:
            self.encoder.set_grad_checkpointing(enable)
        except AssertionError as error:  # timm's report of an unsupported network
            raise ValueError(
                f"`activation_checkpointing` is on, but timm has none for {self.config.timm_model!r}. Leave it off, "
                "or choose another `timm_model`."
            ) from error
        if enable:
            track_statistics_once(self.encoder)

    def _apply_heads(self, groups: list[torch.Tensor], kinds: list[str]) -> list[list[torch.Tensor]]:
        """Return the features of each group of images, then for each head its outputs: predictions last."""
        # Neighbours of one size share a pass of the encoder and, with `batch_norm_per_resolution`, of the heads.
        passes = [[*of_size] for _, of_size in groupby(zip(groups, kinds), key=lambda pair: pair[0].shape[-2:])]
        stages = [[self._features(self.encoder, *zip(*of_size)) for of_size in passes]]
        for head in (self.projection_head, self.prediction_head):
            if head is not None:
                stages.append(self._apply_head(head, stages[-1]))
        return [list(torch.cat(rows).split([len(group) for group in groups])) for rows in stages]


class SemiSupervisedModel(AnyEncoderModel):
    """Base of [`PAWSForPreTraining`] and [`SuNCEtForPreTraining`]: any encoder, its heads, a support set."""

    config: SemiSupervisedConfig
    _keys_to_ignore_on_load_missing = ("mask_state",)  # which older checkpoints lack

    def __init__(self, config: SemiSupervisedConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_add_mask_state)

    def _label_rows(self, support_labels: torch.Tensor) -> torch.Tensor:
        """Return smoothed one-hot rows of this rank's supports, a column per class in the support of **all** ranks."""
        if support_labels.ndim != 1 or support_labels.is_floating_point() or support_labels.dtype == torch.bool:
            raise ValueError(
                "`support_labels` must be one class number per support, (S,), but has shape "
                f"{tuple(support_labels.shape)} and type {support_labels.dtype}."
            )
        classes = torch.unique(all_gather_cat(support_labels))
        if classes[0] < 0:
            raise ValueError(
                f"`support_labels` must be class numbers >= 0, but one is {int(classes[0])}. Images without a label "
                "cannot be supports."
            )
        weight = self.projection_head.fc1.weight
        rows = F.one_hot(torch.searchsorted(classes, support_labels), len(classes))
        rows = rows.to(torch.promote_types(weight.dtype, torch.float32))  # keeps a float64 model in float64
        smoothing = self.config.label_smoothing
        return rows * (1 - smoothing) + smoothing / len(classes)


def _forget_mask_draw(model: PretrainingModel, incompatible_keys) -> None:
    model._mask_draw = None


def _add_mask_state(model: SemiSupervisedModel, state_dict: dict, prefix: str, *args) -> None:
    state_dict.setdefault(f"{prefix}mask_state", torch.zeros_like(model.mask_state))


def names_of_shared_tensors(module: nn.Module, prefix: str) -> dict[str, str]:
    """Map each further name of a tensor in the state dict to its first name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}
    return {prefix + name: prefix + original for name, original in names.items() if name != original}


def check_two_views(pixel_values: torch.Tensor, anchor_pixel_values: torch.Tensor | None) -> None:
    """Raise a `ValueError` unless each image has a second global view."""
    wanted = (len(pixel_values), 1)
    if anchor_pixel_values is None or anchor_pixel_values.ndim != 5 or anchor_pixel_values.shape[:2] != wanted:
        shape = None if anchor_pixel_values is None else tuple(anchor_pixel_values.shape)
        raise ValueError(
            "Each image needs two global views, `pixel_values` (B, C, H, W) and `anchor_pixel_values` "
            f"(B, 1, C, H, W) with B = {len(pixel_values)}, but `anchor_pixel_values` is {shape}. Set `anchor_views` "
            "of the transform to 1."
        )


def check_support(support_pixel_values: torch.Tensor | None, support_labels: torch.Tensor | None) -> None:
    """Raise a `ValueError` unless there are supports, and one label per support."""
    shapes = [None if t is None else tuple(t.shape) for t in (support_pixel_values, support_labels)]
    if None in shapes or shapes[0][0] != shapes[1][0] or shapes[0][0] == 0:
        raise ValueError(
            "The support needs `support_pixel_values` (S, C, H, W) and one label per image in `support_labels` (S,), "
            f"with S >= 1, but they are {shapes[0]} and {shapes[1]}. A `support_loader` gives both."
        )
