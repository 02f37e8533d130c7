"""`torch.set_default_dtype` changes nothing of a model that is there: what the kernels write in float32 is float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pc_triton as pc
from pc_triton import dispatch
from pc_triton.models import Transformer


def families() -> nn.Module:
    hidden = (pc.Gaussian, pc.Bernoulli, pc.Laplace, pc.StudentT, pc.Categorical)
    nodes = [module for family in hidden for module in (nn.Linear(8, 8), family())]
    return nn.Sequential(*nodes, nn.Linear(8, 6), pc.GaussianLogVar(), pc.Head(3, 4))


def transformer() -> nn.Module:
    return Transformer(32, width=16, heads=2, blocks=1, context=4)


def chain() -> nn.Module:
    return nn.Sequential(pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


WAYS = {
    "error": (families, {}, None),
    "error, T = 3": (families, {"steps": 3}, None),
    "sweep": (families, {"order": "sweep", "precision": 1.0}, None),
    "attention": (transformer, {}, None),
    "attention, T = 3": (transformer, {"steps": 3}, None),
    "layer and node in one": (chain, {"steps": 3}, dispatch.use_fused),
    "the whole step in one": (chain, {"steps": 3}, dispatch.use_chain),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_default_dtype(backend, way, default):
    make, options, context = WAYS[way]
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    if make is transformer:
        x, y = torch.randint(32, (2, 2, 4))
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(1)
            with pc.use_backend(backend), (context or dispatch.use_fused)(context is not None):
                loss = pc.FreeEnergy(model, **options)(x, y)
                found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*found, strict=True))
