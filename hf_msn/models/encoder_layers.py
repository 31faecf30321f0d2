"""The layer of ViTMSN with the same weights under the same names, faster in training."""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNAttention, ViTMSNLayer, eager_attention_forward

from .onednn_linear import linear_of_all


class PretrainingViTMSNLayer(ViTMSNLayer):
    """`ViTMSNLayer` that can leave out what the [CLS] does not need."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, N, D)`): The [CLS] first.
            attention_mask (`torch.Tensor`, *optional*): As in `ViTMSNLayer`; not together with `cls_only`.
            cls_only (`bool`, *optional*, defaults to `False`): Compute the output of the [CLS] alone. It still attends
                to all tokens, but their own queries and MLP, five sixths of the layer's products, are left out.

        Returns:
            `torch.Tensor`: Of shape `(B, N, D)`, or `(B, 1, D)` with `cls_only`.
        """
        residual = hidden_states[:, :1] if cls_only else hidden_states
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, cls_only, **kwargs)
        hidden_states = self.dropout(attended) + residual
        return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states


class PretrainingViTMSNAttention(ViTMSNAttention):
    """`ViTMSNAttention` that can attend from the [CLS] alone, and avoids a slow backward pass of SDPA on the CPU."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if cls_only:
            projected = self.q_proj(hidden_states[:, :1]), *linear_of_all([self.k_proj, self.v_proj], hidden_states)
        else:
            projected = linear_of_all([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        query, key, value = map(self._split_heads, projected)

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

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _slow_in_sdpa(query: torch.Tensor, key: torch.Tensor) -> bool:
    # In 16 bits forward and backward of the CPU's flash kernel take 1.2 to 8 times as long as plain products, the more
    # the shorter the sequence; past this length the products' memory counts. Forward alone it is the more precise one.
    in_16_bits = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and query.requires_grad and key.shape[2] <= 2048


def batched_products(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
    """softmax(Q K^T scaling) V with the signature of transformers' attention functions, without mask."""
    weights = torch.softmax((query * scaling) @ key.transpose(2, 3), dim=-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), None
