"""``bench/suite.py``: a quick grid, that it goes on where it was, its statistics and counts, and the page it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pc_triton as pc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
suite, suite_stability, runs = (pytest.importorskip(name) for name in ("suite", "suite_stability", "runs"))
stats = pytest.importorskip("scipy.stats")


@pytest.fixture(autouse=True)
def own_random_numbers(monkeypatch):
    """On one thread, as the suite's command sets it, with short long runs in the reports."""
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def options(out: Path, **given) -> object:
    kept = {"tasks": ["mlp-fashion"], "methods": ["bp", "pc"], "seeds": 1} | given
    return suite.Options(data=None, device="cpu", quick=True, jobs=0, out=out, **kept)


def test_quick(tmp_path, monkeypatch):
    """Every method on three tasks: scores, costs, regime and figures; a second call makes no run."""
    asked = options(tmp_path / "out.json", tasks=["mlp-fashion", "memory", "conv-fashion"], methods=list(suite.METHODS))
    suite.grid(asked)
    suite.stability(asked)
    shown = suite.parts(asked.out)
    records = runs.load(asked.out)["runs"]
    assert all(record["commit"] for record in records)
    monkeypatch.setattr(suite, "run", lambda *_, **__: pytest.fail("a run was made again"))
    monkeypatch.setattr(suite_stability, "run", lambda *_, **__: pytest.fail("a run was made again"))
    suite.grid(asked)
    suite.stability(asked)
    assert suite.parts(asked.out) == shown
    assert runs.load(asked.out)["runs"] == records
    for task in asked.tasks:
        found = suite.by_method(records, task)
        assert list(found) == list(suite.METHODS)
        for name, (record,) in found.items():
            assert record["score"] < runs.DIVERGED
            assert ("settled" in record) == (not name.startswith("bp"))
        assert suite.table(records, task) in shown
        assert suite.tuning(records, task) in shown
    assert suite_stability.table(records) in shown
    suite.draw(asked.out)
    for png in (asked.out.with_suffix(".png"), suite.stability_png(asked.out)):
        assert png.stat().st_size > 10_000


def test_killed_it_loses_one_run(tmp_path, monkeypatch):
    """What was finished before is in the file, and is not made again."""
    asked, made, run = options(tmp_path / "out.json"), [], suite.run

    def killed(settings, data):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(settings)
        return run(settings, data)

    monkeypatch.setattr(suite, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        suite.grid(asked)
    assert [record["settings"] for record in runs.load(asked.out)["runs"]] == made
    monkeypatch.setattr(suite, "run", lambda settings, data: made.append(settings) or run(settings, data))
    suite.grid(asked)
    assert len(made) == len({repr(settings) for settings in made}) == 5  # the cost, two trials, two runs


def test_every_method_has_the_same_trials():
    assert {len(suite.choices(method)) for method in suite.METHODS.values()} == {4}
    assert all({key for choice in m.own for key in choice} <= {"step", "output_weight"} for m in suite.METHODS.values())


def test_tuning_sees_no_image_that_is_measured_on():
    """Of a memory: none that it stores in the end."""
    for name, task in suite.TASKS.items():
        settings = suite.base(name, options(Path("out.json")))
        tried, final = (suite.find(task, settings | {"tuning": tuning}, None) for tuning in (True, False))
        rows = {tuple(x.tolist()) for x in final.test_x}
        assert not [x for x in (*tried.x, *tried.test_x) if tuple(x.tolist()) in rows]


def records(scores, first=0):
    found = []
    for seed, value in enumerate(scores, first):
        record = {"settings": {"seed": seed}, "score": value}
        if value == runs.DIVERGED:
            record = {"settings": {"seed": seed}, "diverged": "it did"}
        found.append(record)
    return found


def test_the_difference_is_paired_and_has_student_s_interval():
    a, b = [3.0, 1.0, 4.0, 1.5], [2.0, 0.5, 2.5, 1.75]
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    middle, half, seeds = suite.paired(records(a), records(b))
    assert seeds == 4
    assert (middle - half, middle + half) == pytest.approx(interval)
    assert suite.paired(records(a[1:], 1), records(b)) == suite.paired(records(a[1:]), records(b[1:]))
    assert suite.minus(records(a[:1]), records(b)) == "+1.00"
    assert suite.minus(records([*a[:3], runs.DIVERGED]), records(b)) == ""


def test_products_are_those_of_the_passes():
    """64-4-4-10: backpropagation makes three products a layer, but none of the input's gradient; T = 2 five."""
    settings = suite.base("mlp-fashion", options(Path("out.json"))) | {"seed": 0, "tuning": False, "turns": 2}
    costs = suite.run(settings, None)["costs"]
    first, whole = 64 * 4, 64 * 4 + 4 * 4 + 4 * 10
    assert costs["pc"]["products"] == pytest.approx((5 * whole - 2 * first) / (3 * whole - first))
    assert costs["bp"] == {"products": 1.0, "time": 1.0, "quartiles": [1.0, 1.0]}


@pytest.mark.parametrize("name", ["nudging, positive", "nudging, centred"])
def test_a_nudged_step_is_near_backpropagation_s(name, monkeypatch):
    """At a small weight and in settled states; the centred one to second order."""
    settings = suite.base("mlp-fashion", options(Path("out.json"))) | {"seed": 0, "tuning": False, "lr": 0.0}
    x, y = torch.rand(32, 64), torch.randint(10, (32,))
    gradients = {}
    for method, weight in (("bp", 0.0), (name, 0.01)):
        network = suite.build(settings | {"method": method, "output_weight": weight}, 64)
        if network.free_energy is not None:
            network.free_energy.steps = 60
        suite.METHODS[method].learn(network, x, y)
        gradients[method] = torch.cat([p.grad.flatten() for p in network.model.parameters()])
        assert network.free_energy is None or network.free_energy.output_weight == weight
    error = (gradients[name] - gradients["bp"]).norm() / gradients["bp"].norm()
    assert error < (0.02 if name == "nudging, positive" else 0.001)


def test_curvature_is_the_hessian_s_largest_eigenvalue():
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 4), nn.ReLU(), pc.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(3, 5), torch.rand(3, 3)
    first, second, last = (model[number] for number in (0, 2, 4))

    def energy(errors, x, y):
        h = first(x) + errors[:4]
        h = second(h.relu()) + errors[4:]
        return 0.5 * (last(h.relu()) - y).square().sum()

    found = suite_stability.curvature(model, pc.Gaussian(1.0), x, y)
    for value, a, b in zip(found, x, y):
        hessian = torch.autograd.functional.hessian(lambda e, a=a, b=b: energy(e, a, b), torch.zeros(8))
        assert value.item() == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=1e-3)


def test_the_page_is_the_file():
    """Versions, tables and links of docs/benchmark.md, and every run of a commit."""
    out = ROOT / "bench" / "results" / "suite.json"
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert page.count(suite.BEGIN) == page.count(suite.END) == 1
    between = page.partition(suite.BEGIN)[2].partition(suite.END)[0]
    assert between.strip() == suite.parts(out).strip()
    assert not [record for record in runs.load(out)["runs"] if record["commit"].endswith("-dirty")]
