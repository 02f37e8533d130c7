"""The bets of bench/bets.py in their smoke runs, what is computed from trials, and the page's tables."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
names = ("training", "tuning", "displacement", "large_batch", "online", "few_images")
runs, training, tuning, displacement, large_batch, online, few_images = (
    pytest.importorskip(name) for name in ("runs", *(f"bets_{name}" for name in names))
)  # the scripts want scikit-learn, matplotlib and tqdm
BETS = (tuning, displacement, large_batch, online, few_images)


@pytest.mark.parametrize("bet", BETS, ids=lambda module: module.__name__)
def test_quick_run_and_resume(bet, tmp_path, monkeypatch):
    """The tables hold every method; the second call makes no run and gives the same tables."""
    text = online.read_text()[:60_000]
    for module in (training, online):
        monkeypatch.setattr(module, "read_text", lambda path=None: text)
    caches = (training.default_tokens, online.texts, online.pretrained)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of a pool
    out = tmp_path / "out.json"
    with torch.random.fork_rng():
        first = bet.reproduce(None, True, out, 0)
        records = json.loads(out.read_text())["runs"]
        monkeypatch.setattr(bet, "run", lambda *_, **__: pytest.fail("a run was made again"))
        assert bet.reproduce(None, True, out, 0) == first
    torch.set_num_threads(threads)
    for cached in caches:
        cached.cache_clear()
    assert json.loads(out.read_text())["runs"] == records
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert all(runs.score(record) < runs.DIVERGED and record["commit"] for record in records)
    assert {"bp", "pc"} <= {record["settings"]["method"] for record in records}


def test_products_are_equal():
    """BP has 5/3 of PC's steps, or of its batch, and nothing is rounded."""
    assert training.steps(240, "pc 0.1") == 240
    for count in (tuning.IMAGE_STEPS, *tuning.STEPS.values(), displacement.STEPS):
        assert training.steps(count, "bp") * 3 == count * 5
    assert all(size * training.BP_STEPS[0] % training.BP_STEPS[1] == 0 for size in large_batch.BATCHES)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_best_of_k_is_the_mean_over_all_choices_of_k(k):
    """Of each choice of k trials the test score of the one with the lowest validation score; a guess if it diverged."""
    generator = torch.Generator().manual_seed(0)
    records = [{"valid": v, "score": s, "guess": 2.0} for v, s in torch.rand(5, 2, generator=generator).tolist()]
    records.append({"diverged": "at once", "guess": 2.0})

    def chosen(some):
        return min(some, key=lambda r: r.get("valid", runs.DIVERGED)).get("score", 2.0)

    expected = mean(map(chosen, itertools.combinations(records, k)))
    assert tuning.best_of(records, k) == pytest.approx(expected)
    if k == 1:
        assert tuning.best_of(records[-1:], 1) == 2.0


def test_trials_draw_the_same_for_every_method():
    wanted = tuning.wanted(False)
    keys = [{k: v for k, v in s.items() if k not in ("method", "steps")} for s in wanted]
    assert all(keys.count(key) == len(training.METHODS) for key in keys[:: len(training.METHODS)])
    careful = [s for s in wanted if s["task"] == "careful"]
    assert careful
    assert all(s["gain"] == 1 and s["clip"] == 1 and s["warmup"] == 0.2 for s in careful)


def test_rank_correlation():
    """1 for any rising pairs, -1 for falling ones; ties share their rank."""
    assert displacement.correlation([(1, 0.1), (2, 10.0), (5, 11.0)]) == pytest.approx(1)
    assert displacement.correlation([(1, 3.0), (2, 2.0), (5, 1.0)]) == pytest.approx(-1)
    assert displacement.ranks([3.0, 1.0, 3.0]) == [1.5, 0.0, 1.5]


