"""A linear layer and its node in one kernel, against the float64 oracle; the plan of its tiles; the rule of dispatch.

Compiled where there is a GPU, else in Triton's interpreter. An element's error may be a rounding to its dtype, and the
float32 rounding of its terms: 4 sqrt(K) + 8 units of the sum of their magnitudes.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import ON_GPU, double, poison, spots  # noqa: F401
from torch import nn

import pc_triton as pc
from pc_triton import dispatch, reference
from pc_triton.kernels import linear
from pc_triton.kernels.linear import Tiles, plan

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [  # rows, N, K, samples
    (1, 1, 1, 1),
    (17, 65, 8, 17),
    (65, 17, 40, 13),
    (129, 1, 130, 1),
    (130, 129, 100, 65),
    (256, 128, 128, 2),  # no tile reaches over an edge
]


@pytest.fixture(params=spots(torch.float32, torch.float16, torch.bfloat16))
def spot(request):
    return request.param


@pytest.fixture(params=spots(torch.float32))
def device(request) -> str:
    return request.param[0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut products so small that there are groups of programs, a last group that is short, and parts of the depth."""
    monkeypatch.setattr(linear, "plan", lambda *sizes, split=False: Tiles(16, 16, 16, 4, 2, 3, 3 if split else 1))


def problem(rows: int, n: int, k: int, samples: int, spot, state_dtype=torch.float32):
    """x, weight, bias, state, grad, (precision, keep, move)."""
    device, dtype = spot
    generator = torch.Generator().manual_seed(rows + n + k + samples)
    x, weight, bias, grad = (
        torch.randn(size, generator=generator).to(device, dtype) for size in ((rows, k), (n, k), (n,), (rows, n))
    )
    state = torch.randn((rows, n), generator=generator).to(device, state_dtype)
    coefficients = [c.to(device) for c in torch.rand(3, samples, generator=generator) + 0.25]
    return x, weight, bias, state, grad, coefficients


def assert_close(what: str, actual, truth, magnitude, terms: int, dtype: torch.dtype) -> None:
    """``magnitude``: the sum of the magnitudes of each element's terms, which float32 adds up."""
    assert actual.shape == truth.shape, what
    assert actual.dtype == dtype, what
    rounding = (4 * terms**0.5 + 8) * torch.finfo(torch.float32).eps * magnitude
    bound = torch.finfo(dtype).eps * truth.abs() + rounding + torch.finfo(dtype).tiny
    error = (actual.double() - truth).abs()
    assert (error <= bound).all(), f"{what}: {(error / bound).max():.1f} times what rounding allows"


def magnitudes(*tensors):
    return [None if t is None else t.double().abs() for t in tensors]


def check_forward(x, weight, bias, state, pi, form: str) -> None:
    words = f"{form} form, rows and K {tuple(x.shape)}, N {len(weight)}"
    before = state.clone()
    out, energy = linear.linear_forward(x, weight, bias, state, pi, form=form)
    assert torch.equal(state, before), words
    truth, true_energy = reference.linear_forward(*map(double, (x, weight, bias, state, pi)), form=form)
    x_, w_, b_, e_ = magnitudes(x, weight, bias, state)
    size, k = reference.linear_forward(x_, w_, b_, e_, double(pi), form="error")[0], x.shape[1]
    assert_close(f"{words}: emission", out, truth, size, k, x.dtype)
    d = e_ if form == "error" else truth.abs()
    terms = reference.sum_samples(d * d + (0 if form == "error" else 2 * d * size), len(pi)) * double(pi)
    assert_close(f"{words}: energy", energy, true_energy, terms, max(k, x.shape[0] * len(weight)), torch.float32)


