"""A linear layer mu = x W' + b with a Gaussian value node of fixed variance on it: product and node in one kernel.

E = pi sum (u - mu)^2 / 2 and its inference step (Pinchetti et al. 2022, arXiv 2211.03481, eq. 5; the error form:
Goemaere et al. 2025, arXiv 2505.20137). mu is never written: the accumulator of the product starts at b + e, or b - u.

A program owns a tile of a product, and takes its share of the node before it. Tiles are such that from sm_90 on two
programs fit on a multiprocessor where no tile is masked: one moves states while the other multiplies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .common import (
    UNFUSED,
    cdiv,
    check,
    check_in_place,
    check_moves,
    check_precision,
    coefficients,
    on_device,
    packed,
    sum_partials,
)

SHARED: dict[int | str, int] = {80: 81, 87: 81, 90: 113, 100: 113, 103: 113}
"""KiB of shared memory of half a multiprocessor, by compute capability; 49 on NVIDIA's others."""
WAVE = 128
"""Programs that busy a GPU: a product of fewer tiles than that is split along its depth, where it may be."""


class Tiles(NamedTuple):
    """How a product is cut: a program's tile, its warps, its pipeline's stages, rows of tiles in a group, parts."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    splits: int = 1


def plan(rows: int, cols: int, depth: int, itemsize: int, arch: int | str = 90, *, split: bool = False) -> Tiles:
    """The tiles of the product [rows, depth] [depth, cols] of elements of ``itemsize`` bytes.

    arch: Triton's name of the GPU, the compute capability as 10 major + minor or AMD's "gfx942". split: the depth may
    be cut into parts, whose products are then summed.
    """
    amd, half = isinstance(arch, str), SHARED.get(arch, 49)
    if itemsize == 4:  # exact float32 has no tensor cores
        m, n, k, warps = 64, 64, 16, 4
    else:
        m, n = 128 if rows > 64 else 64, 128 if cols > 64 else 64
        k = 64 if amd or half > 100 else 32
        warps = 8 if m * n == 128 * 128 else 4
    stages = 2 if amd else min(4, half * 1024 // ((m + n) * k * itemsize))
    programs = cdiv(rows, m) * cdiv(cols, n)
    parts = min(WAVE // programs, depth // (8 * k)) if split and programs else 1
    return Tiles(m, n, k, warps, stages, splits=max(1, parts))


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
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _forward(
    x_ptr,  # [R, K]
    weight_ptr,  # [N, K], x's dtype
    bias_ptr,  # [N], x's dtype
    state_ptr,  # [R, N]
    precision_ptr,  # [S] float32
    out_ptr,  # [R, N], x's dtype: u in error form, u - mu in state form
    energy_ptr,  # [R, blocks] float32
    n_rows,
    n_units,  # N / N_UNIT
    k_units,  # K / K_UNIT
    sample_rows,  # R / S
    ERROR: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    N_UNIT: tl.constexpr,  # what the strides are known to be multiples of
    K_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """u = x W' + b + e, or d = u - x W' - b, and pi d^2 / 2. A program takes a tile [ROWS, COLS] of them.

    Floor: read x, W and the state (R N, 4 or 2 bytes each), write u or d; 2 R N K FLOPs.
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
    state = tl.load(state_ptr + top * n + left + offsets, mask=mask, other=0.0).to(tl.float32)
    if ERROR:
        tl.store(energy_ptr + partial, 0.5 * pi * tl.sum(state * state, axis=1), mask=inside)
    acc = state if ERROR else -state
    if BIAS:
        acc += tl.load(bias_ptr + left + cols.to(tl.int64), mask=cols < wide, other=0.0).to(tl.float32)[None, :]
    acc = multiply(
        acc, x_ptr + top * k, weight_ptr + left * k, high, wide, k, k, 1, 1, k, ROWS, COLS, DEPTH, EVEN
    )  # fmt: skip
    if not ERROR:
        acc = -acc  # 0 beyond the edge
        tl.store(energy_ptr + partial, 0.5 * pi * tl.sum(acc * acc, axis=1), mask=inside)
    tl.store(out_ptr + top * n + left + offsets, acc, mask=mask)


