"""The layer of ViTMSN with the same weights under the same names, faster in training."""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNAttention, ViTMSNLayer, eager_attention_forward


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
        query = self._split_heads(self.q_proj(hidden_states[:, :1] if cls_only else hidden_states))
        key, value = self._split_heads(self.k_proj(hidden_states)), self._split_heads(self.v_proj(hidden_states))

        if self.config._attn_implementation == "sdpa" and attention_mask is None and _slow_in_sdpa(query):
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


def _slow_in_sdpa(query: torch.Tensor) -> bool:
    # The flash kernel of the CPU takes 2 to 10 times as long as plain products in 16 bits, where it must go backward.
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and query.requires_grad


def batched_products(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
    """softmax(Q K^T scaling) V with the signature of transformers' attention functions, without mask."""
    weights = torch.softmax((query * scaling) @ key.transpose(2, 3), dim=-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), None
