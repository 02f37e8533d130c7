"""The equations of each family in float64, against torch.autograd of torch's own KL divergences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pc_triton as pc
from pc_triton import reference

FAMILIES = ["gaussian", "gaussian_logvar", "bernoulli", "categorical", "laplace", "student_t"]
NU = 3.0
FORMS = ["error", "state"]
EPS = torch.finfo(torch.float64).eps


def divergence(family: str, u, mu):
    """KL[D(u) || D(mu)] summed over everything, by torch.distributions."""
    if family == "gaussian":
        kl = D.kl_divergence(D.Normal(u, 1.0), D.Normal(mu, 1.0))
    elif family == "gaussian_logvar":
        (m, s), (m_hat, s_hat) = u.chunk(2, -1), mu.chunk(2, -1)
        kl = D.kl_divergence(D.Normal(m, (s / 2).exp()), D.Normal(m_hat, (s_hat / 2).exp()))
    elif family == "bernoulli":
        kl = D.kl_divergence(D.Bernoulli(logits=u), D.Bernoulli(logits=mu))
    elif family == "laplace":
        kl = D.kl_divergence(D.Laplace(u, 1.0), D.Laplace(mu, 1.0))
    elif family == "student_t":  # no divergence has a closed form: log p(mu) - log p(u), of the density around mu
        kl = D.StudentT(NU, mu).log_prob(mu) - D.StudentT(NU, mu).log_prob(u)
    else:
        kl = D.kl_divergence(D.Categorical(logits=u), D.Categorical(logits=mu))
    return kl.flatten(1).sum(1) if kl.dim() > 1 else kl


def emission(family: str, u, noise):
    if family == "gaussian_logvar":
        m, s = u.chunk(2, -1)
        return m + (s / 2).exp() * noise[0]
    return {"bernoulli": u.sigmoid, "categorical": lambda: u.softmax(-1)}.get(family, lambda: u)()


def curvature(family: str, u, mu, v):
    """The inverse of the matrix V of the natural gradient, times v."""
    if family == "gaussian_logvar":
        (_, s), (_, s_hat) = u.chunk(2, -1), mu.chunk(2, -1)
        return v * torch.cat([(-s_hat).exp(), torch.expm1(s - s_hat) / (2 * (s - s_hat))], -1)
    if family == "student_t":
        return v * (NU + 1) / NU
    p = emission(family, u, ())
    if family == "bernoulli":
        return p * (1 - p) * v
    return p * (v - (p * v).sum(-1, keepdim=True)) if family == "categorical" else v


def problem(family: str, shape: tuple[int, ...], samples: int, size: float = 1.0, dtype=torch.float64):
    """mu, d = u - mu, grad, noise, precision, keep, move."""
    g = torch.Generator().manual_seed(sum(shape) * 7 + samples)
    wide = (*shape[:-1], 2 * shape[-1]) if family == "gaussian_logvar" else shape
    mu, d = (size * torch.randn(wide, generator=g, dtype=dtype) for _ in range(2))
    grad, noise = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    coefficients = torch.rand(3, samples, generator=g, dtype=dtype) + 0.2
    return mu, d, grad, (noise,) if family == "gaussian_logvar" else (), *coefficients


def functions(family: str):
    """Its forward and step, called with the arguments that all families share: no unit."""
    forward, step = getattr(reference, f"{family}_forward"), getattr(reference, f"{family}_step")
    if family not in ("laplace", "student_t"):
        return forward, step
    nu = {"nu": NU} if family == "student_t" else {}

    def unitless(mu, state, grad, precision, keep, move, **options):
        return step(mu, state, grad, precision, None, keep, move, **nu, **options)

    return partial(forward, **nu), unitless


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e3 * EPS, atol=1e3 * EPS)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)).map(lambda s: ((s[0] * s[1], s[2]), s[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=shapes, moved=st.booleans(), middle=st.booleans())
def test_step_and_forward_are_autograds(family, form, shape, moved, middle):
    """Energy, emission, both forms of dF/dmu, and the move, with one or several rows per sample."""
    (rows, columns), samples = shape
    shape = (rows, 2, columns) if middle else (rows, columns)
    mu, d, grad, noise, pi, keep, move = problem(family, shape, samples)
    forward, step = functions(family)
    state = d if form == "error" else mu + d
    emitted, energy = forward(mu, state, pi, *noise, form=form)
    new, grad_mu = step(mu, state, grad, pi, keep, move, *noise, form=form, moved=moved)

    rate = reference.per_sample(pi, mu)
    u_, mu_ = (mu + d).requires_grad_(), mu.clone().requires_grad_()
    rows_energy = divergence(family, u_, mu_)
    e_u, e_mu = torch.autograd.grad(rows_energy.sum(), [u_, mu_])
    (push,) = torch.autograd.grad((grad * emission(family, u_, noise)).sum(), u_)
    close(emitted, emission(family, mu + d, noise))
    close(energy, pi * reference.sum_samples(rows_energy.detach(), samples))

    d_new = new if form == "error" else new - mu
    moved_by = reference.per_sample(1 - keep, mu) * e_u + reference.per_sample(move, mu) / rate * push
    close(curvature(family, mu + d, mu, d_new - d), -moved_by)
    if form == "error":
        close(grad_mu, rate * (e_u + e_mu) + push)
    else:
        shown = mu + (d_new if moved else d)
        close(grad_mu, rate * torch.autograd.grad(divergence(family, shown, mu_).sum(), mu_)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_keep_moves_nothing(family, form):
    """``keep=None`` is the learning pass: the gradients alone."""
    mu, d, grad, noise, pi, keep, move = problem(family, (4, 3), 2)
    state = d if form == "error" else mu + d
    _, step = functions(family)
    new, grad_mu = step(mu, state, grad, pi, None, None, *noise, form=form)
    _, with_move = step(mu, state, grad, pi, keep, move, *noise, form=form)
    close(new, state)
    close(grad_mu, with_move)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_state_is_no_error(family):
    """In error form ``state=None`` is e = 0."""
    mu, d, grad, noise, *coefficients = problem(family, (4, 3), 2)
    _, step = functions(family)
    for a, b in zip(
        step(mu, None, grad, *coefficients, *noise, form="error"),
        step(mu, torch.zeros_like(d), grad, *coefficients, *noise, form="error"),
    ):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_energy_is_positive(family, size, dtype):
    mu, d, _, noise, pi, *_ = problem(family, (64, 33), 64, size, dtype)
    forward, _ = functions(family)
    rounding = 33 * torch.finfo(dtype).eps * size
    for form, state in zip(FORMS, (d, mu + d)):
        energy = forward(mu, state, pi, *noise, form=form)[1]
        assert (energy >= -rounding).all()
        assert energy.sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_at_the_prediction(family):
    """At u = mu the energy is 0, and so is what the node sends down of itself."""
    mu, _, grad, noise, *coefficients = problem(family, (6, 5), 3, dtype=torch.float32)
    forward, step = functions(family)
    assert (forward(mu, mu.clone(), coefficients[0], *noise, form="state")[1].abs() < 1e-6).all()
    _, grad_mu = step(mu, mu.clone(), grad, *coefficients, *noise, form="state")
    assert (grad_mu == 0).all()
    kept, _ = step(mu, mu.clone(), torch.zeros_like(grad), *coefficients, *noise, form="state")
    assert torch.equal(kept, mu)


def test_logits_count_up_to_a_shift():
    mu, d, grad, _, pi, keep, move = problem("categorical", (5, 7), 5)
    up = torch.arange(5.0, dtype=torch.float64).view(5, 1)
    plain = reference.categorical_step(mu, mu + d, grad, pi, keep, move, form="state")
    shifted = reference.categorical_step(mu + up, mu + d - 3 * up, grad, pi, keep, move, form="state")
    close(shifted[0].softmax(-1), plain[0].softmax(-1))
    close(shifted[1], plain[1])
    _, energy = reference.categorical_forward(mu, mu + d, pi, form="state")
    close(reference.categorical_forward(mu + up, mu + d - 3 * up, pi, form="state")[1], energy)
    close(
        reference.categorical_step(mu, mu + d, grad + up, pi, keep, move, form="state")[0],
        reference.categorical_step(mu, mu + d, grad, pi, keep, move, form="state")[0],
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["causal and padding", "infinite"])
def test_masked_logits_are_absent(how, form):
    """A masked row behaves as the row without its masked columns, after a step too; a row masked whole gives zeros."""
    mu, d, grad, _, pi, keep, move = problem("categorical", (2, 3, 4, 4), 2)
    padding = torch.tensor([[True, False, False, False], [False, False, False, True]])
    masked = torch.ones(4, 4).triu(1).bool() | padding[:, None, None, :]
    options = {"causal": True, "padding": padding} if how != "infinite" else {}
    if how == "infinite":
        mu = mu.masked_fill(masked, -torch.inf)
    state = d if form == "error" else mu + d
    new, grad_mu = reference.categorical_step(mu, state, grad, pi, keep, move, form=form, moved=True, **options)
    p, energy = reference.categorical_forward(mu, new, pi, form=form, **options)
    for x in (new, grad_mu, energy, p):
        assert not x.isnan().any()
    assert (p[masked.expand_as(p)] == 0).all()
    assert (grad_mu[masked.expand_as(p)] == 0).all()
    assert (p[0, :, 0] == 0).all(), "sample 0 sees no key at its first query"
    close(p.sum(-1)[1], torch.ones(3, 4, dtype=torch.float64))

    query, keys = 2, [1, 2]  # what the third query of sample 0 sees
    one = [x[:1, :1, query, keys] for x in (mu, state, grad)]
    rate = pi[:1], keep[:1], move[:1]
    alone = reference.categorical_step(*one, *rate, form=form, moved=True)
    close(grad_mu[:1, :1, query, keys], alone[1])
    close(p[:1, :1, query, keys], reference.categorical_forward(one[0], alone[0], pi[:1], form=form)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-30, 80.0, 1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_values_stay_finite(family, size, form):
    if family == "gaussian_logvar":
        size = min(size, 20.0)  # a log variance of 80 is a variance of 1e35
    mu, d, grad, noise, *coefficients = problem(family, (4, 6), 4, size, torch.float32)
    forward, step = functions(family)
    if family == "gaussian_logvar":
        d = d / 10
    state = d if form == "error" else mu + d
    results = (
        *step(mu, state, grad, *coefficients, *noise, form=form),
        *forward(mu, state, coefficients[0], *noise, form=form),
    )
    for x in results:
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), size=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99)
)
def test_clamped_categorical_is_cross_entropy(dtype, rows, columns, size, seed):
    """Energy and gradient per row are ``F.cross_entropy``'s, rows of the ignored label 0."""
    g = torch.Generator().manual_seed(seed)
    mu = (size * torch.randn(rows, columns, generator=g, dtype=dtype)).requires_grad_()
    labels = torch.randint(columns, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.3] = -100
    weight = torch.rand(rows, generator=g, dtype=dtype)
    truth = F.cross_entropy(mu, labels, reduction="none")
    (grad,) = torch.autograd.grad(truth, mu, weight)
    energy, lse = reference.clamped_categorical_forward(mu.detach(), labels, -100)
    got = reference.clamped_categorical_backward(mu.detach(), labels, lse, weight, -100)
    tolerance = 8 * torch.finfo(dtype).eps * max(size, 1)
    torch.testing.assert_close(energy, truth.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got, grad, rtol=tolerance, atol=tolerance)
    assert (got[labels == -100] == 0).all()