@triton.jit
def _backward(
    grad_ptr,  # [R, N]
    weight_ptr,  # [N, K], grad's dtype
    state_ptr,  # [R, N], moved in place
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    grad_x_ptr,  # [R, K], grad's dtype
    n_rows,
    n_units,  # N / N_UNIT
    k_units,  # K / K_UNIT
    sample_rows,  # R / S
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    EVEN: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """g W, and e <- keep e - (move / pi) g. A program takes a tile [ROWS, COLS] of g W.

    The programs of the same ROWS move their states in turns, DEPTH columns each: that brings the g which all of them
    then read into the L2. Floor: read g, W and e (R N, 4 or 2 bytes each), write e and g W; 2 R N K FLOPs.
    """
    n, k = n_units * N_UNIT, k_units * K_UNIT
    row, col = _place(n_rows, k, ROWS, COLS, GROUP)
    top, left = row.to(tl.int64) * ROWS, col.to(tl.int64) * COLS
    high, wide = n_rows - row * ROWS, k - col * COLS
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = rows < high
    if MOVE:
        sample = ((row * ROWS + rows) // sample_rows).to(tl.int64)
        _, keep, push = coefficients(precision_ptr, keep_ptr, move_ptr, sample, inside, MOVE)
        within = tl.arange(0, DEPTH)
        tile = (rows[:, None] * n + within[None, :]).to(tl.int64)
        for at in tl.range(col * DEPTH, n, tl.cdiv(k, COLS) * DEPTH, num_stages=3):
            mask = inside[:, None] & (within < n - at)[None, :]
            new = -push[:, None] * tl.load(grad_ptr + top * n + at + tile, mask=mask, other=0.0).to(tl.float32)
            if HAS_STATE:
                e = tl.load(state_ptr + top * n + at + tile, mask=mask, other=0.0).to(tl.float32)
                new += keep[:, None] * e
            tl.store(state_ptr + top * n + at + tile, new, mask=mask)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    acc = multiply(
        acc, grad_ptr + top * n, weight_ptr + left, high, wide, n, n, 1, k, 1, ROWS, COLS, DEPTH, EVEN
    )  # fmt: skip
    offsets = (rows[:, None] * k + cols[None, :]).to(tl.int64)
    tl.store(grad_x_ptr + top * k + left + offsets, acc, mask=inside[:, None] & (cols < wide)[None, :])


@triton.jit
def _weight_gradient(
    grad_ptr,  # [R, N]
    x_ptr,  # [R, K], grad's dtype
    grad_weight_ptr,  # [splits, N, K], grad's dtype or float32
    grad_bias_ptr,  # [splits * blocks, N] float32
    n_rows,
    n_units,  # N / N_UNIT
    k_units,  # K / K_UNIT
    part,  # rows of a split, a multiple of DEPTH
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """g' x, and the sum of g's rows. A program takes a tile [ROWS, COLS] of g' x over one part of the rows.

    The programs of the same columns of g sum its blocks of DEPTH rows in turns, before their product: inside it that
    would halt the tensor cores. Floor: read g and x, write g' x; 2 R N K FLOPs.
    """
    n, k = n_units * N_UNIT, k_units * K_UNIT
    row, col = _place(n, k, ROWS, COLS, GROUP)
    split, blocks = tl.program_id(1), tl.cdiv(k, COLS)
    top, left, start = row.to(tl.int64) * ROWS, col.to(tl.int64) * COLS, split.to(tl.int64) * part
    high, wide, depth = n - row * ROWS, k - col * COLS, tl.minimum(n_rows - split * part, part)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    if BIAS:
        total, within, step = tl.zeros([ROWS], tl.float32), tl.arange(0, DEPTH)[:, None], tl.cast(n, tl.int64)
        tile = (within * n + rows[None, :]).to(tl.int64)
        for at in tl.range(col * DEPTH, depth, blocks * DEPTH, num_stages=3):
            mask = (within < depth - at) & (rows < high)[None, :]
            g = tl.load(grad_ptr + (start + at) * step + top + tile, mask=mask, other=0.0)
            total += tl.sum(g.to(tl.float32), axis=0)
        place = (split * blocks + col).to(tl.int64) * n + top
        tl.store(grad_bias_ptr + place + rows.to(tl.int64), total, mask=rows < high)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    acc = multiply(
        acc, grad_ptr + start * n + top, x_ptr + start * k + left, high, wide, depth, 1, n, k, 1,
        ROWS, COLS, DEPTH, EVEN,
    )  # fmt: skip
    offsets = (rows[:, None] * k + cols[None, :]).to(tl.int64)
    mask = (rows < high)[:, None] & (cols < wide)[None, :]
    tl.store(grad_weight_ptr + (split.to(tl.int64) * n + top) * k + left + offsets, acc, mask=mask)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, precision: Tensor, *, form: str
) -> tuple[Tensor, Tensor]:
    """The node on mu = x W' + b: u in error form, the error u - mu in state form; and pi |u - mu|^2 / 2 ``[S]``.

    x ``[S * r, K]``, weight ``[N, K]`` and bias ``[N]`` of one dtype, float32, float16 or bfloat16, of any strides;
    state ``[S * r, N]`` of any of these dtypes, contiguous: e = u - mu, or u in state form, whose emission is the state
    itself; precision ``[S]`` float32. The first result ``[S * r, N]`` has x's dtype: the error keeps its own digits.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    if form not in ("error", "state"):
        raise ValueError(f'form is {form!r}: say "error" or "state"')
    _check_product("x", x, weight, weight.shape[-1])
    (rows, k), n = x.shape, len(weight)
    if bias is not None:
        check("bias", bias, x, (n,), beside="x", same=True)
    _check_state("x", x, state, (rows, n), precision)
    out, samples = torch.empty(rows, n, dtype=x.dtype, device=x.device), len(precision)
    if out.numel() == 0:
        return out, torch.zeros_like(precision)
    with on_device(x):
        tiles = plan(rows, n, k, x.element_size(), arch(x))
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
            sample_rows=rows // samples,
            ERROR=form == "error",
            BIAS=bias is not None,
            **_cut(tiles, rows, n, k, n, k),
        )
    return out, sum_partials(energy, samples)


def linear_backward(
    grad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """One step of the node in error form, e <- keep e - (move / pi) g, and the gradient g W of the layer's input.

    grad ``[S * r, N]`` and weight ``[N, K]`` of one dtype, float32, float16 or bfloat16, of any strides; state
    ``[S * r, N]`` of any of these dtypes, contiguous, moved in place (None: e = 0, and the new one is returned, in
    float32); precision, keep, move ``[S]`` float32. Without keep and move it is the learning pass: the state stays.
    Returns the state and g W ``[S * r, K]`` in grad's dtype; dF/dmu is grad itself.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not.
    """
    _check_product("grad", grad, weight, len(weight))
    (rows, n), k = grad.shape, weight.shape[1]
    _check_state("grad", grad, state, (rows, n), precision)
    check_moves(keep, move, precision, grad, "grad")
    moves, has_state, samples = keep is not None, state is not None, len(precision)
    if moves and state is None:
        state = torch.empty(rows, n, dtype=torch.float32, device=grad.device)
    grad_x = torch.empty(rows, k, dtype=grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return state, grad_x.zero_()
    with on_device(grad):
        tiles = plan(rows, k, n, grad.element_size(), arch(grad))
        _backward[(cdiv(rows, tiles.rows) * cdiv(k, tiles.cols),)](
            grad.contiguous(),
            weight.contiguous(),
            state if moves else None,
            precision.contiguous(),
            packed(keep),
            packed(move),
            grad_x,
            rows,
            sample_rows=rows // samples,
            HAS_STATE=has_state,
            MOVE=moves,
            **_cut(tiles, rows, k, n, n, k),
        )
    return state, grad_x


def linear_weight_gradient(grad: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """g' x ``[N, K]``, and the sum of g over its rows ``[N]`` if there is a bias; the same bits in every run.

    grad ``[R, N]``, x ``[R, K]`` of one dtype, float32, float16 or bfloat16, of any strides; the results have it too.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not.
    """
    if grad.dim() != 2 or x.dim() != 2:
        raise ValueError(f"grad and x have {grad.dim()} and {x.dim()} dimensions: give them [rows, columns]")
    (rows, n), k = grad.shape, x.shape[1]
    check("grad", grad, grad, (rows, n))
    check("x", x, grad, (rows, k), beside="grad", same=True)
    _check_size(rows, n, k)
    if rows == 0 or n == 0 or k == 0:
        return grad.new_zeros(n, k), grad.sum(0) if bias else None
    with on_device(grad):
        tiles = plan(n, k, rows, grad.element_size(), arch(grad), split=True)
        blocks, splits = cdiv(k, tiles.cols), tiles.splits
        part = cdiv(rows, splits * tiles.depth) * tiles.depth
        wide = grad.dtype if splits == 1 else torch.float32
        grad_weight = torch.empty(splits, n, k, dtype=wide, device=grad.device)
        grad_bias = torch.empty(splits * blocks, n, dtype=torch.float32, device=grad.device) if bias else None
        _weight_gradient[(cdiv(n, tiles.rows) * blocks, splits)](
            grad.contiguous(),
            x.contiguous(),
            grad_weight,
            grad_bias,
            rows,
            part=part,
            BIAS=bias,
            **_cut(tiles, n, k, rows, n, k),
        )
    summed = grad_weight[0] if splits == 1 else grad_weight.sum(0).to(grad.dtype)
    return summed, None if grad_bias is None else grad_bias.sum(0).to(grad.dtype)


def _cut(tiles: Tiles, rows: int, cols: int, depth: int, n: int, k: int) -> dict[str, int | bool]:
    """The launch's sizes and options for the product [rows, depth] [depth, cols] of a layer [N, K]."""
    n_unit, k_unit = math.gcd(n, 8), math.gcd(k, 8)
    return {
        "n_units": n // n_unit,
        "k_units": k // k_unit,
        "N_UNIT": n_unit,
        "K_UNIT": k_unit,
        "EVEN": rows % tiles.rows == cols % tiles.cols == depth % tiles.depth == 0,
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        "DEPTH": tiles.depth,
        "GROUP": tiles.group,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **UNFUSED,
    }


def arch(x: Tensor) -> int | str:
    """The current GPU as Triton names it; in the interpreter any."""
    return 90 if x.device.type == "cpu" else driver.active.get_current_target().arch


def _check_product(name: str, x: Tensor, weight: Tensor, columns: int) -> None:
    """Refuse a product of x [R, columns] with the weight."""
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions: give it [N, K], as nn.Linear has it")
    if not weight.shape[1]:
        raise ValueError("weight has no columns: give it at least one")
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions: give it [rows, {columns}]")
    check(name, x, x, (len(x), columns))
    check("weight", weight, x, weight.shape, beside=name, same=True)
    _check_size(len(x), *weight.shape)


def _check_size(rows: int, n: int, k: int) -> None:
    """Refuse sizes whose offsets within a tile overflow."""
    if rows > 2**30 or max(n, k) > 2**23:
        raise ValueError(f"{rows} rows, N={n}, K={k}: at most 2^30 rows and 2^23 columns at a time")


def _check_state(name: str, x: Tensor, state: Tensor | None, shape: tuple[int, int], precision: Tensor) -> None:
    """Refuse a state of the wrong kind, and a precision that does not divide its rows among samples."""
    check_precision(precision, x, name)
    if state is not None:
        check("state", state, x, shape, beside=name)
        check_in_place(state)
