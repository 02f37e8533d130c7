"""Families: one defined by its energy alone, the fused ones against it, emissions, clamped outputs, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pc_triton as pc


class Normal(pc.Distribution):
    """A Gaussian of variance 1 by its energy alone."""

    measured = True

    def energy(self, u, mu):
        return (u - mu) ** 2 / 2


class Swish(pc.Distribution):
    """An energy that is not symmetric, and an emission of its own."""

    def energy(self, u, mu):
        return torch.cosh(u - mu) - 1 + mu**2 * (u - mu) ** 2

    def emission(self, u):
        return F.silu(u)


BUILT_IN = [pc.Gaussian(), pc.Gaussian(0.3), pc.GaussianLogVar(), pc.Bernoulli(), pc.Categorical()]
FUSED = [*BUILT_IN, pc.Laplace(), pc.StudentT(), pc.StudentT(1.0)]
FAMILIES = [*FUSED, Normal(), Swish()]
EPS32, EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def network(first, second, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), first, nn.Tanh(), nn.Linear(8, 8), second, nn.Linear(8, 4)).to(dtype)


def batch(seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=g).to(dtype), torch.randint(4, (6,), generator=g)


def states_and_gradients(model, order, precision, **options):
    free_energy = pc.FreeEnergy(model, order=order, precision=precision, steps=4, **options)
    x, y = batch(dtype=next(model.parameters()).dtype)
    settled = free_energy.infer(x, y)
    model.zero_grad()
    free_energy(x, y).backward()
    return [*settled.states.values(), settled.free_energy, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("precision", ["auto", 2.0])
@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
def test_a_family_by_its_energy_is_the_fused_one(order, precision):
    """The same states, free energies and gradients as `Gaussian`."""
    torch.manual_seed(0)
    theirs = states_and_gradients(network(pc.Gaussian(), pc.Gaussian(), dtype=torch.float64), order, precision)
    ours = states_and_gradients(network(Normal(), Normal(), dtype=torch.float64), order, precision)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # step and precision are kept in float32


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
@pytest.mark.parametrize("make", [pc.Laplace, pc.StudentT, Normal, Swish])
def test_a_family_by_its_energy_trains(make, order):
    """F falls in inference, and the loss in training."""
    model = network(make(), make())
    x, y = batch()
    report = pc.FreeEnergy(model, order=order, steps=5).report(x, y)
    assert report.free_energies[-1] < report.free_energies[0]
    free_energy = pc.FreeEnergy(model, order=order)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = free_energy(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", [pc.Laplace, Normal, pc.Gaussian])
def test_half_precision_model(make):
    """Every family emits in the model's dtype."""
    model = network(make(), make()).bfloat16()
    x, y = batch()
    pc.FreeEnergy(model, order="sweep")(x.bfloat16(), y).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FUSED, ids=repr)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 7),
    form=st.sampled_from(["error", "state"]),
    moved=st.booleans(),
    learn=st.booleans(),
)
def test_fused_steps_are_the_generic_ones(family, samples, rows, columns, form, moved, learn):
    """Each fused pass against `Distribution`'s, which differentiates energy and emission.

    The move of the generic pass scales by the curvature at the prediction: the fused Bernoulli, Categorical and
    GaussianLogVar by what makes it linear in u - mu, so their moves are compared where the two meet, at u = mu.
    """
    g = torch.Generator().manual_seed(samples + 10 * rows + 100 * columns)
    wide = 2 * columns if isinstance(family, pc.GaussianLogVar) else columns
    mu, d = (torch.randn(samples * rows, wide, generator=g, dtype=torch.float64) for _ in range(2))
    frozen = family.frozen(mu)
    grad = torch.randn(samples * rows, columns, generator=g, dtype=torch.float64)
    pi, keep, move = torch.rand(3, samples, generator=g, dtype=torch.float64) + 0.2
    unit = torch.rand(samples, generator=g, dtype=torch.float64) + 0.5 if family.measured else None
    if learn:
        keep = move = None
    state = d if form == "error" else mu + d

    def both(name, *args, **options):
        fused = getattr(family, name)(*args, **options)
        return zip(fused, getattr(pc.Distribution, name)(family, *args, **options))

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e4 * EPS64, atol=1e4 * EPS64)

    for a, b in both("node_forward", mu, state, pi, unit, form=form, **frozen):
        close(a, b)
    options = {"form": form, "moved": moved, **frozen}
    (new, new_), (down, down_) = both("node_step", mu, state, grad, pi, unit, keep, move, **options)
    curved = isinstance(family, (pc.Bernoulli, pc.Categorical, pc.GaussianLogVar))
    if not curved:
        close(new, new_)
    if not (curved and moved and not learn):
        close(down, down_)
    if not isinstance(family, (pc.Bernoulli, pc.Categorical)):
        found = family.fall(mu, grad, samples, **frozen)
        wanted = pc.Distribution.fall(family, mu, grad, samples, **frozen)
        close(found if family.measured else found[1], wanted if family.measured else wanted[1])