def test_curvature_is_the_largest_eigenvalue():
    """That of the whole Hessian in the errors of one sample, in units of the nodes and of the precision."""
    torch.manual_seed(0)
    model = training.Deep(5, 3, 2, 1.0).double()
    x, y = torch.randn(1, 5, dtype=torch.double), torch.tensor([4])
    found = displacement.curvature(model, x, y)
    layers = list(model.layers)
    seen = {}
    with torch.no_grad(), displacement.displaced(layers, lambda number, out: seen.setdefault(number, out)):
        model(x)
    units = [out.square().mean().sqrt() for out in seen.values()]

    def loss(e):
        with displacement.displaced(layers, lambda n, out: out + units[n] * e[3 * n : 3 * n + 3]):
            return F.cross_entropy(model(x), y)

    e = torch.zeros(6, dtype=torch.double, requires_grad=True)
    squared = torch.autograd.grad(loss(e), e)[0].view(2, 3).square().sum(1)
    pi = (2 * squared / (2 * displacement.DEFAULT * loss(e).detach())).repeat_interleave(3)
    hessian = torch.autograd.functional.hessian(loss, e) / (pi.sqrt()[:, None] * pi.sqrt())
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert found["curvature"] == pytest.approx(float(max(eigenvalues, key=abs)), rel=0.1)
    assert found["gradient ratio"] == pytest.approx(float((squared[0] / squared[1]).sqrt()), rel=1e-6)


def test_the_rules_move_the_displacement():
    """Annealed ends at the default; step 0.5 goes up where the learnt step is larger, down where it is smaller."""
    free_energy = training.free_energy(training.Deep(5, 3, 2, 1.0), "pc")
    displacement.follow("annealed", free_energy, 10)(10)
    assert free_energy.displacement == pytest.approx(0.003)
    after = displacement.follow("step 0.5", free_energy, 10)
    for step, factor in ((0.9, 1.1), (0.2, 1 / 1.1)):
        before = free_energy.displacement
        free_energy.tracker.mean.fill_(step)
        after(1)
        assert free_energy.displacement == pytest.approx(before * factor)


def test_the_largest_settled_displacement(monkeypatch):
    """The first from above whose report says so; the default where none does."""

    def settles_below(limit):
        class Fake:
            def __init__(self, model, displacement):
                self.settled = float(displacement <= limit)

            def report(self, x, y):
                return self

        return Fake

    for limit, expected in ((1.0, 0.3), (0.05, 0.03), (0.002, 0.003)):
        monkeypatch.setattr(displacement.pc, "FreeEnergy", settles_below(limit))
        assert displacement.largest_settled(None, None, None) == expected


@pytest.mark.parametrize("bet", BETS, ids=lambda module: module.__name__)
def test_tables_of_the_page_are_the_files(bet, monkeypatch):
    """A table in docs/bets.md is what the results file gives, and every run behind it is there; or it says so."""
    text = (ROOT / "docs" / "bets.md").read_text(encoding="utf-8")
    out = ROOT / "bench" / "results" / f"{bet.__name__}.json"
    if not out.exists():
        assert f"`{bet.__name__.removeprefix('bets_')}` was not run yet" in text
        return
    monkeypatch.setattr(bet, "plot", lambda *_: None)
    monkeypatch.setattr(bet, "run", lambda *_, **__: pytest.fail("a run is missing"))
    tables = bet.reproduce(Path("data"), False, out, 0).split("\n\n")
    assert not [table for table in tables if table not in text]
    assert not [r for r in json.loads(out.read_text())["runs"] if r["commit"].endswith("-dirty")]


def test_a_refined_posterior_is_that_of_adam_by_hand(monkeypatch):
    """One inner step from q: Adam's first is the rate times the sign of the gradient; no weight gets a gradient."""
    torch.manual_seed(0)
    model, x = few_images.VAE(9, 7), torch.rand(5, 9)
    q = model.encoder(x).detach()
    torch.manual_seed(1)
    noise = torch.randn(5, few_images.LATENT)
    (grad,) = torch.autograd.grad(few_images.elbo_at(model, q.requires_grad_(), x, noise).sum(), [q])
    monkeypatch.setattr(few_images, "INNER", 1)
    torch.manual_seed(1)
    found = few_images.refined(model, q, x)
    torch.testing.assert_close(found, q.detach() - few_images.INNER_RATE * grad.sign(), rtol=0, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_the_elbo_at_a_posterior_is_the_encoders_at_its_own():
    torch.manual_seed(0)
    model, x = few_images.VAE(9, 7), torch.rand(5, 9)
    torch.manual_seed(1)
    wanted = sum(few_images.negative_elbo(model, few_images.OUTPUT, x))
    torch.manual_seed(1)
    found = few_images.elbo_at(model, model.encoder(x), x, torch.randn(5, few_images.LATENT))
    torch.testing.assert_close(found, wanted)
