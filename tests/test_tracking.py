"""The tracked step: the best one for the only move of T = 2, learnt in training alone, kept by checkpoints."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

import pc_triton as pc
from pc_triton.rules import Guarded
from pc_triton.tracking import NEWEST, Tracked


def network(gain: float = 1.0, layers: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [module for width in [5, *[16] * (layers - 1)] for module in (pc.Linear(width, 16), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    return model


def batch(seed: int = 1, samples: int = 12, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=g).to(dtype), torch.randint(4, (samples,), generator=g)


def free_energies(model: nn.Module, steps: torch.Tensor) -> torch.Tensor:
    """F of a batch, summed, after one first move by each of these steps."""
    losses = [pc.FreeEnergy(model, steps=2, step=float(step))(*batch()).detach() for step in steps]
    return torch.stack(losses)


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_the_best_step(gain):
    """Tracked on one batch again and again it is where F is smallest along the move."""
    model = network(gain)
    free_energy = pc.FreeEnergy(model)
    for _ in range(100):
        free_energy(*batch())
    steps = torch.linspace(0.02, 1.0, 50)
    best = steps[free_energies(model, steps).argmin()]
    assert float(free_energy.tracker.mean) == pytest.approx(float(best), abs=0.05)


@pytest.mark.parametrize("family", [pc.Gaussian, pc.Laplace, pc.Bernoulli, pc.Categorical])
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_settled_from_the_first_batch_on(layers, family):
    torch.manual_seed(0)
    hidden = [m for width in [5, *[16] * (layers - 1)] for m in (nn.Linear(width, 16), family(), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 4))
    free_energy = pc.FreeEnergy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert free_energy.report(*batch(dtype=torch.float32)).settled > 0.9
    for step in range(10):
        optimizer.zero_grad()
        free_energy(*batch(step, dtype=torch.float32)).backward()
        optimizer.step()
    report = free_energy.report(*batch(99, dtype=torch.float32))
    assert report.settled > 0.9
    assert report.summary.startswith("Settled.")


def test_what_is_not_settled_is_called_so():
    report = pc.FreeEnergy(network(12.0, layers=6), displacement=0.3).report(*batch())
    assert report.settled < 0.9
    assert report.summary.startswith("Not settled: ")
    assert "a lower displacement" in report.summary


def test_the_running_mean():
    """Each batch moves it by a tenth of the way to the step that would have been its best."""
    free_energy = pc.FreeEnergy(network())
    free_energy(*batch())
    for seed in range(2, 6):
        before = free_energy.tracker.mean.clone()
        once = copy.deepcopy(free_energy)
        once(*batch(seed))
        best = before + (once.tracker.mean - before) / NEWEST
        assert 0 < best <= 1 + 1e-9
        free_energy(*batch(seed))
        assert torch.equal(free_energy.tracker.mean, once.tracker.mean)


def evaluates(free_energy):
    free_energy.eval()
    free_energy(*batch())


def without_gradients(free_energy):
    with torch.no_grad():
        free_energy(*batch())


def in_inference_mode(free_energy):
    with torch.inference_mode():
        free_energy(*batch())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        evaluates,
        without_gradients,
        in_inference_mode,
        lambda free_energy: free_energy.report(*batch()),
        lambda free_energy: free_energy.infer(*batch()),
        lambda free_energy: free_energy.record(*batch()),
    ],
)
def test_only_training_learns_it(use, begun):
    free_energy = pc.FreeEnergy(network())
    if begun:
        free_energy(*batch())
    before = free_energy.tracker.mean.clone()
    use(free_energy)
    assert free_energy.tracker.begun == begun
    torch.testing.assert_close(free_energy.tracker.mean, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"steps": 3}, {"step": 0.25}, {"order": "sweep"}, {"steps": 1}, {"steps": 4}])
def test_where_there_is_none(options):
    free_energy = pc.FreeEnergy(network(), **options)
    free_energy(*batch())
    assert not free_energy.tracker.begun
    assert type(free_energy.rules.step) in (pc.Constant, Guarded)
    assert type(pc.FreeEnergy(network()).rules.step) is Tracked


def test_steps_by_default():
    assert pc.FreeEnergy(network()).steps == 2
    assert all(pc.FreeEnergy(network(), order=order).steps == 3 for order in ("sweep", "simultaneous", "incremental"))


def test_checkpoints():
    """They keep it; one from before there was any begins without, also under strict loading."""
    free_energy = pc.FreeEnergy(network())
    free_energy(*batch())
    saved = {name: t.clone() for name, t in free_energy.state_dict().items()}
    other = pc.FreeEnergy(network())
    other.load_state_dict(saved)
    assert torch.equal(other(*batch(5)), free_energy(*batch(5)))
    assert torch.equal(other.tracker.mean, free_energy.tracker.mean)
    other.load_state_dict({name: t for name, t in saved.items() if name.startswith("model.")})
    assert not other.tracker.begun
    other.load_state_dict(pc.FreeEnergy(network()).state_dict())
    assert not other.tracker.begun
    assert "tracker.mean" in saved
    assert len(saved) == len(network().state_dict()) + 1


def test_micro_batches_are_one_batch():
    whole, parts = (pc.FreeEnergy(network()) for _ in range(2))
    for seed in range(3):
        x, y = batch(seed)
        whole(x, y)
        with parts.tracker.hold():
            for piece in (slice(0, 5), slice(5, 12)):
                parts(x[piece], y[piece])
        torch.testing.assert_close(parts.tracker.mean, whole.tracker.mean, rtol=1e-6, atol=0)


def test_hold_within_an_error():
    """A batch that is refused leaves what was learnt before it."""
    free_energy = pc.FreeEnergy(network())
    free_energy(*batch())
    with pytest.raises(ValueError, match="NaN"), free_energy.tracker.hold():
        free_energy(torch.full((2, 5), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    assert 0 < free_energy.tracker.mean <= 1
    assert not free_energy.tracker.holds


def test_where_nothing_moves():
    """The output does not depend on the node: there is no slope, and the first step stays."""

    class Passed(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = pc.Linear(5, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.out(x) + 0.0 * self.hidden(x).sum(1, keepdim=True)

    model = Passed()
    free_energy = pc.FreeEnergy(model)
    for _ in range(3):
        loss = free_energy(*batch(dtype=torch.float32))
        torch.testing.assert_close(loss, nn.functional.cross_entropy(model(batch()[0].float()), batch()[1]))
    assert not free_energy.tracker.begun


def test_within_bfloat16():
    """F is too coarse there: the step is Newton's, and inference settles as in float32."""
    torch.manual_seed(0)
    hidden = [pc.Linear(64, 256), nn.Tanh(), pc.Linear(256, 256), nn.Tanh()]
    free_energy = pc.FreeEnergy(nn.Sequential(*hidden, nn.Linear(256, 10)))
    x, y = torch.randn(256, 64), torch.randint(10, (256,))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss, inferred = free_energy.loss_and_batch(x, y, tracks=True)
    assert float(free_energy.tracker.mean) == 1.0
    plain = pc.FreeEnergy(free_energy.model, step=1.0).loss_and_batch(x, y)[1]
    for a, b in zip(inferred.nodes, plain.nodes):
        if b.state is not None:
            assert (a.state - b.state).norm() < 0.05 * b.state.norm()
    torch.testing.assert_close(loss, pc.FreeEnergy(free_energy.model)(x, y), rtol=0.01, atol=0)