@pytest.mark.parametrize("family", [pc.Bernoulli(), pc.Categorical()], ids=repr)
def test_fall_of_the_curved_families(family):
    """2 pi times the most that the energy's quadratic and the linear term of g allow, here by dense algebra."""
    torch.manual_seed(0)
    mu, grad = torch.randn(2, 3, 5, dtype=torch.float64)
    u = mu.clone().requires_grad_()
    push = torch.autograd.grad(family.emission(u), u, grad)[0]
    hessian = torch.autograd.functional.hessian(lambda v: family.energy(v.view_as(mu), mu).sum(), mu.flatten())
    push = push.flatten()
    per_row = (push * (torch.linalg.pinv(hessian, hermitian=True) @ push)).view(3, 5).sum(1)
    torch.testing.assert_close(family.fall(mu, grad, 3)[1], per_row, rtol=1e-9, atol=1e-12)


def test_units():
    """What an average over a node's states is taken over."""
    mu = torch.zeros(4, 3, 5)
    assert pc.Categorical().variables(mu) == 12
    assert pc.Gaussian().variables(mu) == 60


# Energies.


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_energy_is_a_divergence(family):
    """Positive, and 0 with its gradient at u = mu."""
    torch.manual_seed(0)
    u, mu = 2 * torch.randn(2, 40, 6, dtype=torch.float64)
    at_mu = mu.clone().requires_grad_()
    energy = family.energy(at_mu, mu).sum()
    assert abs(energy) < 1e-12
    assert torch.autograd.grad(energy, at_mu)[0].abs().max() < 1e-12
    assert (family.energy(u, mu).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("family", [pc.Gaussian(0.3), pc.Laplace(), pc.StudentT(2.5)], ids=repr)
def test_variance_is_the_inverse_curvature(family):
    """At u = mu; Laplace and Student-t by the second difference of their energy."""
    mu, h = torch.linspace(-1, 1, 4, dtype=torch.float64), 1e-4
    curvature = (family.energy(mu + h, mu) + family.energy(mu - h, mu)) / h**2
    torch.testing.assert_close(curvature, torch.full_like(mu, 1 / family.variance(mu)), rtol=1e-3, atol=0)


# Emissions.


def test_outside_inference_a_family_is_its_emission():
    u = torch.randn(3, 4, 6)
    assert pc.Gaussian()(u) is u
    assert pc.Laplace()(u) is u
    assert torch.equal(pc.Bernoulli()(u), u.sigmoid())
    torch.testing.assert_close(pc.Categorical()(u), u.softmax(-1))
    assert torch.equal(Swish()(u), F.silu(u))


def test_gaussian_logvar_samples_in_training_and_not_in_evaluation():
    torch.manual_seed(0)
    node, mu = pc.GaussianLogVar(), torch.cat([torch.full((20000, 1), 3.0), torch.full((20000, 1), 2 * 0.7).log()], -1)
    z = node(mu)
    assert z.shape == (20000, 1)
    assert abs(z.mean() - 3) < 5 * (1.4 / 20000) ** 0.5
    assert abs(z.var() / 1.4 - 1) < 0.05
    assert torch.equal(node.eval()(mu), mu[:, :1])


# Outputs.


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_clamped_to_labels(ignore_index):
    """The energy per sample, its gradient and the number of labels are those of cross-entropy."""
    torch.manual_seed(0)
    mu, y = torch.randn(5, 7, 3, requires_grad=True), torch.randint(3, (5, 7))
    y[0, :4] = ignore_index
    family = pc.Categorical(ignore_index)
    energy, items = family.clamped(mu, y), family.check_target(y, mu)
    truth = F.cross_entropy(mu.transpose(1, 2), y, ignore_index=ignore_index, reduction="none").sum(1)
    torch.testing.assert_close(energy, truth)
    assert items == (y != ignore_index).sum()
    weight = torch.rand(5)
    for a, b in zip(torch.autograd.grad(energy, mu, weight), torch.autograd.grad(truth, mu, weight)):
        torch.testing.assert_close(a, b)


def test_labels_ignored_everywhere():
    """Then F is 0, and so is every gradient."""
    model = network(pc.Gaussian(), pc.Gaussian())
    x, _ = batch()
    loss = pc.FreeEnergy(model, steps=3)(x, torch.full((6,), -100))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_clamped_to_probabilities():
    """KL[y || q]: cross-entropy less y's own entropy, 0 where q is y; one-hot rows are labels."""
    torch.manual_seed(0)
    mu = torch.randn(5, 3, requires_grad=True)
    y = torch.randn(5, 3).softmax(-1)
    energy, items = pc.Categorical().clamped(mu, y), pc.Categorical().check_target(y, mu)
    torch.testing.assert_close(energy, F.kl_div(mu.log_softmax(-1), y, reduction="none").sum(1))
    torch.testing.assert_close(torch.autograd.grad(energy.sum(), mu)[0], mu.softmax(-1) - y)
    assert items == 5
    assert (pc.Categorical().clamped(y.log(), y).abs() < 1e-6).all()
    labels = torch.tensor([0, 1, 2, 1, 0])
    hot = pc.Categorical().clamped(mu, F.one_hot(labels, 3).float())
    torch.testing.assert_close(hot, pc.Categorical().clamped(mu, labels))


def test_clamped_bernoulli_is_binary_cross_entropy():
    mu, y = torch.randn(4, 6), torch.rand(4, 6)
    energy = pc.Bernoulli().clamped(mu, y)
    torch.testing.assert_close(energy, F.binary_cross_entropy_with_logits(mu, y, reduction="none").sum(1))


def test_clamped_gaussians():
    m, s, y = torch.randn(3, 4, 6)
    torch.testing.assert_close(pc.Gaussian(0.5).clamped(m, y), ((y - m) ** 2).sum(1))
    energy = pc.GaussianLogVar().clamped(torch.cat([m, s], -1), y)
    torch.testing.assert_close(energy, F.gaussian_nll_loss(m, y, s.exp(), reduction="none").sum(1))


class Huber(pc.Distribution):
    """Written with a loss of torch's own, which wants both its arguments of one dtype."""

    measured = True

    def energy(self, u, mu):
        return F.huber_loss(u, mu, reduction="none")


@pytest.mark.parametrize("order", ["error", "sweep"])
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_a_family_by_its_energy_in_bfloat16(half, order):
    """The states and the arithmetic are float32, as the built-in families'."""
    model = network(Huber(), Huber())
    x, y = batch()
    if half == "weights":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        loss = pc.FreeEnergy(model, order=order, steps=3)(x, y)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def doubled(family, *arguments):
    """A family derived from a built-in one: twice its energy, half its variance."""

    class Doubled(family):
        def energy(self, u, mu):
            return 2 * super().energy(u, mu)

        def variance(self, mu):
            return super().variance(mu) / 2

    return Doubled(*arguments)


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
@pytest.mark.parametrize("family", [(pc.Gaussian,), (pc.Gaussian, 0.3), (pc.Laplace,), (pc.StudentT, 2.0)], ids=str)
def test_a_derived_energy(family, order):
    """At half the precision, twice the energy is the same: its parent's kernels must not compute it."""
    old = network(family[0](*family[1:]), family[0](*family[1:]), dtype=torch.float64)
    new = network(doubled(*family), doubled(*family), dtype=torch.float64)
    for a, b in zip(states_and_gradients(old, order, 2.0), states_and_gradients(new, order, 1.0), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", [pc.Gaussian, pc.Categorical, pc.Bernoulli, pc.Laplace, pc.StudentT])
def test_a_derived_emission(family):
    class Halved(family):
        def emission(self, u, **masks):
            return 0.5 * super().emission(u, **masks)

    model = network(Halved(), Halved())
    x, y = batch()
    settled = pc.FreeEnergy(model, precision=1e9).infer(x, y)  # so stiff that the states stay at their predictions
    torch.testing.assert_close(settled.output, model(x))


def test_mathematics_from_another_base():
    """An energy that comes before the family's in the order of bases; and a step of its own, which stays."""

    class Quartic:
        def energy(self, u, mu):
            return (u - mu) ** 4

    class Mixed(Quartic, pc.Gaussian):
        pass

    class Stepped(pc.Gaussian):
        def energy(self, u, mu):
            return (u - mu) ** 4

        def node_step(self, *arguments, **options):
            return pc.Distribution.node_step(self, *arguments, **options)

    assert Mixed.node_forward is pc.Distribution.node_forward
    assert Stepped.node_forward is pc.Distribution.node_forward
    assert Stepped.node_step is not pc.Distribution.node_step
    assert pc.Gaussian.node_forward is not pc.Distribution.node_forward
    assert type("Plain", (pc.Gaussian,), {}).node_forward is pc.Gaussian.node_forward


def test_attention_by_a_derived_softmax():
    """Neither the fused kernel nor torch's own attention computes it."""

    class Cold(pc.Categorical):
        def emission(self, u, **masks):
            return super().emission(4 * u, **masks)

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    out, _ = pc.nn.attend(Cold(), q, k, v, False, None, None, 0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=2.0))


def test_a_derived_output_behind_a_head():
    """Labels are clamped by its own energy there too."""

    class Smoothed(pc.Categorical):
        def clamped(self, mu, target, mask=None):
            return F.cross_entropy(mu, target, reduction="none", label_smoothing=0.1)

    x, y = batch()
    losses = []
    for head in (nn.Linear, pc.Head):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), pc.Gaussian(), nn.Tanh(), head(8, 4))
        losses.append(pc.FreeEnergy(model, output=Smoothed())(x, y))
    torch.testing.assert_close(*losses)


