"""A linear layer and its node in one kernel, against the float64 oracle; and the plan of its tiles.

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
from test_kernels import EMULATED, ON_GPU, double, poison, spots  # noqa: F401
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
    """Cut products so small that there are groups of programs, and a last group that is short."""
    monkeypatch.setattr(linear, "plan", lambda *_: Tiles(16, 16, 16, 4, 2, 3))


def problem(rows: int, n: int, k: int, samples: int, spot, state_dtype=torch.float32):
    """x, weight, bias, state, precision."""
    device, dtype = spot
    generator = torch.Generator().manual_seed(rows + n + k + samples)
    x, weight, bias = (torch.randn(size, generator=generator).to(device, dtype) for size in ((rows, k), (n, k), (n,)))
    state = torch.randn((rows, n), generator=generator).to(device, state_dtype)
    return x, weight, bias, state, (torch.rand(samples, generator=generator) + 0.25).to(device)


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


def check_forward(x, weight, bias, state, pi) -> None:
    words = f"rows and K {tuple(x.shape)}, N {len(weight)}"
    before = state.clone()
    out, energy = linear.linear_forward(x, weight, bias, state, pi)
    assert torch.equal(state, before), words
    truth, true_energy = reference.linear_forward(*map(double, (x, weight, bias, state, pi)))
    x_, w_, b_, e_ = magnitudes(x, weight, bias, state)
    size, k = reference.linear_forward(x_, w_, b_, e_, double(pi))[0], x.shape[1]
    assert_close(f"{words}: emission", out, truth, size, k, x.dtype)
    terms = reference.sum_samples(e_ * e_, len(pi)) * double(pi)
    assert_close(f"{words}: energy", energy, true_energy, terms, max(k, x.shape[0] * len(weight)), torch.float32)


def check_all(rows: int, n: int, k: int, samples: int, spot, *, bias: bool = True, state_dtype=torch.float32) -> None:
    x, weight, b, state, pi = problem(rows, n, k, samples, spot, state_dtype)
    check_forward(x, weight, b if bias else None, state, pi)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, spot):
    check_all(*shape, spot, bias=shape[1] != 17)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(4))
def test_groups(seed, device):
    draw = random.Random(seed)
    samples, rows = draw.randint(1, 4), draw.randint(1, 30)
    n, k = ((16 * draw.randint(1, 5) + 8 * (seed % 2) * draw.randint(0, 1)) for _ in range(2))
    check_all(samples * rows, n, k, samples, (device, torch.float32))


def test_states_of_half_precision(device):
    check_all(65, 17, 40, 5, (device, torch.float16), state_dtype=torch.float16)
    check_all(9, 17, 40, 3, (device, torch.float32), state_dtype=torch.float16)
    check_all(65, 17, 40, 5, (device, torch.float32), state_dtype=torch.bfloat16)
    check_all(65, 17, 40, 5, (device, torch.float16), state_dtype=torch.bfloat16)


def test_strided_inputs(device):
    x, weight, bias, state, pi = problem(6, 40, 24, 3, (device, torch.float32))
    x, weight = (t.t().contiguous().t() for t in (x, weight))
    check_forward(x, weight, bias.repeat_interleave(2)[::2], state, pi[:1].expand(3))


def test_nothing_to_do_at_the_prediction(spot):
    """E = 0 at e = 0; u is then the product's own."""
    x, weight, bias, state, pi = problem(20, 17, 40, 5, spot)
    u, energy = linear.linear_forward(x, weight, bias, state.zero_(), pi)
    assert (energy == 0).all()
    size = x.abs().double() @ weight.abs().double().t() + bias.abs()
    assert_close("u", u, nn.functional.linear(*map(double, (x, weight, bias))), size, 40, x.dtype)


def test_products_in_tf32(device):
    """Asked for as torch's are: rounded to 11 bits. The interpreter multiplies exactly all the same."""
    x, weight, bias, state, pi = problem(130, 129, 100, 65, (device, torch.float32))
    exact, _ = linear.linear_forward(x, weight, bias, state, pi)
    torch.set_float32_matmul_precision("high")
    try:
        rounded, _ = linear.linear_forward(x, weight, bias, state, pi)
    finally:
        torch.set_float32_matmul_precision("highest")
    error = (rounded - exact).abs()
    assert (error <= 2.0**-9 * (x.abs() @ weight.abs().t()) + 1e-6).all()
    compiled = EMULATED or (device == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and not torch.version.hip)
    assert (error.max() > 1e-4) == compiled


@pytest.mark.parametrize(("rows", "n"), [(0, 4), (4, 0)], ids=str)
def test_empty(rows, n, device):
    x, weight, bias, state, pi = problem(rows, n, 6, min(rows, 2), (device, torch.float32))
    out, energy = linear.linear_forward(x, weight, bias, state, pi)
    assert out.shape == (rows, n)
    assert torch.equal(energy, torch.zeros_like(pi))


# The oracle.


@pytest.mark.parametrize("bias", [True, False])
def test_the_oracle(bias):
    x, weight, b, e, pi = map(double, problem(6, 5, 4, 3, ("cpu", torch.float32)))
    u, energy = reference.linear_forward(x, weight, b if bias else None, e, pi)
    torch.testing.assert_close(u, x @ weight.t() + (b if bias else 0.0) + e)
    torch.testing.assert_close(energy, 0.5 * pi * reference.sum_samples(e * e, 3))