def check_backward(grad, weight, state, pi, keep, move) -> None:
    words = f"rows and N {tuple(grad.shape)}, K {weight.shape[1]}"
    moved = None if state is None else state.clone()
    new, grad_x = linear.linear_backward(grad, weight, moved, pi, keep, move)
    truth, true_grad = reference.linear_backward(*map(double, (grad, weight, state, pi, keep, move)))
    assert_close(
        f"{words}: g W", grad_x, true_grad, grad.double().abs() @ weight.double().abs(), len(weight), grad.dtype
    )
    if keep is None:
        assert new is moved, words
        assert state is None or torch.equal(new, state), f"{words}: the learning pass moved the state"
        return
    assert state is None or new is moved, words
    g, e = magnitudes(grad, torch.zeros(grad.shape, device=grad.device) if state is None else state)
    push, keep = (reference.per_sample(double(c), grad) for c in (move / pi, keep))
    assert_close(f"{words}: state", new, truth, push * g + keep * e, 1, new.dtype)


def check_weight_gradient(grad, x, bias: bool) -> None:
    words = f"rows {len(x)}, N {grad.shape[1]}, K {x.shape[1]}"
    got = linear.linear_weight_gradient(grad, x, bias=bias)
    assert (got[1] is not None) == bias, words
    truth = reference.linear_weight_gradient(double(grad), double(x), bias=bias)
    sizes = reference.linear_weight_gradient(*magnitudes(grad, x), bias=bias)
    for what, a, b, size in zip(("g' x", "sum of g"), got, truth, sizes):
        if a is not None:
            assert_close(f"{words}: {what}", a, b, size, len(x), grad.dtype)


def check_all(rows: int, n: int, k: int, samples: int, spot, *, bias: bool = True, state_dtype=torch.float32) -> None:
    x, weight, b, state, grad, (pi, keep, move) = problem(rows, n, k, samples, spot, state_dtype)
    for form in ("error", "state"):
        check_forward(x, weight, b if bias else None, state, pi, form)
    check_backward(grad, weight, state, pi, keep, move)
    check_backward(grad, weight, None, pi, keep, move)
    check_backward(grad, weight, state, pi, None, None)
    check_weight_gradient(grad, x, bias)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, spot):
    check_all(*shape, spot, bias=shape[1] != 17)


def test_long_and_split(device):
    """Enough rows that the weight gradient is split over them, unevenly."""
    assert plan(17, 8, 3001, 4, split=True).splits > 1
    x, _, _, _, grad, _ = problem(3001, 17, 8, 1, (device, torch.float32))
    check_weight_gradient(grad, x, True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(4))
def test_groups_and_parts(seed, device):
    draw = random.Random(seed)
    samples, rows = draw.randint(1, 4), draw.randint(1, 30)
    n, k = ((16 * draw.randint(1, 5) + 8 * (seed % 2) * draw.randint(0, 1)) for _ in range(2))
    check_all(samples * rows, n, k, samples, (device, torch.float32))


@pytest.mark.usefixtures("small_tiles")
def test_every_element_of_the_state_moves_once(device):
    """Whether there are more programs in a row than blocks of its states, or fewer."""
    for n, k in ((16, 80), (80, 16), (48, 48), (50, 50)):
        _, weight, _, state, grad, (pi, _, move) = problem(50, n, k, 1, (device, torch.float32))
        new, _ = linear.linear_backward(grad, weight, state.clone(), pi, torch.full_like(pi, 0.5), 0 * move)
        assert torch.equal(new, 0.5 * state)


def test_states_of_half_precision(device):
    check_all(65, 17, 40, 5, (device, torch.float16), state_dtype=torch.float16)
    check_all(9, 17, 40, 3, (device, torch.float32), state_dtype=torch.float16)
    check_all(65, 17, 40, 5, (device, torch.float32), state_dtype=torch.bfloat16)
    check_all(65, 17, 40, 5, (device, torch.float16), state_dtype=torch.bfloat16)


def test_strided_inputs(device):
    x, weight, bias, state, grad, c = problem(6, 40, 24, 3, (device, torch.float32))
    x, weight, grad = (t.t().contiguous().t() for t in (x, weight, grad))
    bias, c = bias.repeat_interleave(2)[::2], [t[:1].expand(3) for t in c]
    check_forward(x, weight, bias, state, c[0], "error")
    check_backward(grad, weight, state, *c)
    check_weight_gradient(grad[:, ::2], x[:, 1:], True)


