"""What the bets share: networks, data, and one loop that trains by PC or by BP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from images import Images, images
from runs import Record, Settings
from torch import Tensor, nn

import pc_triton as pc
from pc_triton.build import schedule
from pc_triton.data import draw, encode
from pc_triton.evaluate import unigram_perplexity
from pc_triton.models import Transformer
from pc_triton.text import read_text, split, train_tokenizer

METHODS: dict[str, Settings] = {"bp": {}, "pc": {}, "pc 0.1": {"displacement": 0.1}}
"""The options of `pc.FreeEnergy` by method; BP has none."""
BP_STEPS = 5, 3
"""For so many steps of BP as many of PC at T = 2: equal products."""
MEASURED = 16_000
"""So many held-out tokens are measured on."""

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def steps(pc_steps: int, method: str) -> int:
    """The steps that cost as many products as pc_steps of PC."""
    return pc_steps * BP_STEPS[0] // BP_STEPS[1] if method == "bp" else pc_steps


def free_energy(model: nn.Module, method: str) -> pc.FreeEnergy | None:
    """The loss of a method of PC; None for BP."""
    return None if method == "bp" else pc.FreeEnergy(model, **METHODS[method])


def backpropagation(model: nn.Module) -> Loss:
    """BP's loss: cross-entropy for labels, half the squared error for values, as F at the prediction."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        if y.is_floating_point():
            return 0.5 * F.mse_loss(out, y) * y.shape[-1]
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    return loss


def train(
    model: nn.Module, loss: Loss, batches: Batches, settings: Settings, after: Callable[[int], None] | None = None
) -> Record:
    """Train for ``steps`` steps of Adam; settings: also lr, warmup, and optionally clip (0: none) and beta2.

    after: called after each step with its number, from 1. Returns an empty record, or why it diverged.
    """
    count, clip = settings["steps"], settings.get("clip", 0)
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"], betas=(0.9, settings.get("beta2", 0.999)))
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * schedule(step, count, settings["warmup"])
        value = loss(*next(batches))
        if not value.isfinite():
            return {"diverged": f"the loss is {value.item()} at step {step + 1}"}
        optimizer.zero_grad()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if after is not None:
            after(step + 1)
    return {}


# Images.


class Deep(nn.Module):
    """Images to logits through ``depth`` hidden layers of tanh, each linear layer a value node.

    gain: the standard deviation of the initial weights times the root of a layer's inputs. residual: h + tanh(z) and
    not tanh(z), from the second layer on. normalised: LayerNorm before each layer but the first.
    """

    def __init__(
        self, inputs: int, width: int, depth: int, gain: float, residual: bool = False, normalised: bool = False
    ) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(pc.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if normalised else nn.Identity() for _ in range(depth))
        self.last = nn.Linear(width, 10)
        self.residual = residual
        for layer in (*self.layers, self.last):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for number, layer in enumerate(self.layers):
            new = layer(self.norms[number - 1](h) if number else h).tanh()
            h = h + new if self.residual and number else new
        return self.last(self.norms[-1](h))


@cache
def standard_images(data: Path | None) -> tuple[Images, Images]:
    """The images less their mean, over their deviation: of each set to tune on, and to measure on."""
    whole = images(data)
    mean, std = whole.x.mean(), whole.x.std()
    return tuple(  # type: ignore[return-value]
        Images((s.x - mean) / std, s.y, (s.test_x - mean) / std, s.test_y) for s in (images(data, True), whole)
    )


def batches_of(x: Tensor, y: Tensor, size: int, seed: int) -> Batches:
    """Batches drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(x), (size,), generator=generator)
        yield x[at], y[at]


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent of wrong labels."""
    return 100 * (model(x).argmax(-1) != y).double().mean().item()


# Texts.


class Tokens(NamedTuple):
    """Tokens int64 ``[L]``: to train on, to choose by, and to measure on."""

    train: Tensor
    valid: Tensor
    test: Tensor
    unigram: float
    """Perplexity of the unigram model on ``test``."""


@cache
def default_tokens(vocabulary: int, context: int) -> Tokens:
    """The default text."""
    training, test = split(read_text())
    training, valid = split(training)
    tokenizer = train_tokenizer(training, vocabulary)
    parts = [encode(tokenizer, training), *(encode(tokenizer, text)[:MEASURED] for text in (valid, test))]
    counts = torch.bincount(parts[0], minlength=vocabulary)
    return Tokens(*parts, unigram_perplexity(counts, parts[2], context))


def sequences(tokens: Tensor, context: int, size: int, seed: int) -> Batches:
    """Batches of sequences from random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = draw(tokens, context, size, generator)
        yield tokens[at], tokens[at + 1]


def language_model(vocabulary: int, width: int, blocks: int, context: int, factor: float = 1.0) -> Transformer:
    """A transformer with four heads; factor: on the initial weights."""
    model = Transformer(vocabulary, width, 4, blocks, context)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(factor)
    return model
