"""A report as its reader meets it: numbers for a logger, a table in a notebook, a page in a browser, TensorBoard."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import pc_triton as pc
from pc_triton.report import table

NASTY = "a.<script>alert('1')</script>&\"$x$"
VOID = {"meta", "wbr", "br"}
WIDTHS = 390, 1280
"""Those of a phone and of a desktop."""


class Reader(HTMLParser):
    """What a text of HTML holds. Fails where its tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.cells = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def report(*names, free_energies=(4.0, 3.5, 3.1), **numbers):
    nodes = [pc.NodeReport(name, "Gaussian", 2.0 + k, 0.1 * (k + 1), 0.25 * k) for k, name in enumerate(names)]
    whole = {"long_run": 3.0, "residual": 0.05, "cosine": 0.98, "worst_cosine": 0.9} | numbers
    return pc.Report(tuple(nodes), tuple(free_energies), **whole)


def history(r):
    return [{"step": step, "perplexity": 900 / step, "val/accuracy": 0.5, **r.scalars()} for step in (10, 20, 30)]


def test_scalars():
    """Every number of the report once, for a logger that takes floats by name."""
    r = report("a", "b.attn")
    assert r.scalars() == {
        "free_energy": 3.1,
        "settled": r.settled,
        "explained": r.explained,
        "residual": 0.05,
        "cosine": 0.98,
        "worst_cosine": 0.9,
        "energy/a": 0.1,
        "energy/b.attn": 0.2,
        "residual/a": 0.0,
        "residual/b.attn": 0.25,
        "precision/a": 2.0,
        "precision/b.attn": 3.0,
    }


