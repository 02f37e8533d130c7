"""Rounding to 8 bits, for the products of inference: an operand is read once and written once.

Each row of an operand has a scale of its own. A program that holds a whole row knows its largest number, so nothing
has to be read before. With one scale for the whole tensor its largest number comes first, and costs a second read.
Per element of 16 bits that is 2 + 1 bytes here, 2 + 2 + 1 there; and a row's numbers depend on no other row.

The products of inference need x ``[R, K]`` in rows for x W', the gradient g ``[R, N]`` in rows for g W, and the weight
W ``[N, K]`` both as it is and transposed, since hardware sums over what lies side by side. No pass of inference makes
a weight's gradient, so x and g are needed in one layout. W stays through all passes of a batch: it is rounded once,
with one scale, which serves both layouts: 2 bytes an element for its largest number, then 2 + 1 + 1.

A scale is a power of two, from the exponent of the largest number: to divide by it rounds nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import UNFUSED, cdiv, check, on_device, tile

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LONGEST = 16384
"""The longest row that a program holds; a longer one is read twice."""
TILE = 64
"""Rows and columns of a weight that a program rounds and transposes."""


@triton.jit
def magnitude(x):
    """|x| of a float32 as an integer, which orders as |x| does, with infinity above all numbers and NaN above that."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, unit):
    """The power of two in ``largest`` (by `magnitude`, from 2^-110 on) times ``unit``; infinity if it is no number."""
    power = tl.maximum(largest, (127 - 110) << 23) & 0x7F800000  # the exponent's bits alone
    return power.to(tl.float32, bitcast=True) * unit


@triton.jit
def in_8_bits(x, scale, like_ptr):
    """x / scale, in the float8 that the pointer is to."""
    return (x * tl.div_rn(1.0, scale)).to(like_ptr.dtype.element_ty)


