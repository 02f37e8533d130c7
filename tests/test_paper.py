"""The experiments of bench/paper.py in their smoke runs: tables, figure, and no run made twice."""

from __future__ import annotations

import gzip
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from pc_triton.text import InputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
images, paper_toy, paper_vae, paper_beyond, paper_backwards, runs = (
    pytest.importorskip(name)
    for name in ("images", "paper_toy", "paper_vae", "paper_beyond", "paper_backwards", "runs")
)  # the scripts want scikit-learn, matplotlib and tqdm


@pytest.mark.parametrize(
    "experiment", [paper_toy, paper_vae, paper_beyond, paper_backwards], ids=lambda module: module.__name__
)
def test_quick_run_and_resume(experiment, tmp_path, monkeypatch):
    """The tables hold every method; the second call makes no run and gives the same tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of a pool
    out = tmp_path / "out.json"
    with torch.random.fork_rng():
        first = experiment.reproduce(None, True, out, 0)
        records = json.loads(out.read_text())["runs"]
        monkeypatch.setattr(experiment, "run", lambda *_, **__: pytest.fail("a run was made again"))
        assert experiment.reproduce(None, True, out, 0) == first
    torch.set_num_threads(threads)
    assert json.loads(out.read_text())["runs"] == records
    assert out.with_suffix(".png").stat().st_size > 10_000
    for record in records:
        assert record["score"] < runs.DIVERGED
        assert record["commit"]
        settings = record["settings"]
        learns_by_pc = not (settings.get("method") or settings["learning"]).startswith("bp")
        t1 = settings.get("inference", {}).get("steps") == 1
        assert ("settled" in record) == (learns_by_pc and not settings["tuning"]) or t1
    assert "| bp" in first
    assert "| pc" in first
    assert "**Tuning**" in first


@pytest.mark.parametrize(
    ("experiment", "data"),
    [(e, d) for e in (paper_toy, paper_vae) for d in ("mnist", "fashion")]
    + [(paper_beyond, "fashion"), (paper_backwards, "fashion")],
    ids=lambda of: getattr(of, "__name__", of),
)
def test_tables_of_the_documentation_are_the_files(experiment, data, monkeypatch):
    """A table in docs/experiments.md is what the results file gives, and every run behind it is there."""
    monkeypatch.setattr(experiment, "images", lambda _: images.Images(*torch.zeros(4, 1)))
    monkeypatch.setattr(experiment, "plot", lambda *_: None)
    monkeypatch.setattr(experiment, "run", lambda *_, **__: pytest.fail("a run is missing"))
    out = ROOT / "bench" / "results" / f"paper_{experiment.__name__.removeprefix('paper_')}_{data}.json"
    tables = experiment.reproduce(Path(data), False, out, 0).split("\n\n")
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert not [table for table in tables if table not in text]
    assert not [r for r in json.loads(out.read_text())["runs"] if r["commit"].endswith("-dirty")]


def test_images_from_idx_files(tmp_path):
    """Pixels and labels of gzipped idx files; a part held out for tuning; a file that is missing has a clear error."""
    with pytest.raises(InputError, match="no such file"):
        images.images(tmp_path)
    for part, count in (("train", 6), ("t10k", 2)):
        pixels = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 2, 2)) + bytes(range(4 * count))
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(range(count))
        for kind, raw in (("images-idx3", pixels), ("labels-idx1", labels)):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(raw))
    found = images.images(tmp_path)
    assert found.x.shape == (6, 4)
    torch.testing.assert_close(found.x[1], torch.arange(4, 8) / 255)
    assert found.y.tolist() == [0, 1, 2, 3, 4, 5]
    tuning = images.images(tmp_path, tuning=True)
    assert tuning.y.tolist() == [0, 1, 2, 3, 4]
    assert tuning.test_y.tolist() == [5]


def test_divergence_is_recorded():
    """A run whose loss is no number says so, and counts as the worst."""
    settings = {"task": "softmax output", "energies": "generalised", "learning": "bp", "training_steps": 30}
    record = partial(paper_toy.run, data=None)(settings | {"lr": float("inf"), "seed": 0, "tuning": False})
    assert "diverged" in record
    assert runs.score(record) == runs.DIVERGED
    assert runs.spread([record]) == "diverged"


@pytest.mark.parametrize(
    ("name", "rows"),
    [(name, ("| bp", "| pc")) for name in ("paper_early", "paper_depth", "paper_displacement")]
    + [("paper_states", ("| float32", "| bfloat16")), ("paper_float8", ("| float32", "| float8_e4m3fn"))],
)
def test_language_models(name, rows, tmp_path, monkeypatch):
    """As `test_quick_run_and_resume`, on a short text."""
    paper_lm, experiment = pytest.importorskip("paper_lm"), pytest.importorskip(name)
    text = " ".join(f"{a}{b} of {b}{a}" for a in ("fox", "dog", "owl") for b in map(str, range(100))) * 3
    for module in (paper_lm, experiment):
        monkeypatch.setattr(module, "texts", lambda data, tuning: (text, text[:3000]), raising=False)
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 3)
    out = tmp_path / "out.json"
    with torch.random.fork_rng():
        first = experiment.reproduce(None, True, out, 0)
        monkeypatch.setattr(experiment, "run", lambda *_, **__: pytest.fail("a run was made again"))
        assert experiment.reproduce(None, True, out, 0) == first
    records = json.loads(out.read_text())["runs"]
    assert all(1 < record["score"] < runs.DIVERGED for record in records)
    assert all(row in first for row in (*rows, "settled"))
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_texts_of_a_folder(tmp_path):
    """WikiText's three parts, or LM1B's shards, whose validation text is a part of the training text."""
    paper_lm = pytest.importorskip("paper_lm")
    with pytest.raises(InputError, match=r"it needs train\.txt"):
        paper_lm.texts(tmp_path, tuning=False)
    for shard in ("heldout-1.txt", "heldout-2.txt", "news.en.heldout-0"):
        (tmp_path / shard).write_text(f"a sentence of {shard}\n" * 50)
    training, test = paper_lm.texts(tmp_path, tuning=False)
    assert "heldout-1" in training
    assert "heldout-2" in training
    assert "news.en" in test
    part, valid = paper_lm.texts(tmp_path, tuning=True)
    assert sorted(part + valid) == sorted(training)
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert paper_lm.texts(tmp_path, tuning=False) == ("train", "test")
    assert paper_lm.texts(tmp_path, tuning=True) == ("train", "valid")


def test_language_models_of_the_documentation_are_the_files():
    paper_lm = pytest.importorskip("paper_lm")
    records = runs.load(ROOT / "bench" / "results" / "paper_lm_lm1b.json")["runs"]
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert paper_lm.table(paper_lm.finished(records)) in text
    assert paper_lm.tuning_table(records) in text
    assert not [record for record in records if record["commit"].endswith("-dirty")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("paper_early", None),
        ("paper_depth", "wikitext-2"),
        ("paper_displacement", None),
        ("paper_states", None),
        ("paper_float8", None),
    ],
)
def test_what_deep_pc_does_in_the_documentation_is_the_files(name, data, monkeypatch):
    experiment = pytest.importorskip(name)
    monkeypatch.setattr(experiment, "plot", lambda *_: None)
    monkeypatch.setattr(experiment, "run", lambda *_, **__: pytest.fail("a run is missing"))
    out = ROOT / "bench" / "results" / f"{name}_{data or 'default'}.json"
    tables = experiment.reproduce(data and Path(data), False, out, 0).split("\n\n")
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert not [table for table in tables if table not in text]
    assert not [r for r in json.loads(out.read_text())["runs"] if r["commit"].endswith("-dirty")]


def test_an_experiment_in_8_bits_makes_products_of_8_bits(monkeypatch):
    """The free energy of its runs has that dtype."""
    paper_float8, build = pytest.importorskip("paper_float8"), pytest.importorskip("pc_triton.build")
    seen = []

    def lm(options, data):
        settings = build.Settings(width=16, heads=2, blocks=1, vocabulary=300, **options)
        seen.append(build.build(settings)[1].inference_dtype)
        return {}

    monkeypatch.setattr(paper_float8.paper_lm, "run", lm)
    for kind in paper_float8.KINDS:
        paper_float8.run({"inference_dtype": kind}, None)
    assert seen == [None, torch.float8_e4m3fn]
