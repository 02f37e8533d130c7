"""Training runs of an experiment, each in a process of its own on one CPU thread, and their records in one JSON file.

A finished run is in the file at once, with the commit that made it, and is not made again after an interruption. After
a change of the code begin with another file.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from pc_triton import Report

Settings = dict[str, Any]
"""What defines a run: numbers and strings, as they stand in the file; never a path of this machine."""
Record = dict[str, Any]
"""``settings``, ``commit``, and what the run returned: ``score`` (the lower the better), or why it ``diverged``."""

TUNING_SEED = 100
DIVERGED = float("inf")


def commit() -> str:
    """The commit of this checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def load(out: Path) -> dict[str, Any]:
    """What the file holds: ``environment`` and ``runs``, a list of records."""
    if out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"environment": versions | {"device": "CPU only, one thread a run"}, "runs": []}


def save(out: Path, results: dict[str, Any]) -> None:
    """Replace the file at once."""
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)


def complete(out: Path, wanted: Sequence[Settings], run: Callable[[Settings], Record], jobs: int) -> list[Record]:
    """The records of these runs, in their order; those not in the file are made, ``jobs`` at once.

    run: a function of a module (a process of its own imports it). jobs: 0 makes them here, in this process.
    """
    results = load(out)

    def find(settings: Settings) -> Record | None:
        return next((record for record in results["runs"] if record["settings"] == settings), None)

    todo = [settings for settings in wanted if find(settings) is None]
    made_by = commit()
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep(settings: Settings, record: Record) -> None:
        results["runs"].append({"settings": settings, "commit": made_by, **record})
        save(out, results)

    if jobs == 0:
        for settings in todo:
            keep(settings, run(settings))
        return [record for settings in wanted if (record := find(settings)) is not None]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, settings): settings for settings in todo}
        try:
            done = len(wanted) - len(todo)  # no bar in a log: disable=None
            for future in tqdm(as_completed(futures), "runs", len(wanted), initial=done, unit="run", disable=None):
                keep(futures[future], future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [record for settings in wanted if (record := find(settings)) is not None]


def score(record: Record) -> float:
    """The score of a run; infinite where it diverged."""
    return record.get("score", DIVERGED)


def chosen(
    out: Path,
    variants: Sequence[tuple[Settings, Sequence[Settings]]],
    seeds: Sequence[int],
    run: Callable[[Settings], Record],
    jobs: int,
) -> list[list[Record]]:
    """For each variant its records on the seeds, with that of its choices which scored best in tuning.

    variants: each with what is tuned of it, such as ``{"lr": 0.1}``, the same number of choices for all. Tuning is one
    run a choice, on a seed of its own, with ``tuning`` set in its settings, by which run measures on data that neither
    training nor the final measurement uses.
    """
    trials = [v | choice | {"seed": TUNING_SEED, "tuning": True} for v, choices in variants for choice in choices]
    tried = iter(complete(out, trials, run, jobs))
    best = [min([next(tried) for _ in choices], key=score)["settings"] for _, choices in variants]
    wanted = [settings | {"seed": seed, "tuning": False} for seed in seeds for settings in best]
    records = complete(out, wanted, run, jobs)
    return [records[n :: len(best)] for n in range(len(best))]


def tuned(
    out: Path,
    variants: Sequence[Settings],
    rates: Sequence[float],
    seeds: Sequence[int],
    run: Callable[[Settings], Record],
    jobs: int,
) -> list[list[Record]]:
    """As `chosen`, where the learning rate, of the same rates for all, is what is tuned."""
    return chosen(out, [(v, [{"lr": lr} for lr in rates]) for v in variants], seeds, run, jobs)


def spread(records: Sequence[Record], digits: int = 2) -> str:
    """Mean and standard deviation of the runs' scores over the seeds, as in ``36.98 ± 0.08``."""
    return mean_and_std(list(map(score, records)), digits)


def mean_and_std(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """As `spread`, of any values; sign: "+" to have it written always."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{mean(values):{sign}.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def standing(report: Report) -> Record:
    """Where inference stands, for a record."""
    return {name: getattr(report, name) for name in ("settled", "explained", "residual", "cosine", "worst_cosine")}


def regime(records: Sequence[Record]) -> str:
    """Where the trained models' inference stands, means over the seeds that did not diverge."""
    names = ("settled", "explained", "residual", "cosine", "worst_cosine")
    infers = [record for record in records if "settled" in record]
    if not infers:
        return "no inference" if min(map(score, records)) < DIVERGED else ""
    settled, explained, residual, cosine, worst = (mean(record[name] for record in infers) for name in names)
    return (
        f"settled {settled:.1%} (explains {explained:.2%} of F), residual {residual:.2g}, "
        f"cosine to bp {cosine:.4f} (worst parameter {worst:.3f})"
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def tuning_table(
    runs: Sequence[Record], heads: Sequence[str], method: Callable[[Settings], tuple[str, ...]], digits: int
) -> str:
    """Markdown: the score in tuning at every learning rate that was tried, a row a method; empty where it diverged.

    method: the cells under heads by which a run's settings are known.
    """
    tried = [record for record in runs if record["settings"]["seed"] == TUNING_SEED]
    rates = sorted({record["settings"]["lr"] for record in tried})
    found: dict[tuple[str, ...], dict[float, float]] = {}
    for record in tried:
        found.setdefault(method(record["settings"]), {})[record["settings"]["lr"]] = score(record)
    rows = [
        [*cells, *(f"{by_rate[lr]:.{digits}f}" if by_rate.get(lr, DIVERGED) < DIVERGED else "" for lr in rates)]
        for cells, by_rate in found.items()
    ]
    return markdown([*heads, *(f"lr {rate:g}" for rate in rates)], rows)
