"""Categorical value node with logits along the last axis: p = softmax(u), q = softmax(mu), E = pi sum KL[p || q].

Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 for two Categoricals, in attention one for each query. ``clamped.py``
has the one that is clamped to labels. The step is the natural gradient's (Amari 1998): logits move by g - <p, g>. The
error form is that of Goemaere et al. 2025 (arXiv 2505.20137), the online softmax Milakov and Gimelshein's (arXiv
1805.02867).

A row that fits one tile is read once and stays in registers. A longer one is read twice, first for an online
log-sum-exp (thrice where the gradient is taken at the moved state). A logit of -inf is masked, p = q = d = 0, and so is
what CAUSAL, PADDING or SEGMENTS hides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    UNFUSED,
    cdiv,
    changes,
    check_node,
    check_step,
    coefficients,
    count_rows,
    exp,
    log1p,
    moved_by,
    near_tail,
    new_state,
    on_device,
    packed,
    sum_partials,
    tile,
)

SHORT = 4096  # columns of the longest row that is kept in registers
LONG = 2048  # columns that a program takes at a time of a longer row
INTEGERS = (torch.int32, torch.int64)


class Rows(NamedTuple):
    """What a program reads its rows by; the tensors per row are ``[ROWS, 1]``."""

    mu_ptr: Any
    state_ptr: Any
    padding_ptr: Any
    segments_ptr: Any
    n_rows: Any
    n_columns: Any
    last: Any
    """The last column that each row sees."""
    first_key: Any
    """Where the row's keys begin in padding and segments."""
    segment: Any


class Block(NamedTuple):
    """Some columns of a program's rows ``[ROWS, COLS]``."""

    offsets: Any
    mask: Any
    """Which entries there are."""
    read: Any
    """Which are loaded."""
    live: Any
    """Which of them are seen: u, mu and d are 0 where not."""
    u: Any
    mu: Any
    d: Any
    """u - mu."""


class Row(NamedTuple):
    """What a finished row is known by, each ``[ROWS, 1]``."""

    mean_d: Any
    """<p, d>."""
    mean_g: Any
    """<p, g>."""
    settled_u: Any
    """Peak of u and 1 / sum e^(u - peak)."""
    settled_mu: Any


