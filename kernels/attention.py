"""Attention whose weights are the states of a Categorical node over the keys for every query, in error form.

mu = scale q k', u = mu + e, p = softmax(u), q_ = softmax(mu), output p v, E = pi KL[p || q_] (Pinchetti et al. 2022,
arXiv 2211.03481, section 4.3). Neither mu nor p nor their gradients reach memory, as in Dao et al. 2022 (arXiv
2205.14135): e ``[B, H, N, K]`` alone does, and without a state (e = 0) nothing of that size. Tiles that causal hides
are not visited, nor are those behind an item's last key that is no padding, nor before the first and behind the last
token whose segment lies between those of a tile: none, in a sequence packed of documents, that hold no pair.

A row's KL is gathered in one pass over the keys by the chain rule: for keys a and b seen apart, of weights w in p and
v in q_, KL = w_a KL_a + w_b KL_b + KL[w || v]. Each term is taken as in ``categorical.py``, without cancellation, and
none is negative; d = u - mu is centred tile by tile, so that a shift costs no more digits than d itself loses by it.
The step needs no difference q_ - p either: with x = d - <p, d> and y = log(q_ / p) = -(x + KL),
p x + q_ - p = p (e^y - 1 - y) - p KL, of second order in d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    end_of,
    keys_near,
    load_rows,
    near_segments,
    pairs,
    place,
    seen_keys,
    segments_of,
    store_rows,
    visible,
)
from .categorical import check_masks, kl_of, kl_parts, online_softmax, settle
from .common import (
    arch,
    cdiv,
    check,
    check_node,
    check_step,
    exp,
    near_tail,
    on_device,
    packed,
    power_of_2,
    product_precision,
    sum_partials,
)

WIDEST = 128  # the largest head dimension
FUSED = {"enable_fp_fusion": True}  # launch option: what is to be exactly 0 is no difference of rounded products here


@triton.jit
def join(peak_a, total_a, peak_b, total_b):
    """The peak of two parts of a row, settled or not, the sum and its inverse; what scales either part to it."""
    highest = tl.maximum(peak_a, peak_b)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    scale_a = exp(peak_a - finite)
    scale_b = exp(peak_b - finite)
    total = total_a * scale_a + total_b * scale_b
    return highest, total, settle(highest, total), scale_a, scale_b


@triton.jit
def tile_row(u, mu, d, live, ROWS: tl.constexpr):
    """A tile's weights e^(u - peak); by row peaks and sums of u and mu, <p, d> and KL[p || q_] within the tile."""
    low = tl.full([ROWS, 1], float("-inf"), tl.float32)
    nil = tl.zeros([ROWS, 1], tl.float32)
    peak_u, total_u, weights, _ = online_softmax(u, live, low, nil)
    peak_mu, total_mu, weights_mu, _ = online_softmax(mu, live, low, nil)
    flat_u, inverse_u = settle(peak_u, total_u)
    flat_mu, inverse_mu = settle(peak_mu, total_mu)
    products = tl.where(live, weights * d, 0.0)  # chosen, so that no fused add makes each lane's sum another
    mean_d = tl.sum(products, axis=1, keep_dims=True) * inverse_u
    kl = mean_d - (flat_u - flat_mu) - tl.log(inverse_mu / inverse_u)
    terms = kl_parts(weights * inverse_u, weights_mu * inverse_mu, d - mean_d, kl)
    kl = kl_of(tl.sum(terms, axis=1, keep_dims=True), kl)
    return weights, (peak_u, total_u, peak_mu, total_mu, mean_d, kl)


