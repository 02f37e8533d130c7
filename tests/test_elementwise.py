"""Laplace and Student-t by the shared kernels, and a family of a user's own, against autograd and float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import pc_triton as pc
from pc_triton import reference
from pc_triton.dispatch import triton_kernels
from pc_triton.kernels.common import log1p
from pc_triton.kernels.elementwise import Family, forward, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def log_cosh_emit(u, mu, d, parameter):
    a = tl.abs(d)
    rest = log1p(tl.exp(-2.0 * a)) - 0.6931471805599453
    return u, tl.where(a < 0.05, d * d * (0.5 - d * d / 12.0), a + rest)


@triton.jit
def log_cosh_slopes(u, mu, d, g, pi, parameter):
    z = tl.exp(-2.0 * tl.abs(d))
    rise = (1.0 - z) / (1.0 + z)
    slope = tl.where(d < 0, -rise, rise)
    return -pi * slope, g, slope


LOG_COSH = Family(log_cosh_emit, log_cosh_slopes, location=True)


class LogCosh(pc.Distribution):
    """The oracle of the recipe: the energy alone, its gradients by autograd."""

    measured = True

    def energy(self, u, mu):
        d = (u - mu).abs()
        return d + torch.log1p(torch.exp(-2 * d)) - torch.log(d.new_tensor(2.0))


def family(name):
    if name == "log_cosh":
        return (
            LogCosh(),
            lambda *a, **k: forward(LOG_COSH, *a[:3], unit=a[3], **k),
            lambda *a, **k: step(LOG_COSH, *a[:4], *a[5:], unit=a[4], **k),
        )
    kernels, options = triton_kernels(), {"nu": 3.0} if name == "student_t" else {}
    node = pc.StudentT(3.0) if options else pc.Laplace()
    return (
        node,
        lambda *a, **k: getattr(kernels, f"{name}_forward")(*a, **options, **k),
        lambda *a, **k: getattr(kernels, f"{name}_step")(*a, **options, **k),
    )


@pytest.mark.parametrize("phase", ["move", "moved", "fresh", "learn"])
@pytest.mark.parametrize("with_unit", [False, True], ids=["plain", "unit"])
@pytest.mark.parametrize("form", ["error", "state"])
@pytest.mark.parametrize("shape", [(4, 41), (6, 1271)])
@pytest.mark.parametrize("name", ["laplace", "student_t", "log_cosh"])
def test_against_autograd(name, shape, form, with_unit, phase):
    torch.manual_seed(0)
    node, run_forward, run_step = family(name)
    mu, state, grad = torch.randn(3, *shape, device=DEVICE)
    samples = 2
    pi, keep, move = torch.rand(3, samples, device=DEVICE) + 0.25
    unit = torch.rand(samples, device=DEVICE) + 0.5 if with_unit else None
    if phase == "learn":
        keep = move = None
    options = {"form": form, "moved": phase == "moved"}
    double = [None if t is None else t.double() for t in (mu, state, grad, pi, unit, keep, move)]
    generic = pc.Distribution
    expected = generic.node_forward(node, *double[:2], *double[3:5], form=form)
    for got, want in zip(run_forward(mu, state, pi, unit, form=form), expected):
        torch.testing.assert_close(got, want.float())
    if phase == "fresh":
        double[1] = state = None
    expected = generic.node_step(node, *double, **options)
    got_state, got = run_step(mu, None if state is None else state.clone(), grad, pi, unit, keep, move, **options)
    torch.testing.assert_close(got, expected[1].float(), rtol=1e-5, atol=2e-6)
    if phase != "learn":
        torch.testing.assert_close(got_state, expected[0].float(), rtol=1e-5, atol=2e-6)
    if name != "log_cosh":
        nu = {"nu": 3.0} if name == "student_t" else {}
        oracle = getattr(reference, f"{name}_step")(*double, **nu, **options)
        torch.testing.assert_close(oracle[1], expected[1])
        if phase != "learn":
            torch.testing.assert_close(oracle[0], expected[0])


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2])
@pytest.mark.parametrize("name", ["laplace", "student_t"])
def test_small_errors_do_not_cancel(name, size):
    _, run_forward, _ = family(name)
    mu, e = torch.zeros(2, 41, device=DEVICE), torch.full((2, 41), size, device=DEVICE)
    pi = torch.ones(2, device=DEVICE)
    nu = {"nu": 3.0} if name == "student_t" else {}
    truth = getattr(reference, f"{name}_forward")(mu.double(), e.double(), pi.double(), **nu, form="error")[1]
    got = run_forward(mu, e, pi, form="error")[1]
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=0.0)


def test_a_unit_of_the_wrong_shape_or_family_is_refused():
    mu, pi = torch.zeros(2, 4, device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match="unit has shape"):
        triton_kernels().laplace_forward(mu, mu, pi, torch.ones(3, device=DEVICE), form="error")
    from pc_triton.kernels.gaussian import GAUSSIAN

    with pytest.raises(ValueError, match="location family"):
        forward(GAUSSIAN, mu, mu, pi, form="error", unit=pi)
