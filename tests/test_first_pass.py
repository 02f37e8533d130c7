"""The kernels of the first pass against the float64 oracle: how far F falls by a node, and attention's first move."""

from __future__ import annotations

import pytest
import torch
from test_attention_kernels import hide, number, problem
from test_kernels import assert_close, double, spot  # noqa: F401

import pc_triton as pc
from pc_triton import reference
from pc_triton.kernels import attention_first, fall
from pc_triton.models import Transformer

SHAPES = [(3, 5), (2, 1), (4, 7, 33), (6, 2, 5000), (1, 4096), (2, 0), (5, 1025)]


@pytest.mark.parametrize("name", ["location_fall", "bernoulli_fall"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fall(shape, name, spot):  # noqa: F811
    device, dtype = spot
    torch.manual_seed(0)
    mu, grad = (3 * torch.randn(2, *shape)).to(device, dtype)
    samples = shape[0] // 2 if shape[0] % 2 == 0 else shape[0]
    got = getattr(fall, name)(mu, grad, samples)
    assert got.dtype == torch.float32
    if mu.numel() == 0:
        assert not got.any()
        return
    truth = getattr(reference, name)(double(mu), double(grad), samples)
    plain = getattr(reference, name)(mu, grad, samples)
    for row, a, b, c in zip(("mean of squares", "fall"), got, truth, plain, strict=True):
        assert_close(row, a, b, c)


def test_fall_of_strides(spot):  # noqa: F811
    device, dtype = spot
    mu, grad = torch.randn(2, 4, 6, 10).transpose(2, 3).to(device, dtype)
    got = fall.location_fall(mu, grad, 4)
    assert torch.equal(got, fall.location_fall(mu.contiguous(), grad.contiguous(), 4))


def test_what_fall_refuses():
    with pytest.raises(ValueError, match="grad has shape"):
        fall.location_fall(torch.zeros(2, 3), torch.zeros(2, 4), 2)
    with pytest.raises(ValueError, match="no multiple of the 3 samples"):
        fall.location_fall(torch.zeros(4, 3), torch.zeros(4, 3), 3)
    with pytest.raises(TypeError, match="float64"):
        fall.location_fall(torch.zeros(4, 3).double(), torch.zeros(4, 3).double(), 2)


CASES = [  # heads, key heads, queries, keys, head dimension, causal, padded, segments
    (1, 1, 1, 1, 16, False, False, False),
    (2, 1, 17, 33, 8, True, True, False),
    (4, 2, 18, 17, 16, True, False, False),
    (1, 1, 65, 65, 40, True, True, False),
    (2, 1, 33, 70, 40, False, False, False),
    (2, 2, 40, 40, 16, True, False, True),
    (2, 1, 17, 40, 66, True, True, False),
]


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, map(int, case))))
def test_attention(case, state_dtype, spot):  # noqa: F811
    heads, kv_heads, queries, keys, dim, causal, padded, segments = case
    q, k, v, grad_out, _, (precision, _, move) = problem(spot, heads, kv_heads, queries, keys, dim)
    masks = {"causal": causal}
    if padded:
        masks["padding"] = hide(keys, device=spot[0])
    if segments:
        masks["segments"] = number(queries, device=spot[0])
    scale = dim**-0.5
    exact, *_ = reference.attention_forward(*map(double, (q, k, v)), None, double(precision), scale=scale, **masks)
    known = (q, k, v, exact.to(q.dtype), grad_out)
    wide = [double(x) for x in known[:3]] + [exact, double(grad_out)]
    largest = grad_out.abs().sum(-1).max().double() * v.abs().max()  # <p, g> is of the rounded output
    rounding = torch.finfo(q.dtype).eps / torch.finfo(torch.float32).eps
    run, oracle = attention_first.attention_fall, reference.attention_fall
    got = run(*known, len(precision), scale=scale, **masks)
    truth = oracle(*wide, len(precision), scale=scale, **masks)
    plain = oracle(*known, len(precision), scale=scale, **masks)
    assert_close("fall", got, truth, plain, terms=rounding * heads * queries * largest**2)
    run, oracle = attention_first.attention_first_step, reference.attention_first_step
    got = run(*known, precision, move, state_dtype=state_dtype, **masks)
    assert got.dtype == (state_dtype or torch.float32)
    truth = oracle(*wide, double(precision), double(move), **masks)
    plain = oracle(*known, precision, move, state_dtype=state_dtype, **masks)
    assert_close("state", got, truth, plain, terms=rounding * largest * (move / precision).max())
    hidden = reference.mask_logits(torch.zeros_like(truth), causal, masks.get("padding"), masks.get("segments"))
    assert (got[hidden == -torch.inf] == 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("masked", ["causal", "documents", "precision"])
def test_a_transformer(steps, masked):
    """Whether the first pass makes attention's weights or not, F and gradients are the same."""
    torch.manual_seed(0)
    separator = 0 if masked == "documents" else None
    model = Transformer(32, width=16, heads=2, blocks=2, context=8, separator=separator)
    x, y = torch.randint(32, (2, 2, 8))
    found = []
    for backend in ("torch", "triton"):  # the one makes them
        with pc.use_backend(backend):
            options = {"precision": 2.0} if masked == "precision" else {}
            loss = pc.FreeEnergy(model, steps=steps, step=0.25, **options)(x, y)  # no step by a difference of two F
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)