@triton.jit
def row_facts(
    rows, n_rows, n_columns, n_queries, rows_per_item, segments_ptr, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr
):
    """The last column each row sees, the first that no row of the program sees, where the row's keys begin in padding
    and segments, and its segment."""
    row = tl.where(rows < n_rows, rows, 0).to(tl.int32)  # a 64-bit division spills registers
    last = row % n_queries + (n_columns - n_queries)
    end = n_columns
    if CAUSAL:
        end = tl.minimum(tl.max(last) + 1, n_columns)
    first_key = (row // rows_per_item).to(tl.int64) * n_columns
    segment = last
    if SEGMENTS:
        segment = tl.load(segments_ptr + (first_key + last))  # there are as many queries as keys
    return last, end, first_key, segment


@triton.jit
def load_node(
    rows,
    cols,
    node,
    ERROR: tl.constexpr,
    READ: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """The `Block` of these columns. READ: there is a state.

    A mask that depends on loaded numbers, or ends anywhere, would cut the loads' vectors to pieces: they are by 8
    columns, and what is masked within them is replaced. Segments alone save more bytes than that costs.
    """
    offsets = rows * node.n_columns + cols
    mask = (rows < node.n_rows) & (cols < node.n_columns)
    live = mask
    read = mask
    if CAUSAL:
        live = live & (cols <= node.last)
        read = read & (cols // 8 * 8 <= node.last)
    if PADDING:
        live = live & (tl.load(node.padding_ptr + (node.first_key + cols), mask=read, other=1) == 0)
    if SEGMENTS:
        live = live & (tl.load(node.segments_ptr + (node.first_key + cols), mask=read, other=0) == node.segment)
        read = live
    mu = tl.load(node.mu_ptr + offsets, mask=read, other=float("-inf")).to(tl.float32)
    live = live & (mu != float("-inf"))
    mu = tl.where(live, mu, 0.0)
    u = mu
    d = tl.zeros_like(mu)
    if READ:
        state = tl.load(node.state_ptr + offsets, mask=read, other=0.0).to(tl.float32)
        state = tl.where(live, state, 0.0)
        u = mu + state if ERROR else state
        d = state if ERROR else state - mu
    return Block(offsets=offsets, mask=mask, read=read, live=live, u=u, mu=mu, d=d)


@triton.jit
def load_grad(grad_ptr, block, READ: tl.constexpr):
    """g of a block, 0 where masked or where nothing needs it."""
    g = tl.zeros_like(block.d)
    if READ:
        g = tl.load(grad_ptr + block.offsets, mask=block.read, other=0.0).to(tl.float32)
        g = tl.where(block.live, g, 0.0)
    return g


@triton.jit
def no_sums(ROWS: tl.constexpr):
    """The running sums of ``add_tile`` before a row's first tile."""
    low = tl.full([ROWS, 1], float("-inf"), tl.float32)
    nil = tl.zeros([ROWS, 1], tl.float32)
    return low, nil, nil, nil, low, nil


@triton.jit
def online_softmax(x, live, peak, total):
    """One tile more of a row: its peak, its sum of weights e^(x - peak), the weights, what rescales older sums."""
    x = tl.where(live, x, float("-inf"))
    highest = tl.maximum(peak, tl.max(x, axis=1, keep_dims=True))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weights = exp(x - finite)
    scale = exp(peak - finite)
    return highest, total * scale + tl.sum(weights, axis=1, keep_dims=True), weights, scale


@triton.jit
def add_tile(sums, block, g):
    """A row's peak of u, sums of e^u, e^u d and e^u g, peak of mu and sum of e^mu, one tile further."""
    peak_u, total_u, sum_d, sum_g, peak_mu, total_mu = sums
    peak_u, total_u, weights, scale = online_softmax(block.u, block.live, peak_u, total_u)
    sum_d = sum_d * scale + tl.sum(weights * block.d, axis=1, keep_dims=True)
    sum_g = sum_g * scale + tl.sum(weights * g, axis=1, keep_dims=True)
    peak_mu, total_mu, _, _ = online_softmax(block.mu, block.live, peak_mu, total_mu)
    return peak_u, total_u, sum_d, sum_g, peak_mu, total_mu


@triton.jit
def settle(peak, total):
    """Peak and 1 / total of a finished row: 0 and 1 where all of it is masked."""
    return tl.where(total == 0.0, 0.0, peak), 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def finish(sums):
    """The `Row` of a row's sums."""
    peak_u, total_u, sum_d, sum_g, peak_mu, total_mu = sums
    peak_u, inverse_u = settle(peak_u, total_u)
    return Row(
        mean_d=sum_d * inverse_u,
        mean_g=sum_g * inverse_u,
        settled_u=(peak_u, inverse_u),
        settled_mu=settle(peak_mu, total_mu),
    )


@triton.jit
def direct_kl(row):
    """KL = <p, d> - (lse u - lse mu), which is noise where u is near mu."""
    peak_u, inverse_u = row.settled_u  # one at a time: Triton 3.6 reads no nested targets
    peak_mu, inverse_mu = row.settled_mu
    return row.mean_d - (peak_u - peak_mu) - tl.log(inverse_mu / inverse_u)


@triton.jit
def softmax(x, live, settled):
    """e^(x - peak) / total of a block, 0 where masked."""
    peak, inverse = settled
    return exp(tl.where(live, x - peak, float("-inf"))) * inverse


@triton.jit
def kl_parts(p, q, x, kl):
    """The terms p (e^-x - 1 + x) of e^KL - 1, x = d - <p, d>: none is negative, and none is lost near u = mu.

    Away from x = 0 p e^-x is taken as q e^KL, which cannot overflow.
    """
    near = tl.abs(x) < 1.0
    return tl.where(near, p * near_tail(tl.where(near, -x, 0.0)), q * exp(tl.minimum(kl, 1.0)) - p + p * x)


@triton.jit
def kl_of(terms, kl):
    """A row's KL: from the terms where it is small, direct where it is large."""
    return tl.where(kl > 1.0, kl, log1p(tl.maximum(terms, 0.0)))


@triton.jit
def write_emission(emission_ptr, block, row, kl):
    """Write p of a tile; its share of e^KL - 1."""
    p = softmax(block.u, block.live, row.settled_u)
    tl.store(emission_ptr + block.offsets, p, mask=block.mask)
    q = softmax(block.mu, block.live, row.settled_mu)
    return tl.sum(kl_parts(p, q, block.d - row.mean_d, kl), axis=1, keep_dims=True)


@triton.jit
def _forward(
    mu_ptr,  # [R, C]
    state_ptr,  # [R, C] float32, in error form or bfloat16
    precision_ptr,  # [S] float32
    padding_ptr,  # [B, C], non-zero where a key is padding
    segments_ptr,  # [B, C] int32 or int64
    emission_ptr,  # [R, C], mu's dtype
    energy_ptr,  # [R] float32
    n_rows,
    n_columns,
    rows_per_sample,
    n_queries,
    rows_per_item,
    ERROR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """p = softmax(u) and pi KL[p || q]. A program takes ROWS whole rows.

    Floor, bytes per element: read mu and the state (4 or 2), write the emission; a row over one tile is read twice.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = rows < n_rows
    sample = (rows.to(tl.int32) // rows_per_sample).to(tl.int64)
    last, end, first_key, segment = row_facts(
        rows, n_rows, n_columns, n_queries, rows_per_item, segments_ptr, CAUSAL, SEGMENTS
    )
    node = Rows(
        mu_ptr=mu_ptr,
        state_ptr=state_ptr,
        padding_ptr=padding_ptr,
        segments_ptr=segments_ptr,
        n_rows=n_rows,
        n_columns=n_columns,
        last=last,
        first_key=first_key,
        segment=segment,
    )
    sums = no_sums(ROWS)
    if ONE_TILE:
        block = load_node(rows, cols, node, ERROR, True, CAUSAL, PADDING, SEGMENTS)
        row = finish(add_tile(sums, block, block.d))
        kl = direct_kl(row)
        terms = write_emission(emission_ptr, block, row, kl)
    else:
        for start in range(0, end, COLS):
            block = load_node(rows, start + cols, node, ERROR, True, CAUSAL, PADDING, SEGMENTS)
            sums = add_tile(sums, block, block.d)
        row = finish(sums)
        kl = direct_kl(row)
        terms = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, n_columns, COLS):
            block = load_node(rows, start + cols, node, ERROR, True, CAUSAL, PADDING, SEGMENTS)
            terms += write_emission(emission_ptr, block, row, kl)
    pi = tl.load(precision_ptr + sample, mask=inside, other=1.0)
    tl.store(energy_ptr + rows, pi * kl_of(terms, kl), mask=inside)


@triton.jit
def move_d(block, g, row, coefficient):
    """keep d - (move / pi) (g - <p, g>), 0 where masked."""
    _, keep, push = coefficient
    return tl.where(block.live, moved_by(block.d, g - row.mean_g, keep, push), 0.0)


@triton.jit
def write_step(
    grad_mu_ptr,
    state_ptr,
    block,
    g,
    row,
    settled_moved,
    coefficient,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,
):
    """Write the moved state and dF/dmu of a tile."""
    pi, keep, push = coefficient
    p = softmax(block.u, block.live, row.settled_u)
    q = softmax(block.mu, block.live, row.settled_mu)
    grad_mu = pi * (q - p)
    if ERROR:
        grad_mu += p * (pi * (block.d - row.mean_d) + (g - row.mean_g))
    if MOVE:
        new = move_d(block, g, row, coefficient)
        written = block.mask
        if HAS_STATE and not ERROR:
            written = written & changes(keep, push)
        tl.store(state_ptr + block.offsets, new if ERROR else block.mu + new, mask=written)
        if MOVED:
            grad_mu = pi * (q - softmax(block.mu + new, block.live, settled_moved))
    tl.store(grad_mu_ptr + block.offsets, grad_mu, mask=block.mask)


@triton.jit
def _step(
    mu_ptr,  # [R, C]
    state_ptr,  # [R, C] float32, in error form or bfloat16; moved in place
    grad_ptr,  # [R, C]
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    padding_ptr,  # [B, C], non-zero where a key is padding
    segments_ptr,  # [B, C] int32 or int64
    grad_mu_ptr,  # [R, C], mu's dtype
    n_rows,
    n_columns,
    rows_per_sample,
    n_queries,
    rows_per_item,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,  # only in state form, and with MOVE
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d <- keep d - (move / pi) (g - <p, g>); dF/dmu = pi (q - p), in error form + p (pi (d - <p, d>) + g - <p, g>).

    A program takes ROWS whole rows. Floor, bytes per element: read mu, g and the state (4 or 2), write the state (4 or
    2) and dF/dmu; a row over one tile is read twice, under MOVED three times.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = rows < n_rows
    sample = (rows.to(tl.int32) // rows_per_sample).to(tl.int64)
    last, end, first_key, segment = row_facts(
        rows, n_rows, n_columns, n_queries, rows_per_item, segments_ptr, CAUSAL, SEGMENTS
    )
    node = Rows(
        mu_ptr=mu_ptr,
        state_ptr=state_ptr,
        padding_ptr=padding_ptr,
        segments_ptr=segments_ptr,
        n_rows=n_rows,
        n_columns=n_columns,
        last=last,
        first_key=first_key,
        segment=segment,
    )
    coefficient = coefficients(precision_ptr, keep_ptr, move_ptr, sample, inside, MOVE)
    sums = no_sums(ROWS)
    moved = (sums[0], sums[1])
    if ONE_TILE:
        block = load_node(rows, cols, node, ERROR, HAS_STATE, CAUSAL, PADDING, SEGMENTS)
        g = load_grad(grad_ptr, block, ERROR or MOVE)
        row = finish(add_tile(sums, block, g))
        if MOVED:
            x = block.mu + move_d(block, g, row, coefficient)
            peak, total, _, _ = online_softmax(x, block.live, sums[0], sums[1])
            moved = settle(peak, total)
        write_step(grad_mu_ptr, state_ptr, block, g, row, moved, coefficient, ERROR, HAS_STATE, MOVE, MOVED)
    else:
        for start in range(0, end, COLS):
            block = load_node(rows, start + cols, node, ERROR, HAS_STATE, CAUSAL, PADDING, SEGMENTS)
            sums = add_tile(sums, block, load_grad(grad_ptr, block, ERROR or MOVE))
        row = finish(sums)
        if MOVED:
            peak, total = moved
            for start in range(0, end, COLS):
                block = load_node(rows, start + cols, node, ERROR, HAS_STATE, CAUSAL, PADDING, SEGMENTS)
                x = block.mu + move_d(block, load_grad(grad_ptr, block, True), row, coefficient)
                peak, total, _, _ = online_softmax(x, block.live, peak, total)
            moved = settle(peak, total)
        for start in range(0, n_columns, COLS):
            block = load_node(rows, start + cols, node, ERROR, HAS_STATE, CAUSAL, PADDING, SEGMENTS)
            g = load_grad(grad_ptr, block, ERROR or MOVE)
            write_step(grad_mu_ptr, state_ptr, block, g, row, moved, coefficient, ERROR, HAS_STATE, MOVE, MOVED)


def check_masks(mu: Tensor, causal: bool, padding: Tensor | None, segments: Tensor | None) -> None:
    """Refuse masks that do not fit attention's logits."""
    if causal and mu.dim() < 2:
        raise ValueError(f"mu has {mu.dim()} dimension: causal needs [..., queries, keys]")
    if padding is not None:
        check_mask("padding", padding, mu, "a bool tensor, True where a key is padding", (torch.bool,))
    if segments is not None:
        check_mask("segments", segments, mu, "int32 or int64, a number for each document", INTEGERS)
        if mu.shape[2] != mu.shape[3]:
            raise ValueError(f"mu has shape {list(mu.shape)}: segments need as many queries as keys")


def check_mask(name: str, mask: Tensor, mu: Tensor, wanted: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what is not one number of these dtypes a key."""
    if mu.dim() != 4:
        raise ValueError(f"mu has {mu.dim()} dimensions: {name} needs [batch, heads, queries, keys]")
    if mask.dtype not in dtypes:
        raise TypeError(f"{name} is {str(mask.dtype).removeprefix('torch.')}: give {wanted}")
    if mask.shape != (mu.shape[0], mu.shape[3]):
        raise ValueError(f"{name} has shape {list(mask.shape)}: give it {[mu.shape[0], mu.shape[3]]}, [batch, keys]")
    if mask.device != mu.device:
        raise ValueError(f"{name} is on {mask.device} and mu on {mu.device}: move it there")


def plan(columns: int) -> tuple[bool, int, int, int]:
    """ONE_TILE, ROWS, COLS and num_warps for rows of that length."""
    return (True, *tile(columns, 1024, SHORT)) if columns <= SHORT else (False, 1, LONG, 8)


def categorical_forward(
    mu: Tensor,
    state: Tensor,
    precision: Tensor,
    *,
    form: str,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Emission softmax(u), in mu's shape and dtype, and energy pi KL ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous: u in float32, or
    in error form u - mu in float32 or bfloat16; precision ``[S]`` float32.
    causal: mu is ``[..., N, K]`` and query i sees keys 0 .. i + K - N. For mu ``[B, heads, N, K]`` padding ``[B, K]``
    bool, True where a key is padding, and segments ``[B, N]``, N = K, int32 or int64: a query sees the keys of its own
    number. p = 0 where masked.
    Raises ValueError for a form, shape or device that does not fit or more than 2^31 - 1 rows, TypeError for a dtype.
    """
    check_node(mu, state, precision, form)
    check_masks(mu, causal, padding, segments)
    samples, emission = len(precision), torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return emission, torch.zeros_like(precision)
    columns = mu.shape[-1]
    n_rows = count_rows(mu)
    one_tile, rows, cols, warps = plan(columns)
    energy = torch.empty(n_rows, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        _forward[(cdiv(n_rows, rows),)](
            mu.contiguous(),
            state,
            precision.contiguous(),
            None if padding is None else padding.contiguous().view(torch.uint8),
            packed(segments),
            emission,
            energy,
            n_rows,
            columns,
            n_rows // samples,
            mu.shape[-2] if causal or segments is not None else 1,
            1 if padding is None and segments is None else n_rows // len(mu),
            ERROR=form == "error",
            CAUSAL=causal,
            PADDING=padding is not None,
            SEGMENTS=segments is not None,
            ONE_TILE=one_tile,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return emission, sum_partials(energy, samples)


def categorical_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    *,
    form: str,
    moved: bool = False,
    state_dtype: torch.dtype | None = None,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """d <- keep d - (move / pi) (grad - <p, grad>): the state and dF/dmu.

    dF/dmu = pi (q - p), in error form + p (pi (d - <p, d>) + grad - <p, grad>), in mu's shape and dtype.
    mu, grad ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous, float32
    or in error form bfloat16, moved in place (None: u = mu, and the new one is returned, of state_dtype; by default
    float32); precision, keep, move ``[S]`` float32. Without keep and move it is the learning pass: the state stays, and
    in state form grad may be None.
    Masks as in `categorical_forward`; where masked, dF/dmu and the moved state are 0.
    Raises ValueError for a form, shape or device that does not fit or more than 2^31 - 1 rows, TypeError for a dtype.
    """
    check_step(mu, state, grad, precision, keep, move, form)
    check_masks(mu, causal, padding, segments)
    samples, error, moves, has_state = len(precision), form == "error", keep is not None, state is not None
    if moves and state is None:
        state = new_state(mu, form, state_dtype)
    grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return state, grad_mu
    columns = mu.shape[-1]
    n_rows = count_rows(mu)
    one_tile, rows, cols, warps = plan(columns)
    with on_device(mu):
        _step[(cdiv(n_rows, rows),)](
            mu.contiguous(),
            state,
            packed(grad if error or moves else None),
            precision.contiguous(),
            packed(keep),
            packed(move),
            None if padding is None else padding.contiguous().view(torch.uint8),
            packed(segments),
            grad_mu,
            n_rows,
            columns,
            n_rows // samples,
            mu.shape[-2] if causal or segments is not None else 1,
            1 if padding is None and segments is None else n_rows // len(mu),
            ERROR=error,
            HAS_STATE=has_state,
            MOVE=moves,
            MOVED=moved and moves and not error,
            CAUSAL=causal,
            PADDING=padding is not None,
            SEGMENTS=segments is not None,
            ONE_TILE=one_tile,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return state, grad_mu