@triton.jit
def _rows_rounded(
    x_ptr,  # [R, K], a row's numbers side by side
    values_ptr,  # [R, K] float8
    scale_ptr,  # [R] float32
    stride,  # from row to row of x
    unit,  # 2 / the largest power of two of that float8
    n_rows,
    n_columns,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Each row's scale, and the row over it in 8 bits. A program takes ROWS whole rows.

    Floor, bytes per element of 16 bits: read x, 2, and write it, 1. A row longer than COLS is read twice.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = rows < n_rows
    from_ptr, to_ptr = x_ptr + rows * stride, values_ptr + rows * n_columns
    if ONE_TILE:
        mask = inside & (cols < n_columns)
        x = tl.load(from_ptr + cols.to(tl.int64), mask=mask, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(magnitude(x), axis=1, keep_dims=True), unit)
        tl.store(to_ptr + cols.to(tl.int64), in_8_bits(x, scale, values_ptr), mask=mask)
    else:
        most = tl.zeros([ROWS, COLS], tl.int32)
        for first in range(0, n_columns, COLS):
            at = first + cols.to(tl.int64)
            x = tl.load(from_ptr + at, mask=inside & (at < n_columns), other=0.0).to(tl.float32)
            most = tl.maximum(most, magnitude(x))
        scale = scale_of(tl.max(most, axis=1, keep_dims=True), unit)
        for first in range(0, n_columns, COLS):
            at = first + cols.to(tl.int64)
            mask = inside & (at < n_columns)
            x = tl.load(from_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(to_ptr + at, in_8_bits(x, scale, values_ptr), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=inside)


@triton.jit
def _weight_rounded(
    weight_ptr,  # [N, K], a row's numbers side by side
    largest_ptr,  # [], the largest |number| of the weight, of its dtype
    values_ptr,  # [N, K] float8
    transposed_ptr,  # [K, N] float8, or None
    scale_ptr,  # [max(N, K)] float32, the same number everywhere
    stride,  # from row to row of the weight
    unit,  # 2 / the largest power of two of that float8
    n_rows,
    n_columns,
    TILE: tl.constexpr,
):
    """A weight over its one scale in 8 bits, as it lies and transposed. A program takes TILE rows and columns.

    Floor, bytes per element of 16 bits: read W, 2, write it, 1, and its transpose, 1.
    """
    across = tl.cdiv(n_columns, TILE)
    program = tl.program_id(0)
    rows = (program // across).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    cols = (program % across).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    mask = (rows < n_rows) & (cols < n_columns)
    scale = scale_of(magnitude(tl.load(largest_ptr).to(tl.float32)), unit)
    weight = tl.load(weight_ptr + rows * stride + cols, mask=mask, other=0.0).to(tl.float32)
    values = in_8_bits(weight, scale, values_ptr)
    tl.store(values_ptr + rows * n_columns + cols, values, mask=mask)
    if transposed_ptr is not None:
        tl.store(transposed_ptr + cols * n_rows + rows, values, mask=mask)
    entries = program.to(tl.int64) * TILE + tl.arange(0, TILE)  # together they reach the longer side's end
    everywhere = tl.zeros([TILE], tl.float32) + scale
    tl.store(scale_ptr + entries, everywhere, mask=entries < tl.maximum(n_rows, n_columns))


def check_float8(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Refuse what the kernels cannot round, or not to that dtype."""
    check(name, x, x, x.shape)
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions: give it [rows, columns]")
    if dtype not in FLOAT8:
        raise TypeError(f"dtype is {dtype}: round to torch.float8_e4m3fn or torch.float8_e5m2")


def unit_of(dtype: torch.dtype) -> float:
    """What a tensor's largest power of two is scaled by to be half of the largest one of a float8."""
    return 2.0 ** (1 - math.floor(math.log2(torch.finfo(dtype).max)))


def rows_rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits ``[R, K]``, contiguous, and the scale of each row ``[R, 1]`` float32: x is values * scale.

    x ``[R, K]`` float32, float16 or bfloat16, of any strides; if its rows do not lie side by side they are copied
    first. dtype: float8_e4m3fn or float8_e5m2. A scale brings the row's largest number to at least half of 2^8, or of
    2^15, and below that; it is a power of two and at least 2^-117, or 2^-124. A row with NaN or infinity is not finite.
    Raises ValueError for a shape, TypeError for a dtype that does not fit.
    """
    check_float8("x", x, dtype)
    n_rows, n_columns = x.shape
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return values, torch.ones(n_rows, 1, dtype=torch.float32, device=x.device)
    scale = torch.empty(n_rows, 1, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, cols, warps = tile(n_columns, 4096, LONGEST)
    with on_device(x):
        _rows_rounded[(cdiv(n_rows, rows),)](
            x,
            values,
            scale,
            x.stride(0),
            unit_of(dtype),
            n_rows,
            n_columns,
            ROWS=rows,
            COLS=cols,
            ONE_TILE=n_columns <= cols,
            num_warps=warps,
            **UNFUSED,
        )
    return values, scale


def weight_rounded(weight: Tensor, dtype: torch.dtype, transposes: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight in 8 bits ``[N, K]``, its transpose ``[K, N]``, and their scale ``[max(N, K), 1]`` float32, one number.

    weight ``[N, K]`` float32, float16 or bfloat16, of any strides. transposes: without it the transpose is None. The
    scale is as of a row in `rows_rounded`, and so is what is raised.
    """
    check_float8("weight", weight, dtype)
    n_rows, n_columns = weight.shape
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    transposed = torch.empty(n_columns, n_rows, dtype=dtype, device=weight.device) if transposes else None
    if weight.numel() == 0:
        return values, transposed, torch.ones(max(weight.shape), 1, dtype=torch.float32, device=weight.device)
    scale = torch.empty(max(weight.shape), 1, dtype=torch.float32, device=weight.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    largest = torch.linalg.vector_norm(weight, torch.inf)
    with on_device(weight):
        _weight_rounded[(cdiv(n_rows, TILE) * cdiv(n_columns, TILE),)](
            weight,
            largest,
            values,
            transposed,
            scale,
            weight.stride(0),
            unit_of(dtype),
            n_rows,
            n_columns,
            TILE=TILE,
            num_warps=4,
            **UNFUSED,
        )
    return values, transposed, scale