@triton.jit
def merge(a, b):
    """Two parts of a row as one, by the chain rule; what scales the weights of either to the new peak."""
    peak_ua, total_ua, peak_mua, total_mua, mean_a, kl_a = a
    peak_ub, total_ub, peak_mub, total_mub, mean_b, kl_b = b
    peak_u, total_u, settled_u, scale_a, scale_b = join(peak_ua, total_ua, peak_ub, total_ub)
    peak_mu, total_mu, settled_mu, scale_mua, scale_mub = join(peak_mua, total_mua, peak_mub, total_mub)
    w_a = total_ua * scale_a * settled_u[1]
    w_b = total_ub * scale_b * settled_u[1]
    v_a = total_mua * scale_mua * settled_mu[1]
    v_b = total_mub * scale_mub * settled_mu[1]
    shift_a = mean_a - kl_a  # lse u - lse mu within the part
    shift_b = mean_b - kl_b
    gap = shift_a - shift_b
    kl = (w_a * shift_a + w_b * shift_b) - (settled_u[0] - settled_mu[0]) - tl.log(settled_mu[1] / settled_u[1])
    between = kl_of(kl_parts(w_a, v_a, w_b * gap, kl) + kl_parts(w_b, v_b, -w_a * gap, kl), kl)
    merged = (peak_u, total_u, peak_mu, total_mu, w_a * mean_a + w_b * mean_b, w_a * kl_a + w_b * kl_b + between)
    return merged, scale_a, scale_b


