"""Every kernel against the float64 oracle: in Triton's interpreter on a CPU, compiled where there is a GPU.

A kernel's error may be twice that of plain torch at the same dtype, plus a few units in the last place of the largest
value.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from pc_triton import reference
from pc_triton.kernels import bernoulli, categorical, clamped, gaussian, gaussian_logvar, laplace, student_t
from pc_triton.kernels.common import tile

MODULES = {
    "gaussian": gaussian,
    "gaussian_logvar": gaussian_logvar,
    "bernoulli": bernoulli,
    "categorical": categorical,
    "laplace": laplace,
    "student_t": student_t,
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "PTX_EMULATED" in os.environ  # the compiled code runs in tests/ptx_emulator
ON_CPU = pytest.mark.skipif(not INTERPRETED, reason="a CPU needs the interpreter: set TRITON_INTERPRET=1")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]

Spot = tuple[str, torch.dtype]


def spots(*dtypes: torch.dtype):
    """Device and dtype; bfloat16 is silently wrong in the interpreter, so where compiled code runs alone."""
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.bfloat16 or EMULATED:
            yield pytest.param(("cpu", dtype), marks=ON_CPU, id=f"cpu-{name}")
        yield pytest.param(("cuda", dtype), marks=ON_GPU, id=f"cuda-{name}")


@pytest.fixture(params=spots(torch.float32, torch.float16, torch.bfloat16))
def spot(request) -> Spot:
    return request.param


@pytest.fixture(params=spots(torch.float32))
def device(request) -> str:
    return request.param[0]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill torch.empty with NaN, so that a partial write shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **options):
            x = plain(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def short_rows(monkeypatch):
    """Send rows over 16 columns through the loops of long ones."""
    cut_rows(monkeypatch, 32)


def cut_rows(monkeypatch, longest: int) -> None:
    """Tiles of so many columns for rows over 16, by one warp: of more, two would hold the state of the same place."""
    tiles = lambda columns: (True, *tile(columns, 1024, 16)) if columns <= 16 else (False, 1, longest, 1)  # noqa: E731
    monkeypatch.setattr(categorical, "plan", tiles)


def function(module, family: str, part: str):
    """A family's forward or step, called with the arguments that all families share: no unit, 3 degrees of freedom."""
    call, nu = getattr(module, f"{family}_{part}"), {"nu": 3.0} if family == "student_t" else {}
    if family not in ("laplace", "student_t"):
        return call
    if part == "forward":
        return lambda *arguments, **options: call(*arguments, **nu, **options)
    return lambda mu, state, grad, precision, keep, move, **options: call(
        mu, state, grad, precision, None, keep, move, **nu, **options
    )


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_close(what: str, actual, truth, plain, terms: float = 0.0) -> None:
    """``terms``: the size of the float32 terms that a difference is made of."""
    assert actual.shape == truth.shape, what
    assert actual.dtype == plain.dtype, what
    scale = truth.abs().max()
    error, allowed = (actual.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max()
    bound = allowed + 4 * torch.finfo(actual.dtype).eps * scale + 2 * torch.finfo(torch.float32).eps * terms + 1e-37
    assert error <= bound, (
        f"{what}: error {error:.2e} over {bound:.2e} (largest {scale:.2e}, torch's {allowed / 2:.2e})"
    )


def problem(family: str, shape, samples: int, spot: Spot, form: str, *, scale: float = 1.0, size: float = 1.0):
    """mu, state, grad, (precision, keep, move), the family's further arguments; u - mu has that size."""
    device, dtype = spot
    generator = torch.Generator().manual_seed(sum(shape) + samples)

    def normal(*size):
        return torch.randn(size, generator=generator)

    logvar = family == "gaussian_logvar"
    pull = 1.0
    if logvar:  # beyond this e^s and e^(s - s^) leave float16, or multiply the rounding of s
        scale, size, pull = min(scale, 0.5), min(size, 0.3), 0.3
    shape = (*shape[:-1], shape[-1] * 2) if logvar else tuple(shape)
    half = (*shape[:-1], shape[-1] // 2) if logvar else shape
    mu, e, grad = (scale * normal(*shape)).to(dtype), size * normal(*shape), (pull * normal(*half)).to(dtype)
    state = e if form == "error" else mu.float() + e
    coefficients = [c.to(device) for c in torch.rand(3, samples, generator=generator) + 0.25]
    extra = (normal(*half).to(device, dtype),) if logvar else ()
    return mu.to(device), state.to(device), grad.to(device), coefficients, extra


def check_step(family, mu, state, grad, coefficients, extra, form, moved, **options) -> None:
    kernel, oracle = (function(module, family, "step") for module in (MODULES[family], reference))
    precision, keep, move = coefficients
    start = state
    if state is None and form == "state":
        start = mu.float()
    arguments = (mu, start, grad, precision, keep, move, *extra)
    truth = oracle(*map(double, arguments), form=form, moved=moved, **options)
    plain = oracle(*arguments, form=form, moved=moved, **options)
    given_state = None if state is None else state.clone()
    given_grad = None if keep is None and form == "state" else grad
    got = kernel(mu, given_state, given_grad, precision, keep, move, *extra, form=form, moved=moved, **options)
    words = f"{family} {form} {tuple(mu.shape)} moved={moved}"
    if keep is None:
        assert got[0] is given_state, words
        if state is not None:
            assert torch.equal(got[0], state), f"{words}: the learning pass moved the state"
    else:
        assert state is None or got[0] is given_state, words
        assert_close(f"{words}: state", got[0], truth[0], plain[0])
    assert_close(f"{words}: dF/dmu", got[1], truth[1], plain[1], terms=precision.max() + grad.abs().max())


def check_forward(family, mu, state, coefficients, extra, form, **options) -> None:
    kernel, oracle = (function(module, family, "forward") for module in (MODULES[family], reference))
    arguments = (mu, state, coefficients[0], *extra)
    before = state.clone()
    if family == "categorical" and form == "state":
        state = state.masked_fill(mu == -torch.inf, -torch.inf)
    known = mu, state, coefficients[0], *extra
    truth = oracle(*map(double, known), form=form, **options)
    plain = oracle(*known, form=form, **options)
    got = kernel(*arguments, form=form, **options)
    assert torch.equal(arguments[1], before)
    for what, a, b, c in zip(("emission", "energy"), got, truth, plain):
        assert_close(f"{family} {form} {tuple(mu.shape)}: {what}", a, b, c)
    assert (got[1] >= 0).all()


# Form, whether there is a state, whether it moves, whether the gradient is that of the moved state.
MAIN = [("error", True, True, False), ("state", True, True, True), ("state", True, False, False)]
STEPS = [
    *MAIN,
    ("error", True, False, False),
    ("error", False, True, False),
    ("error", False, False, False),
    ("state", True, True, False),
    ("state", False, True, True),
    ("state", False, False, False),
]


def check_all(family, shape, samples, spot, steps, **options) -> None:
    """The forward of both forms, and these steps."""
    for form in ("error", "state"):
        mu, state, _, c, extra = problem(family, shape, samples, spot, form)
        check_forward(family, mu, state, c, extra, form, **options)
    for form, has_state, has_move, moved in steps:
        mu, state, grad, c, extra = problem(family, shape, samples, spot, form)
        cs = c if has_move else [c[0], None, None]
        check_step(family, mu, state if has_state else None, grad, cs, extra, form, moved, **options)


@pytest.mark.parametrize(("shape", "samples"), [((4, 41), 2), ((5, 127), 5)], ids=str)
@pytest.mark.parametrize("family", MODULES)
def test_dtypes(family, shape, samples, spot):
    check_all(family, shape, samples, spot, STEPS if samples == 2 else MAIN)


@pytest.mark.parametrize(("shape", "samples"), [((1, 1), 1), ((3, 3), 3), ((2, 1271), 2), ((70, 10), 35)], ids=str)
@pytest.mark.parametrize("family", MODULES)
def test_odd_shapes(family, shape, samples, device):
    check_all(family, shape, samples, (device, torch.float32), MAIN)


@pytest.mark.parametrize("family", MODULES)
def test_long_rows(family, device):
    check_all(family, (1, 5_001), 1, (device, torch.float32), MAIN)


def test_a_quarter_million_columns(device):
    spot = device, torch.float16
    mu, state, grad, c, extra = problem("categorical", (1, 2**18 + 1), 1, spot, "error", scale=3.0)
    check_step("categorical", mu, state, grad, c, extra, "error", False)


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_in_bfloat16(family, dtype, device):
    """Read as they are, and rounded once when they have moved (the interpreter truncates)."""
    mu, e, grad, c, extra = problem(family, (4, 41), 2, (device, dtype), "error")
    e = e.bfloat16()
    check_forward(family, mu, e, c, extra, "error")
    check_step(family, mu, e, grad, c, extra, "error", False)
    check_step(family, mu, None, grad, c, extra, "error", False, state_dtype=torch.bfloat16)
    check_step(family, mu, e, grad, (c[0], None, None), extra, "error", False)


@pytest.mark.usefixtures("short_rows")
def test_errors_in_bfloat16_over_long_rows_with_masks(device):
    mu, e, grad, c, _ = problem("categorical", (2, 3, 5, 41), 2, (device, torch.float32), "error")
    masks = {"causal": True, "padding": torch.arange(41, device=device)[None].repeat(2, 1) % 3 == 0}
    check_forward("categorical", mu, e.bfloat16(), c, (), "error", **masks)
    check_step("categorical", mu, e.bfloat16(), grad, c, (), "error", False, **masks)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", MODULES)
def test_random_shapes(family, seed, device):
    draw = random.Random(seed)
    samples, rows, columns = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 300)
    form, has_state, has_move, moved = draw.choice(STEPS)
    scale = draw.choice([1e-3, 1.0, 10.0])
    mu, state, grad, c, extra = problem(
        family, (samples * rows, columns), samples, (device, torch.float32), form, scale=scale
    )
    check_forward(family, mu, state, c, extra, form)
    c = c if has_move else [c[0], None, None]
    check_step(family, mu, state if has_state else None, grad, c, extra, form, moved)


def held(family, spot, form, **options):
    """`problem` of three samples, the second of which the guard holds: its gradient and prediction have overflowed."""
    mu, state, grad, (precision, keep, move), extra = problem(family, (6, 41), 3, spot, form, **options)
    keep[1], move[1] = 1.0, 0.0
    spoilt = [x.clone() for x in (mu, grad)]
    for x in spoilt:
        x[2], x[3, ::2] = torch.inf, torch.nan
    return mu, state, grad, (precision, keep, move), extra, spoilt


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("form", ["error", "state", "moved"])
@pytest.mark.parametrize("family", [*MODULES, "categorical, long"])
def test_a_sample_that_is_held_keeps_its_state(family, form, spot, monkeypatch):
    """Bit for bit, whatever the guard found in it; and the others are as they are beside a finite one."""
    if family.endswith("long"):
        cut_rows(monkeypatch, 32)
        family = "categorical"
    moved, form = form == "moved", form.replace("moved", "state")
    mu, state, grad, c, extra, spoilt = held(family, spot, form)
    known = (mu, state, grad, *c, *extra, *spoilt)
    for module, values in ((MODULES[family], known), (reference, known), (reference, map(double, known))):
        step = function(module, family, "step")
        m, u, g, *rest, m_spoilt, g_spoilt = values
        truth = step(m, u.clone(), g, *rest, form=form, moved=moved)
        got = step(m_spoilt, u.clone(), g_spoilt, *rest, form=form, moved=moved)
        assert torch.equal(got[0][2:4], u[2:4]), f"{module.__name__}: the state moved"
        for a, b in zip(got, truth):
            others = [0, 1, 4, 5]
            assert b[others].isfinite().all()
            assert torch.equal(a[others], b[others]), f"{module.__name__}: another sample is not as it was"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("family", MODULES)
def test_no_move_leads_back_past_an_infinite_gradient(family, device):
    """To the part ``keep`` of the error: so the guard takes back a first move in error form."""
    mu, e, _, (precision, keep, move), extra, (_, grad) = held(family, (device, torch.float32), "error")
    keep[1] = 0.25
    for module in (MODULES[family], reference):
        got, _ = function(module, family, "step")(mu, e.clone(), grad, precision, keep, move, *extra, form="error")
        assert torch.equal(got[2:4], 0.25 * e[2:4])


@pytest.mark.parametrize("form", ["error", "state"])
def test_a_variance_below_the_smallest_number(form, device):
    """No NaN where u = mu, and none beside it."""
    mu = torch.tensor([[1.0, 2.0, -90.0, -200.0]], device=device)
    state = torch.zeros_like(mu) if form == "error" else mu.clone()
    one, zero = torch.ones(1, device=device), torch.zeros(1, 2, device=device)
    emission, energy = gaussian_logvar.gaussian_logvar_forward(mu, state, one, zero, form=form)
    assert torch.equal(emission, mu[:, :2])
    assert energy.item() == 0
    for x in gaussian_logvar.gaussian_logvar_step(mu, state, zero, one, one, one, zero, form=form):
        assert x.isfinite().all()


# Attention's node.

MASKS = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3), (11, 41)], ids=str)
@pytest.mark.parametrize(("causal", "padded"), MASKS, ids=["causal", "padding", "both"])
def test_attention(queries, keys, causal, padded, device):
    padding = (torch.arange(2 * keys, device=device).view(2, keys) % 3 == 0) if padded else None
    steps = STEPS if keys == 7 else MAIN
    check_all("categorical", (2, 3, queries, keys), 2, (device, torch.float32), steps, causal=causal, padding=padding)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize(("causal", "padded"), MASKS, ids=["causal", "padding", "both"])
