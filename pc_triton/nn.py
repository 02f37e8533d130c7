"""The layers: torch's own, each with the value node of its output.

Outside inference each layer is its torch counterpart, with the same state dict.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .context import awaits_pass, outside_graphs, pass_here
from .dispatch import backend, fuses
from .distributions import Distribution
from .errors import see
from .families import Categorical, Gaussian
from .operations import AttentionAtPrediction, EmitAttention, EmitLinear
from .reference_softmax import mask_logits


class Linear(nn.Linear):
    """``nn.Linear`` whose output is a value node: mu = x W' + b, x ``[B, ..., in_features]``.

    Arguments as in ``nn.Linear``; its state dict too. node: the family of the output, by default `Gaussian`.
    Raises TypeError if it is no `Distribution`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        node: Distribution | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.node = _family(node)

    def forward(self, input: Tensor) -> Tensor:
        """The node's emission ``[B, ..., out_features]``, in the dtype of the product."""
        return outside_graphs(self._emit, input) if awaits_pass(self.node) else self.node(super().forward(input))

    def _emit(self, input: Tensor) -> Tensor:
        here = pass_here()
        fits = here is not None and here.few_digits is None and type(self.node) is Gaussian
        if here is not None and fits and fuses(input, self.weight):

            def product_and_node(node: Any, here: Any, anchor: Tensor) -> Any:
                return EmitLinear.apply(input, self.weight, self.bias, anchor, node, here)

            emission = here.emit_fused(self.node, product_and_node)
            if emission is not None:
                return emission
        return self.node(super().forward(input))