@triton.jit
def _forward(
    q_ptr,  # [B, N, H, HEAD], a row of heads every q_stride
    k_ptr,  # [B, K, H / GROUP, HEAD], every k_stride
    v_ptr,  # [B, K, H / GROUP, HEAD], every v_stride
    state_ptr,  # [B, H, N, K] float32 or bfloat16
    precision_ptr,  # [S] float32
    padding_ptr,  # [B, K], non-zero where a key is padding
    segments_ptr,  # [B, N], N = K, int32 or int64
    out_ptr,  # [B, N, H, HEAD], q's dtype
    energy_ptr,  # [B, H, N] float32
    facts_ptr,  # [3, B, H, N] float32: log sum e^u, <p, d>, KL
    scale,
    q_stride,
    k_stride,
    v_stride,
    n_queries,
    n_keys,
    n_heads,
    n_rows,
    items_per_sample,
    GROUP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p v, pi KL[p || q_] and each row's facts. A program takes ROWS queries of a head.

    Floor, bytes per pair of query and key: read the state (4 or 2); nothing without one.
    """
    item, head, block = place(tl.cdiv(n_queries, ROWS), n_heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = load_rows(q_ptr + (item * n_queries * q_stride + head * HEAD), rows, n_queries, q_stride, HEAD, DIM)
    k_ptr += item * n_keys * k_stride + head // GROUP * HEAD
    v_ptr += item * n_keys * v_stride + head // GROUP * HEAD
    places = (item * n_heads + head) * n_queries + rows
    inside = rows < n_queries
    low = tl.full([ROWS, 1], float("-inf"), tl.float32)
    nil = tl.zeros([ROWS, 1], tl.float32)
    row = (low, nil, low, nil, nil, nil)
    peak, total, mean_d, kl = low, nil, nil, nil
    out = tl.zeros([ROWS, DIM], tl.float32)
    span = end_of(block, item, padding_ptr, n_queries, n_keys, CAUSAL, PADDING, ROWS, COLS)
    own, begin, span = keys_near(rows, span, item, segments_ptr, n_keys, SEGMENTS, COLS)
    for start in range(0, span, COLS):
        cols = begin + start + tl.arange(0, COLS)
        k = load_rows(k_ptr, cols, n_keys, k_stride, HEAD, DIM)
        mu = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        live = pairs(rows, cols, own, item, padding_ptr, segments_ptr, n_queries, n_keys, CAUSAL, PADDING, SEGMENTS)
        if HAS_STATE:
            pointers = state_ptr + (places[:, None] * n_keys + cols[None, :])
            d = load_state(pointers, inside[:, None] & (cols < n_keys)[None, :], live)
            weights, part = tile_row(mu + d, mu, d, live, ROWS)
            row, older, newer = merge(row, part)
            weights *= newer
        else:
            peak, total, weights, older = online_softmax(mu, live, peak, total)
        v = load_rows(v_ptr, cols, n_keys, v_stride, HEAD, DIM)
        out = tl.dot(weights.to(v.dtype), v, out * older, input_precision=PRECISION)
    if HAS_STATE:
        peak, total, _, _, mean_d, kl = row
    peak, inverse = settle(peak, total)
    store_rows(
        out_ptr + (item * n_queries * n_heads + head) * HEAD,
        out * inverse,
        rows,
        n_queries,
        n_heads * HEAD,
        HEAD,
        DIM,
    )
    places = places[:, None]
    inside = inside[:, None]
    tl.store(facts_ptr + places, peak - tl.log(inverse), mask=inside)
    tl.store(facts_ptr + (n_rows + places), mean_d, mask=inside)
    tl.store(facts_ptr + (2 * n_rows + places), kl, mask=inside)
    tl.store(energy_ptr + places, tl.load(precision_ptr + item // items_per_sample) * kl, mask=inside)


@triton.jit
def load_facts(facts_ptr, places, mask, n_rows, HAS_STATE: tl.constexpr):
    """Of these rows log sum e^u, <p, d> and KL."""
    lse = tl.load(facts_ptr + places, mask=mask, other=0.0)
    mean_d = tl.zeros_like(lse)
    kl = tl.zeros_like(lse)
    if HAS_STATE:
        mean_d = tl.load(facts_ptr + (n_rows + places), mask=mask, other=0.0)
        kl = tl.load(facts_ptr + (2 * n_rows + places), mask=mask, other=0.0)
    return lse, mean_d, kl


@triton.jit
def load_state(pointers, mask, live):
    """A tile of d, 0 where masked. The load itself minds the edges alone: causal would cut its vectors to pieces."""
    return tl.where(live, tl.load(pointers, mask=mask, other=0.0).to(tl.float32), 0.0)


@triton.jit
def node_tile(mu, d, g, facts, mean_g, pi, HAS_STATE: tl.constexpr):
    """p and dF/dmu = p (pi (d - <p, d>) + g - <p, g>) + pi (q_ - p) of a tile; masked, mu is -inf and both are 0."""
    lse, mean_d, kl = facts
    p = exp(mu + d - lse)
    grad_mu = p * (g - mean_g)
    if HAS_STATE:
        y = mean_d - kl - d
        near = tl.abs(y) < 1.0
        q = exp(mu - (lse - mean_d + kl))
        bend = tl.where(near, p * near_tail(tl.where(near, y, 0.0)), q - p - p * y)
        grad_mu += pi * (bend - p * kl)
    return p, grad_mu


@triton.jit
def _grad_queries(
    q_ptr,  # [B, N, H, HEAD], a row of heads every q_stride
    k_ptr,  # [B, K, H / GROUP, HEAD], every k_stride
    v_ptr,  # [B, K, H / GROUP, HEAD], every v_stride
    out_ptr,  # [B, N, H, HEAD]
    grad_out_ptr,  # [B, N, H, HEAD]
    state_ptr,  # [B, H, N, K] float32 or bfloat16
    precision_ptr,  # [S] float32
    padding_ptr,  # [B, K], non-zero where a key is padding
    segments_ptr,  # [B, N], N = K, int32 or int64
    facts_ptr,  # [3, B, H, N] float32
    mean_g_ptr,  # [B, H, N] float32, written: <p, g>
    grad_q_ptr,  # [B, N, H, HEAD], q's dtype
    scale,
    q_stride,
    k_stride,
    v_stride,
    n_queries,
    n_keys,
    n_heads,
    n_rows,
    items_per_sample,
    GROUP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dF/dq = scale dF/dmu k, and <p, g> = <out, dF/dout>, which the keys' kernel reads. A program takes ROWS queries.

    Floor, bytes per pair of query and key: read the state (4 or 2).
    """
    item, head, block = place(tl.cdiv(n_queries, ROWS), n_heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = load_rows(q_ptr + (item * n_queries * q_stride + head * HEAD), rows, n_queries, q_stride, HEAD, DIM)
    token = n_heads * HEAD
    first = (item * n_queries * n_heads + head) * HEAD
    grad_out = load_rows(grad_out_ptr + first, rows, n_queries, token, HEAD, DIM)
    out = load_rows(out_ptr + first, rows, n_queries, token, HEAD, DIM)
    places = (item * n_heads + head) * n_queries + rows
    inside = rows < n_queries
    mean_g = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(mean_g_ptr + places, mean_g, mask=inside)
    lse, mean_d, kl = load_facts(facts_ptr, places, inside, n_rows, HAS_STATE)
    facts = (lse[:, None], mean_d[:, None], kl[:, None])
    pi = tl.load(precision_ptr + item // items_per_sample)
    k_ptr += item * n_keys * k_stride + head // GROUP * HEAD
    v_ptr += item * n_keys * v_stride + head // GROUP * HEAD
    grad_q = tl.zeros([ROWS, DIM], tl.float32)
    span = end_of(block, item, padding_ptr, n_queries, n_keys, CAUSAL, PADDING, ROWS, COLS)
    own, begin, span = keys_near(rows, span, item, segments_ptr, n_keys, SEGMENTS, COLS)
    for start in range(0, span, COLS):
        cols = begin + start + tl.arange(0, COLS)
        k = load_rows(k_ptr, cols, n_keys, k_stride, HEAD, DIM)
        v = load_rows(v_ptr, cols, n_keys, v_stride, HEAD, DIM)
        mu = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        g = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        live = pairs(rows, cols, own, item, padding_ptr, segments_ptr, n_queries, n_keys, CAUSAL, PADDING, SEGMENTS)
        mu = tl.where(live, mu, float("-inf"))
        d = tl.zeros_like(mu)
        if HAS_STATE:
            pointers = state_ptr + (places[:, None] * n_keys + cols[None, :])
            d = load_state(pointers, inside[:, None] & (cols < n_keys)[None, :], live)
        _, grad_mu = node_tile(mu, d, g, facts, mean_g[:, None], pi, HAS_STATE)
        grad_q = tl.dot(grad_mu.to(k.dtype), k, grad_q, input_precision=PRECISION)
    store_rows(grad_q_ptr + first, grad_q * scale, rows, n_queries, token, HEAD, DIM)


@triton.jit
def _step_keys(
    q_ptr,  # [B, N, H, HEAD], a row of heads every q_stride
    k_ptr,  # [B, K, H / GROUP, HEAD], every k_stride
    v_ptr,  # [B, K, H / GROUP, HEAD], every v_stride
    grad_out_ptr,  # [B, N, H, HEAD]
    state_ptr,  # [B, H, N, K] float32 or bfloat16, moved in place
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    padding_ptr,  # [B, K], non-zero where a key is padding
    segments_ptr,  # [B, N], N = K, int32 or int64
    facts_ptr,  # [3, B, H, N] float32
    mean_g_ptr,  # [B, H, N] float32
    grad_k_ptr,  # [B, K, H / GROUP, HEAD], k's dtype
    grad_v_ptr,  # [B, K, H / GROUP, HEAD], v's dtype
    scale,
    q_stride,
    k_stride,
    v_stride,
    n_queries,
    n_keys,
    n_heads,
    n_rows,
    items_per_sample,
    GROUP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d <- keep d - (move / pi) (g - <p, g>); dF/dk = scale dF/dmu' q and dF/dv = p' dF/dout, at the old d.

    A program takes COLS keys of a head of theirs, and every query head of its group.
    Floor, bytes per pair of query and key: read and write the state (8 or 4).
    """
    item, kv_head, block = place(tl.cdiv(n_keys, COLS), n_heads // GROUP)
    cols = block * COLS + tl.arange(0, COLS)
    k_ptr += item * n_keys * k_stride + kv_head * HEAD
    v_ptr += item * n_keys * v_stride + kv_head * HEAD
    k = load_rows(k_ptr, cols, n_keys, k_stride, HEAD, DIM)
    v = load_rows(v_ptr, cols, n_keys, v_stride, HEAD, DIM)
    seen = seen_keys(cols, item, padding_ptr, n_keys, PADDING)
    sample = item // items_per_sample
    pi = tl.load(precision_ptr + sample)
    keep = pi
    push = pi
    if MOVE:
        keep = tl.load(keep_ptr + sample)
        push = tl.load(move_ptr + sample) / pi
    grad_k = tl.zeros([COLS, DIM], tl.float32)
    grad_v = tl.zeros([COLS, DIM], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(block * COLS - (n_keys - n_queries), 0) // ROWS * ROWS
    if PADDING:
        first = tl.where(tl.max(seen.to(tl.int32)) > 0, first, n_queries)
    end = n_queries
    if SEGMENTS:
        own = segments_of(cols, item, segments_ptr, n_keys)
        first, end = near_segments(own, first, n_queries, item, segments_ptr, n_keys)
        first = first // ROWS * ROWS
    span = tl.maximum(end - first, 1)  # see end_of
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_row = (item * n_heads + head) * n_queries
        if MOVE and not HAS_STATE and not SEGMENTS:  # the launcher then gives zeros
            for start in range(0, tl.minimum(first, n_queries), ROWS):
                rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
                mask = (rows < n_queries) & (cols < n_keys)[None, :]
                tl.store(state_ptr + ((head_row + rows) * n_keys + cols[None, :]), 0.0, mask=mask)
        for start in range(0, span, ROWS):
            rows = first + start + tl.arange(0, ROWS)
            q = load_rows(q_ptr + (item * n_queries * q_stride + head * HEAD), rows, n_queries, q_stride, HEAD, DIM)
            grad_out = load_rows(
                grad_out_ptr + (item * n_queries * n_heads + head) * HEAD,
                rows,
                n_queries,
                n_heads * HEAD,
                HEAD,
                DIM,
            )
            mu = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            g = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            inside = rows < n_queries
            places = head_row + rows
            lse, mean_d, kl = load_facts(facts_ptr, places, inside, n_rows, HAS_STATE)
            mean_g = tl.load(mean_g_ptr + places, mask=inside, other=0.0)[None, :]
            live = visible(rows[None, :], cols[:, None], seen[:, None], n_queries, n_keys, CAUSAL)
            if SEGMENTS:
                live = live & (own[:, None] == segments_of(rows, item, segments_ptr, n_keys)[None, :])
            mu = tl.where(live, mu, float("-inf"))
            offsets = places[None, :] * n_keys + cols[:, None]
            mask = inside[None, :] & (cols < n_keys)[:, None]
            d = tl.zeros_like(mu)
            if HAS_STATE:
                d = load_state(state_ptr + offsets, mask, live)
            p, grad_mu = node_tile(mu, d, g, (lse[None, :], mean_d[None, :], kl[None, :]), mean_g, pi, HAS_STATE)
            grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
            grad_k = tl.dot(grad_mu.to(q.dtype), q, grad_k, input_precision=PRECISION)
            if MOVE:  # last, where it takes the fewest registers
                kept = keep * d  # 0 where masked; and all that is left where push is 0: see common.moved_by
                new = tl.where(mu == float("-inf"), kept, kept - push * (g - mean_g))
                new = tl.where(push == 0.0, kept, new)
                tl.store(state_ptr + offsets, new, mask=mask)
    token = n_heads // GROUP * HEAD
    place_k = (item * n_keys * (n_heads // GROUP) + kv_head) * HEAD
    store_rows(grad_k_ptr + place_k, grad_k * scale, cols, n_keys, token, HEAD, DIM)
    store_rows(grad_v_ptr + place_k, grad_v, cols, n_keys, token, HEAD, DIM)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    precision: Tensor,
    causal: bool,
    padding: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """Refuse arguments that the kernels would misread; q spread to the shape of the logits, for further checks."""
    check("q", q, q, q.shape)
    if q.dim() != 4:
        raise ValueError(f"q has {q.dim()} dimensions: give it [batch, heads, queries, head dimension]")
    if not 1 <= q.shape[3] <= WIDEST:
        raise ValueError(f"q has head dimension {q.shape[3]}: the kernels take 1 to {WIDEST}")
    if k.dim() != 4 or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)}: give it [batch, heads, keys, head dimension], its heads a divisor of "
            f"q's {q.shape[1]}"
        )
    check("k", k, q, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    check("v", v, q, k.shape)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q {q.dtype}: give them one dtype".replace("torch.", ""))
    mu = q[..., :1].expand(-1, -1, -1, k.shape[2])
    check_node(mu, state, precision, "error")
    check_masks(mu, causal, padding, segments)
    return mu


def by_token(x: Tensor) -> tuple[Tensor, int]:
    """x ``[B, heads, length, HEAD]``, copied only where it is not laid out ``[B, length, heads, HEAD]`` but for the
    distance of its rows; and that distance."""
    b, heads, length, head = x.shape
    row = x.stride(2) if length > 1 else x.stride(0) if b > 1 else heads * head
    wanted = (length * row, head, row, 1)
    if any(size > 1 and a != w for size, a, w in zip(x.shape, x.stride(), wanted)):
        return x.transpose(1, 2).contiguous().transpose(1, 2), heads * head
    return x, row


def packed_tokens(x: Tensor, q: Tensor) -> Tensor:
    """x ``[B, heads, length, HEAD]`` in q's dtype, laid out ``[B, length, heads, HEAD]`` without strides."""
    return x.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def mask_pointers(padding: Tensor | None, segments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The masks as the kernels read them."""
    return None if padding is None else padding.contiguous().view(torch.uint8), packed(segments)


def like_tokens(x: Tensor) -> Tensor:
    """A new tensor of x's shape and dtype, laid out ``[B, length, heads, HEAD]``."""
    b, heads, length, head = x.shape
    return torch.empty(b, length, heads, head, dtype=x.dtype, device=x.device).transpose(1, 2)


def plan(
    dtype: torch.dtype, dim: int, kernel: str, segments: bool, target: int | str, precision: str = "ieee"
) -> dict[str, int]:
    """ROWS, COLS, num_warps and num_stages of a kernel: the largest tiles that spill on none of aot.py's targets.

    target: Triton's name of the GPU. precision: that of `product_precision`. A product's warps lie along its rows, 16
    to each and on sm_90 64 to four, for the keys' kernel along its columns: warps beyond that would compute what others
    have, softmax and all. On sm_100, whose products lie in a memory of their own, eight warps share 64 rows.
    """
    wide, number = dim > 64, 0 if isinstance(target, str) else target
    amd, tensor_memory = number == 0, 100 <= number < 120
    exact = dtype == torch.float32 and precision == "ieee"
    if precision == "tf32":
        roomy, warps, stages = not wide and (number == 90 or tensor_memory), 4, 1
        if kernel == "keys":
            rows, cols = 16, 64 if roomy else 32
        else:
            rows, cols = 32 if wide else 64, 32 if roomy or kernel == "forward" else 16
    elif exact:
        rows, cols, warps, stages = 16, 16 if kernel == "queries" else 32, 8 if wide else 4, 1
    elif kernel == "keys":
        rows, cols, warps, stages = 16, 64, 8 if wide or amd else 4, 2
        if wide and number == 90 and not segments:
            cols = 128
        elif wide and 0 < number < 90:
            cols, warps = 32, 4
        elif wide and segments and (amd or tensor_memory):
            stages = 1
    elif amd:
        rows, cols, warps, stages = 64, 16, 4, 2
    elif kernel == "forward" and wide:
        rows, cols, warps, stages = 128, 32, 8, 2
    elif tensor_memory and not wide:
        rows, cols, warps, stages = 64, 64, 8, 2
    else:
        tight = segments if kernel == "forward" else number >= 120
        rows, cols, warps, stages = 64, 32 if wide or tight else 64, 4, 2
    options = {"ROWS": rows, "COLS": cols, "num_warps": warps, "num_stages": stages, **FUSED}
    if not amd and (segments or not exact or kernel == "forward" or not wide):
        options["maxnreg"] = 248  # unasked, ptxas takes all 255 on sm_80; in 248 it spills nothing worth the name
    return options


def shape_options(
    q: Tensor, k: Tensor, kernel: str, causal: bool, padding: Tensor | None, segments: Tensor | None
) -> dict[str, Any]:
    """What a launch fixes at compile time."""
    dim = max(16, power_of_2(q.shape[3]))
    masks = {"CAUSAL": causal, "PADDING": padding is not None, "SEGMENTS": segments is not None}
    precision = product_precision(q.dtype)
    tiles = plan(q.dtype, dim, kernel, segments is not None, arch(), precision)
    sizes = {"GROUP": q.shape[1] // k.shape[1], "HEAD": q.shape[3], "DIM": dim, "PRECISION": precision}
    return {**sizes, **masks, **tiles}


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    precision: Tensor,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output softmax(u) v ``[B, H, N, D]`` in q's dtype, energy pi KL ``[S]``, and each row's facts for the step.

    u = scale q k' + state. q ``[B, H, N, D]``, k and v ``[B, heads, K, D]`` with H a multiple of heads and D at most
    128, of one dtype (float32, float16 or bfloat16) and any strides; state ``[B, H, N, K]`` float32 or bfloat16,
    contiguous (None: 0); precision ``[S]`` float32. Facts: ``[3, B, H, N]`` float32, log sum e^u, <p, d>, KL[p || q_].
    causal: query i sees keys 0 .. i + K - N. padding ``[B, K]`` bool, True where a key is padding. segments ``[B, N]``
    int32 or int64, N = K: a query sees the keys of its own number; where they do not fall, tiles of other documents
    are not visited. A query that sees no key has output 0 and energy 0.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    mu = check_attention(q, k, v, state, precision, causal, padding, segments)
    out, facts = like_tokens(q), torch.empty(3, *q.shape[:3], dtype=torch.float32, device=q.device)
    if mu.numel() == 0:
        return out.zero_(), torch.zeros_like(precision), facts.zero_()
    (q, q_stride), (k, k_stride), (v, v_stride) = by_token(q), by_token(k), by_token(v)
    energy = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q):
        options = shape_options(q, k, "forward", causal, padding, segments)
        _forward[(len(q) * q.shape[1] * cdiv(q.shape[2], options["ROWS"]),)](
            q,
            k,
            v,
            state,
            precision.contiguous(),
            *mask_pointers(padding, segments),
            out,
            energy,
            facts,
            scale,
            q_stride,
            k_stride,
            v_stride,
            q.shape[2],
            k.shape[2],
            q.shape[1],
            energy.numel(),
            len(q) // len(precision),
            HAS_STATE=state is not None,
            **options,
        )
    return out, sum_partials(energy, len(precision)), facts


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    state: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    facts: Tensor,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """state <- keep state - (move / pi) (g - <p, g>) with g = grad_out v'; the state, and dF/dq, dF/dk, dF/dv before.

    dF/dmu = p (pi (d - <p, d>) + g - <p, g>) + pi (q_ - p). The arguments are those of `attention_forward`, with what
    it returned for this state (out, facts) and with grad_out ``[B, H, N, D]``, dF/dout; keep, move ``[S]`` float32.
    The state is moved in place; None stands for 0, and the new one, float32 and 0 where masked, is returned. Of a state
    that was given what is masked may be left as it is: nothing reads it. Without keep and move it is the learning
    pass: the state stays. Every sum has its order: the same arguments give the same bits.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    mu = check_attention(q, k, v, state, precision, causal, padding, segments)
    check_step(mu, state, mu, precision, keep, move, "error")
    check("out", out, q, q.shape)
    check("grad_out", grad_out, q, q.shape)
    check("facts", facts, q, (3, *q.shape[:3]), coefficient=True)
    moves, has_state = keep is not None, state is not None
    if moves and state is None:
        state = (torch.empty if segments is None else torch.zeros)(mu.shape, dtype=torch.float32, device=q.device)
    grad_q, grad_k, grad_v = like_tokens(q), like_tokens(k), like_tokens(v)
    if mu.numel() == 0:
        return state, grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    (q, q_stride), (k, k_stride), (v, v_stride) = by_token(q), by_token(k), by_token(v)
    out, grad_out = packed_tokens(out, q), packed_tokens(grad_out, q)
    precision, facts = precision.contiguous(), facts.contiguous()
    masks = mask_pointers(padding, segments)
    mean_g = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lengths = (q.shape[2], k.shape[2], q.shape[1], mean_g.numel(), len(q) // len(precision))
    sizes = (scale, q_stride, k_stride, v_stride, *lengths)
    with on_device(q):
        options = shape_options(q, k, "queries", causal, padding, segments)
        _grad_queries[(len(q) * q.shape[1] * cdiv(q.shape[2], options["ROWS"]),)](
            q, k, v, out, grad_out, state, precision, *masks, facts, mean_g, grad_q, *sizes,
            HAS_STATE=has_state, **options,
        )  # fmt: skip
        options = shape_options(q, k, "keys", causal, padding, segments)
        _step_keys[(len(q) * k.shape[1] * cdiv(k.shape[2], options["COLS"]),)](
            q, k, v, grad_out, state, precision, packed(keep), packed(move), *masks, facts, mean_g, grad_k, grad_v,
            *sizes, HAS_STATE=has_state, MOVE=moves, **options,
        )  # fmt: skip
    return state, grad_q, grad_k, grad_v