def test_nothing_to_do_at_the_prediction(spot):
    """E = 0 at e = 0, whose move without a gradient is none; u is then the product's own."""
    x, weight, bias, state, grad, (pi, keep, move) = problem(20, 17, 40, 5, spot)
    state.zero_()
    u, energy = linear.linear_forward(x, weight, bias, state, pi, form="error")
    d, _ = linear.linear_forward(x, weight, bias, state, pi, form="state")
    assert (energy == 0).all()
    assert torch.equal(u, -d)
    new, grad_x = linear.linear_backward(0 * grad, weight, state, pi, keep, move)
    assert (new == 0).all()
    assert (grad_x == 0).all()


def test_the_same_bits_again(spot):
    x, _, _, _, grad, _ = problem(2500, 33, 24, 1, spot)
    first, again = (linear.linear_weight_gradient(grad, x) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize(("rows", "n"), [(0, 4), (4, 0)], ids=str)
def test_empty(rows, n, device):
    x, weight, bias, state, grad, c = problem(rows, n, 6, min(rows, 2), (device, torch.float32))
    for form in ("error", "state"):
        out, energy = linear.linear_forward(x, weight, bias, state, c[0], form=form)
        assert out.shape == (rows, n)
        assert torch.equal(energy, torch.zeros_like(c[0]))
    new, grad_x = linear.linear_backward(grad, weight, None, *c)
    assert new.shape == (rows, n)
    assert torch.equal(grad_x, torch.zeros(rows, 6, device=device))
    for a, b in zip(linear.linear_weight_gradient(grad, x), (torch.zeros_like(weight), torch.zeros_like(bias))):
        assert torch.equal(a, b)


# The oracle.


@pytest.mark.parametrize("bias", [True, False])
def test_the_oracle_is_autograds(bias):
    """u, E, the products and the move of e, of F = E(e) + <g, u>."""
    x, weight, b, e, g, (pi, keep, _) = map_doubles(problem(6, 5, 4, 3, ("cpu", torch.float32)))
    move, rate = 1 - keep, reference.per_sample(pi, e)
    leaves = [t.requires_grad_() for t in (x, weight, b if bias else e.new_zeros(5), e)]
    mu = leaves[0] @ leaves[1].t() + leaves[2]
    sent = (g * (mu + leaves[3])).sum()
    by_x, by_weight, by_bias, push = torch.autograd.grad(sent, leaves)
    by_e = rate * e.detach()
    with torch.no_grad():
        u, energy = reference.linear_forward(x, weight, b if bias else None, e, pi, form="error")
        d, same = reference.linear_forward(x, weight, b if bias else None, u, pi, form="state")
        torch.testing.assert_close(u, mu + e)
        torch.testing.assert_close(energy, 0.5 * pi * reference.sum_samples(e * e, 3))
        torch.testing.assert_close((d, same), (e.detach(), energy))
        new, grad_x = reference.linear_backward(g, weight, e, pi, keep, move)
        torch.testing.assert_close(grad_x, by_x)
        torch.testing.assert_close(new, e - reference.per_sample(move, e) / rate * (by_e + push))
        grads = reference.linear_weight_gradient(g, x, bias=bias)
        torch.testing.assert_close(grads, (by_weight, by_bias if bias else None))


def map_doubles(tensors):
    return [list(map(double, t)) if isinstance(t, list) else double(t) for t in tensors]


# What a caller may not hand over.

ONE = torch.ones(2)


def forward_arguments(**changes):
    zeros = torch.zeros
    given = {"x": zeros(4, 6), "weight": zeros(5, 6), "bias": zeros(5), "state": zeros(4, 5), "precision": ONE}
    return given | {"form": "error"} | changes


def backward_arguments(**changes):
    given = {"grad": torch.zeros(4, 5), "weight": torch.zeros(5, 6), "state": torch.zeros(4, 5)}
    return given | {"precision": ONE, "keep": ONE, "move": ONE} | changes


BAD_FORWARD = [
    ({"form": "both"}, ValueError, 'form is .both.: say "error" or "state"'),
    ({"x": torch.zeros(4, 6).double()}, TypeError, "x is float64 .* cast it, or use pc_triton.reference"),
    ({"x": torch.zeros(4, 6).int()}, TypeError, "x is int32: cast it to float32, float16 or bfloat16"),
    ({"x": torch.zeros(2, 2, 6)}, ValueError, r"x has 3 dimensions: give it \[rows, 6\]"),
    ({"x": torch.zeros(4, 7)}, ValueError, r"x has shape \[4, 7\]: give it \[4, 6\]"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight has 1 dimensions: give it \[N, K\]"),
    ({"weight": torch.zeros(5, 0), "x": torch.zeros(4, 0)}, ValueError, "weight has no columns: give it at least one"),
    ({"weight": torch.zeros(5, 6).half()}, TypeError, "weight is float16 and x float32: cast one to the other's"),
    ({"weight": torch.zeros(5, 6, device="meta")}, ValueError, "weight is on meta and x on cpu: move it there"),
    ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \[6\]: give it \[5\]"),
    ({"bias": torch.zeros(5).half()}, TypeError, "bias is float16 and x float32"),
    ({"state": torch.zeros(4, 6)}, ValueError, r"state has shape \[4, 6\]: give it \[4, 5\]"),
    ({"state": torch.zeros(4, 5).double()}, TypeError, "state is float64"),
    ({"state": torch.zeros(5, 4).t()}, ValueError, "state is not contiguous and is moved in place"),
    ({"precision": torch.ones(3)}, ValueError, "x has 4 rows, no multiple of the 3 samples of precision"),
    ({"precision": ONE.half()}, TypeError, "precision is float16: cast it to float32"),
    ({"precision": ONE.to("meta")}, ValueError, "precision is on meta and x on cpu"),
    ({"precision": torch.ones(2, 1)}, ValueError, r"precision has shape \[2, 1\]: give it \[2\]"),
]
BAD_BACKWARD = [
    ({"grad": torch.zeros(4, 6)}, ValueError, r"grad has shape \[4, 6\]: give it \[4, 5\]"),
    ({"grad": torch.zeros(5)}, ValueError, r"grad has 1 dimensions: give it \[rows, 5\]"),
    ({"grad": torch.zeros(4, 5).double()}, TypeError, "grad is float64"),
    ({"weight": torch.zeros(5, 6).half()}, TypeError, "weight is float16 and grad float32"),
    ({"state": torch.zeros(5, 4).t()}, ValueError, "state is not contiguous"),
    ({"keep": None}, ValueError, "keep and move go together"),
    ({"keep": torch.ones(4)}, ValueError, r"keep has shape \[4\]: give it \[2\]"),
    ({"move": ONE.double()}, TypeError, "move is float64"),
    ({"move": ONE.to("meta")}, ValueError, "move is on meta and grad on cpu"),
    ({"precision": torch.ones(3)}, ValueError, "grad has 4 rows, no multiple of the 3 samples"),
]


def words(case) -> str:
    return case[2][:40]


@pytest.mark.parametrize("case", BAD_FORWARD, ids=words)
def test_bad_arguments_of_the_forward(case):
    changes, error, message = case
    with pytest.raises(error, match=message):
        linear.linear_forward(**forward_arguments(**changes))


@pytest.mark.parametrize("case", BAD_BACKWARD, ids=words)
def test_bad_arguments_of_the_backward(case):
    changes, error, message = case
    with pytest.raises(error, match=message):
        linear.linear_backward(**backward_arguments(**changes))


def test_bad_arguments_of_the_weight_gradient():
    grad, x = torch.zeros(4, 5), torch.zeros(4, 6)
    for bad, error, message in (
        ((grad[0], x), ValueError, "grad and x have 1 and 2 dimensions"),
        ((grad, x[:3]), ValueError, r"x has shape \[3, 6\]: give it \[4, 6\]"),
        ((grad, x.half()), TypeError, "x is float16 and grad float32"),
        ((grad.double(), x), TypeError, "grad is float64"),
        ((grad, x.to("meta")), ValueError, "x is on meta and grad on cpu"),
        ((grad, torch.zeros(4, 1).expand(4, 2**23 + 1)), ValueError, "at most 2\\^30 rows and 2\\^23 columns"),
    ):
        with pytest.raises(error, match=message):
            linear.linear_weight_gradient(*bad)


# The plan, and the rule.

ARCHES = (80, 86, 90, 100, "gfx942")
LIMITS = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, "gfx942": 65_536}  # bytes of a program


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plan(arch, itemsize):
    """Powers of two that the tensor cores take; two programs' pipelines fit where one's may be."""
    for rows, cols, depth in ((1, 1, 1), (64, 64, 8), (65, 4096, 4096), (16384, 4096, 16384), (2**30, 2**20, 2**20)):
        tiles = plan(rows, cols, depth, itemsize, arch)
        assert all(size & (size - 1) == 0 for size in tiles[:4]), tiles
        assert tiles.rows >= 64, tiles
        assert tiles.warps in (4, 8), tiles
        assert tiles.stages >= 2, tiles
        assert tiles.splits == 1, tiles
        assert 2 * tiles.stages * (tiles.rows + tiles.cols) * tiles.depth * itemsize <= max(LIMITS[arch], 2**17), tiles


def test_plan_splits_few_tiles_of_great_depth():
    assert plan(4096, 4096, 16384, 2, split=True).splits == 1
    few = plan(1024, 1024, 16384, 2, split=True)
    assert few.splits == 2
    assert plan(64, 64, 16384, 2, split=True).splits <= 16384 // (8 * few.depth)
    assert plan(64, 64, 8, 2, split=True).splits == 1
    assert plan(0, 64, 8, 2, split=True).splits == 1


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table of two shapes, of which only the greater gains by fusion."""
    table = {"linear": {"NVIDIA H100": {"bfloat16": [[16384, 4096, 4096, 1.2], [1024, 256, 256, 0.7]]}}}
    monkeypatch.setattr(dispatch, "TUNED", tmp_path / "tuned.json")
    dispatch.TUNED.write_text(json.dumps(table))
    dispatch.fused.cache_clear()
    dispatch.measured.cache_clear()
    yield
    dispatch.fused.cache_clear()
    dispatch.measured.cache_clear()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("device_name", "rows", "n", "k", "dtype", "answer"),
    [
        ("NVIDIA H100", 16384, 4096, 4096, torch.bfloat16, True),
        ("NVIDIA H100", 8192, 8192, 2048, torch.bfloat16, True),
        ("NVIDIA H100", 2048, 512, 256, torch.bfloat16, False),
        ("NVIDIA H100", 16384, 4096, 4096, torch.float32, False),
        ("NVIDIA A100", 16384, 4096, 4096, torch.bfloat16, False),
        ("NVIDIA H100", 16384, 4096, 4100, torch.bfloat16, False),
        ("NVIDIA H100", 0, 4096, 4096, torch.bfloat16, False),
    ],
)
def test_rule(device_name, rows, n, k, dtype, answer):
    """The nearest shape measured decides; nothing measured, or rows of no whole vectors, and it is cuBLAS."""
    assert dispatch.fused(device_name, rows, n, k, dtype) is answer


def test_table_is_well_formed():
    table = json.loads(dispatch.TUNED.read_text())
    assert set(table) <= {"linear", "chain"}
    for by_device in table.values():
        for dtype, rows in (item for by_dtype in by_device.values() for item in by_dtype.items()):
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert all(len(row) == 4 and min(row) > 0 for row in rows)


def test_fusing_is_asked_for_or_measured():
    x, weight = torch.zeros(2, 8), torch.zeros(8, 8)
    assert not dispatch.fuses(x, weight)
    with dispatch.use_fused(True):
        assert dispatch.fuses(x, weight)
        assert not dispatch.fuses(x.half(), weight)
        assert not dispatch.fuses(x[0], weight)
        with torch.autocast("cpu"):
            assert not dispatch.fuses(x, weight)
        with dispatch.use_fused(False):
            assert not dispatch.fuses(x, weight)


def test_both_backends_have_the_same_functions():
    for name in ("linear_forward", "linear_backward", "linear_weight_gradient"):
        assert getattr(dispatch.triton_kernels(), name) is getattr(linear, name)
        assert callable(getattr(reference, name))


@pytest.fixture
def tuner(monkeypatch):
    """The module of ``bench/tune_linear.py``."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("tune_linear", ROOT / "bench" / "tune_linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tuner_refuses_without_a_gpu(tuner, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuner.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU: ")


def test_tuner_writes_the_table(tuner, monkeypatch, tmp_path, capsys):
    """A second device's rows join the first's; the rule then reads them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuner, "SHAPES", [(16384, 4096, 4096), (1024, 256, 256)])
    monkeypatch.setattr(
        tuner, "measure", lambda *shape: {"fused": 2.0, "apart": 2.4 if shape[0] > 9999 else 1, "product": 2}
    )
    table = tmp_path / "tuned.json"
    for name in ("NVIDIA H100", "NVIDIA A100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert tuner.main(["--out", str(table)]) == 0
    known = json.loads(table.read_text())["linear"]
    assert known.keys() == {"NVIDIA H100", "NVIDIA A100"}
    assert known["NVIDIA A100"] == {"bfloat16": [[16384, 4096, 4096, 1.2], [1024, 256, 256, 0.5]]}
    assert "| 16384 | 4096 | 4096 | 2000.000 | 1.200 | 1.000 |" in capsys.readouterr().out


def test_tuner_writes_nothing_that_is_wrong(tuner, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls, state = tuner.parts(24, 16, 8, torch.float32, "cpu")
    assert tuner.differs(calls, state) is None
    calls["backward"]["fused"] = lambda: (state, calls["backward"]["product"]()[0])
    assert tuner.differs(calls, state) == "backward"
    monkeypatch.setattr(tuner, "parts", lambda *shape: (calls, state))
    assert tuner.main(["--out", str(tmp_path / "tuned.json")]) == 1
    assert "the fused backward differs" in capsys.readouterr().err
    assert not (tmp_path / "tuned.json").exists()


# In inference.


def network(dtype=torch.float64, frozen: bool = False):
    """Layers with and without bias, of two and of three dimensions, one visited twice, and an output node."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first = nn.Linear(6, 5), pc.Linear(5, 8, bias=False)
            self.attn, self.twice, self.out = pc.Attention(8, 2), pc.Linear(8, 8), pc.Linear(8, 3)

        def forward(self, x):
            h = self.first(self.embed(x).tanh()).tanh()
            h = h + self.attn(h)
            h = h + self.twice(h).tanh() + self.twice(h.sin())
            return self.out(h)

    model = Net().to(dtype)
    model.twice.weight.requires_grad_(not frozen)
    return model, torch.randn(4, 5, 6, dtype=dtype), torch.randn(4, 5, 3, dtype=dtype)


def learned(fuse: bool, model, x, y, **options):
    """The loss, its gradients and the states."""
    model.zero_grad()
    free_energy = pc.FreeEnergy(model, **options)
    with dispatch.use_fused(fuse):
        loss = free_energy(x, y)
        (0.5 * loss).backward()
        states = free_energy.infer(x, y).free_energy
    return [loss.detach(), states, *(p.grad for p in model.parameters() if p.requires_grad)]


def adam(states):
    return torch.optim.Adam(states, lr=0.05)


OPTIONS = [
    {},
    {"steps": 4},
    {"precision": 3.0, "step": 0.3},
    {"state_optimizer": adam},
    {"order": "sweep"},
    {"order": "simultaneous", "precision": 2.0},
]


@pytest.mark.parametrize(
    ("options", "frozen"),
    [({}, True), *((options, False) for options in OPTIONS)],
    ids=lambda value: ",".join(value) or "default" if isinstance(value, dict) else str(value),
)
def test_inference_is_the_same(options, frozen, monkeypatch):
    """Loss, gradients and F at the states, product and node in one or apart, in float64; error form alone is fused."""
    served = []
    plain = reference.linear_forward
    monkeypatch.setattr(reference, "linear_forward", lambda *a, **k: served.append(1) or plain(*a, **k))
    model, x, y = network(frozen=frozen)
    apart = learned(False, model, x, y, **options)
    assert not served
    together = learned(True, model, x, y, **options)
    assert bool(served) == ("order" not in options)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-11)


def test_residuals_and_backward_inference_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(6, 5), nn.Tanh(), pc.Linear(5, 3)).double()
    x, y, reports, inputs = torch.randn(4, 6).double(), torch.randn(4, 3).double(), [], []
    for fuse in (False, True):
        with dispatch.use_fused(fuse):
            reports.append(str(pc.FreeEnergy(model).report(x, y)))
            inputs.append(pc.FreeEnergy(model).infer(x, y, clamp_input=False).free_energy)
    assert reports[0] == reports[1]
    torch.testing.assert_close(*inputs)


