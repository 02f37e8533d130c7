"""A linear layer mu = x W' + b with a Gaussian value node of fixed variance on it: product and node in one kernel.

u = mu + e and E = pi sum e^2 / 2 (Pinchetti et al. 2022, arXiv 2211.03481, eq. 5; the error form: Goemaere et al. 2025,
arXiv 2505.20137). mu is never written: the accumulator of the product starts at b + e. The backward pass is two
products, which cuBLAS has, and the Gaussian's own step.

A program owns a tile of the product. Tiles are such that from sm_90 on two programs fit on a multiprocessor where no
tile is masked: one reads states while the other multiplies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    UNFUSED,
    arch,
    cdiv,
    check,
    check_in_place,
    check_precision,
    on_device,
    packed,
    product_precision,
    sum_partials,
)

SHARED: dict[int | str, int] = {80: 81, 87: 81, 90: 113, 100: 113, 103: 113}
"""KiB of shared memory of half a multiprocessor, by compute capability; 49 on NVIDIA's others."""


class Tiles(NamedTuple):
    """How a product is cut: a program's tile, its warps, its pipeline's stages, rows of tiles in a group."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


def plan(rows: int, cols: int, itemsize: int, arch: int | str = 90, precision: str = "ieee") -> Tiles:
    """The tiles of a product of [rows, cols], of elements of ``itemsize`` bytes.

    arch: Triton's name of the GPU, the compute capability as 10 major + minor or AMD's "gfx942". precision: that of
    `product_precision`.
    """
    amd, half = isinstance(arch, str), SHARED.get(arch, 49)
    if itemsize == 4 and precision == "ieee":  # exact float32 has no tensor cores
        m, n, k, warps = 64, 64, 16, 4
    else:
        m, n = 128 if rows > 64 else 64, 128 if cols > 64 else 64
        k = (128 if amd or half > 100 else 64) // itemsize
        warps = 8 if m * n == 128 * 128 else 4
    stages = 2 if amd else min(4, half * 1024 // ((m + n) * k * itemsize))
    return Tiles(m, n, k, warps, stages)


@triton.jit
def _place(n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """The row and column of this program's tile: GROUP rows of tiles, column by column, share what the L2 holds."""
    program, wide = tl.program_id(0), tl.cdiv(n_cols, COLS)
    first = program // (GROUP * wide) * GROUP
    size = tl.minimum(tl.cdiv(n_rows, ROWS) - first, GROUP)
    within = program % (GROUP * wide)
    return first + within % size, within // size


