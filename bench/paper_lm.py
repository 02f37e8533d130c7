"""The conditional language model of Pinchetti et al. 2022, section 4.3: BP, PC and Gaussian PC on the same text.

``--data`` is a folder of UTF-8 text: ``train.txt``, ``valid.txt`` and ``test.txt``, as of WikiText-2, or LM1B's shards,
``heldout-*.txt`` to train on and ``news.en.heldout-*`` to measure on; then the model is the paper's: one block, one
head, 128 units, sequences of 32 tokens, 8,001 byte-pair tokens. Without it the text is Python's language reference, and
the model that of ``pc-triton train``. Learning rates are chosen on text that is neither trained on nor measured on.
Backpropagation also gets the steps that PC's products would pay for, and both a longer warm-up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from runs import TUNING_SEED, Record, Settings, load, markdown, regime, score, spread, standing, tuned

from pc_triton.rules import Precision
from pc_triton.settings import Settings as TrainSettings
from pc_triton.text import InputError, read_text, split
from pc_triton.train import Diverged, train

DEFAULT: Settings = {"width": 128, "heads": 4, "blocks": 2, "context": 64, "vocabulary": 1024, "batch": 16}
PAPER: Settings = {"width": 128, "heads": 1, "blocks": 1, "context": 32, "vocabulary": 8001, "batch": 32}
TINY: Settings = {"width": 16, "heads": 2, "blocks": 1, "context": 16, "vocabulary": 300, "batch": 4}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LONG_WARMUP = 0.2  # instead of 5 % of the steps: it bears larger rates, so that the small ones need no trial
LONG_RATES = RATES[2:]
SEEDS = (0, 1, 2)
STEPS = 500


def base(data: Path | None, quick: bool) -> Settings:
    """What all runs share: the model, the batch and the number of steps."""
    if quick:
        return TINY | {"steps": 20}
    return (DEFAULT if data is None else PAPER) | {"steps": STEPS}


def texts(data: Path | None, tuning: bool) -> tuple[str, str]:
    """The text to train on and the one to measure on; in tuning the validation text, or a part of the training text."""
    valid = None
    if data is None:
        training, test = split(read_text())
    elif (data / "train.txt").exists():
        training, valid, test = (read_text(str(data / f"{part}.txt")) for part in ("train", "valid", "test"))
    else:
        shards = sorted(data.glob("heldout-*.txt")), sorted(data.glob("news.en.heldout-*"))
        if not all(shards):
            raise InputError(f"{data}: it needs train.txt, valid.txt and test.txt, or LM1B's shards: see paper_lm.py")
        training, test = ("".join(read_text(str(shard)) for shard in group) for group in shards)
    if not tuning:
        return training, test
    return split(training) if valid is None else (training, valid)


def run(settings: Settings, data: Path | None, precision: Precision | None = None) -> Record:
    """Train one model, as ``pc-triton train`` does; its score is the perplexity per token of the text measured on.

    precision: as in `train`.
    """
    options = {name: value for name, value in settings.items() if name != "tuning"}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("train.txt", "held_out.txt")]
        for path, text in zip(paths, texts(data, settings["tuning"])):
            path.write_text(text, encoding="utf-8")
        every = settings["steps"] if settings["tuning"] else -(-settings["steps"] // 4)
        options = (
            {"eval_every": every, "inference_steps": 3} | options | {"data": str(paths[0]), "held_out": str(paths[1])}
        )
        try:
            out = Path(folder) / "run"
            result = train(TrainSettings(**options), out, device="cpu", quiet=True, precision=precision)
        except Diverged as error:
            return {"diverged": str(error)}
    record = {"score": result["held_out_perplexity"], "unigram_perplexity": result["unigram_perplexity"]}
    if result["report"] is not None:
        record |= standing(result["report"])
        record["node_energies"] = {node.name: node.energy for node in result["report"].nodes}
    return record | {"evaluations": result["evaluations"], "losses_every_10th": result["losses"][::10]}


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of methods and tuning, and a PNG of the curves beside the JSON."""
    common = base(data, quick)
    variants = [common | {"method": method} for method in ("bp", "pc", "gaussian-pc")]
    variants.insert(1, variants[0] | {"steps": common["steps"] * products(variants[1]) // products(variants[0])})
    rates, seeds = (RATES[:2], SEEDS[:1]) if quick else (RATES, SEEDS)
    if data is None:
        variants.append(common | {"method": "pc", "inference_steps": 2})  # the default since; the others are T = 3
    tuned(out, variants, rates, seeds, partial(run, data=data), jobs)
    long = [common | {"method": method, "warmup": LONG_WARMUP} for method in ("bp", "pc")]
    tuned(out, long, rates[:1] if quick else LONG_RATES, seeds, partial(run, data=data), jobs)
    runs = load(out)["runs"]
    results = finished(runs)
    plot(results, out.with_suffix(".png"))
    return table(results) + "\n\n" + tuning_table(runs)


def finished(runs: Sequence[Record]) -> list[list[Record]]:
    """The runs that count, by method: those of backpropagation first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(runs, key=lambda record: record["settings"]["seed"]):
        s = record["settings"]
        if not s["tuning"]:
            method = (s["method"] != "bp", s["method"] != "pc", s.get("inference_steps", 3))
            key = (*method, s["steps"], s.get("warmup", 0.0), s["lr"])
            groups.setdefault(key, []).append(record)
    return [groups[key] for key in sorted(groups)]


def products(settings: Settings) -> int:
    """Passes of the network's products in a training: a step of BP takes 3, one of PC in error order 2 T + 1."""
    return settings["steps"] * (3 if settings["method"] == "bp" else 2 * settings.get("inference_steps", 3) + 1)


def names(all_settings: Sequence[Settings]) -> list[str]:
    """Of each its method, and the settings in which they differ otherwise."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings if key not in ("method", "lr", "seed"))
    differ = [key for key in keys if len({settings.get(key) for settings in all_settings}) > 1]
    parts = [[f"{key.replace('_', ' ')} {s[key]}" for key in differ if key in s] for s in all_settings]
    return [", ".join([s["method"], *part]) for s, part in zip(all_settings, parts)]


def table(results: Sequence[Sequence[Record]]) -> str:
    """Markdown: each method's perplexities, their ratio to backpropagation's, and the regime, means over the seeds."""
    seeds = sorted({record["settings"]["seed"] for records in results for record in records})
    heads = ["method", "products", "lr", *(f"seed {seed}" for seed in seeds), "mean ± std", "ratio to bp", "regime"]
    rows = []
    first = mean(map(score, results[0]))
    all_settings = [records[0]["settings"] for records in results]
    for name, settings, records in zip(names(all_settings), all_settings, results):
        by_seed = {record["settings"]["seed"]: [record] for record in records}
        cells = [name, f"{products(settings) / products(all_settings[0]):.2f}", f"{settings['lr']:g}"]
        cells += [spread(by_seed[seed]) if seed in by_seed else "" for seed in seeds]
        cells += [spread(records), f"{mean(map(score, records)) / first:.3f}", regime(records)]
        rows.append(cells)
    return markdown(heads, rows)


def tuning_table(runs: Sequence[Record]) -> str:
    """Markdown: each method's perplexity in tuning at every learning rate that was tried."""
    tried = [record for record in runs if record["settings"]["seed"] == TUNING_SEED]
    rates = sorted({record["settings"]["lr"] for record in tried})
    found: dict[str, dict[float, str]] = {}
    for name, record in zip(names([record["settings"] for record in tried]), tried):
        found.setdefault(name, {})[record["settings"]["lr"]] = spread([record])
    rows = [[name, *(values.get(rate, "") for rate in rates)] for name, values in found.items()]
    return markdown(["in tuning", *(f"lr {rate:g}" for rate in rates)], rows)


def plot(results: Sequence[Sequence[Record]], png: Path) -> None:
    """Perplexity over the training steps: each method's mean over the seeds, and their range as a band."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, records in zip(names([records[0]["settings"] for records in results]), results):
        finished: list[Any] = [record["evaluations"] for record in records if "evaluations" in record]
        if finished:
            steps = [row["step"] for row in finished[0]]
            values = list(zip(*([row["perplexity"] for row in rows] for rows in finished)))
            (line,) = axes.plot(steps, list(map(mean, values)), marker=".", label=name)
            band = list(map(min, values)), list(map(max, values))
            axes.fill_between(steps, *band, color=line.get_color(), alpha=0.2)
    unigram = next((r["unigram_perplexity"] for rows in results for r in rows if "unigram_perplexity" in r), None)
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle="--", label=f"unigram model, {unigram:.0f}")
    axes.set(xlabel="training step", ylabel="held-out perplexity per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(png, dpi=120)
