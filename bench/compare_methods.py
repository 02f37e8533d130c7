"""Predictive coding, backpropagation and Gaussian predictive coding on the default text: one model, one tuning effort.

    python bench/compare_methods.py [--jobs 2] [--quick]

Every method gets the same grid of learning rates on a seed of its own, then its best one on the seeds that count. Each
run is what ``pc-triton train`` does; how runs are made and kept is in ``runs.py``. At the end: Markdown tables of the
methods and of the tuning on stdout, and beside the JSON a PNG of the curves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from paper_lm import plot
from runs import DIVERGED, complete, load

from pc_triton.settings import METHODS, Settings
from pc_triton.train import Diverged, train

LEARNING_RATES: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEED = 3
SEEDS: tuple[int, ...] = (0, 1, 2)


def run(options: dict[str, Any]) -> dict[str, Any]:
    """The record of one training run."""
    settings = Settings(**options)
    record: dict[str, Any] = {"method": settings.method, "seed": settings.seed, "lr": settings.lr}
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = train(settings, folder, device="cpu", quiet=True)
    except Diverged as error:
        return record | {"diverged": str(error)}
    for name in ("held_out_perplexity", "unigram_perplexity", "regime", "parameters", "evaluations"):
        record[name] = result[name]
    if result["report"] is not None:
        for name in ("settled", "residual", "cosine", "worst_cosine"):
            record[name] = getattr(result["report"], name)
    return record | {"losses_every_10th": result["losses"][::10]}


def perplexity(record: dict[str, Any]) -> float:
    """Held out, per token; infinite for a run that diverged."""
    return record.get("held_out_perplexity", DIVERGED)


def compare(base: Settings, rates: tuple[float, ...], seeds: tuple[int, ...], out: Path, jobs: int) -> dict[str, Any]:
    """The records of the seeds, by method, each at the method's best learning rate."""
    tuning = [replace(base, method=m, lr=lr, seed=TUNING_SEED) for m in METHODS for lr in rates]
    best = best_rates(complete(out, list(map(asdict, tuning)), run, jobs))
    final = [replace(base, method=m, lr=best[m], seed=seed) for m in METHODS for seed in seeds]
    return chosen(complete(out, list(map(asdict, final)), run, jobs), best)


def best_rates(records: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each method that ended lowest on the tuning seed."""
    tried = [r for r in records if r["seed"] == TUNING_SEED]
    return {m: min((r for r in tried if r["method"] == m), key=perplexity)["lr"] for m in METHODS}


def chosen(records: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Of these runs each method's at its best rate, without the tuning seed's."""
    counted = [r for r in records if r["seed"] != TUNING_SEED and r["lr"] == rates[r["method"]]]
    return {m: [r for r in counted if r["method"] == m] for m in METHODS}


def table(final: dict[str, Any]) -> str:
    """Markdown: each method's perplexities, their ratio to backpropagation's, and the regime, means over the seeds."""
    seeds = [str(record["seed"]) for record in final["bp"]]
    columns = ["method", "lr", *(f"seed {seed}" for seed in seeds), "mean ± std", "ratio to bp", "regime"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    base = statistics.mean(map(perplexity, final["bp"]))
    for method, records in final.items():
        values = list(map(perplexity, records))
        cells = [method, f"{records[0]['lr']:g}", *(f"{v:.2f}" if v < DIVERGED else "diverged" for v in values)]
        if max(values) < DIVERGED:
            mean = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells += [f"{mean:.2f}{spread}", f"{mean / base:.3f}", regime(records)]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table(results: list[dict[str, Any]], rates: tuple[float, ...]) -> str:
    """Markdown: each method's perplexity at every learning rate that was tried, on the seed for tuning."""
    lines = ["| method | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method in METHODS:
        found = {r["lr"]: perplexity(r) for r in results if r["method"] == method and r["seed"] == TUNING_SEED}
        lines.append(f"| {method} | " + " | ".join(f"{found[rate]:.2f}" for rate in rates) + " |")
    return "\n".join(lines)


def regime(records: list[dict[str, Any]]) -> str:
    """Where the trained models' inference stands, means over the seeds."""
    if "settled" not in records[0]:
        return "no inference"
    settled, residual, cosine, worst = (
        statistics.mean(r[name] for r in records) for name in ("settled", "residual", "cosine", "worst_cosine")
    )
    return f"settled {settled:.1%}, residual {residual:.2g}, cosine to bp {cosine:.4f} (worst parameter {worst:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few runs, to try the script")
    parser.add_argument("--out", type=Path, help="JSON of the runs (default bench/results/methods.json)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread (default 1)")
    arguments = parser.parse_args()
    base, rates, seeds = Settings(), LEARNING_RATES, SEEDS
    out = Path(__file__).parent / "results" / "methods.json"
    if arguments.quick:
        base = replace(base, width=16, heads=2, blocks=1, context=16, batch=4, steps=40, eval_every=10, vocabulary=300)
        rates, seeds, out = rates[:2], seeds[:2], Path(tempfile.gettempdir()) / "methods-quick.json"
    out = arguments.out or out
    final = compare(base, rates, seeds, out, arguments.jobs)
    print(table(final), tuning_table(load(out)["runs"], rates), sep="\n\n")
    plot(list(final.values()), out.with_suffix(".png"))


if __name__ == "__main__":
    main()