@triton.jit
def multiply(
    acc,  # [ROWS, COLS] float32
    a_ptr,  # at the tile's first row
    b_ptr,  # at the tile's first column
    n_rows,  # from there to the edge
    n_cols,
    depth,
    a_row,  # strides
    a_depth,
    b_depth,
    b_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
    PRECISION: tl.constexpr,  # of float32's products
):
    """acc + A B. Offsets within a tile are made in 32 bits, which saves registers; its place has 64."""
    row, col, within = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :], tl.arange(0, DEPTH)
    a_offsets = row * a_row + within[None, :] * a_depth
    b_offsets = within[:, None] * b_depth + col * b_col
    a_step, b_step = tl.cast(a_depth, tl.int64), tl.cast(b_depth, tl.int64)
    for at in tl.range(0, depth, DEPTH):
        a_ptrs = a_ptr + at * a_step + a_offsets.to(tl.int64)
        b_ptrs = b_ptr + at * b_step + b_offsets.to(tl.int64)
        if EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(row < n_rows) & (within[None, :] < depth - at), other=0.0)
            b = tl.load(b_ptrs, mask=(within[:, None] < depth - at) & (col < n_cols), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _forward(
    x_ptr,  # [R, K]
    weight_ptr,  # [N, K], x's dtype
    bias_ptr,  # [N], x's dtype
    state_ptr,  # [R, N]
    precision_ptr,  # [S] float32
    out_ptr,  # [R, N], x's dtype: u
    energy_ptr,  # [R, blocks] float32
    n_rows,
    n_units,  # N / N_UNIT
    k_units,  # K / K_UNIT
    sample_rows,  # R / S
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    N_UNIT: tl.constexpr,  # what the strides are known to be multiples of
    K_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u = x W' + b + e, and pi e^2 / 2. A program takes a tile [ROWS, COLS] of them.

    Floor: read x, W and the state (R N, 4 or 2 bytes each), write u; 2 R N K FLOPs.
    """
    n, k = n_units * N_UNIT, k_units * K_UNIT
    row, col = _place(n_rows, n, ROWS, COLS, GROUP)
    top, left = row.to(tl.int64) * ROWS, col.to(tl.int64) * COLS
    high, wide = n_rows - row * ROWS, n - col * COLS
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = rows < high
    mask = inside[:, None] & (cols < wide)[None, :]
    offsets = (rows[:, None] * n + cols[None, :]).to(tl.int64)
    partial = (top + rows) * tl.cdiv(n, COLS) + col
    pi = tl.load(precision_ptr + ((row * ROWS + rows) // sample_rows).to(tl.int64), mask=inside, other=1.0)
    acc = tl.load(state_ptr + top * n + left + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(energy_ptr + partial, 0.5 * pi * tl.sum(acc * acc, axis=1), mask=inside)
    if BIAS:
        acc += tl.load(bias_ptr + left + cols.to(tl.int64), mask=cols < wide, other=0.0).to(tl.float32)[None, :]
    acc = multiply(
        acc, x_ptr + top * k, weight_ptr + left * k, high, wide, k, k, 1, 1, k, ROWS, COLS, DEPTH, EVEN, PRECISION
    )  # fmt: skip
    tl.store(out_ptr + top * n + left + offsets, acc, mask=mask)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """The node on mu = x W' + b in error form: u = mu + e ``[S * r, N]`` in x's dtype, and pi |e|^2 / 2 ``[S]``.

    x ``[S * r, K]``, weight ``[N, K]`` and bias ``[N]`` of one dtype, float32, float16 or bfloat16, of any strides;
    state e ``[S * r, N]`` of any of these dtypes, contiguous; precision ``[S]`` float32.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions: give it [N, K], as nn.Linear has it")
    if not weight.shape[1]:
        raise ValueError("weight has no columns: give it at least one")
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions: give it [rows, {weight.shape[1]}]")
    rows, n, k = len(x), *weight.shape
    check("x", x, x, (rows, k))
    check("weight", weight, x, (n, k), beside="x", same=True)
    if rows > 2**30 or max(n, k) > 2**23:  # else offsets within a tile overflow
        raise ValueError(f"{rows} rows, N={n}, K={k}: at most 2^30 rows and 2^23 columns at a time")
    if bias is not None:
        check("bias", bias, x, (n,), beside="x", same=True)
    check_precision(precision, x, "x")
    check("state", state, x, (rows, n), beside="x")
    check_in_place(state)
    out, samples = torch.empty(rows, n, dtype=x.dtype, device=x.device), len(precision)
    if out.numel() == 0:
        return out, torch.zeros_like(precision)
    with on_device(x):
        products = product_precision(x.dtype)
        tiles = plan(rows, n, x.element_size(), arch(), products)
        n_unit, k_unit = math.gcd(n, 8), math.gcd(k, 8)
        blocks = cdiv(n, tiles.cols)
        energy = torch.empty(rows, blocks, dtype=torch.float32, device=x.device)
        _forward[(cdiv(rows, tiles.rows) * blocks,)](
            x.contiguous(),
            weight.contiguous(),
            packed(bias),
            state,
            precision.contiguous(),
            out,
            energy,
            rows,
            n // n_unit,
            k // k_unit,
            rows // samples,
            BIAS=bias is not None,
            EVEN=rows % tiles.rows == n % tiles.cols == k % tiles.depth == 0,
            N_UNIT=n_unit,
            K_UNIT=k_unit,
            ROWS=tiles.rows,
            COLS=tiles.cols,
            DEPTH=tiles.depth,
            GROUP=tiles.group,
            PRECISION=products,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **UNFUSED,
        )
    return out, sum_partials(energy, samples)
