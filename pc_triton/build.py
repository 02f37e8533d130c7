"""The model of a run, its free energy and its optimiser: made from settings, or from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import checkpoint, parallel
from .families import Gaussian
from .free_energy import FreeEnergy
from .models import Transformer
from .rules import Precision
from .run_files import restore
from .settings import INFERENCE_DTYPES, STATE_DTYPES, Settings, stored_settings
from .text import InputError


def build(settings: Settings, precision: Precision | None = None) -> tuple[Transformer, FreeEnergy | None]:
    """The model, in float32 on the CPU, and the free energy that trains it (None for backpropagation).

    Gaussian PC is that of Pinchetti et al. 2022. Attention has Gaussian nodes on its softmax. The output is the softmax
    of the logits, with a Gaussian energy of variance 1, clamped to one-hot labels.

    precision: a rule of your own, used instead of the settings' precision. Raises InputError for sizes out of range.
    """
    s = settings
    gaussian = s.method == "gaussian-pc"
    try:
        attention = Gaussian() if gaussian else True
        separator = None if s.stream is None else s.vocabulary - 1
        model = Transformer(
            s.vocabulary,
            s.width,
            s.heads,
            s.blocks,
            s.context,
            attention=attention,
            separator=separator,
            checkpointing=s.checkpointing,
        )
        if s.method == "bp":
            return model, None
        whole = nn.Sequential(model, nn.Softmax(-1)) if gaussian else model
        output = Gaussian(1.0) if gaussian else None
        options: dict[str, Any] = {"order": s.order, "displacement": s.displacement}
        options["precision"] = precision or (s.precision if s.precision == "auto" else float(s.precision))
        options["state_dtype"] = STATE_DTYPES[s.state_dtype]
        options["inference_dtype"] = INFERENCE_DTYPES[s.inference_dtype]
        return model, FreeEnergy(whole, output, steps=s.inference_steps, **options)
    except ValueError as error:
        raise InputError(str(error)) from None


class Run(NamedTuple):
    """What `load` returns."""

    model: Transformer
    free_energy: FreeEnergy | None
    tokenizer: Tokenizer
    counts: Tensor
    """int64 ``[vocabulary]``: how often each token occurs in the training tokens."""
    held_out: Tensor
    """int64 ``[L]``: the tokens that the run is measured on."""
    record: dict[str, Any]


def load(path: str | Path, device: str = "auto") -> Run:
    """The run of a checkpoint, with its model on a device. path: the file, or the folder of the run.

    Raises InputError for a checkpoint or a device that cannot be used.
    """
    place = parallel.choose_device(device)
    tensors, record = checkpoint.load(path)
    model, free_energy = build(stored_settings(path, record))
    restore(path, tensors, record, model, None if free_energy is None else free_energy.tracker)
    with checkpoint.fitting(path):
        tokenizer, held_out = Tokenizer.from_str(record["tokenizer"]), tensors["held_out"].to(torch.int64)
        return Run(model.to(place), free_energy, tokenizer, tensors["unigram"], held_out, record)


def compiled(learner: nn.Module, free_energy: FreeEnergy | None, whole: bool) -> nn.Module:
    """The learner of `parallel.replicate`, to be compiled at its first batch.

    whole: whether a training step is one call. Then all of it is one graph, else the model alone is.
    """
    if free_energy is None:
        return torch.compile(learner)  # type: ignore[return-value]
    if whole:
        free_energy.compile()
    else:
        free_energy.compile_model()
    return learner


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """The optimiser of every run; on a GPU its step is one kernel."""
    fused = all(p.is_cuda for p in model.parameters()) or None
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a fraction of its peak: a linear warm-up, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / max(1, int(steps * warmup))) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