def test_a_module_visited_twice_is_two_nodes():
    layer = pc.Linear(6, 6)
    free_energy = pc.FreeEnergy(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    r = free_energy.report(x, y)
    assert [node.name for node in r.nodes] == ["0", "0#2"] == list(free_energy.infer(x, y).states)
    assert {"energy/0", "energy/0#2"} < r.scalars().keys()


def test_a_report_without_nodes_prints():
    assert str(report()).splitlines()[2].split()[0] == "node"
    assert len(Reader(report()._repr_html_()).cells) == 0


def test_a_notebook_shows_the_table():
    r = report("first", NASTY)
    shown = Reader(r._repr_html_())
    assert shown.cells == ["1", "first", "Gaussian", "2", "0.1", "0", "2", NASTY, "Gaussian", "3", "0.2", "0.25"]
    assert escape(r.regime) in r._repr_html_()
    assert "script" not in shown.tags


def test_bars():
    """Energies in units of the largest, residuals of 1; what is not finite or out of range bursts no cell."""
    nodes = [pc.NodeReport(str(k), "Gaussian", 1.0, e, r) for k, (e, r) in enumerate([(0.4, 0.5), (0.1, 7.0)])]
    nodes += [pc.NodeReport("x", "Gaussian", 1.0, math.nan, math.inf), pc.NodeReport("y", "Gaussian", 1.0, -1.0, 0.0)]
    r = pc.Report(tuple(nodes), (1.0, 0.9), 0.9, 0.0, 1.0, 1.0)
    widths = [float(w) for w in re.findall(r"\) ([\d.]+)%", table(r))]
    assert widths == [100, 50, 25, 100, 0, 0, 0, 0]


SAID = {
    "steps=1": (((4.0,), [0.1], [1.0]), ["Backpropagation: the states stay"]),
    "settled": (((4.0, 3.05), [0.1], [0.1]), ["Settled.", "Not close to backpropagation: the cosine", "is 0.9800."]),
    "a node lags": (
        ((4.0, 3.05), [0.1, 0.2], [0.0, 0.6]),
        ["Settled.", "Node 2 (`b.0`) has not settled: the residual is 0.6. Give more steps."],
    ),
    "not settled": (
        ((4.0, 3.5), [0.1] * 5, [0.9] * 5),
        ["Not settled: 50% of", "Nodes 1 (`a`), 2 (`b.0`), 3 (`c`) and 2 more have", "a lower displacement"],
    ),
    "not reached": (
        ((4.0, 3.5), [0.0, 0.1], [0.0, 0.9]),
        ["Not settled: 50%", "Node 2 (`b.0`) has not", "The error has not reached node 1 (`a`).", "order='error'"],
    ),
    "F rose": (((4.0, 4.5), [0.1], [0.1]), ["Not settled: inference raised F.", "Give a smaller step"]),
    "no number": (((4.0, math.nan), [0.1], [0.1]), ["F is not finite: inference diverged."]),
    "no number at the prediction": (((math.nan, 3.1), [0.1], [0.1]), ["F is not finite before anything moves"]),
    "infinite at the prediction": (((math.inf, 3.1), [0.1], [0.1]), ["F is not finite before anything moves"]),
    "residual is no number": (
        ((4.0, 3.05), [0.1], [math.nan]),
        ["Settled.", "Node 1 (`a`) has not settled: the residual is nan"],
    ),
    "no nodes": (((4.0, 3.5), [], []), ["Backpropagation: the forward visits no free value node"]),
}


@pytest.mark.parametrize("case", SAID)
def test_the_regime_in_words(case):
    """What is said first, printed, in a notebook and on the page, about these energies and residuals."""
    (free_energies, energies, residuals), said = SAID[case]
    names = ["a", "b.0", "c", "d", "e"]
    nodes = [pc.NodeReport(n, "Gaussian", 2.0, e, r) for n, e, r in zip(names, energies, residuals)]
    r = pc.Report(tuple(nodes), free_energies, 3.0, 0.05, 0.98, 0.9)
    assert r.summary.startswith(said[0])
    assert not [words for words in said if words not in r.summary]
    for text in (str(r).partition("\n\n")[0], "".join(re.findall("^<p>.*?</p>", r._repr_html_()))):
        assert [word for word in re.findall(r"\w+", text) if word not in ("p", "code")] == re.findall(r"\w+", r.summary)


def regime(free_energies, long_run, residual=0.1, cosine=0.98):
    """A report on one node of these figures."""
    return pc.Report((pc.NodeReport("a", "Gaussian", 2.0, 0.1, residual),), free_energies, long_run, 0.05, cosine, 0.9)


@pytest.mark.parametrize("free_energies", [(4.0, 4.0), (4.0, 4.0000002), (4.0, 3.9999998)])
@pytest.mark.parametrize("long_run", [4.0, 3.9999998])
def test_within_rounding_nothing_is_said_of_the_fall(free_energies, long_run):
    """Of a precision so large that F can hardly fall; the residuals still tell."""
    settled, late = (regime(free_energies, long_run, residual) for residual in (0.1, 0.8))
    assert settled.summary.startswith("All that F could fall by is within its rounding. Not close")
    assert "ettled" not in settled.summary
    assert "Node 1 (`a`) has not settled: the residual is 0.8. Give more steps." in late.summary


@pytest.mark.parametrize("figures", [((math.nan, 3.0), 3.0), ((4.0, math.nan), 3.0), ((4.0, 3.1), math.nan)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_not_settled(figures, bad):
    (first, last), long_run = figures
    r = regime(*(tuple(bad if math.isnan(f) else f for f in (first, last)), bad if math.isnan(long_run) else long_run))
    assert math.isnan(r.settled)
    assert r.summary.startswith("F is not finite")


def test_of_no_weight_gradient_nothing_is_compared():
    model = nn.Sequential(pc.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).requires_grad_(False)
    r = pc.FreeEnergy(model).report(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert r.summary == "Settled. There is no finite weight gradient to compare with backpropagation's."
    assert "no finite weight gradient" in regime((4.0, 3.1), 3.0, cosine=math.nan).summary


def test_weights_that_are_no_number():
    model = nn.Sequential(pc.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match="free energy is not finite"):
        r = pc.FreeEnergy(model).report(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert r.summary.startswith("F is not finite before anything moves: the model's output is not.")
    assert "nan%" in r.regime


def test_close_to_backpropagation():
    assert "Close to backpropagation: the cosine of the weight gradients is 0.9990" in report("a", cosine=0.999).summary
    assert "Not close to backpropagation" in report("a", cosine=0.1).summary


def energies_over(steps, nodes, scale=1.0):
    """As under simultaneous order: a move later for every node further down."""
    return tuple(tuple(scale * max(0, t + k + 1 - nodes) / 100 for k in range(nodes)) for t in range(steps + 1))


@pytest.mark.parametrize(
    "energies",
    [
        energies_over(1, 1),
        energies_over(1, 2),
        energies_over(12, 8),
        energies_over(64, 200),
        energies_over(3, 2, scale=0.0),
        energies_over(3, 2, scale=-1.0),
        ((0.0, 0.0), (math.nan, math.inf)),
        ((0.0, 1e-30), (1.0, 2.0)),
    ],
    ids=["one node", "two nodes", "eight", "two hundred", "zero", "negative", "not finite", "many orders"],
)
def test_a_heat_map_of_energies(energies):
    """A picture of a row a node and a column a move, with labelled axes, of no more size than is seen."""
    plots = pytest.importorskip("pc_triton.plots", reason="pip install 'pc_triton[train]'")
    text = plots.heat_map(energies)
    shown = Reader(text)
    assert {"moves of the states", "node", "nats per item"} <= set(re.findall(r">([^<>]+)</text>", text))
    assert [a for a in shown.attributes if a == ("role", "img")] == [("role", "img")]
    assert len(text) < 100_000
    width, height = map(int, re.search(r'viewBox="0 0 (\d+)[\d.]* (\d+)', text).groups())
    assert width / 4 < height < 2 * width


def test_colours_of_a_heat_map_tell_the_energies():
    """Each cell has the colour of its energy, by the scale beside it: logarithmic, and grey where there is none."""
    plots = pytest.importorskip("pc_triton.plots", reason="pip install 'pc_triton[train]'")
    images = pytest.importorskip("PIL.Image")
    text = plots.heat_map([[0.0, 0.0], [1e-4, 1e-3], [1e-3, 1e-2]])
    cells, _ = (base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", text))
    picture = images.open(io.BytesIO(cells)).convert("RGBA")
    assert picture.size == (3, 2), "a column a move, a row a node"
    seen = [[picture.getpixel((move, node)) for move in range(3)] for node in range(2)]
    low, middle, high = (plots.COLORS(part, bytes=True) for part in (0.0, 0.5, 1.0))
    near = [
        [max(abs(int(a) - int(b)) for a, b in zip(*pair)) for pair in zip(row, wanted)]
        for row, wanted in zip(seen, [[(136, 136, 136, 68), low, middle], [(136, 136, 136, 68), middle, high]])
    ]
    assert max(map(max, near)) <= 2


def test_a_notebook_without_matplotlib(monkeypatch):
    r = report("a", "b")
    r = dataclasses.replace(r, energies=((0.0, 0.0), (0.1, 0.1), (0.1, 0.2)))
    assert "<svg" in r._repr_html_() or find_spec("matplotlib") is None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pc_triton.plots", raising=False)
    assert "pip install matplotlib" in r._repr_html_()
    assert "<table" in r._repr_html_()


def test_a_report_ticks_for_a_progress_bar():
    """As often as evaluate.py tells its bar, at each step of the long run and after the last."""
    ticks = []
    model = nn.Sequential(pc.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    pc.FreeEnergy(model).report(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), tick=lambda: ticks.append(1))
    assert len(ticks) == sys.modules["pc_triton.report"].LONG_RUN + 1


def test_extra_repr():
    model = nn.Sequential(pc.Linear(2, 2), nn.Linear(2, 2))
    assert "order='error', precision='auto', displacement=0.003, step=0.25" in repr(pc.FreeEnergy(model))
    assert "precision=2.0, step=0.25" in repr(pc.FreeEnergy(model, precision=2.0))


# The page.


def make(*arguments, **options):
    return pytest.importorskip("pc_triton.page", reason="pip install 'pc_triton[train]'").page(*arguments, **options)


def test_a_page_holds_all_and_loads_nothing():
    r = report("first", NASTY)
    text = make(NASTY, r, [{**row, NASTY: 1.0} for row in history(r)], [5.0, 4.0, 4.5], {NASTY: NASTY})
    shown = Reader(text)
    assert shown.cells[-12:] == ["1", "first", "Gaussian", "2", "0.1", "0", "2", NASTY, "Gaussian", "3", "0.2", "0.25"]
    assert shown.cells[:15][1::3] == ["90.0%", "22.50%", "0.05", "0.9800", "0.900"]
    assert shown.tags.count("svg") == len([a for a, _ in shown.attributes if a == "aria-label"]) > 3
    assert text.count(escape(NASTY)) == 6, "title, heading, a fact and its name, a plot and its description"
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(shown.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert not [a for a, _ in shown.attributes if a.startswith("on") or a in ("src", "srcset", "action")]
    assert all(value.startswith(("#", "data:")) for a, value in shown.attributes if a.endswith("href"))
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [value for name, value in shown.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_fits_any_width():
    """As far as its text tells: see `test_in_a_browser`. Tables scroll in a container, and no width is fixed."""
    text = make("run", report("first"), history(report("first")), [5.0, 4.0], {"data": "x" * 300})
    shown = Reader(text)
    assert ("content", "width=device-width, initial-scale=1") in shown.attributes
    assert ("lang", "en") in shown.attributes
    assert [
        style for name, style in shown.attributes if name == "style" and re.search(r"(?<!-)width:\s*\d+(px|pt)", style)
    ] == []
    assert "overflow-wrap: anywhere" in text
    assert "color-scheme: light dark" in text
    assert re.findall(r"(.{29})<table>", text) == ['<div style="overflow-x:auto">']
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)rem", text)) >= 0.75


def test_a_plot_for_each_name_and_one_for_all_nodes():
    r = report("first", "second")
    text = make("run", r, history(r), [5.0, 4.0])
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == [
        "F per item; dashed: a long run",
        *("training loss", "perplexity", "val/accuracy", "free energy", "settled", "explained", "residual", "cosine"),
        *("worst cosine", "energy by node", "residual by node", "precision by node"),
    ]


def test_old_runs_and_backpropagation():
    """Evaluations with fewer numbers, with those of a part of the rows, and no report at all."""
    rows = [{"step": 1, "perplexity": 300.0, "settled": 0.9}, {"step": 2, "perplexity": math.nan}]
    text = make("run", None, rows)
    Reader(text)
    assert "Trained by backpropagation" in text
    assert text.count("<svg") == 2
    assert make("run", None, rows) == text, "the same page from the same numbers"
    assert make("run", None).count("<svg") == 0


def test_a_history_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"row 1 of history has no step: give"):
        make("run", None, [{"step": 1}, {"loss": 2.0}])
    with pytest.raises(ValueError, match=r"row 0 of history: note is 'x': give"):
        make("run", None, [{"step": 1, "note": "x"}])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_in_a_browser(tmp_path):
    """Laid out at a phone's and a desktop's width: nothing is wider than the window, and every plot is drawn."""
    r = report(*(f"encoder.layers.{k}.self_attention.out_projection" for k in range(30)))
    r = dataclasses.replace(r, energies=energies_over(2, 30))
    text = escape(make("run", r, [{"step": 1, "perplexity": 300.0, "energy/a": 1.0, "energy/b": 2.0}], [5.0, 4.0]))
    frames = "".join(f'<iframe width={width} height=800 srcdoc="{text}"></iframe>' for width in WIDTHS)
    script = """onload = () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => [
        frame.contentDocument.documentElement.scrollWidth,
        Math.max(...[...frame.contentDocument.querySelectorAll("table, p, dd, h1, figure")].map(
            part => part.getBoundingClientRect().right)),
        ...[...frame.contentDocument.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height)]))"""
    path = tmp_path / "frames.html"
    path.write_text(f"<meta charset=utf-8><title></title>{frames}<script>{script}</script>", encoding="utf-8")
    off = ["gpu", "quic", "background-networking", "component-update", "sync"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    line = ["chromium", *flags, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=True)
    for width, (wide, right, *heights) in zip(WIDTHS, json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])):
        assert max(wide, right) <= width, "no scrolling sideways, of the page or of a table in it"
        assert len(heights) == 5
        assert min(heights) > 150


# The command line.

SIZES = (
    "--width 16 --heads 2 --blocks 1 --context 16 --vocabulary 300 --batch 4 --steps 20 --eval-every 10 --device cpu"
)


def main(*arguments):
    pytest.importorskip("tokenizers", reason="pip install 'pc_triton[train]'")
    from pc_triton.cli import main

    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i} of {i * i % 13} words, then {i % 7}.\n" for i in range(600)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("pc_triton.report.LONG_RUN", 3)


@pytest.mark.parametrize("method", ["pc", "bp"])
def test_a_page_of_a_run(tmp_path, data, capsys, method):
    out, page = tmp_path / "run", tmp_path / "page.html"
    assert main("train", "--data", data, "--out", out, "--method", method, *SIZES.split()) == 0
    capsys.readouterr()
    assert main("eval", "--checkpoint", out, "--device", "cpu", "--html", page) == 0
    *rows, measured = capsys.readouterr().out.splitlines()
    text = page.read_text(encoding="utf-8")
    shown = Reader(text)
    assert measured.split()[4] in text
    if method == "pc":
        nodes = [row.split()[0] for row in rows[rows.index("") + 2 : -2]]
        assert shown.cells[-6 * len(nodes) :][1::6] == nodes
        assert "energy by node" in text
    assert "training loss" in text
    before = page.read_bytes()
    assert main("eval", "--checkpoint", out, "--device", "cpu", "--html", tmp_path / "missing" / "page.html") == 2
    assert "cannot write" in capsys.readouterr().err
    assert page.read_bytes() == before


def test_tensorboard_has_what_the_checkpoint_has(tmp_path, data, monkeypatch, capsys):
    """Each loss and evaluation once, also where a run was stopped, killed with more than it had saved, and resumed."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from pc_triton import checkpoint
    from pc_triton import train as training

    original, calls = training.losses, []

    def losses(*arguments):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    arguments = ["--data", data, "--out", tmp_path, "--tensorboard", "--quiet", *SIZES.split()]
    with monkeypatch.context() as patch:
        patch.setattr(training, "losses", losses)
        assert main("train", *arguments) == 130
    with SummaryWriter(tmp_path) as killed:
        killed.add_scalar("loss", 1e6, 14)
    assert main("train", *arguments, "--resume") == 0
    record = checkpoint.load(tmp_path)[1]
    events = EventAccumulator(str(tmp_path), {"scalars": 0})
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read.pop("loss") == [(k, pytest.approx(loss)) for k, loss in enumerate(record["losses"], 1)]
    names = record["evaluations"][0].keys() - {"step"}
    assert names == read.keys() >= {"perplexity", "settled", "energy/blocks.0.attn", "residual/blocks.0.attn"}
    for name in names:
        assert read[name] == [(row["step"], pytest.approx(row[name])) for row in record["evaluations"]]


def test_without_tensorboard(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert main("train", "--data", data, "--out", tmp_path / "run", "--tensorboard", *SIZES.split()) == 2
    assert capsys.readouterr().err == "pc-triton: error: tensorboard is not installed: pip install tensorboard\n"
    assert not (tmp_path / "run").exists()
