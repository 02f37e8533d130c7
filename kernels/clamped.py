"""A Categorical clamped to labels: the cross-entropy E = -log q_y of rows of logits, q = softmax(mu).

Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 with p clamped to the label y. dE/dmu = q - y. A row of an ignored label
has neither; one whose label is no column has the energy NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .categorical import LONG, online_softmax, settle, softmax
from .common import UNFUSED, cdiv, check, exp, on_device, row_tile, tile


@triton.jit
def _clamped_forward(
    mu_ptr,  # [R, C]
    labels_ptr,  # [R] integers
    energy_ptr,  # [R] float32
    lse_ptr,  # [R] float32
    n_rows,
    n_columns,
    ignore_index,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """E = log sum e^mu - mu_y, 0 where the label is ignored, NaN where it is no column; and the log-sum-exp.

    A program takes ROWS whole rows. Floor, bytes per element: read mu.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < n_rows
    peak = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, n_columns, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        mask = inside & (cols < n_columns)
        mu = tl.load(mu_ptr + (rows * n_columns + cols), mask=mask, other=float("-inf")).to(tl.float32)
        peak, total, _, _ = online_softmax(mu, mask, peak, total)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    a_column = inside & (labels >= 0) & (labels < n_columns)
    target = tl.load(mu_ptr + (rows * n_columns + labels), mask=a_column, other=float("nan")).to(tl.float32)
    peak, inverse = settle(peak, total)
    lse = tl.where(total == 0.0, float("-inf"), peak - tl.log(inverse))
    energy = tl.where(labels == ignore_index, 0.0, (peak - target) - tl.log(inverse))
    tl.store(lse_ptr + rows, lse, mask=inside)
    tl.store(energy_ptr + rows, energy, mask=inside)


