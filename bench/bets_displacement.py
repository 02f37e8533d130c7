"""Bet: what decides the displacement. Its best value by network, what predicts that, and rules that choose it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from bets_training import (
    Batches,
    Deep,
    backpropagation,
    batches_of,
    default_tokens,
    language_model,
    sequences,
    standard_images,
    steps,
    train,
)
from matplotlib.figure import Figure
from runs import DIVERGED, Record, Settings, chosen, markdown, mean_and_std, score
from torch import Tensor, nn

import pc_triton as pc
from pc_triton.rules import LEAST

DISPLACEMENTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DEFAULT = 0.003
RATES, SEEDS = (1e-3, 3e-3), (0, 1)
STEPS, BATCH, WARMUP, MEASURED = 120, 64, 0.1, 4096
TEXT: Settings = {"data": "text", "blocks": 4}
TEXT_STEPS, TEXT_RATES = 100, (4e-3, 8e-3)
VOCABULARY, WIDTH, CONTEXT, SEQUENCES = 512, 64, 32, 16
QUANTITIES = ("saturated", "gradient ratio", "curvature", "step", "settled")
FIXED = (0.003, 0.03, 0.1)
RULES = ("annealed", "step 0.5", "settled 0.7")
FASTEST = 1.1
"""The factor by which a training step changes the displacement under the rule "step 0.5"."""


def plain(data: str, depth: int, gain: float, **options: bool) -> Settings:
    return {"data": data, "depth": depth, "gain": gain, **options}


def networks(data: str, depths: Sequence[int], gains: Sequence[float], others: Sequence[int]) -> list[Settings]:
    """Plain ones of each depth and gain; of each depth in others one with residuals, with normalisation, with both."""
    found = [plain(data, depth, gain) for depth in depths for gain in gains]
    kinds: list[dict[str, bool]] = [{"residual": True}, {"normalised": True}, {"residual": True, "normalised": True}]
    return found + [plain(data, depth, 1.0, **kind) for depth in others for kind in kinds]


LOOKED_AT = networks("mnist", (10, 30), (0.8, 1.0, 1.5, 2.5), (10, 30))
HELD_OUT = networks("fashion", (15, 25), (0.9, 1.3, 2.0), (20,))


def name(settings: Settings) -> str:
    if settings["data"] == "text":
        return f"transformer, {settings['blocks']} blocks"
    kinds = [kind for kind in ("residual", "normalised") if settings.get(kind)]
    return f"{' and '.join(kinds) or 'plain'}, depth {settings['depth']}, gain {settings['gain']:g}"


# A run.


def largest_settled(model: nn.Module, x: Tensor, y: Tensor, least: float = 0.7) -> float:
    """The largest displacement of the grid at which inference, before training, makes that part of the reachable fall.

    At least the default.
    """
    for delta in DISPLACEMENTS[:1:-1]:
        if pc.FreeEnergy(model, displacement=delta).report(x, y).settled >= least:
            return delta
    return DEFAULT


def follow(rule: str, free_energy: pc.FreeEnergy, count: int) -> Callable[[int], None]:
    """What a rule does after each training step of ``count``."""

    def annealed(step: int) -> None:
        free_energy.displacement = 0.1 * (DEFAULT / 0.1) ** (step / count)

    def by_step(step: int) -> None:
        factor = FASTEST if float(free_energy.tracker.mean) > 0.5 else 1 / FASTEST
        free_energy.displacement = min(max(free_energy.displacement * factor, DISPLACEMENTS[0]), DISPLACEMENTS[-1])

    return {"annealed": annealed, "step 0.5": by_step}.get(rule, lambda step: None)


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network: ``score`` is the logarithm of its loss; at the default displacement also the quantities."""
    torch.manual_seed(settings["seed"])
    text, method = settings["data"] == "text", settings["method"]
    if text:
        tokens = default_tokens(VOCABULARY, CONTEXT)
        model: nn.Module = language_model(VOCABULARY, WIDTH, settings["blocks"], CONTEXT)
        batches = sequences(tokens.train, CONTEXT, SEQUENCES, settings["seed"])
        measured = next(sequences(tokens.test, CONTEXT, 128, -1))
    else:
        images = standard_images(data and data / settings["data"])[0]
        options = {kind: settings.get(kind, False) for kind in ("residual", "normalised")}
        model = Deep(images.x.shape[1], settings["width"], settings["depth"], settings["gain"], **options)
        batches = batches_of(images.x, images.y, BATCH, settings["seed"])
        measured = images.x[:MEASURED], images.y[:MEASURED]
    loss, after = backpropagation(model), None
    if method != "bp":
        begins = {"annealed": 0.1, "step 0.5": DEFAULT}.get(method)
        if method == "settled 0.7":
            begins = largest_settled(model, *next(batches))
        loss = free_energy = pc.FreeEnergy(model, displacement=begins or settings["displacement"])
        after = follow(method, free_energy, settings["steps"]) if begins else None
    looks = settings.get("displacement") == DEFAULT and not settings["tuning"]
    before = quantities(model, batches) if looks else None
    record = train(model, loss, batches, settings, after)
    if not record:
        with torch.no_grad():
            final = float(backpropagation(model)(*measured))
        if not 0 < final < math.inf:
            return {"diverged": f"the loss is {final} at the end"}
        record = {"score": math.log(final)}
        if looks:
            record |= {"before": before, "after": quantities(model, batches)}
        if after is not None:
            record["displacement"] = free_energy.displacement
    return record