def test_first_layer_multiplies_nothing_back(monkeypatch):
    """Nothing lies beneath the first node: its product's gradient is the learning pass's alone."""
    backs = []
    plain = reference.linear_backward
    monkeypatch.setattr(reference, "linear_backward", lambda *a: backs.append(a[1].shape) or plain(*a))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), pc.Linear(5, 7), nn.Tanh(), pc.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2))
    with dispatch.use_fused(True):
        pc.FreeEnergy(model, steps=3)(torch.randn(4, 3), torch.randn(4, 2)).backward()
    assert set(backs) == {(6, 7)}
    assert model[0].weight.grad.abs().max() > 0


def test_inference_by_the_kernels(device):
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(6, 9), nn.Tanh(), pc.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)).to(device)
    x, y = torch.randn(10, 6, device=device), torch.randint(3, (10,), device=device)
    apart = learned(False, model, x, y)
    with dispatch.use_backend("triton"):
        together = learned(True, model, x, y)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_another_path_is_refused():
    """The nodes of later passes are those of the first, fused or not."""
    model, x, y = network()
    extra, calls = pc.Linear(8, 8).double(), []
    model.extra = extra
    plain = model.twice.forward
    model.twice.forward = lambda h: (extra if calls.append(1) or len(calls) > 2 else plain)(h)
    with dispatch.use_fused(True), pytest.raises(RuntimeError, match="node 'extra': the model visits its nodes in"):
        pc.FreeEnergy(model)(x, y)


