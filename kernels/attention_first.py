"""Attention's node in the first pass of inference, where e = 0: how far F falls by it, and its first move.

The names are those of ``attention.py``. The children send back g = dF/dout v', so that <p, g> = <dF/dout, out>. Then

    2 pi times the fall of F, to first order in 1 / pi:  sum p (g - <p, g>)^2,
    the first move:                                      e = -(move / pi) (g - <p, g>).

Of size N K only e is written, and nothing is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import by_token, check_attention, mask_pointers, packed_tokens, shape_options
from .attention_tiles import end_of, keys_near, load_rows, pairs, place, segments_of
from .categorical import online_softmax, settle
from .common import UNFUSED, cdiv, check, check_moves, new_state, on_device, sum_partials


@triton.jit
def _fall(
    q_ptr,  # [B, N, H, HEAD], a row of heads every q_stride
    k_ptr,  # [B, K, H / GROUP, HEAD], every k_stride
    v_ptr,  # [B, K, H / GROUP, HEAD], every v_stride
    out_ptr,  # [B, N, H, HEAD]
    grad_out_ptr,  # [B, N, H, HEAD]
    padding_ptr,  # [B, K], non-zero where a key is padding
    segments_ptr,  # [B, N], N = K, int32 or int64
    fall_ptr,  # [B, H, N] float32
    scale,
    q_stride,
    k_stride,
    v_stride,
    n_queries,
    n_keys,
    n_heads,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum p (g - <p, g>)^2 of each query, in one pass over its keys. A program takes ROWS queries of a head.

    Floor, bytes per pair of query and key: none.
    """
    item, head, block = place(tl.cdiv(n_queries, ROWS), n_heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = load_rows(q_ptr + (item * n_queries * q_stride + head * HEAD), rows, n_queries, q_stride, HEAD, DIM)
    token = n_heads * HEAD
    first = (item * n_queries * n_heads + head) * HEAD
    grad_out = load_rows(grad_out_ptr + first, rows, n_queries, token, HEAD, DIM)
    out = load_rows(out_ptr + first, rows, n_queries, token, HEAD, DIM)
    mean_g = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1, keep_dims=True)
    k_ptr += item * n_keys * k_stride + head // GROUP * HEAD
    v_ptr += item * n_keys * v_stride + head // GROUP * HEAD
    peak = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    squares = tl.zeros([ROWS, 1], tl.float32)
    span = end_of(block, item, padding_ptr, n_queries, n_keys, CAUSAL, PADDING, ROWS, COLS)
    own, begin, span = keys_near(rows, span, item, segments_ptr, n_keys, SEGMENTS, COLS)
    for start in range(0, span, COLS):
        cols = begin + start + tl.arange(0, COLS)
        k = load_rows(k_ptr, cols, n_keys, k_stride, HEAD, DIM)
        v = load_rows(v_ptr, cols, n_keys, v_stride, HEAD, DIM)
        mu = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        g = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        live = pairs(rows, cols, own, item, padding_ptr, segments_ptr, n_queries, n_keys, CAUSAL, PADDING, SEGMENTS)
        peak, total, weights, older = online_softmax(mu, live, peak, total)
        push = tl.where(live, g - mean_g, 0.0)
        squares = squares * older + tl.sum(weights * push * push, axis=1, keep_dims=True)
    _, inverse = settle(peak, total)
    places = ((item * n_heads + head) * n_queries + rows)[:, None]
    tl.store(fall_ptr + places, squares * inverse, mask=(rows < n_queries)[:, None])