# Bad arguments.


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_variance(variance):
    with pytest.raises(ValueError, match="positive finite"):
        pc.Gaussian(variance)


@pytest.mark.parametrize("nu", [0.0, -2.0, float("inf"), float("nan")])
def test_bad_degrees_of_freedom(nu):
    with pytest.raises(ValueError, match="positive finite"):
        pc.StudentT(nu)


def test_a_family_without_an_energy():
    class Empty(pc.Distribution):
        pass

    with pytest.raises(NotImplementedError, match="Empty needs an energy"):
        pc.FreeEnergy(network(Empty(), Empty()), order="sweep")(*batch())


def test_odd_columns():
    model = nn.Sequential(nn.Linear(5, 7), pc.GaussianLogVar(), nn.Linear(3, 4))
    x, y = batch()
    for call in (lambda: model(x), lambda: pc.FreeEnergy(model)(x, y)):
        with pytest.raises(ValueError, match="7 columns are an odd number"):
            call()


@pytest.mark.parametrize("output", [pc.Gaussian(), pc.Bernoulli(), pc.Categorical(), pc.Laplace()], ids=repr)
def test_target_of_another_shape(output):
    with pytest.raises(ValueError, match=r"\(6, 3\).*\(6, 4\)"):
        output.check_target(torch.zeros(6, 3), torch.zeros(6, 4))