# What may decide.


def quantities(model: nn.Module, batches: Batches) -> dict[str, float]:
    """What is measured at the default displacement; ``settled`` at 0.1. All of it trains nothing."""
    free_energy = pc.FreeEnergy(model, displacement=DEFAULT)
    for _ in range(5):
        free_energy(*next(batches))
    x, y = next(batches)
    report = pc.FreeEnergy(model, displacement=0.1).report(x, y)
    found = {"step": float(free_energy.tracker.mean), "settled": report.settled, "explained": report.explained}
    return found | (curvature(model, x, y) if isinstance(model, Deep) else {})


@contextmanager
def displaced(layers: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within it the output of each layer is change(its number, output)."""
    hooks = [
        layer.register_forward_hook(lambda module, inputs, out, number=number: change(number, out))
        for number, layer in enumerate(layers)
    ]
    yield
    for hook in hooks:
        hook.remove()


def curvature(model: Deep, x: Tensor, y: Tensor) -> dict[str, float]:
    """Saturation, the ratio of gradients, and the loss's largest eigenvalue in the errors, in units of the precision.

    Errors count in units of their node's root mean square. The precision is the default displacement's. The eigenvalue
    is the median over samples, each by ten rounds of power iteration.
    """
    layers, outputs = list(model.layers), {}
    with torch.no_grad(), displaced(layers, lambda number, out: outputs.setdefault(number, out)):
        model(x)
    errors = [torch.zeros_like(out).requires_grad_() for out in outputs.values()]
    units = [out.square().mean().sqrt() for out in outputs.values()]
    with displaced(layers, lambda number, out: out + units[number] * errors[number]):
        losses = F.cross_entropy(model(x), y, reduction="none")
    gradients = torch.autograd.grad(losses.sum(), errors, create_graph=True)
    squared = torch.stack([g.detach().square().sum(1) for g in gradients])
    pi = squared * len(layers) / (2 * DEFAULT * losses.detach())
    pi = torch.maximum(pi, LEAST * pi.mean(0)).clamp_min(1e-30)
    scales = [row.rsqrt().unsqueeze(1) for row in pi]
    vectors = [torch.randn_like(e) for e in errors]
    value = losses.detach()
    for _ in range(10):
        norm = sum(v.square().sum(1, keepdim=True) for v in vectors).sqrt()  # type: ignore[union-attr]
        vectors = [v / norm for v in vectors]
        along = sum((g * v * s).sum() for g, v, s in zip(gradients, vectors, scales))
        bent = [h * s for h, s in zip(torch.autograd.grad(along, errors, retain_graph=True), scales)]
        value = sum((v * h).sum(1) for v, h in zip(vectors, bent))
        vectors = bent
    ratio = (squared[0].sum() / squared[-1].sum()).sqrt()
    saturated = mean(float((out.tanh().abs() > 0.95).float().mean()) for out in outputs.values())
    return {"saturated": saturated, "gradient ratio": float(ratio), "curvature": float(value.median())}


# Tables and figure.


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the grid, of what predicts, and of the rules; and a PNG."""
    looked_at, held_out = [*LOOKED_AT, TEXT], HELD_OUT
    if quick:
        looked_at, held_out = [*networks("mnist", (2, 3), (1.0,), ()), TEXT | {"blocks": 1}], HELD_OUT[:1]
    fixed = [{"method": "pc", "displacement": delta} for delta in (FIXED[:2] if quick else DISPLACEMENTS)]
    rivals: list[Settings] = [{"method": "bp"}]
    rivals += [{"method": "pc", "displacement": delta} for delta in FIXED]
    rivals += [{"method": rule} for rule in RULES]
    grids, tests = (compared(out, *which, quick, data, jobs) for which in ((looked_at, fixed), (held_out, rivals)))
    plot(grids, tests, out.with_suffix(".png"))
    parts = ["**Logarithm of the loss, by displacement**", grid_table(grids)]
    parts += ["**What predicts the best displacement**", prediction_table(grids)]
    parts += ["**Rules, on networks that were not looked at**", rule_table(tests)]
    return "\n\n".join(parts)


def compared(
    out: Path, networks: Sequence[Settings], methods: Sequence[Settings], quick: bool, data: Path | None, jobs: int
) -> list[list[list[Record]]]:
    """For each network and method the records on the seeds, at the better of the rates."""
    variants: list[tuple[Settings, list[Settings]]] = []
    for network in networks:
        text = network["data"] == "text"
        own = network | {"warmup": WARMUP} | ({} if text else {"width": 32})
        rates = (TEXT_RATES if text else RATES)[: 1 if quick else None]
        for method in methods:
            count = steps(4 if quick else TEXT_STEPS if text else STEPS, method["method"])
            variants.append((own | method | {"steps": count}, [{"lr": lr} for lr in rates]))
    found = chosen(out, variants, SEEDS[:1] if quick else SEEDS, partial(run, data=data), jobs)
    return [found[n : n + len(methods)] for n in range(0, len(found), len(methods))]


def value(records: Sequence[Record]) -> float:
    """The mean score; one that diverged, or is above a constant guess's, counts as that."""
    guess = math.log(math.log(VOCABULARY if records[0]["settings"]["data"] == "text" else 10))
    return mean(min(score(record), guess) for record in records)


def best(rows: Sequence[Sequence[Record]]) -> Sequence[Record]:
    return min(rows, key=value)


def at_default(rows: Sequence[Sequence[Record]]) -> Sequence[Record]:
    return next(rows for rows in rows if rows[0]["settings"].get("displacement") == DEFAULT)


def spread(records: Sequence[Record]) -> str:
    return "diverged" if min(map(score, records)) == DIVERGED else mean_and_std(list(map(score, records)))


def row(network: Sequence[Sequence[Record]]) -> list[str]:
    """A network's name and its scores, the lowest in bold."""
    lowest = best(network)
    cells = [f"**{spread(records)}**" if records is lowest else spread(records) for records in network]
    return [name(network[0][0]["settings"]), *cells]


def grid_table(grids: Sequence[Sequence[Sequence[Record]]]) -> str:
    """Markdown: a row a network, a column a displacement."""
    rows = [row(grid) for grid in grids]
    return markdown(["network", *(f"{records[0]['settings']['displacement']:g}" for records in grids[0])], rows)


def measured(records: Sequence[Record], when: str, quantity: str) -> float | None:
    """A quantity, the mean over the seeds; None where it was not measured."""
    found = [record[when][quantity] for record in records if quantity in record.get(when, {})]
    return mean(found) if found else None


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks; equal values have the mean of theirs."""
    return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation."""
    a, b = (torch.tensor(ranks(values)) for values in zip(*pairs))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def prediction_table(grids: Sequence[Sequence[Sequence[Record]]]) -> str:
    """Markdown: a row a network with its best displacement and each quantity before and after training."""
    columns = [(when, quantity) for quantity in QUANTITIES for when in ("before", "after")]
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {column: [] for column in columns}
    rows = []
    for grid in grids:
        records, lowest = at_default(grid), best(grid)
        delta, cells = lowest[0]["settings"]["displacement"], []
        for column in columns:
            found = measured(records, *column)
            cells.append("" if found is None else f"{found:.2g}")
            if found is not None:
                pairs[column].append((found, delta))
        gain = value(records) - value(lowest)
        rows.append([name(lowest[0]["settings"]), f"{delta:g}", f"{gain:.2f}", *cells])
    rows.append(["rank correlation", "", "", *(f"{correlation(p):+.2f}" if len(p) > 2 else "" for p in pairs.values())])
    heads = ["network", "best", "gain over 0.003", *(f"{quantity} {when}" for when, quantity in columns)]
    return markdown(heads, rows)


def label(settings: Settings) -> str:
    return f"{settings['displacement']:g}" if "displacement" in settings else settings["method"]


def rule_table(tests: Sequence[Sequence[Sequence[Record]]]) -> str:
    """Markdown: a row a network, a column a method; their mean, and the networks on which it beats the default."""
    rows = [row(test) for test in tests]
    columns = list(zip(*tests))
    default = [value(at_default(test)) for test in tests]
    rows.append(["mean", *(f"{mean(map(value, column)):.3f}" for column in columns)])
    lower = [sum(value(records) < d for records, d in zip(column, default)) for column in columns]
    rows.append(["below 0.003 on", *(f"{count} of {len(tests)}" for count in lower)])
    return markdown(["network", *(label(records[0]["settings"]) for records in tests[0])], rows)


def plot(grids: Any, tests: Any, png: Path) -> None:
    """The score over the displacement; the best displacement over what settles at 0.1; the rules' mean scores."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for grid in grids:
        settings = grid[0][0]["settings"]
        kinds = settings.get("residual", False) + 2 * settings.get("normalised", False)
        color = "black" if settings["data"] == "text" else f"C{kinds}"
        style = "--" if settings.get("depth", 0) >= 30 else "-"
        points = sorted((records[0]["settings"]["displacement"], value(records)) for records in grid)
        zero = value(at_default(grid))
        kind = name(settings).partition(", gain")[0]
        left.plot([d for d, _ in points], [v - zero for _, v in points], style, color=color, label=kind)
        settled = measured(at_default(grid), "before", "settled")
        if settled is not None:
            middle.plot(settled, best(grid)[0]["settings"]["displacement"], "o", color=color)
    lines, labels = left.get_legend_handles_labels()
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(xscale="log", xlabel="displacement", ylabel="logarithm of the loss, less that at 0.003")
    kinds_and_depths = dict(zip(reversed(labels), reversed(lines)))  # each once
    figure.legend(kinds_and_depths.values(), kinds_and_depths.keys(), loc="outside lower center", ncols=5)
    middle.set(yscale="log", xlabel="settled at 0.1, before training", ylabel="best displacement")
    columns = list(zip(*tests))
    methods = [label(column[0][0]["settings"]) for column in columns]
    right.bar(methods, [mean(map(value, column)) for column in columns], color="C4")
    for column, place in zip(columns, methods):
        right.plot([place] * len(column), list(map(value, column)), "k.", markersize=4)
    right.set(ylabel="logarithm of the loss, FashionMNIST networks")
    right.tick_params("x", rotation=30)
    figure.savefig(png, dpi=100)