@triton.jit
def _first_step(
    v_ptr,  # [B, K, H / GROUP, HEAD], a row of heads every v_stride
    out_ptr,  # [B, N, H, HEAD]
    grad_out_ptr,  # [B, N, H, HEAD]
    state_ptr,  # [B, H, N, K] float32 or bfloat16, written
    precision_ptr,  # [S] float32
    move_ptr,  # [S] float32
    padding_ptr,  # [B, K], non-zero where a key is padding
    segments_ptr,  # [B, N], N = K, int32 or int64
    v_stride,
    n_queries,
    n_keys,
    n_heads,
    items_per_sample,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """e = -(move / pi) (g - <p, g>), 0 where masked. A program takes ROWS queries of a head.

    Floor, bytes per pair of query and key: write the state (4 or 2).
    """
    item, head, block = place(tl.cdiv(n_queries, ROWS), n_heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    token = n_heads * HEAD
    first = (item * n_queries * n_heads + head) * HEAD
    sample = item // items_per_sample
    push = tl.load(move_ptr + sample) / tl.load(precision_ptr + sample)
    pushed = tl.where(push == 0.0, 0, n_queries)  # what a push of 0 would multiply may be infinite, and is not read
    grad_out = load_rows(grad_out_ptr + first, rows, pushed, token, HEAD, DIM)
    out = load_rows(out_ptr + first, rows, pushed, token, HEAD, DIM)
    mean_g = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1, keep_dims=True)
    v_ptr += item * n_keys * v_stride + head // GROUP * HEAD
    places = (item * n_heads + head) * n_queries + rows
    inside = rows < n_queries
    own = rows
    if SEGMENTS:
        own = segments_of(rows, item, segments_ptr, n_keys)
    for start in range(0, n_keys, COLS):
        cols = start + tl.arange(0, COLS)
        v = load_rows(v_ptr, cols, n_keys, v_stride, HEAD, DIM)
        g = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        live = pairs(rows, cols, own, item, padding_ptr, segments_ptr, n_queries, n_keys, CAUSAL, PADDING, SEGMENTS)
        new = tl.where(live, push * (mean_g - g), 0.0)
        pointers = state_ptr + (places[:, None] * n_keys + cols[None, :])
        tl.store(pointers, new, mask=inside[:, None] & (cols < n_keys)[None, :])


def attention_fall(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    samples: int,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """The sum of p (g - <p, g>)^2 of each sample, float32 ``[S]``, with p = softmax(scale q k') and g = grad_out v'.

    out, grad_out ``[B, H, N, D]``: attention's output p v, and F's gradient in it. The other arguments, and what is
    raised, are those of `attention_forward`.
    """
    precision = torch.empty(samples, dtype=torch.float32, device=q.device)
    mu = check_attention(q, k, v, None, precision, causal, padding, segments)
    check("out", out, q, q.shape)
    check("grad_out", grad_out, q, q.shape)
    out, grad_out = packed_tokens(out, q), packed_tokens(grad_out, q)
    if mu.numel() == 0:
        return torch.zeros_like(precision)
    fall = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    (q, q_stride), (k, k_stride), (v, v_stride) = by_token(q), by_token(k), by_token(v)
    with on_device(q):
        options = shape_options(q, k, "queries", causal, padding, segments)
        _fall[(len(q) * q.shape[1] * cdiv(q.shape[2], options["ROWS"]),)](
            q, k, v, out, grad_out, *mask_pointers(padding, segments), fall,
            scale, q_stride, k_stride, v_stride, q.shape[2], k.shape[2], q.shape[1],
            **options | UNFUSED,
        )  # fmt: skip
    return sum_partials(fall, samples)


def attention_first_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    precision: Tensor,
    move: Tensor,
    *,
    state_dtype: torch.dtype | None = None,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """The state after the first move, -(move / pi) (g - <p, g>), 0 where masked: ``[B, H, N, K]``.

    state_dtype: float32 (None) or bfloat16. precision, move ``[S]`` float32. The other arguments, and what is raised,
    are those of `attention_fall`.
    """
    mu = check_attention(q, k, v, None, precision, causal, padding, segments)
    check_moves(move, move, precision, mu)
    check("out", out, q, q.shape)
    check("grad_out", grad_out, q, q.shape)
    out, grad_out = packed_tokens(out, q), packed_tokens(grad_out, q)
    state = new_state(mu, "error", state_dtype)
    if mu.numel() == 0:
        return state
    v, v_stride = by_token(v)
    with on_device(q):
        options = shape_options(q, k, "queries", causal, padding, segments)
        _first_step[(len(q) * q.shape[1] * cdiv(q.shape[2], options["ROWS"]),)](
            v, out, grad_out, state, precision.contiguous(), move.contiguous(),
            *mask_pointers(padding, segments),
            v_stride, q.shape[2], k.shape[2], q.shape[1], len(q) // len(precision), **options | UNFUSED,
        )  # fmt: skip
    return state
