"""A whole training step of a transformer by the kernels, each launched where the model calls for it, against float64.

What a step changes in the order of its launches, a test of one kernel does not see: a state that two kernels share, a
tensor that one leaves for the next, the head after the blocks. A CUDA graph replays the same launches.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_kernels import EMULATED, poison, spots  # noqa: F401
from torch import nn

import pc_triton as pc
from pc_triton.dispatch import use_fused
from pc_triton.models import Transformer

TOKENS = 11
NARROW = torch.finfo(torch.bfloat16).eps


@pytest.fixture(params=spots(torch.float32, torch.float16, torch.bfloat16))
def spot(request) -> tuple[str, torch.dtype]:
    return request.param


def transformer(separator: int | None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TOKENS, width=16, heads=2, blocks=2, context=19, separator=separator)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of several documents each, which begin with token 3; one label that counts nothing."""
    x, y = torch.randint(TOKENS, (2, 2, 19), generator=torch.Generator().manual_seed(1))
    x[x == 3] = 4
    x[0, [0, 4, 5]] = x[1, [2, 17]] = 3
    y[0, 7] = -100
    return x, y


def learn(backend: str, fused: bool, model: nn.Module, x, y, **options) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter, in float64."""
    model.zero_grad()
    with pc.use_backend(backend), use_fused(fused):
        loss = pc.FreeEnergy(model, **options)(x, y)
        loss.backward()
    return [loss.detach().double(), *(p.grad.double() for p in model.parameters())]


@pytest.mark.parametrize(
    ("separator", "fused", "options"),
    [
        (None, False, {"displacement": 0.3}),
        (3, True, {"precision": 0.5}),
        (3, False, {"precision": 0.5, "state_dtype": torch.bfloat16}),
    ],
    ids=["plain", "packed-fused", "packed-narrow"],
)
def test_a_transformer(separator, fused, options, spot):
    """Each gradient's error at most twice that of plain torch in the same dtype, and some units in the last place.

    The step is a number: of one that is chosen by energies, rounding would change the gradients by more. Of states in
    bfloat16 some are rounded to the other neighbour, a unit away: of values that are wrong by 16 units of their own
    dtype, the share 32 eps / NARROW. Those errors are of either sign, so that their root mean square is what they do.
    """
    device, dtype = spot
    narrow, eps = "state_dtype" in options, torch.finfo(dtype).eps
    if narrow and device == "cpu" and not EMULATED:
        pytest.skip("the interpreter truncates to bfloat16")
    model, (x, y) = transformer(separator).to(device, dtype), (t.to(device) for t in batch())
    options = {"steps": 4, "step": 0.3, **options}
    oracle = copy.deepcopy(model).double()
    truth, start = (learn("torch", False, oracle, x, y, **{**options, **other}) for other in ({}, {"steps": 1}))
    plain = learn("torch", False, model, x, y, **options)
    found = learn("triton", fused, model, x, y, **options)
    flips = NARROW * min(1.0, 32 * eps / NARROW) ** 0.5 if narrow else 0.0
    for name, a, b, exact, before in zip(["F", *dict(model.named_parameters())], found, plain, truth, start):
        error, change = (a - exact).norm(), (before - exact).norm()
        bound = 2 * (b - exact).norm() + 4 * eps * exact.norm() + flips * change
        assert error <= bound, f"{name}: the error is {error / bound:.2f} times what rounding allows"
        assert bound < change / 2, f"{name}: a bound so wide shows nothing"
