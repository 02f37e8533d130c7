"""Bet: a pre-trained model that goes on learning from a stream of other text, one sequence at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bets_training import MEASURED, Loss, backpropagation, free_energy, language_model, sequences, train
from matplotlib.figure import Figure
from runs import Record, Settings, chosen, load, markdown, mean_and_std, score, spread, tuning_table
from torch import Tensor, nn

from pc_triton.data import encode
from pc_triton.evaluate import perplexity, windows
from pc_triton.text import read_text, split, train_tokenizer

VOCABULARY, WIDTH, BLOCKS, CONTEXT, SEQUENCES = 512, 64, 2, 32, 16
CHARACTERS = 1_000_000
"""So much of a text is used."""
PRETRAINED, STREAMED, SEEDS = 400, 150, (0, 1, 2)
METHODS = ("bp", "bp, clipped", "bp, two steps", "bp, proximal", "pc", "pc 0.1")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3), "adam": (1e-4, 3e-4, 1e-3, 3e-3)}


@cache
def texts(data: Path | None) -> dict[str, Tensor]:
    """Tokens int64 ``[L]``: "old" to pre-train on, "kept" of the same kind, streams "new" and to "tune" on."""
    reference = read_text()
    if data is None:
        rest, kept = split(reference)
        rest, tune = split(rest)
        found = {"old": rest[: len(rest) // 2], "kept": kept, "tune": tune, "new": rest[len(rest) // 2 :]}
    else:
        wiki, lm1b = (data / "wikitext-2" / f"{part}.txt" for part in ("train", "test")), data / "lm1b"
        found = dict(zip(("old", "kept"), (read_text(str(path)) for path in wiki)))
        found |= {"tune": read_text(str(lm1b / "news.en.heldout-00000-of-00050.txt")), "new": reference}
    tokenizer = train_tokenizer(found["old"][:CHARACTERS], VOCABULARY)
    tokens = {name: encode(tokenizer, text[:CHARACTERS]) for name, text in found.items()}
    return tokens | {"kept": tokens["kept"][:MEASURED]}


@cache
def pretrained(data: Path | None, count: int) -> nn.Module:
    """The model trained by BP on the old text."""
    torch.manual_seed(0)
    model = language_model(VOCABULARY, WIDTH, BLOCKS, CONTEXT)
    batches = sequences(texts(data)["old"], CONTEXT, SEQUENCES, 0)
    train(model, backpropagation(model), batches, {"steps": count, "lr": 4e-3, "warmup": 0.1, "clip": 1.0})
    return model


def streamed(tokens: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences ``[1, CONTEXT]`` in the order of the text, from a place by the seed."""
    x, y = windows(tokens, CONTEXT)
    begin = seed % 7 * len(x) // 7
    for number in range(begin, begin + count):
        yield x[number % len(x)][None], y[number % len(x)][None]


def learn(method: str, loss: Loss, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """What a method does with one sequence."""
    weights = optimizer.param_groups[0]["params"]

    def gradient() -> None:
        optimizer.zero_grad()
        loss(x, y).backward()

    gradient()
    if method == "bp, two steps":
        optimizer.step()
        gradient()
    if method == "bp, clipped":
        nn.utils.clip_grad_norm_(weights, 1.0)
    if method == "bp, proximal":
        before = [(w.detach().clone(), w.grad.clone()) for w in weights]
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        gradient()
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for w, (old, first) in zip(weights, before):
                w.copy_(old)
                w.grad.add_(first).div_(2)
    optimizer.step()


def run(settings: Settings, data: Path | None) -> Record:
    """Read one stream: ``score`` is the perplexity on it, ``old`` that on the old text at the end."""
    found, method = texts(data), settings["method"]
    model = copy.deepcopy(pretrained(data, settings["pretrained"]))
    loss = (free_energy(model, method) if method.startswith("pc") else None) or backpropagation(model)
    optimizer = OPTIMIZERS[settings["optimizer"]](model.parameters(), settings["lr"])
    seen = []
    stream = found["tune" if settings["tuning"] else "new"]
    for x, y in streamed(stream, settings["steps"], settings["seed"]):
        with torch.no_grad():
            seen.append(float(backpropagation(model)(x, y)))
        if not math.isfinite(seen[-1]):
            return {"diverged": f"the loss is {seen[-1]} at step {len(seen)}"}
        learn(method, loss, optimizer, x, y)
    before = perplexity(pretrained(data, settings["pretrained"]), found["kept"])
    after = perplexity(model, found["kept"])
    if not math.isfinite(after):
        return {"diverged": "the perplexity of the old text is not finite"}
    return {"score": math.exp(mean(seen)), "old": after, "old_before": before}


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the methods and of tuning, and a PNG."""
    variants: list[tuple[Settings, list[Settings]]] = []
    for optimizer in OPTIMIZERS:
        for method in ("none", *METHODS) if optimizer == "sgd" else METHODS:
            own = {"method": "bp" if method == "none" else method, "optimizer": optimizer}
            own |= {"pretrained": 5, "steps": 5} if quick else {"pretrained": PRETRAINED, "steps": STREAMED}
            rates = [0.0] * len(RATES[optimizer]) if method == "none" else RATES[optimizer]
            variants.append((own, [{"lr": lr} for lr in rates[: 1 if quick else None]]))
    results = chosen(out, variants, SEEDS[:1] if quick else SEEDS, partial(run, data=data), jobs)
    plot(results, out.with_suffix(".png"))
    tuning = tuning_table(load(out)["runs"], ("method", "optimiser"), lambda s: (s["method"], s["optimizer"]), 1)
    return "\n\n".join([table(results), "**Tuning**", tuning])


def table(results: Sequence[Sequence[Record]]) -> str:
    rows = []
    for records in results:
        settings = records[0]["settings"]
        nothing = settings["lr"] == 0
        cells = ["nothing is learnt", ""] if nothing else [settings["method"], settings["optimizer"]]
        olds = [record.get("old", math.inf) for record in records]
        rows.append([*cells, f"{settings['lr']:g}", spread(records), mean_and_std(olds)])
    return markdown(["method", "optimiser", "lr", "perplexity of the stream", "of the old text, after"], rows)


def plot(results: Any, png: Path) -> None:
    """Perplexity of the old text over that of the stream, every seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, optimizer in zip(figure.subplots(1, 2), OPTIMIZERS):
        for records in results:
            settings = records[0]["settings"]
            if settings["optimizer"] != optimizer or settings["lr"] == 0:
                continue
            marker = "o" if settings["method"].startswith("pc") else "x"
            points = [(score(record), record["old"]) for record in records if "old" in record]
            if points:
                axes.plot(*zip(*points), marker, label=settings["method"])
        axes.set(title=optimizer, xlabel="perplexity of the stream", ylabel="of the old text, after")
        axes.legend(fontsize="small")
    figure.savefig(png, dpi=110)
