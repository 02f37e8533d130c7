"""The guard's memory: after a move that raised F a state goes halfway back to the last one that was accepted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_in_place, check_samples, on_device


@triton.jit
def halfway(state, accepted):
    """(u + accepted) / 2, and the accepted state where that is not finite."""
    half = 0.5 * (state + accepted)
    return tl.where(tl.abs(half) < float("inf"), half, accepted)


@triton.jit
def _guard(
    state_ptr,  # [S, n]
    accepted_ptr,  # [S, n], of state's dtype
    rose_ptr,  # [S], non-zero where F rose
    n,
    COLS: tl.constexpr,
):
    """u <- `halfway` back where F rose, and accepted <- u elsewhere. A program takes COLS elements of one sample.

    Floor, bytes per element of float32: read u and write accepted, 8; where F rose read both and write u, 12.
    """
    blocks = tl.cdiv(n, COLS)
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    cols = (program % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = cols < n
    offsets = sample * n + cols
    u = tl.load(state_ptr + offsets, mask=mask, other=0.0)
    if tl.load(rose_ptr + sample) != 0:
        accepted = tl.load(accepted_ptr + offsets, mask=mask, other=0.0)
        half = halfway(u.to(tl.float32), accepted.to(tl.float32))
        tl.store(state_ptr + offsets, half.to(u.dtype), mask=mask)
    else:
        tl.store(accepted_ptr + offsets, u, mask=mask)


def guard_step(state: Tensor, accepted: Tensor, rose: Tensor) -> tuple[Tensor, Tensor]:
    """The state and the accepted state, both changed in place: see `pc_triton.reference.guard_step`.

    state, accepted ``[S * r, ...]``, contiguous, float32 or bfloat16 both. rose: bool ``[S]``. Raises ValueError for a
    shape, strides or device that does not fit, TypeError for a dtype that does not.
    """
    check("state", state, state, state.shape, beside="state")
    check("accepted", accepted, state, state.shape, beside="state", same=True)
    check_in_place(state)
    check_in_place(accepted)
    if rose.dtype != torch.bool or rose.dim() != 1:
        raise TypeError(f"rose is {rose.dtype} {list(rose.shape)}: give a bool tensor with one entry per sample")
    check_samples(len(rose), state, "state")
    if rose.device != state.device:
        raise ValueError(f"rose is on {rose.device} and state on {state.device}: move it there")
    if state.numel():
        n, cols = state.numel() // len(rose), 1024
        with on_device(state):
            _guard[(len(rose) * cdiv(n, cols),)](state, accepted, rose, n, COLS=cols, num_warps=4)
    return state, accepted
