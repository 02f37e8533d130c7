"""The settings of a run of ``pc-triton train``. Each field is an option of the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import orders
from .text import InputError

METHODS = ("pc", "bp", "gaussian-pc")
ORDERS = tuple(orders.ORDERS)
OWN = ", ".join(f"{order.steps} ({name})" for name, order in orders.ORDERS.items())
DTYPES = ("auto", "float32", "bfloat16")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INFERENCE_DTYPES = {"same": None, "float8_e4m3fn": torch.float8_e4m3fn}
MAY_CHANGE = (
    "data", "stream", "column", "held_out", "micro_batch", "checkpointing", "compile", "steps", "eval_every",
)  # fmt: skip
"""Settings that may change when a run is resumed. The text must stay the same: its digest is compared."""


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run. Raises InputError for a value out of range."""

    method: str = _setting("pc", "predictive coding, backpropagation, or PC with every energy Gaussian", METHODS)
    data: str | None = _setting(None, "UTF-8 text file to train on; Python's language reference if not given")
    stream: str | None = _setting(
        None,
        "in place of --data, documents that are read as they are needed: .txt, .jsonl, .csv or .parquet files (* and "
        "** as in a shell, in quotes), or a set of the Hugging Face hub, NAME, NAME:CONFIG or NAME:CONFIG:SPLIT",
    )
    column: str = _setting("text", "column of --stream that holds the text")
    pool: int = _setting(1024, "sequences of --stream that are read ahead in each process, of which a batch is drawn")
    held_out: str | None = _setting(
        None,
        "what to measure on, of the kind of --data or --stream; by default a part of that, not trained on",
    )
    width: int = _setting(128, "units of the residual stream, a multiple of heads")
    heads: int = _setting(4, "attention heads")
    blocks: int = _setting(2, "transformer blocks")
    context: int = _setting(64, "tokens the model sees at once")
    vocabulary: int = _setting(1024, "byte-pair tokens, at least 256")
    batch: int = _setting(16, "sequences per training step, of all processes together")
    micro_batch: int | None = _setting(
        None, "sequences that a process has in memory at once; if not given, all that it has of a batch"
    )
    steps: int = _setting(600, "training steps")
    lr: float = _setting(2e-3, "peak learning rate of AdamW, which then falls by a cosine to a tenth")
    warmup: float = _setting(0.05, "part of the steps in which the learning rate rises to its peak")
    seed: int = _setting(0, "seed of the weights and the batches")
    inference_steps: int = _setting(
        None, "T, the inference steps of predictive coding; if not given, the order's own: " + OWN
    )
    order: str = _setting("error", "order of inference", ORDERS)
    displacement: float = _setting(0.003, "fraction of the free energy that inference may explain away")
    precision: str = _setting("auto", "precision of the hidden nodes: auto, by the displacement, or a number")
    state_dtype: str = _setting("float32", "what the states of inference are kept in", tuple(STATE_DTYPES))
    inference_dtype: str = _setting(
        "same", "what products are made in where states move and no weight learns; same: as elsewhere",
        tuple(INFERENCE_DTYPES),
    )  # fmt: skip
    dtype: str = _setting(
        "auto",
        "what products are made in; parameters, losses and evaluations are float32. auto is bfloat16 on a GPU that has "
        "it, else float32; float32 is TF32 on a GPU",
        DTYPES,
    )
    checkpointing: bool = _setting(False, "compute each block again for its backward passes, to hold less in memory")
    compile: bool = _setting(False, "make the training step one graph by torch.compile, on a GPU one CUDA graph")
    eval_every: int = _setting(100, "training steps between evaluations, each of which saves a checkpoint")

    def __post_init__(self) -> None:
        kinds = ("state_dtype", STATE_DTYPES), ("inference_dtype", INFERENCE_DTYPES), ("dtype", DTYPES)
        for name, choices in (("method", METHODS), ("order", ORDERS), *kinds):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        if self.inference_steps is None:
            object.__setattr__(self, "inference_steps", orders.as_order(self.order).steps)
        sizes = ["width", "heads", "blocks", "context", "batch", "steps", "inference_steps", "eval_every", "pool"]
        for name in sizes if self.micro_batch is None else [*sizes, "micro_batch"]:
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise InputError(f"{name}={value}: give a whole number of at least 1, below 2**31")
        for name in ("data", "stream", "held_out"):
            value = getattr(self, name)
            if value is not None and (not value or "\0" in value):
                raise InputError(f"{name}={value!r}: give the name of a file, or leave it out")
        if self.data is not None and self.stream is not None:
            raise InputError("data and stream are both given: leave one out")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr}: give a positive finite learning rate, such as 2e-3")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup={self.warmup}: give a part of the steps, at least 0 and below 1, such as 0.05")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed}: give a whole number of at least 0, below 2**63")
        if self.precision != "auto":
            try:
                fine = 0 < float(self.precision) < math.inf
            except ValueError:
                fine = False
            if not fine:
                raise InputError(f"precision={self.precision}: give auto, or a positive finite number")
        if self.micro_batch is not None and self.method != "bp" and self.order == "incremental":
            raise InputError(
                "micro_batch: order=incremental moves the weights at every inference step of the whole batch: use "
                "another --order, or a smaller --batch"
            )

        if self.compile and self.method != "bp" and (self.order == "incremental" or self.checkpointing):
            raise InputError("compile: leave out --checkpointing and --order incremental, or --compile")

    def at_once(self, processes: int) -> int:
        """How many sequences each of the processes has in memory at once."""
        part = self.batch // processes
        return min(part, self.micro_batch or part)

    def reported(self, processes: int) -> int:
        """How many sequences a report uses: half as many as a step, since it holds two inferences."""
        return max(1, self.at_once(processes) // 2)


def stored_settings(path: str | Path, record: dict[str, Any]) -> Settings:
    """The settings in a checkpoint's record. Raises InputError if another version wrote them."""
    try:
        return Settings(**{"dtype": "float32"} | record["settings"])  # before there was a choice, it was that
    except (TypeError, KeyError):
        raise InputError(f"{path} is of another version of pc_triton: use that version, or train again") from None


def check_resumed(path: Path, settings: Settings, record: dict[str, Any]) -> None:
    """Raise InputError if a run with these settings would not continue the run of the checkpoint."""
    stored = stored_settings(path, record)
    if (stored.stream is None) != (settings.stream is None):
        was, other = ("--data", "--stream") if stored.stream is None else ("--stream", "--data")
        raise InputError(f"{path} was made with {was}: leave {other} out, or give the {was} again")
    fixed = [f.name for f in dataclasses.fields(Settings) if f.name not in MAY_CHANGE]
    # The checkpoint of a stream keeps the held-out tokens, so another held_out would have no effect.
    for name in fixed if stored.stream is None else [*fixed, "held_out"]:
        old, new = getattr(stored, name), getattr(settings, name)
        if old != new and (name, new) != ("dtype", "auto"):  # auto is what the run has
            option = "--" + name.replace("_", "-")
            raise InputError(f"{path} was made with {option} {old}, not {new}: leave it out, or train in another --out")
    if record["step"] > settings.steps:
        raise InputError(f"{path} is at step {record['step']} already: give --steps of at least that")
