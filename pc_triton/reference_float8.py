"""Rounding to 8 bits in plain torch, in which a CPU emulates the products of `float8.py`: the oracle of its kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import wide

SMALLEST = 2.0**-110
"""What a largest number counts as if it is smaller, so that scale and inverse are ordinary numbers."""


def rows_rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x ``[R, K]`` in 8 bits ``[R, K]`` and the scale of each row ``[R, 1]`` float32: x is values * scale."""
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype), torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    return _over(x, torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True), dtype)


def weight_rounded(weight: Tensor, dtype: torch.dtype, transposes: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight in 8 bits ``[N, K]``, its transpose ``[K, N]``, and their scale ``[max(N, K), 1]`` float32, one number.

    transposes: without it the transpose is None.
    """
    if weight.numel() == 0:
        values, scale = torch.empty_like(weight, dtype=dtype), weight.new_ones((), dtype=torch.float32)
    else:
        values, scale = _over(weight, torch.linalg.vector_norm(weight, torch.inf), dtype)
    values = values.contiguous()
    transposed = values.t().contiguous() if transposes else None
    return values, transposed, scale.expand(max(weight.shape), 1).contiguous()


def _over(x: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and the scale for its largest |number|: a power of two, so that to scale rounds nothing.

    It brings that number below the largest power of two of the float8, which holds 1.75 times as much, and to half of
    it at least. Where it is no number neither is the scale, and nothing of x is left.
    """
    power = largest.float().clamp_min(SMALLEST).view(torch.int32) & 0x7F800000  # the exponent's bits alone
    scale = power.view(torch.float32) * 2.0 ** (1 - math.floor(math.log2(torch.finfo(dtype).max)))
    x = x if x.dtype == torch.bfloat16 else wide(x)  # float16 has no room for the inverse of every scale
    return (x * (1 / scale).to(x.dtype)).to(dtype).contiguous(), scale
