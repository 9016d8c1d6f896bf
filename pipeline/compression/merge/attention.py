"""torch's attention layer with heads of any width or number: its own requires that heads fill the embedding exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention after compression: num_heads * head_dim is less than embed_dim.

    Same tensors under the same names, same arguments and results; in_proj_weight is (3 * num_heads * head_dim,
    embed_dim) and out_proj.weight (embed_dim, num_heads * head_dim). Made by `resized`, never constructed.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False  # by this nn.TransformerEncoderLayer knows that its fused path does not apply

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query: (N, L, E), or (L, N, E) without batch_first, or (L, E); as nn.MultiheadAttention."""
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError("attention with bias_k or add_zero_attn has no narrow form")
        single = query.dim() == 2
        turned = not single and not self.batch_first
        inputs = [x.unsqueeze(0) if single else x.transpose(0, 1) if turned else x for x in (query, key, value)]
        batch, length, source = inputs[0].shape[0], inputs[0].shape[1], inputs[1].shape[1]
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint on attn_mask: give attn_mask, too, as in nn.MultiheadAttention")
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, self.num_heads, length, source)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(batch, 1, 1, source)
        masks = [_added(given, q.dtype) for given in (attn_mask, key_padding_mask) if given is not None]
        mask = sum(masks[1:], masks[0]) if masks else None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
            scores = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = scores @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        out = out.squeeze(0) if single else out.transpose(0, 1) if turned else out
        if not need_weights:
            return out, None
        shown = scores.mean(1) if average_attn_weights else scores
        return out, shown.squeeze(0) if single else shown


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form that is added to scores: a boolean mask becomes -inf where it is True, else 0."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
