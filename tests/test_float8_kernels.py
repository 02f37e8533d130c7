"""The kernels that round to 8 bits: bit for bit what torch's own conversion makes, on any layout of what they read.

The interpreter's own conversion to float8 neither carries into the exponent nor knows ties; `converts` has torch do it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernels import EMULATED, ON_CPU, ON_GPU, poison  # noqa: F401
from torch import nn

from pc_triton import float8, reference
from pc_triton.dispatch import triton_kernels, use_backend
from pc_triton.kernels import clamped
from pc_triton.kernels import float8 as kernels

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_float8() -> bool:
    """Whether what the kernels run on converts to float8, as a GPU before sm_89 does not."""
    if torch.cuda.is_available():
        return float8.has_products(torch.device("cuda"))
    if EMULATED:
        from triton.runtime.driver import driver

        return driver.active.get_current_target().arch >= 89
    return True


pytestmark = pytest.mark.skipif(not has_float8(), reason="no float8 here")


@pytest.fixture(params=[pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=ON_GPU)])
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def converts(monkeypatch) -> None:
    """In the interpreter float32 becomes float8 as hardware has it: to nearest, ties to even, too large the largest."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fp_to_fp
    kinds = {"fp8e4nv": FORWARD, "fp8e5": GRADIENT}

    def convert(self, src, dst_type, rounding):
        dtype = kinds.get(dst_type.scalar.name)
        if dtype is None:
            return plain(self, src, dst_type, rounding)
        largest = torch.finfo(dtype).max
        values = torch.tensor(src.data).clamp(-largest, largest).to(dtype)  # NaN stays NaN
        return TensorHandle(values.view(torch.uint8).numpy(), dst_type.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", convert)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Numbers of many sizes, with zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).mul(3).exp()
    x = x.masked_fill(torch.rand(*shape, generator=generator) < 0.05, 0.0)
    return x.clamp(-60000, 60000).to(device, dtype)


def same(found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    """Equal bit for bit, but that any NaN is as good as another."""
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    a, b = found.float(), wanted.float()
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    assert torch.equal(a.signbit()[~a.isnan()], b.signbit()[~b.isnan()])


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (41, 48), (3, 401), (2, 4100), (7, 0), (0, 7)], ids=str)
def test_rows(shape, dtype, wanted, device):
    x = numbers(*shape, dtype=dtype, device=device)
    for found, truth in zip(kernels.rows_rounded(x, wanted), reference.rows_rounded(x, wanted), strict=True):
        same(found, truth)


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
def test_rows_longer_than_a_tile(wanted, device, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", 64)
    for columns in (64, 65, 200):
        x = numbers(3, columns, device=device)
        for found, truth in zip(kernels.rows_rounded(x, wanted), reference.rows_rounded(x, wanted), strict=True):
            same(found, truth)


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 48), (130, 257), (300, 5), (0, 16), (16, 0)], ids=str)
def test_weight(shape, dtype, wanted, device):
    weight = numbers(*shape, dtype=dtype, device=device)
    for transposes in (True, False):
        found = kernels.weight_rounded(weight, wanted, transposes)
        for a, b in zip(found, reference.weight_rounded(weight, wanted, transposes), strict=True):
            same(a, b)


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
def test_every_number_and_the_ties_between_them(wanted, device):
    """All of float8's own numbers up to the largest power of two, the middle of each two, and a little beside it."""
    every = torch.arange(256, dtype=torch.uint8).view(wanted).float()
    largest = 2.0 ** torch.tensor(torch.finfo(wanted).max).log2().floor()
    every = every[every.isfinite() & (every.abs() < largest)].sort().values
    middle = (every[1:] + every[:-1]) / 2
    near = [middle * (1 + sign * 2.0**-20) for sign in (-1, 1)]
    x = torch.cat([every, middle, *near, largest.view(1) * 0.75])[None].to(device)
    values, scale = kernels.rows_rounded(x, wanted)
    assert scale.item() == 1.0
    same(values, x.to(wanted))


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 2.0**-110, 1.0, 255.999, 448.0, 65504.0, 1e38, 3.3e38])
def test_sizes(size, wanted, device):
    """From zeros to the largest number: scales are ordinary numbers, nothing overflows."""
    x = torch.tensor([[size, -size, 0.5 * size, 0.0], [1.0, 2.0, 3.0, 4.0]], device=device)
    values, scale = kernels.rows_rounded(x, wanted)
    truth = reference.rows_rounded(x, wanted)
    same(values, truth[0])
    same(scale, truth[1])
    assert values.float().isfinite().all()
    assert (scale >= 2.0**-124).all()
    assert (1 / scale).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the interpreter's NumPy: 0 * inf
@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number(bad, wanted, device, monkeypatch):
    """Its row has no scale, in one tile or in several, and the other rows are what they were."""
    for longest in (kernels.LONGEST, 16):
        monkeypatch.setattr(kernels, "LONGEST", longest)
        x = numbers(3, 33, device=device)
        clean, _ = kernels.rows_rounded(x, wanted)
        x[1, 20] = bad
        values, scale = kernels.rows_rounded(x, wanted)
        assert scale.isinf().flatten().tolist() == [False, True, False]
        assert (values.float() * scale)[1].isnan().all()
        assert torch.equal(values[::2].float(), clean[::2].float())
    values, transposed, scale = kernels.weight_rounded(x, wanted)
    assert scale.isinf().all()
    assert values.float()[1, 20].isnan()
    assert transposed is not None
    assert transposed.float()[20, 1].isnan()