def test_half_precision_is_computed_in_single():
    """The state stays float32, the emission and dF/dmu have mu's dtype."""
    mu, d, grad, _, *coefficients = (x if isinstance(x, tuple) else x.float() for x in problem("gaussian", (4, 3), 4))
    new, grad_mu = reference.gaussian_step(mu.bfloat16(), mu + d, grad.bfloat16(), *coefficients, form="state")
    assert (new.dtype, grad_mu.dtype) == (torch.float32, torch.bfloat16)
    emission, energy = reference.gaussian_forward(mu.bfloat16(), mu + d, coefficients[0], form="state")
    assert (emission.dtype, energy.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.2, 0.4, 1.0, 10.0])
@pytest.mark.parametrize("form", ["error", "state"])
@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_small_energies(family, form, size):
    """Where d is small its energy is of second order in d, and float32 still has its digits; it is never negative."""
    torch.manual_seed(0)
    mu, d = 3 * torch.randn(16, 20), size * torch.randn(16, 20)
    forward = getattr(reference, f"{family}_forward")
    state = d if form == "error" else mu + d
    _, energy = forward(mu, state, torch.ones(16), form=form)
    exact = d.double() if form == "error" else state.double() - mu.double()  # what is left of d in mu + d
    _, truth = forward(mu.double(), exact, torch.ones(16, dtype=torch.float64), form="error")
    assert (energy >= 0).all()
    rounding = 5e-14 if family == "categorical" else 0  # the square of what rounds log sum q e^d
    torch.testing.assert_close(energy.double(), truth, rtol=2e-4, atol=rounding)
    second = torch.func.hessian(lambda u: getattr(reference, f"{family}_energy")(u, mu[0].double()).sum())
    curvature = second(mu[0].double())
    if size <= 1e-4:
        quadratic = 0.5 * exact[0] @ curvature @ exact[0]
        torch.testing.assert_close(truth[0], quadratic, rtol=10 * size, atol=0)


