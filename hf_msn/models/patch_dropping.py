"""A ViTMSN that leaves out patches instead of replacing them, and the draw of which patches to keep."""

import math

import numpy as np
import torch
from torch import nn
from transformers import ViTMSNConfig, ViTMSNModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNEmbeddings
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .encoder_layers import PretrainingViTMSNAttention, PretrainingViTMSNLayer
from .onednn_linear import OneDNNLinear


class PatchDroppingViTMSNModel(ViTMSNModel):
    """`ViTMSNModel` with the same weights under the same names, that can drop patches and takes images of any size.

    A dropped patch costs nothing after the patch embedding: the transformer sees shorter sequences. Position
    embeddings are interpolated (bicubic) wherever the image has another number of patches than `config.image_size`.
    """

    _no_split_modules = ("ViTMSNEmbeddings", "PretrainingViTMSNLayer")

    def __init__(self, config: ViTMSNConfig):
        super().__init__(config)
        for layer in self.layers:  # the modules and their weights stay: only `forward` is another
            layer.__class__ = PretrainingViTMSNLayer
            layer.attention.__class__ = PretrainingViTMSNAttention
            OneDNNLinear.replace_in(layer)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ViTMSNEmbeddings):
            # ViTMSNModel starts both at 0, where all patches look alike; the authors' code draws them.
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        kept_patches: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): H and W are multiples of the patch size.
            kept_patches (`torch.LongTensor` of shape `(B, K)`, *optional*): Indices of the patches to keep, a row for
                each image, row-major over the grid of patches. By default all are kept.
            interpolate_pos_encoding (`bool`, *optional*): Accepted for the signature of `ViTMSNModel`; positions are
                always interpolated where they must be.
            attention_mask (`torch.Tensor`, *optional*): As in `ViTMSNModel`, over the [CLS] and the kept patches.
            cls_only (`bool`, *optional*, defaults to `False`): Compute only the [CLS] in the last layer, which is all
                that the loss of MSN reads.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(B, 1 + K, D)`, or `(B, 1, D)` with `cls_only`, after the
            final LayerNorm; `hidden_states[-1]`, if asked for, is the output of the last block before it.

        Raises:
            ValueError: If H or W is not a multiple of the patch size, or `cls_only` comes with an `attention_mask`.
        """
        if cls_only and attention_mask is not None:
            raise ValueError("`cls_only` takes no `attention_mask`. Leave out one of them.")
        tokens = self._embed(pixel_values.to(self.embeddings.cls_token.dtype), kept_patches)
        attention_mask = create_bidirectional_mask(self.config, inputs_embeds=tokens, attention_mask=attention_mask)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, attention_mask, **kwargs)
        tokens = self.layers[-1](tokens, attention_mask, cls_only, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(tokens))

    def _embed(self, pixel_values: torch.Tensor, kept_patches: torch.Tensor | None) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size or not height or not width:
            raise ValueError(
                f"The images are {height} x {width} pixels, but both sides must be multiples of `patch_size`, which "
                f"is {patch_size}. Resize or crop them, or choose another `image_size` or `focal_size`."
            )
        patches = self.embeddings.patch_embeddings(pixel_values)
        num_patches, hidden_size = patches.shape[1:]
        # The shape is all that the interpolation reads of its first argument.
        positions = self.embeddings.interpolate_pos_encoding(
            patches.new_empty(1, 1 + num_patches, hidden_size), height, width
        )
        patches = patches + positions[:, 1:]
        if kept_patches is not None:
            patches = patches.gather(1, kept_patches.unsqueeze(-1).expand(-1, -1, hidden_size))
        cls_tokens = (self.embeddings.cls_token + positions[:, :1]).expand(batch_size, -1, -1)
        return self.embeddings.dropout(torch.cat([cls_tokens, patches], dim=1))


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """floor(num_patches * (1 - mask_ratio)), not thrown off by floating-point noise such as 10 * (1 - 0.9) < 1."""
    return math.floor(num_patches * (1.0 - mask_ratio) + 1e-9)


def draw_kept_patches(
    batch_size: int, num_patches: int, mask_ratio: float, *, seed: tuple[int, ...], shared: bool = False
) -> torch.Tensor:
    """Draws which patches each image keeps.

    Args:
        batch_size (`int`): Number of images, B.
        num_patches (`int`): Patches of an image, N.
        mask_ratio (`float`): Part of the patches to drop, in [0, 1).
        seed (`tuple[int, ...]`): What the draw depends on, and the only thing: (seed, rank, number of the draw).
        shared (`bool`, *optional*, defaults to `False`): One draw for all images instead of one an image.

    Returns:
        `torch.LongTensor` of shape `(B, floor(N * (1 - mask_ratio)))`: On the CPU, no index twice in a row.

    Raises:
        ValueError: If no patch is left.
    """
    num_kept = num_kept_patches(num_patches, mask_ratio)
    if num_kept < 1:
        raise ValueError(
            f"`mask_ratio` {mask_ratio} leaves none of the {num_patches} patches of a view. Lower it, or choose "
            "larger views or a smaller `patch_size`."
        )
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    keys = torch.rand(1 if shared else batch_size, num_patches, generator=generator)
    kept = keys.argsort(dim=1)[:, :num_kept]
    return kept.expand(batch_size, -1)
