"""The encoder of MSN: a ViTMSN that drops patches instead of replacing them, with layers that train faster."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTMSNConfig, ViTMSNModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_msn.modeling_vit_msn import (
    ViTMSNAttention,
    ViTMSNEmbeddings,
    ViTMSNLayer,
    ViTMSNMLP,
    ViTMSNPreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .masking import patches_per_side
from .onednn_linear import OneDNNLinear, joint_linear
from .patch_resampling import resample_patch_weight


class PatchDroppingViTMSNModel(ViTMSNModel):
    """`ViTMSNModel` with the same weights under the same names, that can drop patches and takes images of any size.

    A dropped patch costs nothing after the patch embedding: the layers see shorter sequences. Position embeddings are
    interpolated (bicubic) where the number of patches differs from that of `config.image_size`. Patches of another
    size are embedded with the same weights, see [`resample_patch_weight`].
    """

    _no_split_modules = ("ViTMSNEmbeddings", "PatchDroppingViTMSNLayer")

    def __init__(self, config: ViTMSNConfig):
        ViTMSNPreTrainedModel.__init__(self, config)  # ViTMSNModel's own builds plain layers
        self.embeddings = ViTMSNEmbeddings(config)
        self.layers = nn.ModuleList(PatchDroppingViTMSNLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):  # the patch embedding; ViTMSNModel draws it as narrow as any layer
            std = getattr(self.config, "patch_initializer_range", None)
            init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()) if std is None else std)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, ViTMSNEmbeddings):
            # ViTMSNModel starts both at 0, where all patches look alike; the authors' code draws them.
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            if getattr(self.config, "position_initializer_range", None) is None:
                init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            else:
                init.normal_(module.position_embeddings, std=self.config.position_initializer_range)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        kept_patches: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        patch_size: int | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): H and W are multiples of `config.patch_size`.
            kept_patches (`torch.LongTensor` of shape `(B, K)`, *optional*): Indices of the patches to keep, one row
                per image, row-major over the grid of patches. By default all are kept.
            interpolate_pos_encoding (`bool`, *optional*): Ignored; part of the signature of `ViTMSNModel`.
            attention_mask (`torch.Tensor`, *optional*): As in `ViTMSNModel`, over the [CLS] and the kept patches.
            cls_only (`bool`, *optional*, defaults to `False`): Compute only the [CLS] in the last layer.
            patch_size (`int`, *optional*): Pixels of a patch, by default `config.patch_size`. With another size the
                images may have any sides: they are resized (bicubic, antialiased) to the nearest multiples of it.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(B, 1 + K, D)`, or `(B, 1, D)` with `cls_only`, after the
            final LayerNorm. `hidden_states[-1]`, if requested, is the output of the last layer before it.

        Raises:
            ValueError: If H or W is not a multiple of `config.patch_size`, a side has less than half of a patch of
                `patch_size`, or `cls_only` comes with an `attention_mask`.
        """
        if cls_only and attention_mask is not None:
            raise ValueError("`cls_only` takes no `attention_mask`. Leave out one of them.")
        tokens = self._embed(pixel_values.to(self.embeddings.cls_token.dtype), kept_patches, patch_size)
        if attention_mask is not None:  # under torch.compile the function makes a mask of N x N, also for the [CLS]
            attention_mask = create_bidirectional_mask(self.config, tokens, attention_mask)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, attention_mask, **kwargs)
        tokens = self.layers[-1](tokens, attention_mask, cls_only, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(tokens))

    def _embed(
        self, pixel_values: torch.Tensor, kept_patches: torch.Tensor | None, patch_size: int | None
    ) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        own_size = self.config.patch_size
        if patch_size is not None and patch_size != own_size:
            rows, columns = (patches_per_side(side, patch_size) for side in (height, width))
            patches = self._embed_patches(pixel_values, patch_size, rows, columns)
            height, width = rows * own_size, columns * own_size  # by which the positions are interpolated
        elif height % own_size or width % own_size or not height or not width:
            raise ValueError(
                f"The images are {height} x {width} pixels, but both sides must be multiples of `patch_size`, which "
                f"is {own_size}. Resize or crop them, or choose another `image_size` or `focal_size`."
            )
        else:
            patches = self.embeddings.patch_embeddings(pixel_values)
        num_patches, hidden_size = patches.shape[1:]
        # interpolate_pos_encoding reads only the shape of its first argument
        positions = self.embeddings.interpolate_pos_encoding(
            patches.new_empty(1, 1 + num_patches, hidden_size), height, width
        )
        patches = patches + positions[:, 1:]
        if kept_patches is not None:
            patches = patches.gather(1, kept_patches.unsqueeze(-1).expand(-1, -1, hidden_size))
        cls_tokens = (self.embeddings.cls_token + positions[:, :1]).expand(batch_size, -1, -1)
        return self.embeddings.dropout(torch.cat([cls_tokens, patches], dim=1))

    @torch.compiler.disable  # torch.compile would trace the pseudo-inverse in place of reading it from the cache
    def _embed_patches(self, pixel_values: torch.Tensor, patch_size: int, rows: int, columns: int) -> torch.Tensor:
        sides = (rows * patch_size, columns * patch_size)
        if pixel_values.shape[-2:] != sides:
            pixel_values = F.interpolate(pixel_values, sides, mode="bicubic", antialias=True)
        projection = self.embeddings.patch_embeddings.projection
        weight = resample_patch_weight(projection.weight, patch_size)
        return F.conv2d(pixel_values, weight, projection.bias, stride=patch_size).flatten(2).transpose(1, 2)


class PatchDroppingViTMSNLayer(ViTMSNLayer):
    """`ViTMSNLayer` that can leave out what the [CLS] does not need."""

    def __init__(self, config: ViTMSNConfig):
        super(ViTMSNLayer, self).__init__()  # ViTMSNLayer's own builds the plain attention
        self.attention = PatchDroppingViTMSNAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMSNMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        OneDNNLinear.replace_in(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """`(B, N, D)`, the [CLS] first, -> `(B, N, D)`, or `(B, 1, D)` with `cls_only`.

        The [CLS] alone still attends to all tokens, but their queries and MLP, five sixths of the layer's products,
        are left out.
        """
        residual = hidden_states[:, :1] if cls_only else hidden_states
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, cls_only, **kwargs)
        hidden_states = self.dropout(attended) + residual
        return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states


class PatchDroppingViTMSNAttention(ViTMSNAttention):
    """`ViTMSNAttention` that can attend from the [CLS] alone, and avoids a slow backward pass of SDPA on the CPU."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if cls_only:
            projected = self.q_proj(hidden_states[:, :1]), *joint_linear([self.k_proj, self.v_proj], hidden_states)
        else:
            projected = joint_linear([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)

        is_sdpa = self.config._attn_implementation == "sdpa" and attention_mask is None
        if is_sdpa and _slow_in_sdpa(query, key):
            attend = batched_products
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


def _slow_in_sdpa(query: torch.Tensor, key: torch.Tensor) -> bool:
    # In 16 bits forward and backward of the CPU's flash kernel take 1.2 to 8 times as long as plain products, the more
    # the shorter the sequence; beyond this length the memory of the products counts. Forward alone it is more precise.
    in_16_bits = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and query.requires_grad and key.shape[2] <= 2048


def batched_products(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
    """softmax(Q K^T scaling) V with the signature of transformers' attention functions, without mask."""
    weights = torch.softmax((query * scaling) @ key.transpose(2, 3), dim=-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), None
