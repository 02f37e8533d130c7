"""What attention's kernels share: the rows of a head, and which pairs of query and key its masks leave."""

from __future__ import annotations

import triton
import triton.language as tl

SCAN = tl.constexpr(512)  # segments that a program looks at together


@triton.jit
def place(n_blocks, n_heads):
    """This program's item of the batch, head and block of rows; the last blocks, under causal the longest, go first."""
    program = tl.program_id(0)
    head = program // n_blocks
    return (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64), n_blocks - 1 - program % n_blocks


@triton.jit
def load_rows(ptr, rows, n_rows, stride, HEAD: tl.constexpr, DIM: tl.constexpr):
    """Rows of a head ``[R, DIM]``, 0 beyond its last row and its HEAD columns."""
    dims = tl.arange(0, DIM)
    mask = (rows < n_rows)[:, None]
    if HEAD != DIM:
        mask = mask & (dims < HEAD)[None, :]
    return tl.load(ptr + (rows.to(tl.int64)[:, None] * stride + dims[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, n_rows, stride, HEAD: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of ``load_rows``."""
    dims = tl.arange(0, DIM)
    mask = (rows < n_rows)[:, None]
    if HEAD != DIM:
        mask = mask & (dims < HEAD)[None, :]
    tl.store(ptr + (rows.to(tl.int64)[:, None] * stride + dims[None, :]), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def seen_keys(cols, item, padding_ptr, n_keys, PADDING: tl.constexpr):
    """Which of these keys are there and no padding."""
    seen = cols < n_keys
    if PADDING:
        seen = seen & (tl.load(padding_ptr + (item * n_keys + cols), mask=seen, other=1) == 0)
    return seen


@triton.jit
def end_of(block, item, padding_ptr, n_queries, n_keys, CAUSAL: tl.constexpr, PADDING: tl.constexpr,
           ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Where the keys end that this block of queries sees; 1 if it sees none.

    Around a loop that may not run at all ptxas serialises the wgmma's of a bfloat16 state.
    """
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, (block + 1) * ROWS + n_keys - n_queries)
    if PADDING:
        last = 0
        for start in range(0, end, COLS):
            cols = start + tl.arange(0, COLS)
            last = tl.maximum(last, tl.max(tl.where(seen_keys(cols, item, padding_ptr, n_keys, PADDING), cols + 1, 0)))
        end = tl.minimum(end, last)
    return tl.maximum(end, 1)


@triton.jit
def segments_of(tokens, item, segments_ptr, n_tokens):
    """The segments of these tokens, beyond the last one its."""
    return tl.load(segments_ptr + (item * n_tokens + tl.minimum(tokens, n_tokens - 1)))


@triton.jit
def near_segments(own, first, end, item, segments_ptr, n_tokens):
    """From which to which of the tokens first .. end - 1 segments lie between the lowest and the highest of own."""
    lowest = tl.min(own)
    highest = tl.max(own)
    begin = end
    last = first
    for start in range(first, end, SCAN):
        tokens = start + tl.arange(0, SCAN)
        segments = segments_of(tokens, item, segments_ptr, n_tokens)
        near = (tokens < end) & (segments >= lowest) & (segments <= highest)
        begin = tl.minimum(begin, tl.min(tl.where(near, tokens, end)))
        last = tl.maximum(last, tl.max(tl.where(near, tokens + 1, first)))
    return begin, last


@triton.jit
def visible(rows, cols, seen, n_queries, n_keys, CAUSAL: tl.constexpr):
    """Which keys each query sees, of those that are seen. In 32 bits: a tile's columns stay in registers."""
    live = (rows < n_queries) & seen
    if CAUSAL:
        live = live & (cols <= rows + (n_keys - n_queries))
    return live


@triton.jit
def pairs(
    rows,
    cols,
    own,  # the segments of the rows, as `keys_near` has them
    item,
    padding_ptr,
    segments_ptr,
    n_queries,
    n_keys,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Which keys each query of a tile [ROWS, COLS] sees."""
    seen = seen_keys(cols, item, padding_ptr, n_keys, PADDING)
    live = visible(rows[:, None], cols[None, :], seen[None, :], n_queries, n_keys, CAUSAL)
    if SEGMENTS:
        live = live & (own[:, None] == segments_of(cols, item, segments_ptr, n_keys)[None, :])
    return live


@triton.jit
def keys_near(rows, end, item, segments_ptr, n_keys, SEGMENTS: tl.constexpr, COLS: tl.constexpr):
    """Of the keys before ``end`` those that these queries may see: the segments, where they begin, and how many.

    They begin at a tile's edge, and are at least 1, as with `end_of`.
    """
    own, begin, span = rows, 0, end
    if SEGMENTS:
        own = segments_of(rows, item, segments_ptr, n_keys)
        begin, end = near_segments(own, 0, end, item, segments_ptr, n_keys)
        begin = begin // COLS * COLS
        span = tl.maximum(end - begin, 1)
    return own, begin, span