@triton.jit
def _clamped_backward(
    mu_ptr,  # [R, C]
    labels_ptr,  # [R] integers
    lse_ptr,  # [R] float32
    grad_energy_ptr,  # [R] float32
    grad_mu_ptr,  # [R, C], mu's dtype
    n_rows,
    n_columns,
    ignore_index,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(q - y) dF/dE, 0 in ignored rows. A program takes COLS columns of ROWS rows.

    Floor, bytes per element: read mu, write dE/dmu.
    """
    rows, cols, _ = row_tile(n_rows, n_columns, ROWS, COLS)
    inside = rows < n_rows
    mask = inside & (cols < n_columns)
    offsets = rows * n_columns + cols
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    scale = tl.load(grad_energy_ptr + rows, mask=inside, other=0.0)
    mu = tl.load(mu_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    q = exp(mu - tl.where(lse == float("-inf"), 0.0, lse))
    grad = tl.where(labels == ignore_index, 0.0, scale * (q - tl.where(cols == labels, 1.0, 0.0)))
    tl.store(grad_mu_ptr + offsets, grad, mask=mask)


@triton.jit
def clamp_rows(
    mu_ptr,  # [R, C] in rows of that stride
    grad_ptr,  # the same, for scale dE/dmu; it may be mu_ptr
    labels_ptr,  # [R] integers
    rows,  # [ROWS, 1]
    n_rows,
    n_columns,
    stride,
    ignore_index,
    scale,
    scale_ptr,  # [R] float32, or None: the gradient is then in units of its row's, which make that of the label -2^15
    COLS: tl.constexpr,
):
    """E = log sum e^mu - mu_y ``[ROWS, 1]`` of whole rows, and scale (q - y); both 0 where ignored."""
    inside = rows < n_rows
    peak = tl.full(rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
    a_column = inside & (labels >= 0) & (labels < n_columns)
    target = tl.load(mu_ptr + (rows * stride + labels), mask=a_column, other=float("nan")).to(tl.float32)
    for start in range(0, n_columns, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        mask = inside & (cols < n_columns)
        mu = tl.load(mu_ptr + (rows * stride + cols), mask=mask, other=float("-inf")).to(tl.float32)
        peak, total, _, _ = online_softmax(mu, mask, peak, total)
    settled = settle(peak, total)
    kept = labels != ignore_index
    if scale_ptr is not None:
        largest = tl.where(kept & a_column, 1.0 - softmax(target, a_column, settled), 0.0)
        largest = tl.maximum(largest, 1.0 / 1048576.0)
        tl.store(scale_ptr + rows, largest / 32768.0, mask=inside)
        scale = 32768.0 / largest
    tl.debug_barrier()  # another warp's target may lie where this one writes
    for start in range(0, n_columns, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        mask = inside & (cols < n_columns)
        mu = tl.load(mu_ptr + (rows * stride + cols), mask=mask, other=float("-inf")).to(tl.float32)
        grad = softmax(mu, mask, settled) - tl.where(cols == labels, 1.0, 0.0)
        grad = tl.where(kept, scale * grad, 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + (rows * stride + cols), grad, mask=mask)
    return tl.where(kept, (settled[0] - target) - tl.log(settled[1]), 0.0)


@triton.jit
def _clamped_gradient(
    mu_ptr,  # [R, C]
    grad_ptr,  # [R, C] float8_e5m2; None: dE/dmu overwrites mu
    scale_ptr,  # [R] float32: dE/dmu is scale times what is in grad_ptr; None without that
    labels_ptr,  # [R] integers
    energy_ptr,  # [R] float32
    n_rows,
    n_columns,
    ignore_index,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """E = log sum e^mu - mu_y, and dE/dmu = q - y, as in mu's place: the clamped forward and backward in one.

    A program takes ROWS whole rows. Floor, bytes per element: read mu, write dE/dmu; mu is read twice.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    to_ptr = mu_ptr if grad_ptr is None else grad_ptr
    energy = clamp_rows(
        mu_ptr, to_ptr, labels_ptr, rows, n_rows, n_columns, n_columns, ignore_index, 1.0, scale_ptr, COLS
    )
    tl.store(energy_ptr + rows, energy, mask=rows < n_rows)


def check_labels(mu: Tensor, labels: Tensor) -> None:
    """Refuse labels that the kernels would misread."""
    check("mu", mu, mu, mu.shape)
    if mu.dim() != 2:
        raise ValueError(f"mu has {mu.dim()} dimensions: give it [rows, columns]")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels are {str(labels.dtype).removeprefix('torch.')}: cast them to int64")
    if labels.shape != mu.shape[:1]:
        raise ValueError(f"labels have shape {list(labels.shape)}: give one to each of the {mu.shape[0]} rows of mu")
    if labels.device != mu.device:
        raise ValueError(f"labels are on {labels.device} and mu on {mu.device}: move them there")


def clamped_categorical_forward(mu: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """E = -log q_y ``[R]`` and each row's log-sum-exp ``[R]``, both float32: eq. 5 with p clamped to the label y.

    mu ``[R, C]`` float32, float16 or bfloat16, of any strides; labels ``[R]`` int64 or int32. E is 0 where the label is
    ignore_index, and NaN where it is neither that nor 0 .. C - 1.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not.
    """
    check_labels(mu, labels)
    n_rows, n_columns = mu.shape
    if n_columns == 0 and n_rows:
        raise ValueError("mu has no columns: give each row at least one category")
    energy, lse = (
        torch.empty(n_rows, dtype=torch.float32, device=mu.device),
        torch.empty(n_rows, dtype=torch.float32, device=mu.device),
    )
    if n_rows:
        rows, cols, warps = tile(n_columns, 1024, LONG)
        with on_device(mu):
            _clamped_forward[(cdiv(n_rows, rows),)](
                mu.contiguous(),
                labels.contiguous(),
                energy,
                lse,
                n_rows,
                n_columns,
                ignore_index,
                ROWS=rows,
                COLS=cols,
                num_warps=warps,
                **UNFUSED,
            )
    return energy, lse


def clamped_categorical_backward(
    mu: Tensor, labels: Tensor, lse: Tensor, grad_energy: Tensor, ignore_index: int
) -> Tensor:
    """dF/dmu = (q - y) grad_energy ``[R, C]``, in mu's dtype, 0 in ignored rows.

    mu, labels and ignore_index as in `clamped_categorical_forward`, lse ``[R]`` float32 from there, grad_energy ``[R]``
    float32.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not.
    """
    check_labels(mu, labels)
    check("lse", lse, mu, labels.shape, coefficient=True)
    check("grad_energy", grad_energy, mu, labels.shape, coefficient=True)
    n_rows, n_columns = mu.shape
    grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel():
        rows, cols, warps = tile(n_columns, 1024, 1024)
        with on_device(mu):
            _clamped_backward[(cdiv(n_rows, rows) * cdiv(n_columns, cols),)](
                mu.contiguous(),
                labels.contiguous(),
                lse.contiguous(),
                grad_energy.contiguous(),
                grad_mu,
                n_rows,
                n_columns,
                ignore_index,
                ROWS=rows,
                COLS=cols,
                num_warps=warps,
                **UNFUSED,
            )
    return grad_mu


def clamped_categorical_gradient_(mu: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """E = -log q_y ``[R]`` float32 of mu ``[R, C]``, which is overwritten by dE/dmu = q - y.

    mu: contiguous; its rows of an ignored label become 0. The rest is as in `clamped_categorical_forward`.
    Raises ValueError for strides, a shape or device that does not fit, TypeError for a dtype that does not.
    """
    if not mu.is_contiguous():
        raise ValueError("mu is not contiguous and is overwritten: give mu.contiguous()")
    return _gradient(mu, None, None, labels, ignore_index)


def clamped_categorical_rounded(mu: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """E as in `clamped_categorical_gradient_`, and dE/dmu in 8 bits: values ``[R, C]`` float8_e5m2, scale ``[R, 1]``.

    No part of q - y is larger than that of the label, 1 - q_y, which is half of the whole. The scale is
    2^-15 times its size, so that it is exact, and what is below 2^-17 of it 0. mu stays as it is, of any strides.
    """
    values = torch.empty(mu.shape, dtype=torch.float8_e5m2, device=mu.device)
    scale = torch.empty(mu.shape[0], 1, dtype=torch.float32, device=mu.device)
    return _gradient(mu.contiguous(), values, scale, labels, ignore_index), values, scale


def _gradient(mu: Tensor, grad: Tensor | None, scale: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
    check_labels(mu, labels)
    n_rows, n_columns = mu.shape
    if n_columns == 0 and n_rows:
        raise ValueError("mu has no columns: give each row at least one category")
    energy = torch.empty(n_rows, dtype=torch.float32, device=mu.device)
    if n_rows:
        rows, cols, warps = tile(n_columns, 1024, LONG)
        with on_device(mu):
            _clamped_gradient[(cdiv(n_rows, rows),)](
                mu,
                grad,
                scale,
                labels.contiguous(),
                energy,
                n_rows,
                n_columns,
                ignore_index,
                ROWS=rows,
                COLS=cols,
                num_warps=warps,
                **UNFUSED,
            )
    return energy
