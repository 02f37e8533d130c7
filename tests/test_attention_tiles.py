"""Attention's kernels with the tiles of every GPU they have tiles for, whatever machine the tests run on."""

from __future__ import annotations

import pytest
import torch
from test_attention_kernels import check, hide, number, problem
from test_kernels import ON_CPU, poison  # noqa: F401

from pc_triton.kernels import attention


@ON_CPU
@pytest.mark.parametrize("segmented", [False, True], ids=["padding", "segments"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90, 100, 120, "gfx942"])
def test_the_tiles_of_each_gpu(arch, dim, segmented, monkeypatch):
    """Tiles that are not whole; two query heads to a head of keys."""
    monkeypatch.setattr(attention, "arch", lambda: arch)
    q, k, v, grad_out, state, c = problem(("cpu", torch.float16), 2, 1, 100, 100, dim)
    masks = {"segments": number(100)} if segmented else {"padding": hide(100)}
    check(q, k, v, grad_out, state, c, causal=True, **masks)


@ON_CPU
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_tiles_of_tf32(arch, dim, monkeypatch):
    """The interpreter multiplies exactly all the same."""
    monkeypatch.setattr(attention, "arch", lambda: arch)
    monkeypatch.setattr(attention, "product_precision", lambda dtype: "tf32")
    q, k, v, grad_out, state, c = problem(("cpu", torch.float32), 2, 1, 100, 100, dim)
    check(q, k, v, grad_out, state, c, causal=True, padding=hide(100))