class Attention(nn.Module):
    """Multi-head self- or cross-attention whose weights are the states of Categorical nodes over the keys.

    mu = q k' / sqrt(head dimension), one Categorical node per query and head, emission p = softmax(u), output p v
    (Pinchetti et al. 2022, section 4.3); then an output projection with a value node of its own (a `Linear`).

    Arguments:
        embed_dim, num_heads, bias, dropout: as in ``nn.MultiheadAttention``, whose state dict it has where
            ``kv_heads`` is ``num_heads``. Dropout acts on the attention weights.
        kv_heads: number of key and value heads, a divisor of num_heads (grouped query heads; default num_heads).
        causal: query i sees the keys up to its own position.
        node: True: a Categorical node over the keys. A family: a node of that family on the softmax's output, as in
            Gaussian PC. False: none; attention is then a plain predictor (torch's fused kernel, no N x N memory).

    Raises ValueError for sizes that do not divide, TypeError for a node that is no `Distribution`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        node: Distribution | bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} is no multiple of kv_heads={kv_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give a probability below 1")
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim, self.causal, self.dropout = embed_dim // num_heads, causal, dropout
        rows = embed_dim + 2 * kv_heads * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.node = None if node is False else _family(Categorical() if node is True else node)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Attention of x ``[B, N, embed_dim]`` over itself or over context ``[B, K, embed_dim]``; x's shape.

        key_padding_mask: bool ``[B, K]``, True where a key is padding. segments: int32 or int64 ``[B, N]``, any number
        for each document of a packed sequence: a query sees the keys of its own document alone. For self-attention.
        Raises ValueError for a wrong shape or dtype, or for segments with a context.
        """
        arguments = (x, context, key_padding_mask, segments)
        return outside_graphs(self._plain, *arguments) if awaits_pass(self.node) else self._plain(*arguments)

    def _plain(
        self, x: Tensor, context: Tensor | None, key_padding_mask: Tensor | None, segments: Tensor | None
    ) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: Attention needs [batch, length, {self.embed_dim}]")
        _check_segments(segments, x, context)
        kv_dim = self.kv_heads * self.head_dim
        if context is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).split([self.embed_dim, kv_dim, kv_dim], -1)
        else:
            sizes = [self.embed_dim, 2 * kv_dim]
            wq, wkv = self.in_proj_weight.split(sizes)
            bq, bkv = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            q, (k, v) = F.linear(x, wq, bq), F.linear(context, wkv, bkv).chunk(2, -1)
        _check_padding(key_padding_mask, k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out, _ = attend(self.node, q, k, v, self.causal, key_padding_mask, None, dropout, segments=segments)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, kv_heads={self.kv_heads}, causal={self.causal}"


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention``, call and state dict, with `Attention`'s value nodes: what `convert` makes of one.

    Not for ``add_bias_kv``, ``add_zero_attn``, ``kdim`` or ``vdim`` of their own: `convert` leaves such a module.
    """

    node: Distribution

    def forward(  # type: ignore[override]
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
        """As ``nn.MultiheadAttention.forward``. Raises ValueError in inference for a sequence without samples."""
        arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return outside_graphs(self._emit, *arguments) if awaits_pass(self.node) else super().forward(*arguments)

    def _emit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if pass_here() is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not self.batch_first or query.dim() != 3:
            raise ValueError(
                f"query has shape {tuple(query.shape)}, with batch_first={self.batch_first}: a value node needs its "
                "samples along the first axis, batch_first=True and [samples, time, width]"
                + see("one-sequence-without-samples")
            )
        q, k, v = F._in_projection_packed(query, key, value, self.in_proj_weight, self.in_proj_bias)  # type: ignore
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        bias = logit_bias(q.dtype, attn_mask, key_padding_mask)
        out, weights = attend(self.node, q, k, v, False, None, bias, dropout, fused=not need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights and weights is not None else weights


def logit_bias(dtype: torch.dtype, *masks: Tensor | None) -> Tensor | None:
    """The sum of masks: bool, True where a key is hidden, or floats to add to the logits; None without any."""
    bias = None
    for mask in masks:
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
            bias = mask if bias is None else bias + mask
    return bias


def attend(
    node: Distribution | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    padding: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    fused: bool = True,
    scale: float | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k' + bias) v ``[B, heads, N, D]`` with the node over the keys, and its weights.

    The weights are None where nothing has to make them; fused=False makes them in inference.
    q ``[B, heads, N, D]``; k, v ``[B, kv heads, K, D]``; causal, padding and segments as in `reference.mask_logits`;
    scale is 1 / sqrt(D) if None.
    """
    if node is None or (pass_here() is None and _is_softmax(node)):
        return _plain(q, k, v, causal, padding, bias, dropout, scale, segments), None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    here = pass_here()
    if fused and here is not None and _is_softmax(node) and bias is None and not dropout:
        kernels = backend(q)
        if kernels is not reference and q.shape[-1] <= kernels.WIDEST:

            def attention(node: Any, here: Any, anchor: Tensor) -> Any:
                return EmitAttention.apply(q, k, v, anchor, node, here, {"scale": scale, **node.frozen})

            def first() -> Any:
                out = _plain(q, k, v, causal, padding, None, 0.0, scale, segments)
                masks = {"causal": causal, "padding": padding, "segments": segments}
                here = AttentionAtPrediction(q.detach(), k.detach(), v.detach(), out.detach(), scale, masks)
                return out, masks, here

            out = here.emit_fused(node, attention, first)
            if out is not None:
                return out, None
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mu = scale * (q @ k.transpose(-2, -1))
    if bias is not None:
        mu = (mu + bias).masked_fill(bias == -torch.inf, -torch.inf)  # where no gradient is to come from either
    if isinstance(node, Categorical):
        masks = {"padding": padding, "segments": segments}
        p = node(mu, causal=causal, **{name: mask for name, mask in masks.items() if mask is not None})
    else:
        p = node(mask_logits(mu, causal, padding, segments).softmax(-1).nan_to_num(0.0))  # 0 where no key is seen
    return F.dropout(p, dropout) @ v, p


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    padding: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    """`attend` without a node, by torch's own attention. A query that sees no key has 0."""
    blind = None
    if padding is not None or segments is not None or (causal and q.shape[2] != k.shape[2]):
        bias = mask_logits(q.new_zeros(len(q), 1, q.shape[2], k.shape[2]), causal, padding, segments)
        if padding is not None or (causal and q.shape[2] > k.shape[2]):
            blind = bias.amax(-1, keepdim=True) == -torch.inf
            bias = bias.masked_fill(blind, 0.0)  # or torch makes NaN of it, and of every gradient
        causal = False
    shared = bool(q.shape[1] != k.shape[1])  # torch.jit.trace makes sizes tensors
    out = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=shared)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _is_softmax(node: Distribution) -> bool:
    """Whether the node is a Categorical as it comes, or one derived from it that leaves its mathematics alone."""
    return type(node).node_forward is Categorical.node_forward


def _family(node: Distribution | None) -> Distribution:
    if node is None:
        return Gaussian()
    if not isinstance(node, Distribution):
        raise TypeError(f"node={node!r}: give a pc_triton Distribution, for example pc_triton.Gaussian()")
    return node


def _check_padding(mask: Tensor | None, keys: Tensor) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:2]):
        raise ValueError(
            f"key_padding_mask is {mask.dtype} {tuple(mask.shape)}: give a bool tensor {tuple(keys.shape[:2])}, "
            "True where a key is padding"
        )


def _check_segments(segments: Tensor | None, x: Tensor, context: Tensor | None) -> None:
    if segments is None:
        return
    if context is not None:
        raise ValueError("segments are for self-attention: leave them out, or the context")
    if segments.dtype not in (torch.int32, torch.int64) or segments.shape != x.shape[:2]:
        raise ValueError(
            f"segments is {segments.dtype} {tuple(segments.shape)}: give an int32 or int64 tensor "
            f"{tuple(x.shape[:2])}, a number for each document"
        )