# What a caller may not hand over.

ONE = torch.ones(2)


def forward_arguments(**changes):
    zeros = torch.zeros
    given = {"x": zeros(4, 6), "weight": zeros(5, 6), "bias": zeros(5), "state": zeros(4, 5), "precision": ONE}
    return given | changes


BAD_FORWARD = [
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
    (
        {"x": torch.zeros(4, 1).expand(4, 2**23 + 1), "weight": torch.zeros(5, 1).expand(5, 2**23 + 1)},
        ValueError,
        "at most 2\\^30 rows and 2\\^23 columns",
    ),
]


def words(case) -> str:
    return case[2][:40]


@pytest.mark.parametrize("case", BAD_FORWARD, ids=words)
def test_bad_arguments_of_the_forward(case):
    changes, error, message = case
    with pytest.raises(error, match=message):
        linear.linear_forward(**forward_arguments(**changes))


# The plan.

ARCHES = (80, 86, 90, 100, "gfx942")
LIMITS = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, "gfx942": 65_536}  # bytes of a program


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("itemsize", "precision"), [(2, "ieee"), (4, "ieee"), (4, "tf32")])
def test_plan(arch, itemsize, precision):
    """Powers of two that the tensor cores take; two programs' pipelines fit where one's may be."""
    for rows, cols in ((1, 1), (64, 64), (65, 4096), (16384, 4096), (2**30, 2**20)):
        tiles = plan(rows, cols, itemsize, arch, precision)
        assert all(size & (size - 1) == 0 for size in tiles[:4]), tiles
        assert tiles.rows >= 64, tiles
        assert tiles.warps in (4, 8), tiles
        assert tiles.stages >= 2, tiles
        assert 2 * tiles.stages * (tiles.rows + tiles.cols) * tiles.depth * itemsize <= max(LIMITS[arch], 2**17), tiles


def test_table_is_well_formed():
    table = json.loads(dispatch.TUNED.read_text())
    assert set(table) <= {"linear", "chain"}
    for by_device in table.values():
        for kind, rows in (item for by_kind in by_device.values() for item in by_kind.items()):
            assert kind == "tf32" or isinstance(getattr(torch, kind), torch.dtype)
            assert all(len(row) == 4 and min(row) > 0 for row in rows)


def test_fusing_is_asked_for_or_chosen():
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


def test_both_backends_have_the_same_function():
    assert dispatch.triton_kernels().linear_forward is linear.linear_forward
    assert callable(reference.linear_forward)


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
    ways = tuner.ways(24, 16, 8, torch.float32, "cpu")
    assert not tuner.differs(ways)
    wrong = {**ways, "fused": lambda: (ways["product"]()[0], ways["apart"]()[1])}
    assert tuner.differs(wrong)
    monkeypatch.setattr(tuner, "ways", lambda *shape: wrong)
    assert tuner.main(["--out", str(tmp_path / "tuned.json")]) == 1
    assert "the fused forward differs" in capsys.readouterr().err
    assert not (tmp_path / "tuned.json").exists()


def test_tuner_for_tf32(tuner, monkeypatch, tmp_path):
    """Its rows are of a kind of their own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(tuner, "SHAPES", [(1024, 256, 256)])
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(tuner, "measure", lambda *_: {"fused": 1.0, "apart": 2.0, "product": 1.0})
    assert tuner.main(["--tf32", "--out", str(tmp_path / "tuned.json")]) == 0
    assert asked == ["high"]
    table = json.loads((tmp_path / "tuned.json").read_text())
    assert table == {"linear": {"NVIDIA A100": {"tf32": [[1024, 256, 256, 2.0]]}}}


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


def test_first_layer_multiplies_nothing_back():
    """Nothing lies beneath the first node: its product's gradient is the learning pass's alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), pc.Linear(5, 7), nn.Tanh(), pc.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2))
    x, y, products = torch.randn(4, 3), torch.randn(4, 2), []
    for fuse in (True, False):
        with dispatch.use_fused(fuse), torch.profiler.profile() as profile:
            pc.FreeEnergy(model, steps=3)(x, y).backward()
        products.append(sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events()))
    assert products[0] == products[1]
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
    x, weight, bias, state, pi = problem(512, 256, 384, 4, ("cuda", dtype))

    def step():
        return linear.linear_forward(x, weight, bias, state, pi)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=ON_GPU)])
def test_past_two_to_the_31_elements(dtype):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    rows, n, k = 2**19 + 8, 4104, 64
    x, weight = torch.zeros(rows, k, dtype=dtype, device="cuda"), torch.ones(n, k, dtype=dtype, device="cuda")
    state, pi = torch.zeros(rows, n, device="cuda"), torch.ones(rows, device="cuda")
    x[-1], state[-1, -1] = 1.0, 2.0
    u, energy = linear.linear_forward(x, weight, None, state, pi)
    assert u[-1, 0] == k
    assert u[-1, -1] == k + 2
    assert energy[-1] == 2
