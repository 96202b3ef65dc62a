"""Multi-head attention that can lose heads, to stand in the place of `nn.MultiheadAttention`, which cannot."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _NoFastPath:
    """Stand where fused transformer layers look for a packed weight: they see that it is none and go the plain way."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class PrunedAttention(nn.Module):
    """Attention with projections of their own for queries, keys and values, and as many heads as are left.

    It takes and returns what `nn.MultiheadAttention` does. The width of the heads, together, need not be that of the
    embedding.

    Args:
        embed_dim: features of the queries and of the result.
        num_heads: number of heads.
        head_dim: features of a head.
        kdim: features of the keys.
        vdim: features of the values.
        bias: whether the projections add a bias.
        dropout: probability with which an attention weight is dropped while training.
        batch_first: whether batches come as `[batch, length, features]` and not `[length, batch, features]`.
        device: of the weights.
    """

    in_proj_weight = _NoFastPath()
    in_proj_bias = None
    bias_k = None
    bias_v = None
    add_zero_attn = False
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        kdim: int,
        vdim: int,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.kdim, self.vdim, self.dropout, self.batch_first = kdim, vdim, dropout, batch_first
        width = num_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias, device=device)
        self.k_proj = nn.Linear(kdim, width, bias, device=device)
        self.v_proj = nn.Linear(vdim, width, bias, device=device)
        self.out_proj = nn.Linear(width, embed_dim, bias, device=device)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the result, if there is one."""
        return self.out_proj.bias

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
        """Attend from queries to keys and mix the values.

        Args:
            query: `[batch, target, embed_dim]`, or as `batch_first` says, or without a batch.
            key: `[batch, source, kdim]`, likewise.
            value: `[batch, source, vdim]`, likewise.
            key_padding_mask: `[batch, source]`: true, or what is added to the scores, where a key is not to be read.
            need_weights: whether to return the weights of attention too.
            attn_mask: `[target, source]` or `[batch · heads, target, source]`: true where attention is not allowed, or
                what is added to the scores.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: that `attn_mask` is causal.

        Returns:
            The result, shaped as `query`, and the weights, `[batch, target, source]` or
            `[batch, heads, target, source]`, or `None`.

        Raises:
            RuntimeError: if `is_causal` is given without a mask, or a mask has no fitting shape.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("`is_causal` says what `attn_mask` is: it must come with one.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, key_padding_mask, attn_mask)
        weights, dropout = None, self.dropout if self.training else 0.0
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return result.squeeze(0), weights
        return result if self.batch_first else result.transpose(0, 1), weights

    def _split(self, features: Tensor) -> Tensor:
        """Return `[batch, heads, length, head_dim]`."""
        batch, length, _ = features.shape
        return features.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, allowed: Tensor | None) -> Tensor | None:
        """Return what is to be added to the scores, broadcasting to `[batch, heads, target, source]`."""
        batch, target, source = q.shape[0], q.shape[2], k.shape[2]
        total = None
        if allowed is not None:
            full = (batch * self.num_heads, target, source)
            if tuple(allowed.shape) not in ((target, source), full):
                raise RuntimeError(
                    f"`attn_mask` must have the shape {[target, source]} or {list(full)}. Got {list(allowed.shape)}."
                )
            total = _added(allowed, q.dtype)
            total = total.view(-1, self.num_heads if total.dim() == 3 else 1, target, source)
        if padding is not None:
            more = _added(padding, q.dtype).view(batch, 1, 1, source)
            total = more if total is None else total + more
        return total

    def extra_repr(self) -> str:
        """Show the heads."""
        return f"{self.num_heads} heads of {self.head_dim}"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores: −∞ where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def why_unprunable(attention: nn.Module) -> str:
    """Return why a `PrunedAttention` cannot stand in the place of an `nn.MultiheadAttention`, or `""`."""
    if type(attention) is not nn.MultiheadAttention:
        return f"a {type(attention).__name__} is no plain nn.MultiheadAttention"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it appends learned keys and values (`add_bias_kv`)"
    if attention.add_zero_attn:
        return "it appends a key of zeros (`add_zero_attn`)"
    if (attention.in_proj_bias is None) != (attention.out_proj.bias is None):
        return "it has a bias on one side only"
    hooks = (attention._forward_hooks, attention._forward_pre_hooks, attention._backward_hooks)
    return "it has hooks, which would be lost" if any(hooks) else ""


@torch.no_grad()
def pruned_attention(attention: nn.MultiheadAttention) -> PrunedAttention:
    """Return the same attention with projections of their own, so that heads can be removed.

    Args:
        attention: for which `why_unprunable` says nothing.
    """
    weight: Any = attention.in_proj_weight
    packed = weight is not None
    parts = weight.chunk(3) if packed else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    made = PrunedAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.head_dim,
        attention.kdim,
        attention.vdim,
        attention.in_proj_bias is not None,
        attention.dropout,
        attention.batch_first,
        device="meta",
    )
    made = made.to_empty(device=attention.out_proj.weight.device).to(attention.out_proj.weight.dtype)
    for layer, own, bias in zip((made.q_proj, made.k_proj, made.v_proj), parts, biases, strict=True):
        layer.weight.copy_(own)
        layer.weight.requires_grad_((weight if packed else own).requires_grad)
        if bias is not None:
            layer.bias.copy_(bias)
            layer.bias.requires_grad_(attention.in_proj_bias.requires_grad)
    made.out_proj.weight.copy_(attention.out_proj.weight)
    made.out_proj.weight.requires_grad_(attention.out_proj.weight.requires_grad)
    if made.out_proj.bias is not None:
        made.out_proj.bias.copy_(attention.out_proj.bias)
        made.out_proj.bias.requires_grad_(attention.out_proj.bias.requires_grad)
    return made.train(attention.training)