def test_a_first_batch_that_moves_nothing():
    """Without a target there is no slope: the batch after it is the first."""
    free_energy, fresh = (pc.FreeEnergy(network()) for _ in range(2))
    free_energy(batch()[0])
    assert not free_energy.tracker.begun
    assert torch.equal(free_energy(*batch()), fresh(*batch()))


def test_a_free_energy_that_overflows_shortens_the_step():
    class Exp(nn.Module):
        def forward(self, x):
            return x.exp()

    torch.manual_seed(0)
    free_energy = pc.FreeEnergy(nn.Sequential(pc.Linear(10, 16), Exp(), nn.Linear(16, 3)), precision=1e-3)
    x, y = torch.randn(32, 10), 5 * torch.randn(32, 3)
    for _ in range(40):
        free_energy(x, y)
    assert free_energy.tracker.mean < 0.05
    assert free_energy(x, y).isfinite()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_hold_and_pickle_of_a_compiled_step():
    plain, compiled = (pc.FreeEnergy(network(2.0, dtype=torch.float32)) for _ in range(2))
    compiled.compile(cpp_wrapper=False)
    for seed in range(3):
        for free_energy in (plain, compiled):
            free_energy(*batch(seed, dtype=torch.float32))
            with free_energy.tracker.hold(), free_energy.tracker.hold():
                free_energy(*batch(seed + 10, dtype=torch.float32))
    torch.testing.assert_close(compiled.tracker.mean, plain.tracker.mean, rtol=1e-3, atol=1e-3)
    again = pickle.loads(pickle.dumps(compiled))
    torch.testing.assert_close(again(*batch(dtype=torch.float32)), compiled(*batch(dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float16])
def test_in_half_precision(dtype):
    """The module may be cast whole; the step stays within rounding of that in float32."""
    free_energy, half = (pc.FreeEnergy(network(dtype=torch.float32)) for _ in range(2))
    half.to(dtype)
    for seed in range(20):
        x, y = batch(seed, 64, torch.float32)
        free_energy(x, y)
        loss = half(x.to(dtype), y)
    assert loss.isfinite()
    assert abs(float(half.tracker.mean) - float(free_energy.tracker.mean)) < 0.2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_it_is_the_same():
    """It is an input and an output of the graph, so that a replay moves it."""
    pair = [pc.FreeEnergy(network(2.0, dtype=torch.float32)) for _ in range(2)]
    pair[1].compile(cpp_wrapper=False)
    optimizers = [torch.optim.SGD(free_energy.parameters(), lr=0.2) for free_energy in pair]
    for seed in range(6):
        losses = []
        for free_energy, optimizer in zip(pair, optimizers):
            optimizer.zero_grad()
            loss = free_energy(*batch(seed, dtype=torch.float32))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(free_energy.tracker.mean for free_energy in pair), rtol=1e-3, atol=1e-3)
