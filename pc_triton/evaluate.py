"""What is done with a trained language model: perplexity, report, curves and generated text."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from . import parallel, report
from .families import Gaussian
from .free_energy import FreeEnergy
from .head import Head
from .models import Transformer
from .report import Report
from .settings import Settings
from .text import InputError, waiting

LOGITS = 2**24
"""`perplexity` makes about so many at once, 64 MB in float32, or those of one sequence if that is more."""


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """A text, int64 ``[L]``, cut into sequences: x int64 ``[S, context]``, and y, the token after each of x.

    Tokens at the end that fill no sequence are left out. Raises InputError for L <= context.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise InputError(
            f"{len(tokens)} tokens of text for a context of {context}: give more, or train with a smaller --context"
        )
    end = count * context
    return tokens[:end].view(count, context), tokens[1 : end + 1].view(count, context)


@torch.no_grad()
def perplexity(model: Transformer, tokens: Tensor, shows: bool = False) -> float:
    """Perplexity per token, by plain forward passes over the `windows` of a text; tokens int64 ``[L]``, on the CPU.

    In a group of processes each measures a part, so all of them must call it. Each makes as many passes as the others,
    since a sharded model is gathered in every one. shows: print a progress bar. Raises InputError for L <= context.
    """
    device = model.head.weight.device
    total = torch.zeros((), dtype=torch.float64)
    x, y = windows(tokens, model.context)
    size = min(64, max(1, LOGITS // (model.context * (model.head.out_features + model.context))))
    parts = list(zip(parallel.part(x).split(size), parallel.part(y).split(size))) if len(parallel.part(x)) else []
    passes = max(parallel.gathered([len(parts)]))
    with waiting(shows, "perplexity", passes, "pass") as bar:
        for k in range(passes):
            some_x, some_y = parts[k] if k < len(parts) else (x[:1], None)
            logits = model(some_x.to(device))
            if some_y is not None:
                total += F.cross_entropy(logits.flatten(0, 1), some_y.to(device).flatten(), reduction="sum").cpu()
            bar.update()
    return float((parallel.total(total) / y.numel()).exp())


def unigram_perplexity(counts: Tensor, tokens: Tensor, context: int) -> float:
    """Perplexity per token of the unigram model with add-one smoothing, over the same tokens as `perplexity`.

    counts: int64 ``[vocabulary]``, those of the training tokens; tokens int64 ``[L]``. Raises InputError for
    L <= context.
    """
    log_q = (counts.double() + 1).log() - (counts.double() + 1).sum().log()
    return float((-log_q[windows(tokens, context)[1]].mean()).exp())


def regime(free_energy: FreeEnergy, tokens: Tensor, context: int, sequences: int, shows: bool = False) -> Report:
    """`FreeEnergy.report` on the first sequences of a text, int64 ``[L]``. Raises InputError for L <= context.

    shows: print a progress bar.
    """
    device = next(free_energy.parameters()).device
    x, y = (t[:sequences].to(device) for t in windows(tokens, context))
    with waiting(shows, "report", report.LONG_RUN + 1, "step") as bar:
        return free_energy.report(x, target(free_energy, y), tick=bar.update)


def target(free_energy: FreeEnergy, y: Tensor) -> Tensor:
    """What the output is clamped to: labels y int64 ``[B, N]``, or one-hot ``[B, N, V]`` for a Gaussian output."""
    if isinstance(free_energy.output, Gaussian):
        head = next(m for m in free_energy.modules() if isinstance(m, Head))
        return F.one_hot(y, head.out_features).float()
    return y


@torch.no_grad()
def generate(
    model: Transformer, tokens: Tensor, count: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Tensor:
    """A text's tokens followed by ``count`` more, drawn one by one: int64 ``[L + count]`` or shorter, on the CPU.

    If the model has a separator, generation ends before the first one that is drawn, at the end of the document.

    tokens: int64 ``[L]``, L >= 1. temperature: divides the logits; 0 takes the likeliest token. top_k: draw from the k
    likeliest tokens only; 0 is all. seed: that of the draws. Raises InputError for values out of range.
    """
    if len(tokens) == 0:
        raise InputError("the prompt is empty: give at least one character with --prompt")
    if count < 1:
        raise InputError(f"tokens={count}: give a whole number of at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: give 0 (the likeliest token) or a positive finite number")
    if top_k < 0:
        raise InputError(f"top_k={top_k}: give 0 (all tokens) or a positive whole number")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed}: give a whole number of at least 0, below 2**63")
    device, random = model.head.weight.device, torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(tokens[None, -model.context :].to(device))[0, -1].double().cpu()
        likeliest = logits.topk(1 if temperature == 0 else min(top_k or len(logits), len(logits)))
        p = ((likeliest.values - likeliest.values[0]) / (temperature or 1.0)).softmax(-1)
        drawn = likeliest.indices[torch.multinomial(p, 1, generator=random)]
        if int(drawn) == model.separator:
            break
        tokens = torch.cat([tokens, drawn])
    return tokens


def plot(settings: Settings, losses: list[float], evaluations: list[dict[str, Any]], unigram: float) -> bytes:
    """A PNG of two curves: the training loss of each step, and the held-out perplexity beside the unigram model's.

    losses, evaluations, unigram: as `train` returns them.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    name = "cross-entropy" if settings.method == "bp" else "free energy"
    left.set(title=f"training {name} ({settings.method})", xlabel="step", ylabel=f"{name}, nats per token")
    right.plot([row["step"] for row in evaluations], [row["perplexity"] for row in evaluations], marker="o")
    right.axhline(unigram, color="gray", linestyle="--", label=f"unigram model, {unigram:.0f}")
    right.set(title="held-out perplexity", xlabel="step", ylabel="per token", yscale="log")
    right.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