# What a GPU alone can show.


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=ON_GPU)])
def test_no_launch_waits_for_the_gpu(dtype):
    x, weight, bias, state, grad, (pi, keep, move) = problem(512, 256, 384, 4, ("cuda", dtype))

    def step():
        out = linear.linear_forward(x, weight, bias, state, pi, form="error")
        new = linear.linear_backward(grad, weight, state, pi, keep, move)
        return *out, *new, *linear.linear_weight_gradient(grad, x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, before = torch.cuda.CUDAGraph(), state.clone()
    with torch.cuda.graph(graph):
        captured = step()
    state.copy_(before)
    graph.replay()
    replayed = [t.clone() for t in captured]
    state.copy_(before)
    assert all(map(torch.equal, replayed, step()))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=ON_GPU)])
def test_past_two_to_the_31_elements(dtype):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    rows, n, k = 2**19 + 8, 4104, 64
    x, weight = torch.zeros(rows, k, dtype=dtype, device="cuda"), torch.ones(n, k, dtype=dtype, device="cuda")
    state, pi = torch.zeros(rows, n, device="cuda"), torch.ones(rows, device="cuda")
    x[-1], state[-1, -1] = 1.0, 2.0
    u, energy = linear.linear_forward(x, weight, None, state, pi, form="error")
    assert u[-1, 0] == k
    assert u[-1, -1] == k + 2
    assert energy[-1] == 2
    state, grad_x = linear.linear_backward(u, weight, state, pi, 0 * pi, pi)
    assert state[-1, -1] == -(k + 2)
    assert grad_x[-1, 0] == n * k + 2 or grad_x[-1, 0].isinf()
