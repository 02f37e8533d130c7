"""The guard's memory by its kernel: what plain torch makes of it, and the guarded steps that use it.

In float32 bit for bit. The interpreter cuts what it stores in bfloat16, where torch and a GPU round: a unit in the last
place.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pc_triton as pc
from pc_triton import dispatch, reference
from pc_triton.kernels import guard

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 7, 33), (6, 2, 1025), (2, 4096), (2, 0)], ids=str)
def test_guard(shape, dtype):
    torch.manual_seed(0)
    state, accepted = torch.randn(2, *shape, device=DEVICE).to(dtype)
    for samples in {shape[0], 1}:
        rose = (torch.arange(samples) % 2 == 0).to(DEVICE)
        truth = reference.guard_step(state, accepted, rose)
        got = guard.guard_step(state.clone(), accepted.clone(), rose)
        for a, b in zip(got, truth, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


def test_it_moves_in_place():
    state, accepted = torch.ones(2, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    moved, kept = guard.guard_step(state, accepted, torch.tensor([True, False], device=DEVICE))
    assert moved is state
    assert kept is accepted
    assert state.tolist() == [[0.5] * 3, [1.0] * 3]
    assert accepted.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("module", [reference, guard], ids=["reference", "kernel"])
def test_from_infinity_it_goes_all_the_way(module):
    """Half of it would be infinity again, however often."""
    far = torch.tensor([[torch.inf, torch.nan, 2.0]] * 2, device=DEVICE)
    one, rose = torch.ones_like(far), torch.tensor([True, False], device=DEVICE)
    state, accepted = module.guard_step(far.clone(), one.clone(), rose)
    assert state[0].tolist() == [1.0, 1.0, 1.5]
    assert accepted[0].tolist() == [1.0, 1.0, 1.0]
    for x in (state, accepted):
        torch.testing.assert_close(x[1], far[1], rtol=0, atol=0, equal_nan=True)


def test_a_slope_that_is_no_number_leads_back_to_the_prediction():
    """Its squares overflow before F's own; a sample whose F fell goes on."""
    slope = torch.tensor([torch.inf, torch.nan, torch.inf, 1.0])
    rule = pc.Guarded(0.25).start(torch.ones(4), slope, False)
    keep, move = rule.next([], torch.tensor([torch.inf, torch.nan, 0.5, torch.inf]))
    assert keep.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert move.tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"accepted": torch.zeros(2, 4)}, ValueError, "accepted has shape"),
        ({"accepted": torch.zeros(2, 3).bfloat16()}, TypeError, "accepted is bfloat16"),
        ({"state": torch.zeros(2, 3).double()}, TypeError, "float64"),
        ({"state": torch.zeros(3, 2).T}, ValueError, "not contiguous"),
        ({"accepted": torch.zeros(3, 2).T}, ValueError, "not contiguous"),
        ({"rose": torch.zeros(2)}, TypeError, "give a bool tensor"),
        ({"rose": torch.zeros(3, dtype=torch.bool)}, ValueError, "no multiple of the 3 samples"),
    ],
)
def test_wrong_arguments(changes, error, text):
    given = {"state": torch.zeros(2, 3), "accepted": torch.zeros(2, 3), "rose": torch.zeros(2, dtype=torch.bool)}
    with pytest.raises(error, match=text):
        guard.guard_step(**(given | changes))


@ON_CPU
@pytest.mark.parametrize("options", [{"steps": 5}, {"order": "sweep"}], ids=str)
def test_inference_is_the_same_by_the_kernel(options, monkeypatch):
    """Steps that are too long, so that F rises: the kernel guards, once a node and move but the first."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 16), nn.Tanh(), pc.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    x, y = 3 * torch.randn(6, 4), torch.randint(3, (6,))
    kernels, calls = dispatch.triton_kernels(), []
    plain = kernels.guard_step
    monkeypatch.setattr(kernels, "guard_step", lambda u, a, rose: calls.append(rose.clone()) or plain(u, a, rose))
    found = []
    for backend in ("torch", "triton"):
        with pc.use_backend(backend):
            loss = pc.FreeEnergy(model, precision=0.05, **options)(x, y)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    moves = 3 if "order" in options else 4
    assert len(calls) == 2 * (moves - (1 if "order" in options else 2))
    assert any(rose.any() for rose in calls)
    assert not all(rose.all() for rose in calls)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)