def test_target_of_another_shape_for_its_own_variance():
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(6, 2\)"):
        pc.GaussianLogVar().check_target(torch.zeros(6, 4), torch.zeros(6, 4))


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_label_out_of_range(label):
    y = torch.tensor([0, 1, 2, label])
    with pytest.raises(ValueError, match=f"label {label} is outside 0 .. 3"):
        pc.Categorical().check_target(y, torch.zeros(4, 4))


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"\(4, 4\) need \(4,\)"):
        pc.Categorical().check_target(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
def test_labels_of_another_dtype(dtype):
    with pytest.raises(ValueError, match="give int64"):
        pc.Categorical().check_target(torch.zeros(4, dtype=dtype), torch.zeros(4, 4))


@pytest.mark.parametrize("value", [-0.5, 1.5])
@pytest.mark.parametrize("output", [pc.Bernoulli(), pc.Categorical()], ids=repr)
def test_probability_out_of_range(output, value):
    with pytest.raises(ValueError, match="outside"):
        output.check_target(torch.full((2, 4), value), torch.zeros(2, 4))


# A prior on a node, and energies of the model's own.


class Autoencoder(nn.Module):
    """A small variational autoencoder; the prior in the node, or by hand as a `pc.add_energy`."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(pc.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.latent = pc.GaussianLogVar(prior=True)
        self.decoder = nn.Sequential(pc.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        return self.decoder(self.latent(self.encoder(x)))


def autoencoder_batch():
    model, x = Autoencoder().double(), torch.rand(6, 5, dtype=torch.float64)
    torch.manual_seed(2)
    return model, x


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_one_step_of_a_node_with_a_prior_is_the_gradient_of_the_elbo():
    """And outside inference the node emits the same sample."""
    model, x = autoencoder_batch()
    ours = pc.FreeEnergy(model, pc.Bernoulli(), steps=1)(x, x)
    torch.manual_seed(2)
    m, s = model.encoder(x).chunk(2, -1)
    z = m + (0.5 * s).exp() * torch.randn_like(m)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(m, (0.5 * s).exp()), torch.distributions.Normal(0, 1)
    )
    theirs = (F.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(1) + kl.sum(1)).mean()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(model, ours), gradients(model, theirs)):
        torch.testing.assert_close(a, b)
    torch.manual_seed(2)
    torch.testing.assert_close(model(x), model.decoder(z))
    assert torch.equal(model.latent.eval()(torch.cat([m, s], -1)), m)


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
def test_every_order_settles_a_node_with_a_prior_where_free_energy_is_lowest(order):
    """F and the latent state of a long run, against L-BFGS on F written out; and the report says settled."""
    model, x = autoencoder_batch()
    settled = pc.FreeEnergy(model, pc.Bernoulli(), order=order, precision=2.0, steps=300).infer(x, x)
    torch.manual_seed(2)
    noise = torch.randn(6, 3, dtype=torch.float64)
    first, last = model.encoder[0], model.decoder[0]
    with torch.no_grad():
        h = F.linear(x, first.weight, first.bias)
        q = model.encoder(x)
        d = F.linear(q[:, :3] + (0.5 * q[:, 3:]).exp() * noise, last.weight, last.bias)
    states = [t.clone().requires_grad_() for t in (h, q, d)]

    def free_energy():
        u, latent, v = states
        mu = model.encoder[2](u.tanh())
        m, s = latent.chunk(2, -1)
        below = F.linear(m + (0.5 * s).exp() * noise, last.weight, last.bias)
        gaussians = ((u - h) ** 2 + (v - below) ** 2).sum(1) / 2
        own, prior = (pc.GaussianLogVar().energy(latent, other).sum(1) for other in (mu, torch.zeros_like(mu)))
        out = F.binary_cross_entropy_with_logits(model.decoder[2](v.tanh()), x, reduction="none").sum(1)
        return 2 * (gaussians + own) + prior + out

    optimizer = torch.optim.LBFGS(states, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = free_energy().sum()
        total.backward()
        return total

    optimizer.step(closure)
    torch.testing.assert_close(settled.free_energy, free_energy().detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(settled.states["latent"][:, 3:], states[1].detach(), rtol=1e-3, atol=1e-3)
    report = pc.FreeEnergy(model, pc.Bernoulli(), order=order, steps=30).report(x, x)
    assert report.settled > 0.9


def test_a_node_with_a_prior_compiles():
    """The same loss and gradients as eager, with the noise held through inference."""
    model, x = Autoencoder(), torch.rand(6, 5)
    results = []
    for compiled in (False, True):
        free_energy = pc.FreeEnergy(model, pc.Bernoulli())
        if compiled:
            free_energy.compile(fallback_random=True)  # torch's own generator, so that both draw the same
        torch.manual_seed(3)
        loss = free_energy(x, x)
        results.append((loss, *gradients(model, loss)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Penalised(nn.Module):
    """A network whose first layer pays for what it emits."""

    def __init__(self, weight, shape=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out, self.weight, self.shape = pc.Linear(5, 8), nn.Linear(8, 4), weight, shape

    def forward(self, x):
        h = self.hidden(x)
        pc.add_energy(self.shape(self.weight * h**2))
        return self.out(h.tanh())


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
def test_an_added_energy_is_lowered_by_inference(order):
    """It counts in F, and moves the states; an energy of weight 0 changes nothing."""
    x, y = batch()
    free, penalised = (pc.FreeEnergy(Penalised(w), order=order, precision=1.0, steps=100).infer(x, y) for w in (0, 2.0))
    plain = pc.FreeEnergy(nn.Sequential(Penalised(0).hidden, nn.Tanh(), Penalised(0).out), order=order, precision=1.0)
    plain.steps = 100
    torch.testing.assert_close(plain.infer(x, y).free_energy, free.free_energy)
    assert (penalised.states["hidden"].norm(dim=1) < free.states["hidden"].norm(dim=1)).all()
    h, mu = penalised.states["hidden"], Penalised(0).hidden(x).detach()
    energy = ((h - mu) ** 2 / 2 + 2 * h**2).sum(1) + F.cross_entropy(penalised.output, y, reduction="none")
    torch.testing.assert_close(penalised.free_energy, energy)


def test_an_added_energy_learns_as_in_backpropagation():
    """One step's gradients; and outside `FreeEnergy` the term is nowhere."""
    model, (x, y) = Penalised(0.3), batch()
    loss = pc.FreeEnergy(model, steps=1)(x, y)
    h = model.hidden(x)
    truth = F.cross_entropy(model(x), y) + 0.3 * (h**2).sum() / 6
    torch.testing.assert_close(loss, truth)
    for a, b in zip(gradients(model, loss), gradients(model, truth)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [lambda e: e.sum(), lambda e: e[:4]])
def test_an_added_energy_without_samples(shape):
    with pytest.raises(ValueError, match="add_energy got shape"):
        pc.FreeEnergy(Penalised(1.0, shape))(*batch())


@pytest.mark.parametrize("prior", [False, True])
def test_a_log_variance_thrown_too_far_comes_back(prior):
    """With a decoder so steep that the first move raises F, at a precision that does not mind it."""
    model, x = autoencoder_batch()
    model.latent, model.decoder[1] = pc.GaussianLogVar(prior=prior), nn.Identity()
    with torch.no_grad():
        model.decoder[0].weight *= 10
    loss, inference = pc.FreeEnergy(model, pc.Bernoulli(), precision=1.0, steps=6).loss_and_batch(x, x)
    first, second, *_, last = inference.energies
    assert (second > 1.5 * first).any()
    assert (last < first).all()
    assert all(g.isfinite().all() for g in gradients(model, loss))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("steps", [3, 8])
def test_samples_whose_first_move_overflows_stay_at_the_prediction(steps, prior, backend):
    """And spoil neither the others nor the weights: e^(s / 2) is infinite where a small precision lets s go."""
    torch.manual_seed(0)
    latent = pc.GaussianLogVar(prior=prior), pc.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12)
    model = nn.Sequential(pc.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), *latent)
    with torch.no_grad():
        model[-1].weight *= 10
    x = torch.rand(16, 12).round()
    with pc.use_backend(backend):
        loss, inference = pc.FreeEnergy(model, pc.Bernoulli(), precision=0.005, steps=steps).loss_and_batch(x, x)
    first, second, *_, last = inference.energies
    lost = ~second.isfinite()
    assert lost.any()
    assert not lost.all()
    torch.testing.assert_close(last[lost], first[lost])
    assert last.isfinite().all()
    assert last[~lost].sum() < second[~lost].sum()
    assert all(g.isfinite().all() for g in gradients(model, loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["error", "state"])
@pytest.mark.parametrize("family", [*FAMILIES, pc.GaussianLogVar(prior=True)], ids=repr)
def test_a_sample_that_is_held_keeps_its_state(family, form, dtype):
    """Bit for bit, even if its gradient and its prediction have overflowed; the others move as beside a finite one."""
    torch.manual_seed(0)
    mu, d = torch.randn(2, 3, 8, dtype=dtype)
    state = d if form == "error" else mu + d
    frozen, one = family.frozen(mu), torch.ones(3, dtype=dtype)
    grad = torch.randn(3, family.emission(mu, **frozen).shape[-1], dtype=dtype)
    unit, keep, move = one if family.measured else None, 0.75 * one, 0.25 * one
    keep[1], move[1] = 1.0, 0.0
    far, steep = mu.clone(), grad.clone()
    for x in (far, steep):
        x[1], x[1, ::3] = torch.inf, torch.nan
    for moved in {False, form == "state"}:
        options = {"form": form, "moved": moved, **frozen}
        truth = family.node_step(mu, state, grad, one, unit, keep, move, **options)
        got = family.node_step(far, state, steep, one, unit, keep, move, **options)
        assert torch.equal(got[0][1], state[1])
        for a, b in zip(got, truth):
            assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("family", [*FAMILIES, pc.GaussianLogVar(prior=True)], ids=repr)
def test_no_keep_and_no_move_lead_back_to_the_prediction(family):
    """From any distance: it is how the guard takes back a first move in error form."""
    torch.manual_seed(0)
    mu, d = torch.randn(2, 3, 8, dtype=torch.float64)
    d *= torch.tensor([1.0, 30.0, 300.0]).unsqueeze(1)
    frozen, zero, one = family.frozen(mu), torch.zeros(3), torch.ones(3)
    grad = torch.randn(3, family.emission(mu, **frozen).shape[-1], dtype=torch.float64)
    unit = one if family.measured else None
    assert not family.node_step(mu, d, grad, one, unit, zero, zero, form="error", **frozen)[0].any()
