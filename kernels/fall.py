"""What inference measures at the prediction, where its precisions come from: one pass over mu and g.

For each of S samples the mean of mu^2, whose root is the unit of a location family, and <J'g, V J'g>, which is 2 pi
times the fall of F by inference to first order in 1 / pi. Of a location family that is sum g^2, of a Bernoulli
sum p (1 - p) g^2 with p = sigmoid(mu).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import UNFUSED, cdiv, check, check_samples, on_device, row_tile, tile


@triton.jit
def _fall(
    mu_ptr,  # [S, n]
    grad_ptr,  # [S, n]
    square_ptr,  # [S, blocks] float32
    fall_ptr,  # [S, blocks] float32
    mean,  # 1 / n
    n_samples,
    n,
    CURVED: tl.constexpr,  # Bernoulli's p (1 - p) weighs g^2
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """mean mu^2 and sum w g^2. A program takes COLS elements of ROWS samples.

    Floor, bytes per element: read mu and g.
    """
    rows, cols, partial = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    squared = g * g
    if CURVED:
        p = tl.sigmoid(mu)
        squared *= p * (1.0 - p)
    tl.store(square_ptr + partial, mean * tl.sum(mu * mu, axis=1, keep_dims=True), mask=inside)
    tl.store(fall_ptr + partial, tl.sum(squared, axis=1, keep_dims=True), mask=inside)


def _measure(mu: Tensor, grad: Tensor, samples: int, curved: bool) -> Tensor:
    check("mu", mu, mu, mu.shape)
    check("grad", grad, mu, mu.shape)
    check_samples(samples, mu)
    if mu.numel() == 0:
        return torch.zeros(2, samples, dtype=torch.float32, device=mu.device)
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 4096, 4096)
    blocks = cdiv(n, cols)
    partials = torch.empty(2, samples, blocks, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        _fall[(cdiv(samples, rows) * blocks,)](
            mu.contiguous(),
            grad.contiguous(),
            partials[0],
            partials[1],
            1.0 / n,
            samples,
            n,
            CURVED=curved,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,  # fused into a sum, a product makes each lane's another
        )
    return partials.sum(-1)


def location_fall(mu: Tensor, grad: Tensor, samples: int) -> Tensor:
    """The mean of mu^2 and the sum of g^2 of each sample, float32 ``[2, S]``: of a location family.

    mu, grad ``[S * r, ...]`` float32, float16 or bfloat16. Raises ValueError for a shape or device that does not fit,
    TypeError for a dtype that does not.
    """
    return _measure(mu, grad, samples, curved=False)


def bernoulli_fall(mu: Tensor, grad: Tensor, samples: int) -> Tensor:
    """`location_fall` with the sum of p (1 - p) g^2 for the sum of g^2."""
    return _measure(mu, grad, samples, curved=True)