def test_energies_of_extreme_variances():
    """A log variance below that of float32's smallest number: no NaN where u = mu, and none beside it."""
    mu = torch.tensor([[1.0, 2.0, -90.0, -200.0]], requires_grad=True)
    energy = reference.gaussian_logvar_energy(mu.detach(), mu)
    assert (energy == 0).all()
    assert torch.autograd.grad(energy.sum(), mu)[0].isfinite().all()
    for form in ("error", "state"):
        state = torch.zeros(1, 4) if form == "error" else mu.detach().clone()
        options = {"form": form, "keep": torch.ones(1), "move": torch.ones(1)}
        noise, grad = torch.zeros(1, 2), torch.zeros(1, 2)
        for t in reference.gaussian_logvar_step(mu.detach(), state, grad, torch.ones(1), noise=noise, **options):
            assert t.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e4])
def test_softmax_far_from_zero(shift, dtype):
    """Rows sum to 1 but for the rounding of each weight; what the logits are shifted by does not matter."""
    torch.manual_seed(0)
    u = (torch.randn(8, 1000) + shift).to(dtype)
    p = pc.Categorical().emission(u)
    assert p.dtype == dtype
    truth = torch.softmax(u.double(), -1)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 32 * torch.finfo(dtype).eps  # e^(log p), log p to -16
    assert ((p.double() - truth).abs() <= eps * truth + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("size", [1e8, 1e15, 1e30])
@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_huge_states_are_finite(family, size):
    """As a saturated node's may become, whose precision is next to nothing."""
    torch.manual_seed(0)
    mu, d = 50 * torch.randn(16, 20), size * torch.randn(16, 20)
    emission, energy = getattr(reference, f"{family}_forward")(mu, d, torch.full((16,), 1e-12), form="error")
    assert emission.isfinite().all()
    assert energy.isfinite().all()
    assert (energy >= 0).all()