def test_attention_over_long_rows(causal, padded, device):
    padding = (torch.arange(2 * 37, device=device).view(2, 37) % 3 == 0) if padded else None
    steps = STEPS if causal and padded else MAIN
    check_all("categorical", (2, 1, 2, 37), 2, (device, torch.float32), steps, causal=causal, padding=padding)


@pytest.mark.parametrize(
    ("tokens", "causal", "padded"), [(7, False, False), (7, True, True), (18, True, True)], ids=["alone", "all", "long"]
)
def test_attention_within_segments(tokens, causal, padded, device, monkeypatch):
    """A document's last tokens, and numbers that no 32 bits hold, mixed; rows of one tile and of two."""
    cut_rows(monkeypatch, 16)
    at = torch.arange(tokens, device=device)
    masks = {"segments": torch.stack([(at + 3) // 7, (at * 5 % 3 - 1) * 2**40])}
    if padded:
        masks["padding"] = torch.arange(2 * tokens, device=device).view(2, tokens) % 3 == 0
    spot = device, torch.float32
    check_all("categorical", (2, 1 if tokens > 16 else 2, tokens, tokens), 2, spot, MAIN, causal=causal, **masks)
    mu, state, _, c, _ = problem("categorical", (2, 1, tokens, tokens), 2, spot, "error")
    p, _ = categorical.categorical_forward(mu, state, c[0], form="error", segments=masks["segments"])
    assert torch.equal(p > 0, (masks["segments"][:, :, None] == masks["segments"][:, None, :])[:, None].expand_as(p))


@pytest.mark.parametrize("columns", [13, 37])
@pytest.mark.usefixtures("short_rows")
def test_rows_masked_whole(columns, device):
    """A row of -inf gives zeros and not NaN, beside rows that are masked in part."""
    for form in ("error", "state"):
        mu, state, grad, c, _ = problem("categorical", (4, columns), 2, (device, torch.float32), form)
        mu[1] = -torch.inf
        mu[2, ::2] = -torch.inf
        check_forward("categorical", mu, state, c, (), form)
        for moved in (False, True):
            check_step("categorical", mu, state, grad, c, (), form, moved)
        new, grad_mu = categorical.categorical_step(mu, state, grad, *c, form=form, moved=True)
        for x in (new[1], grad_mu[1], new[2, ::2], grad_mu[2, ::2]):
            assert (x == 0).all()


# Extreme values.


@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
@pytest.mark.parametrize("form", ["error", "state"])
def test_saturated_logits(family, form, spot):
    """u and mu each at 80, -80 or 0: one-hot, agreeing and opposed."""
    device, dtype = spot
    values = torch.tensor([80.0, -80.0, 0.0, 79.0])
    mu = values.repeat(4, 8).to(device, dtype)
    u = torch.cat([values.roll(i)[None].repeat(1, 8) for i in range(4)]).to(device)
    state = u - mu.float() if form == "error" else u
    grad = torch.linspace(-1, 1, 32, device=device).repeat(4, 1).to(dtype)
    c = [torch.ones(4, device=device), torch.full((4,), 0.7, device=device), torch.full((4,), 0.3, device=device)]
    check_forward(family, mu, state, c, (), form)
    for moved in (False, True):
        check_step(family, mu, state, grad, c, (), form, moved)


@pytest.mark.parametrize("form", ["error", "state"])
def test_far_variances(form, device):
    mu, state, grad, c, extra = problem("gaussian_logvar", (4, 64), 4, (device, torch.float32), form, size=0.1)
    shift = torch.tensor([-10.0, -3.0, 3.0, 10.0], device=device)[:, None]
    mu[:, 64:] += shift
    if form == "state":
        state[:, 64:] += shift
    for i in range(4):
        one = [x[i : i + 1] for x in c]
        arguments = mu[i : i + 1], state[i : i + 1].clone(), grad[i : i + 1], one, (extra[0][i : i + 1],), form
        check_step(*("gaussian_logvar", *arguments), moved=False)


# Properties.


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("form", ["error", "state"])
@pytest.mark.parametrize("columns", [41, 5000])
def test_nothing_to_do_at_the_prediction(family, form, columns, spot):
    """E = 0 and dF/dmu = 0, exactly, at u = mu with no gradient from above."""
    mu, state, grad, c, extra = problem(family, (2, columns), 2, spot, form, scale=4.0, size=0.0)
    _, energy = function(MODULES[family], family, "forward")(mu, state, c[0], *extra, form=form)
    assert (energy == 0).all()
    for moved in (False, True):
        new, grad_mu = function(MODULES[family], family, "step")(
            mu, state.clone(), torch.zeros_like(grad), *c, *extra, form=form, moved=moved
        )
        assert torch.equal(new, state)
        assert (grad_mu == 0).all()


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.2, 1.0])
def test_small_energies_keep_their_digits(family, size, device):
    """A relative error of 2e-5 of each sample's energy, where the plain formula loses all of it in float32."""
    mu, state, _, c, extra = problem(family, (4, 200), 4, (device, torch.float32), "error", scale=3.0, size=size)
    _, energy = function(MODULES[family], family, "forward")(mu, state, c[0], *extra, form="error")
    if family == "categorical" or (family == "bernoulli" and size < 1e-3):  # float64 loses too many digits as well
        probability = mu.double().softmax(-1) if family == "categorical" else mu.double().sigmoid()
        if size < 1e-3:
            d = state.double()
            if family == "categorical":
                curvature = (probability * d * d).sum(-1) - (probability * d).sum(-1) ** 2
            else:
                curvature = (probability * (1 - probability) * d * d).sum(-1)
            truth = 0.5 * c[0] * curvature
            torch.testing.assert_close(energy.double(), truth, rtol=max(2e-5, 3 * size), atol=0.0)
            return
    truth = function(reference, family, "forward")(
        mu.double(), state.double(), c[0].double(), *map(double, extra), form="error"
    )[1]
    torch.testing.assert_close(energy.double(), truth, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("columns", [41, 5000])
def test_logits_count_up_to_a_shift(columns, device):
    mu, state, grad, c, _ = problem("categorical", (2, columns), 2, (device, torch.float32), "error")
    emission, energy = categorical.categorical_forward(mu, state, c[0], form="error")
    same_emission, same_energy = categorical.categorical_forward(mu - 2, state + 5, c[0], form="error")
    torch.testing.assert_close(same_energy, energy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same_emission, emission, rtol=1e-5, atol=1e-6)
    new, grad_mu = categorical.categorical_step(mu, state.clone(), grad, *c, form="error")
    again, same_grad = categorical.categorical_step(mu - 2, state + 5, grad + 3, *c, form="error")
    torch.testing.assert_close(same_grad, grad_mu, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again - 5 * c[1][:, None], new, rtol=1e-5, atol=1e-5)


# What a caller may hand over.


@pytest.mark.parametrize("family", MODULES)
def test_strided_inputs(family, device):
    mu, state, grad, c, extra = problem(family, (6, 40), 3, (device, torch.float32), "state")
    mu, grad = mu.t().contiguous().t(), grad.t().contiguous().t()
    extra = tuple(x.repeat(1, 2)[:, : x.shape[1]] for x in extra)
    c = [x.repeat_interleave(2)[::2] for x in c]
    check_forward(family, mu, state, c, extra, "state")
    check_step(family, mu, state, grad, c, extra, "state", True)
    c = [x[:1].expand(3) for x in c]
    check_step(family, mu, state, grad, c, extra, "state", False)


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty(family, shape, device):
    for form in ("error", "state"):
        mu, state, grad, c, extra = problem(family, shape, shape[0], (device, torch.float32), form)
        emission, energy = function(MODULES[family], family, "forward")(mu, state, c[0], *extra, form=form)
        assert emission.shape == grad.shape
        assert torch.equal(energy, torch.zeros_like(c[0]))
        for given_state in (state, None):
            new, grad_mu = function(MODULES[family], family, "step")(mu, given_state, grad, *c, *extra, form=form)
            assert new.shape == mu.shape
            assert grad_mu.shape == (grad if family == "gaussian" and form == "error" else mu).shape


def test_gaussian_error_hands_grad_on(device):
    mu, state, grad, c, _ = problem("gaussian", (3, 41), 3, (device, torch.float32), "error")
    before = grad.clone()
    assert gaussian.gaussian_step(mu, state, grad, *c, form="error")[1] is grad
    assert torch.equal(grad, before)


def arguments(**changes):
    mu = torch.zeros(4, 6)
    pi = torch.ones(2)
    return {
        "mu": mu,
        "state": torch.zeros(4, 6),
        "grad": mu,
        "precision": pi,
        "keep": pi,
        "move": pi,
        "form": "error",
    } | changes


BAD = [
    ({"form": "both"}, ValueError, 'form is .both.: say "error" or "state"'),
    ({"mu": torch.zeros(4, 6).double()}, TypeError, "mu is float64 .* cast it, or use pc_triton.reference"),
    ({"mu": torch.zeros(4, 6).int()}, TypeError, "mu is int32: cast it to float32, float16 or bfloat16"),
    ({"mu": torch.zeros(())}, ValueError, "mu has 0 dimensions"),
    ({"grad": torch.zeros(4, 5)}, ValueError, r"grad has shape \[4, 5\]: give it \[4, 6\]"),
    ({"grad": None, "form": "state"}, ValueError, r"grad is None: only the learning pass \(keep=None\) in state form"),
    ({"grad": None, "keep": None, "move": None}, ValueError, "grad is None"),
    ({"precision": torch.ones(2, device="meta")}, ValueError, "precision is on meta and mu on cpu: move it there"),
    ({"precision": torch.ones(3)}, ValueError, "mu has 4 rows, no multiple of the 3 samples of precision"),
    ({"precision": torch.ones(2).half()}, TypeError, "precision is float16: cast it to float32"),
    ({"precision": torch.ones(2, 1)}, ValueError, r"precision has shape \[2, 1\]: give it \[2\]"),
    ({"keep": None}, ValueError, "keep and move go together"),
    ({"keep": torch.ones(4)}, ValueError, r"keep has shape \[4\]: give it \[2\]"),
    ({"move": torch.ones(2).double()}, TypeError, "move is float64"),
    ({"state": torch.zeros(4, 6).half()}, TypeError, "state is float16: cast it to float32"),
    ({"state": torch.zeros(4, 6).bfloat16(), "form": "state"}, TypeError, "state is bfloat16: cast it to float32"),
    ({"state": None, "form": "state", "state_dtype": torch.bfloat16}, TypeError, "state is bfloat16: cast it"),
    ({"state": None, "state_dtype": torch.float16}, TypeError, "state is float16: cast it to float32"),
    ({"state": torch.zeros(6)}, ValueError, r"state has shape \[6\]"),
    ({"state": torch.zeros(6, 4).t()}, ValueError, "state is not contiguous and is moved in place"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[words[:30] for _, _, words in BAD])
@pytest.mark.parametrize("family", MODULES)
def test_bad_arguments(family, changes, error, words):
    extra = {}
    changes = dict(changes)
    if family == "gaussian_logvar":
        extra = {"noise": torch.zeros(4, 3)}
        changes.setdefault("grad", torch.zeros(4, 3))
        words = words.replace(r"\[4, 6\]", r"\[4, 3\]")
    with pytest.raises(error, match=words):
        function(MODULES[family], family, "step")(**arguments(**changes), **extra)


def test_bad_noise_and_masks():
    with pytest.raises(ValueError, match=r"noise has shape \[4, 6\]: give it \[4, 3\]"):
        gaussian_logvar.gaussian_logvar_step(**arguments(grad=torch.zeros(4, 3)), noise=torch.zeros(4, 6))
    odd = arguments(mu=torch.zeros(4, 5), state=torch.zeros(4, 5), grad=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="mu has 5 columns: give it an even number"):
        gaussian_logvar.gaussian_logvar_step(**odd, noise=torch.zeros(4, 2))
    logits = torch.zeros(2, 1, 3, 4)
    four = arguments(mu=logits, state=logits.clone(), grad=logits)
    with pytest.raises(ValueError, match=r"padding has shape \[2, 3\]: give it \[2, 4\], \[batch, keys\]"):
        categorical.categorical_step(**four, padding=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="padding is float32: give a bool tensor"):
        categorical.categorical_step(**four, padding=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="padding is on meta and mu on cpu"):
        categorical.categorical_step(**four, padding=torch.zeros(2, 4, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="padding needs"):
        categorical.categorical_step(**arguments(), padding=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="segments is int16: give int32 or int64, a number for each document"):
        categorical.categorical_step(**four, segments=torch.zeros(2, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"mu has shape \[2, 1, 3, 4\]: segments need as many queries as keys"):
        categorical.categorical_step(**four, segments=torch.zeros(2, 4, dtype=torch.int32))
    one = torch.zeros(4)
    with pytest.raises(ValueError, match="causal needs"):
        categorical.categorical_step(**arguments(mu=one, state=one.clone(), grad=one), causal=True)


# The node clamped to labels.


def check_clamped(mu, labels, grad_energy, ignore_index=-100) -> None:
    def both(module, cast=lambda x: x):
        energy, lse = module.clamped_categorical_forward(cast(mu), labels, ignore_index)
        return energy, lse, module.clamped_categorical_backward(cast(mu), labels, lse, cast(grad_energy), ignore_index)

    def in_place(module, cast=lambda x: x):
        grad_mu = cast(mu).clone(memory_format=torch.contiguous_format)
        return module.clamped_categorical_gradient_(grad_mu, labels, ignore_index), grad_mu

    for call, whats in ((both, ("energy", "lse", "dE/dmu")), (in_place, ("energy in place", "dE/dmu in place"))):
        for what, a, b, c in zip(whats, call(clamped), call(reference, double), call(reference)):
            assert_close(f"clamped {tuple(mu.shape)}: {what}", a, b, c)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (7, 41), (3, 127), (4, 1271), (33, 10)], ids=str)
def test_clamped(rows, columns, spot):
    device, dtype = spot
    mu = 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    labels = torch.arange(rows) * 7 % columns
    labels[rows // 2] = -100 if rows > 1 else 0
    grad_energy = torch.linspace(-1, 2, rows)
    check_clamped(mu.to(device, dtype), labels.to(device), grad_energy.to(device))
    check_clamped(mu.to(device, dtype).t().contiguous().t(), labels.int().to(device).long(), grad_energy.to(device))


@pytest.mark.parametrize(("rows", "columns"), [(2, 5_001), (1, 2**18 + 1)])
def test_clamped_long_rows(rows, columns, device):
    mu = 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([columns - 1, 5])[:rows]
    check_clamped(mu.to(device), labels.to(device), torch.tensor([0.5, -2.0])[:rows].to(device))


def test_clamped_extremes(spot):
    device, dtype = spot
    mu = torch.tensor([[80.0, -80, 0], [-80, 80, 79], [-torch.inf, 1, 2], [3, -torch.inf, -torch.inf]]).to(
        device, dtype
    )
    labels = torch.tensor([1, 1, 2, 0], device=device)
    check_clamped(mu, labels, torch.tensor([1.0, 2, 3, 4], device=device))


def test_clamped_ignores_and_warns(device):
    """ignore_index may be a column; a label that is no column gives NaN, with nothing read out of bounds."""
    mu = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    check_clamped(mu, torch.tensor([2, 0, 1, 2], device=device), torch.ones(4, device=device), ignore_index=2)
    energy, _ = clamped.clamped_categorical_forward(mu, torch.tensor([5, -1, -100, 0], device=device), -100)
    assert energy.isnan().tolist() == [True, True, False, False]


def test_clamped_empty_and_bad(device):
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    mu = torch.zeros(0, 5, device=device)
    energy, lse = clamped.clamped_categorical_forward(mu, labels, -100)
    assert energy.shape == lse.shape == (0,)
    assert clamped.clamped_categorical_backward(mu, labels, lse, energy, -100).shape == (0, 5)
    assert clamped.clamped_categorical_gradient_(mu, labels, -100).shape == (0,)
    with pytest.raises(ValueError, match="not contiguous and is overwritten"):
        clamped.clamped_categorical_gradient_(torch.zeros(5, 2).t(), torch.zeros(2, dtype=torch.int64), -100)
    mu, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    for bad, error, words in (
        ((mu.double(), labels), TypeError, "mu is float64"),
        ((mu[0], labels), ValueError, "mu has 1 dimensions: give it \\[rows, columns\\]"),
        ((mu, labels[:1]), ValueError, "labels have shape \\[1\\]: give one to each of the 2 rows"),
        ((mu, labels.float()), TypeError, "labels are float32: cast them to int64"),
        ((mu, labels.to("meta")), ValueError, "labels are on meta and mu on cpu"),
        ((mu[:, :0], labels), ValueError, "mu has no columns"),
    ):
        for call in (clamped.clamped_categorical_forward, clamped.clamped_categorical_gradient_):
            with pytest.raises(error, match=words):
                call(*bad, -100)


# What a GPU alone can show.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("family", MODULES)
def test_no_launch_waits_for_the_gpu(family):
    mu, state, grad, c, extra = problem(family, (8, 1000), 4, ("cuda", torch.bfloat16), "error")
    step = function(MODULES[family], family, "step")
    step(mu, state, grad, *c, *extra, form="error")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(mu, state, grad, *c, *extra, form="error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        step(mu, state, grad, *c, *extra, form="error")
    twice = state.clone()
    step(mu, twice, grad, *c, *extra, form="error")
    graph.replay()
    assert torch.equal(state, twice)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_past_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    rows, columns = 2**19 + 8, 4096
    mu = torch.zeros(rows, columns, dtype=torch.float16, device="cuda")
    state = torch.zeros(rows, columns, device="cuda")
    state[-1] = 1.0
    precision = torch.ones(rows, device="cuda")
    emission, energy = gaussian.gaussian_forward(mu, state, precision, form="error")
    assert (emission[-1] == 1).all()
    assert energy[-1] == columns / 2
    del emission
    state[-1, 7] = 3.0
    emission, _ = categorical.categorical_forward(mu, state, precision, form="error")
    torch.testing.assert_close(emission[-1].float(), state[-1].softmax(-1), rtol=2e-3, atol=1e-6)
