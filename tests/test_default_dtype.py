"""Whatever torch's default dtype is, every launcher returns the same: energies in float16 would be inf."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch
from torch import Tensor

from pc_triton.dispatch import ENDINGS, triton_kernels
from pc_triton.kernels.chain import chain_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NODES = ("gaussian", "bernoulli", "laplace", "student_t", "gaussian_logvar", "categorical")


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(DEVICE)


def calls():
    """Every launcher on small tensors, as (name, call)."""
    kernels = triton_kernels()
    mu, pi, labels = normal(4, 16), normal(2).abs() + 0.5, torch.tensor([0, 3, -100, 15], device=DEVICE)
    for family in NODES:
        nu = {"nu": 3.0} if family == "student_t" else {}
        half = mu[:, :8].contiguous()
        noise, grad = ((half,), half) if family == "gaussian_logvar" else ((), mu)
        unit = (pi,) if family in ("laplace", "student_t") else ()
        forward, step = (getattr(kernels, f"{family}_{part}") for part in ("forward", "step"))
        yield f"{family}_forward", lambda f=forward, u=unit, n=noise, nu=nu: f(mu, mu, pi, *u, *n, form="error", **nu)
        for form, state in (("error", None), ("error", mu), ("state", mu)):
            yield (
                f"{family}_step",
                lambda f=step, s=state, g=grad, u=unit, n=noise, form=form, nu=nu: f(
                    mu, None if s is None else s.clone(), g, pi, *u, pi, pi, *n, form=form, **nu
                ),
            )
    lse, row = normal(4), normal(4)
    yield "clamped_categorical_forward", lambda: kernels.clamped_categorical_forward(mu, labels, -100)
    yield "clamped_categorical_backward", lambda: kernels.clamped_categorical_backward(mu, labels, lse, row, -100)
    yield "clamped_categorical_gradient_", lambda: kernels.clamped_categorical_gradient_(mu.clone(), labels, -100)
    weight, bias = normal(8, 16), normal(8)
    grad, state = normal(4, 8), normal(4, 8)
    yield "linear_forward", lambda: kernels.linear_forward(mu, weight, bias, state, pi, form="error")
    for s in (None, state):
        yield (
            "linear_backward",
            lambda s=s: kernels.linear_backward(grad, weight, None if s is None else s.clone(), pi, pi, pi),
        )
    yield "linear_weight_gradient", lambda: kernels.linear_weight_gradient(grad, mu)
    q, e, facts = normal(2, 2, 5, 16), normal(2, 2, 5, 5), normal(3, 2, 2, 5)
    segments = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    yield "attention_forward", lambda: kernels.attention_forward(q, q, q, e, pi, scale=0.25)
    for s, masks in ((e, {}), (None, {}), (None, {"segments": segments})):
        yield (
            "attention_step",
            lambda s=s, masks=masks: kernels.attention_step(
                q, q, q, q, q, None if s is None else s.clone(), pi, pi, pi, facts, scale=0.25, **masks
            ),
        )
    one = torch.ones((), dtype=torch.float32, device=DEVICE)
    settings = {"steps": 4, "step": 0.25, "guards": True, "precision": None, "displacement": 0.003, "trust": 0.3}
    yield "chain_gradient", lambda: chain_gradient(
        mu, labels.clamp_min(0).remainder(8), one, [normal(16, 16), weight], [None, bias], ("tanh",),
        **settings, ignore_index=-100,
    )  # fmt: skip


def tensors(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


def test_every_launcher_is_here():
    found = {k for k, v in vars(triton_kernels()).items() if isinstance(v, FunctionType) and k.endswith(ENDINGS)} - {
        "check_step"
    }
    assert {name for name, _ in calls()} == found | {"chain_gradient"}


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(default):
    expected = [(name, tensors(call())) for name, call in calls()]
    torch.set_default_dtype(default)
    try:
        got = [(name, tensors(call())) for name, call in calls()]
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, before), (_, after) in zip(expected, got):
        assert [t.dtype for t in after] == [t.dtype for t in before], name
        for a, b in zip(after, before):
            assert torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), name