def test_layouts(device):
    """A slice of wider rows, a row for all, columns and every other one: each is as its contiguous copy."""
    wide = numbers(8, 96, device=device)
    for x in (wide[:, 32:64], wide[:1].expand(8, 96), wide.t(), wide[:, ::2], wide[::3], wide[:, :1].expand(8, 96)):
        for found, truth in zip(kernels.rows_rounded(x, FORWARD), kernels.rows_rounded(x.contiguous(), FORWARD)):
            same(found, truth)
        for found, truth in zip(kernels.weight_rounded(x, FORWARD), kernels.weight_rounded(x.contiguous(), FORWARD)):
            same(found, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (3, 401), (2, 9000), (0, 7)], ids=str)
def test_gradient_of_logits(shape, dtype, device):
    """q - y within the rounding of e5m2 of what float64 has, from logits of any layout; an ignored row is 0."""
    labels = torch.arange(shape[0], device=device) % shape[1]
    mu = numbers(*shape, dtype=dtype, device=device).clamp(-30, 10)
    if len(labels) > 2:
        labels[2] = -100
    for logits in (mu, mu.t().contiguous().t()):
        kept = logits.clone()
        energy, values, scale = clamped.clamped_categorical_rounded(logits, labels, -100)
        assert torch.equal(logits, kept)
        assert values.dtype == GRADIENT
        assert values.is_contiguous()
        assert scale.shape == (shape[0], 1)
        exact = logits.double()
        truth = reference.clamped_categorical_gradient_(exact, labels, -100)
        torch.testing.assert_close(energy.double(), truth, rtol=1e-5, atol=1e-5)
        error = (values.double() * scale - exact).abs()
        assert (error <= (2.0**-3 + 1e-4) * exact.abs() + 2.0**-32).all()
        assert (values.double()[labels == -100] == 0).all()
        row, kept = torch.arange(shape[0], device=device), labels != -100
        assert (values.double()[row, labels.clamp_min(0)][kept & (truth > 1e-6)] == -(2.0**15)).all(), "exact"
        _, plain, plain_scale = reference.clamped_categorical_rounded(logits, labels, -100)
        torch.testing.assert_close(scale, plain_scale, rtol=1e-3, atol=2.0**-37)
        difference = (values.double() * scale - plain.double() * plain_scale).abs()
        assert (difference <= 0.26 * exact.abs() + 2.0**-31).all(), "a tie may fall either way"
        assert (difference > 0.01 * exact.abs() + 2.0**-40).sum() <= 0.01 * difference.numel()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "give one to each of the 2 rows"),
        ({"labels": torch.zeros(2)}, TypeError, "cast them to int64"),
        ({"mu": torch.zeros(2, 3).double()}, TypeError, "float64"),
        ({"mu": torch.zeros(2, 0)}, ValueError, "mu has no columns"),
    ],
)
def test_wrong_arguments_of_logits(changes, error, text):
    given = {"mu": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64), "ignore_index": -100} | changes
    with pytest.raises(error, match=text):
        clamped.clamped_categorical_rounded(**given)


@pytest.mark.parametrize("launch", [kernels.rows_rounded, kernels.weight_rounded])
@pytest.mark.parametrize(
    ("x", "dtype", "error", "text"),
    [
        (torch.zeros(4), FORWARD, ValueError, r"has 1 dimensions: give it \[rows, columns\]"),
        (torch.zeros(2, 2, 2), FORWARD, ValueError, "has 3 dimensions"),
        (torch.zeros(2, 2).double(), FORWARD, TypeError, "float64"),
        (torch.zeros(2, 2, dtype=torch.int32), FORWARD, TypeError, "is int32: cast it"),
        (torch.zeros(2, 2), torch.bfloat16, TypeError, r"round to torch\.float8_e4m3fn or"),
        (torch.zeros(2, 2), torch.float8_e4m3fnuz, TypeError, r"round to torch\.float8_e4m3fn or"),
    ],
)
def test_wrong_arguments(launch, x, dtype, error, text):
    with pytest.raises(error, match=text):
        launch(x, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its products are made elsewhere too")
@ON_CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_of_what_the_kernels_round(dtype, monkeypatch):
    """`FewDigits` by the kernels and in plain torch, forwards and backwards."""
    calls = []
    for name in ("rows_rounded", "weight_rounded"):
        plain = getattr(triton_kernels(), name)
        monkeypatch.setattr(
            triton_kernels(), name, lambda *args, name=name, plain=plain: calls.append(name) or plain(*args)
        )
    x, weight = numbers(3, 5, 48, dtype=dtype).requires_grad_(), nn.Parameter(numbers(80, 48, dtype=dtype))
    grad, found = numbers(3, 5, 80, dtype=dtype), []
    for backend in ("torch", "triton"):
        with use_backend(backend), float8.FewDigits():
            y = F.linear(x, weight)
        with use_backend(backend):
            found.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    assert calls == ["rows_rounded", "weight_rounded", "rows_rounded"] or calls == [
        "weight_rounded", "rows_rounded", "rows_rounded",
    ]  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_gpu_without_float8_rounds_in_plain_torch(monkeypatch):
    """Its kernels may not compile."""

    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

    for has in (False, True):
        monkeypatch.setattr(float8, "has_products", lambda device, has=has: has)
        with use_backend("triton"):
            assert (float8._rounds(OnGPU()) is reference) is not has
