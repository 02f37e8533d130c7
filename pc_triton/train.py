"""Trains the transformer of ``models.py`` on text, by predictive coding or by backpropagation. The CLI calls it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, parallel, reference, shards
from .build import adamw, build, compiled, schedule
from .data import Ahead, StreamData, TextData
from .dispatch import backend
from .evaluate import perplexity, plot, regime, target, unigram_perplexity
from .free_energy import FreeEnergy
from .hardware import card, peak, settled_dtype, tf32
from .memory import step_memory, warning
from .report import Report
from .rules import Precision
from .run_files import RISE, fault_of, locked, restore, state, status, stops, summary_writer
from .settings import Settings, check_resumed, stored_settings
from .speed import Clock, told, trace
from .text import InputError

BACKPROPAGATION = "backpropagation: no inference"
UNREPORTED = "no report of a sharded model: `pc-triton eval` makes one"
TRACE = "trace.json"


class Diverged(InputError):
    """The loss, its gradient or the held-out perplexity is not finite or far too high."""


def losses(
    learner: nn.Module, free_energy: FreeEnergy | None, x: Tensor, y: Tensor, dtype: str = "float32"
) -> Iterator[Tensor]:
    """The losses of one training step in nats per token, float32 scalars: one, or T in incremental order.

    learner: what `parallel.replicate` makes of the model and its free energy. x, y: int64 ``[B, N]``, tokens and the
    token after each. dtype: that of the products. Raises ValueError as `FreeEnergy` does.
    """
    narrow = torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    if free_energy is None:
        with narrow:
            loss = F.cross_entropy(learner(x).flatten(0, 1), y.flatten())
        yield loss
        return
    clamped = target(free_energy, y)
    each = 1 if clamped is y else y.shape[1]  # with a Gaussian output F is per sequence, not per token
    if free_energy.order == "incremental":
        with narrow:
            for loss in free_energy.incremental(x, clamped):
                yield loss / each
        return
    with narrow:
        loss = learner(x, clamped)
    yield loss / each


def backward(
    learner: nn.Module,
    free_energy: FreeEnergy | None,
    x: Tensor,
    y: Tensor,
    micro_batch: int | None,
    dtype: str = "float32",
) -> Iterator[Tensor]:
    """The `losses` of one training step. Each is yielded after its gradients were added to those of the parameters.

    micro_batch: how many sequences to have in memory at once, or None for all. The loss and its gradients are the same
    but for rounding, since each sequence has its own inference. Incremental order ignores it. Other arguments as in
    `losses`.
    """
    if free_energy is not None and free_energy.order == "incremental":
        for loss in losses(learner, free_energy, x, y, dtype):
            loss.backward()
            yield loss.detach()
        return
    pieces, shares = micro_batches(x, y, micro_batch), []
    whole = free_energy is None or len(pieces) == 1
    with contextlib.nullcontext() if free_energy is None or whole else free_energy.tracker.hold():
        for k, piece in enumerate(pieces, 1):
            with contextlib.nullcontext() if k == len(pieces) else parallel.unsent(learner):
                loss = next(losses(learner, free_energy, *piece, dtype)) * (len(piece[0]) / len(x))
                loss.backward()
            shares.append(loss.detach())
            del loss  # its graph holds the states
    yield torch.stack(shares).sum()


def micro_batches(x: Tensor, y: Tensor, size: int | None) -> list[tuple[Tensor, Tensor]]:
    """x and y ``[B, N]`` in parts of ``size`` sequences, the last part being the rest; whole if size is None."""
    return list(zip(x.split(size or len(x)), y.split(size or len(y))))


def train(
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    quiet: bool = False,
    tensorboard: bool = False,
    profile: bool = False,
    shard: bool = False,
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Train a transformer on text. Leaves ``checkpoint.safetensors`` and ``curves.png`` in the folder ``out``.

    Arguments:
        resume: continue from the checkpoint in ``out``. On a CPU the run is then bit for bit as if it had not stopped.
        overwrite: replace the run in ``out``.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"cuda"``.
        quiet: print nothing.
        tensorboard: also write the losses and evaluations to event files in ``out``.
        profile: also write a trace of a few steps to ``trace.json`` in ``out``, by ``torch.profiler``.
        shard: split the parameters among the processes, by FSDP2. The checkpoint is then in shards, too, and any number
            of processes can go on with it, without ``shard`` as well. Its inference has no report.
        precision: a rule of your own, used instead of the settings' precision. A checkpoint does not keep it.

    In a group of processes (`parallel.joined`, or one that you made) each process calls this. Each takes its part of
    every batch, and all return the same. With a text in memory any number of processes trains the same model, but for
    rounding. Rank 0 prints and writes.

    Returns ``held_out_perplexity`` and ``unigram_perplexity`` (per token), ``losses`` (see `losses`), ``evaluations``
    (a list of dicts with step, perplexity and, for PC, `Report.scalars`), ``speed`` (a list of dicts with step and what
    `Clock.read` returns, of the steps since the evaluation before), ``report`` (a `Report`, or None for
    backpropagation), ``regime`` (the report in one line), ``parameters`` (their number), ``settings``, ``checkpoint``
    and ``curves`` (paths).

    Raises:
        InputError: settings, a text, a checkpoint or a folder that cannot be used, or a folder that another run uses.
        Diverged: the loss is no longer finite or more than `RISE` times the first. The last checkpoint is kept.
        KeyboardInterrupt: after the first Ctrl-C or SIGTERM, once the run is saved; its message says how to continue.
    """
    place, path = parallel.choose_device(device), Path(out) / checkpoint.NAME
    if settings.batch % parallel.processes():
        remedy = "use a number of processes that divides it" if resume else "give a --batch that is"
        raise InputError(f"batch={settings.batch} is no multiple of the {parallel.processes()} processes: {remedy}")
    if shard and not parallel.together():
        raise InputError("shard: there is one process alone: start several by torchrun, or leave --shard out")
    if shard and settings.compile:
        raise InputError("shard and compile are both given: leave one out")
    writer = summary_writer() if tensorboard else None
    with locked(path.parent) if parallel.rank() == 0 else contextlib.nullcontext(True) as locks:
        parallel.wait()  # until the folder is ours
        if path.exists() and not (resume or overwrite):
            raise InputError(f"{path.parent} already holds a run: add --resume or --overwrite, or choose another --out")
        shows = parallel.rank() == 0 and not quiet
        run = _Training(settings, path, place, resume, precision, shows and sys.stderr.isatty(), shard)
        if run.writes and writer is not None:
            run.events = writer(path.parent, purge_step=run.done + 1)
        if shows and not locks:
            tqdm.write(f"warning: {path.parent} has no locks: see that no other run writes there")
        traced: AbstractContextManager[Callable[[], None]] = contextlib.nullcontext(lambda: None)
        if profile and run.writes:
            traced = trace(path.parent / TRACE, settings.steps - run.done)
        with tf32(place), traced as tick:
            result = _run(run, tqdm.write if shows else lambda line: None, tick)
        parallel.wait()  # until rank 0 has written all: torchrun would end it if another process failed at its end
        return result


def _run(run: _Training, say: Callable[[str], Any], tick: Callable[[], None]) -> dict[str, Any]:
    """All that `train` does once its run is there. say: prints a line. tick: is called after each step."""
    settings, place, path = run.settings, run.place, run.path
    parameters = sum(p.numel() for p in run.model.parameters())
    kind = f"{settings.method} in {settings.dtype} on {parallel.processes()} x {card(place)}"
    say(f"{kind}: {parameters:,} parameters, {run.data.about}")
    say(f"held-out perplexity of the unigram model: {run.unigram:.1f} per token")
    needs = step_memory(
        settings,
        parallel.processes(),
        triton=backend(run.model.head.weight) is not reference,
        shard=run.sharded,
    )
    say(f"memory of a step: {needs}")
    scarce = warning(needs, settings, place, parallel.processes())
    if scarce is not None:
        say(scarce)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)

    bar = tqdm(total=settings.steps, initial=run.done, unit="step", disable=not run.shows)
    run.clock.start(run.done)
    with stops() as pressed, contextlib.closing(run.batches), bar:
        while run.done < settings.steps:
            x, y = run.batches.batch()
            run.step(x, y)
            bar.update()
            tick()
            due, stop = run.done % settings.eval_every == 0 or run.done == settings.steps, False
            if due and place.type == "cuda" and not run.evaluations:
                say(f"memory of a step, measured: {torch.cuda.max_memory_allocated(place) / 1e9:.3g} GB")
            if due or len(run.unread) == run.often or (parallel.processes() == 1 and pressed()):
                stop = bool(parallel.total(torch.tensor(int(pressed()))))  # all processes stop at the same step
                run.read_losses(x, y)
                speed = run.clock.read(run.done)
                bar.set_postfix_str(f"{status(run.losses, run.evaluations)}, {told(speed)}", refresh=False)
            if due:
                run.speed.append({"step": run.done, **speed})
                run.evaluate()
            if due or stop:
                run.save()
            if due:
                line = f"{status(run.losses, run.evaluations)}, {told(speed)}"
                bar.set_postfix_str(line)
                say(f"step {run.done}/{settings.steps}: {line} (unigram {run.unigram:.1f})")
                run.clock.start(run.done)
            if stop:
                raise KeyboardInterrupt(
                    f"stopped at step {run.done}: continue with --resume --out {shlex.quote(str(path.parent))}"
                )

    if not run.evaluations or run.evaluations[-1]["step"] < run.done:  # resumed at the last step, before its evaluation
        run.evaluate()
        run.save()
    if run.events is not None:
        run.events.close()
    curves = path.parent / "curves.png"
    if run.writes:
        checkpoint.write(curves, plot(settings, run.losses, run.evaluations, run.unigram))
    report = run.report(run.reported)
    return {
        "settings": settings,
        "parameters": parameters,
        "held_out_perplexity": run.evaluations[-1]["perplexity"],
        "unigram_perplexity": run.unigram,
        "losses": run.losses,
        "evaluations": run.evaluations,
        "speed": run.speed,
        "report": report,
        "regime": report.regime if report is not None else UNREPORTED if run.free_energy else BACKPROPAGATION,
        "checkpoint": path,
        "curves": curves,
    }


class _Training:
    """A run in progress: a new one, or with ``resume`` the one in the checkpoint at ``path``.

    shows: whether it shows progress bars.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path,
        place: torch.device,
        resume: bool,
        precision: Precision | None,
        shows: bool,
        shard: bool,
    ) -> None:
        self.path, self.place, self.shows, self.sharded = path, place, shows, shard
        tensors, record = checkpoint.load(path) if resume else ({}, {})
        if resume:
            check_resumed(path, settings, record)
            if shard and "shards" not in record:
                raise InputError(f"{path} was made without --shard: leave it out, or train in another --out")
            settings = dataclasses.replace(settings, dtype=stored_settings(path, record).dtype)
        self.settings = settings = settled_dtype(settings, place)
        self.data = (TextData if settings.stream is None else StreamData)(settings, path, tensors, record, shows)
        self.unigram = unigram_perplexity(self.data.counts, self.data.held_out, settings.context)
        torch.manual_seed(settings.seed)
        self.model, self.free_energy = build(settings) if precision is None else build(settings, precision)
        self.tracker = None if self.free_energy is None else self.free_energy.tracker
        self.model.to(place)
        if shard:
            shards.shard(self.model, place)
        self.optimizer = adamw(self.model, settings.lr)
        if resume:
            restore(path, tensors, record, self.model, self.tracker, self.optimizer)
        self.shards: str | None = record.get("shards")
        del tensors  # as large as the model and AdamW's state
        self.learner = (self.free_energy or self.model) if shard else parallel.replicate(self.model, self.free_energy)
        if settings.compile:
            part = settings.batch // parallel.processes()
            self.learner = compiled(self.learner, self.free_energy, settings.at_once(parallel.processes()) == part)
        self.writes = parallel.rank() == 0
        self.reported = settings.reported(parallel.processes())
        self.done: int = record.get("step", 0)
        self.losses: list[float] = record.get("losses", [])
        self.evaluations: list[dict[str, Any]] = record.get("evaluations", [])
        self.speed: list[dict[str, Any]] = record.get("speed", [])
        rate = peak(card(place), settings.dtype)
        self.clock = Clock(settings, None if rate is None else rate * parallel.processes())
        self.batches = Ahead(self.data, place)
        self.events: Any = None
        self.often = 1 if place.type == "cpu" else 10  # reading a loss waits for the GPU, so read them ten at a time
        self.unread: list[Tensor] = []  # the loss and the gradient's norm of each step since the last reading

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.events is not None:
            for name, number in numbers.items():
                self.events.add_scalar(name, number, step)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step on x and y, int64 ``[B, N]``."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * schedule(self.done, settings.steps, settings.warmup)
        for loss in backward(self.learner, self.free_energy, x, y, settings.micro_batch, settings.dtype):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            norm = norm.full_tensor() if self.sharded else norm  # type: ignore[attr-defined]
            both = torch.stack([loss, norm])
            if self.often == 1 and not norm.isfinite():
                break  # before the update, so that the faulty weights can be inspected
            self.optimizer.step()
            self.optimizer.zero_grad()  # frees the gradients' memory for the next inference
        self.unread.append(both)
        self.done += 1

    def read_losses(self, x: Tensor, y: Tensor) -> None:
        """Add the unread losses to the record. Raises Diverged at the first faulty one."""
        rows = parallel.mean(torch.stack(self.unread)).tolist()
        for k, (value, norm) in enumerate(rows, self.done - len(self.unread) + 1):
            fault = fault_of(value, norm, self.losses)
            if fault is not None:
                finite = math.isfinite(value + norm)
                raise self.diverged(k, fault + ("" if finite else self.faulty_node(x, y)))
            self.losses.append(value)
            self.log({"loss": value}, k)
        self.unread.clear()

    def diverged(self, step: int, fault: str) -> Diverged:
        kept = ""
        if self.path.exists():
            kept = f", and --overwrite or another --out; the earlier checkpoint is kept in {self.path}"
        return Diverged(f"at step {step} the {fault}: train with a --lr below {self.settings.lr}{kept}")

    def faulty_node(self, x: Tensor, y: Tensor) -> str:
        """For an error message: the first node of the forward pass whose prediction is not finite; else empty."""
        if (
            self.free_energy is None
            or self.sharded
            or not all(p.isfinite().all() for p in self.free_energy.parameters())
        ):
            return ""  # with weights that are not finite the first such node says nothing
        for piece, labels in micro_batches(x, y, self.settings.micro_batch):
            batch = self.free_energy.batch(piece, target(self.free_energy, labels))
            energy = batch.at_prediction()
            names = [node.name for node in batch.nodes if node.mu is not None and not node.mu.isfinite().all()]
            if not names and not energy.isfinite().all():
                names = ["output"]
            if names:
                return f", first in node {names[0]!r}"
        return ""

    def report(self, sequences: int) -> Report | None:
        """The report on the first so many held-out sequences; None for backpropagation and for a sharded model."""
        if self.free_energy is None or self.sharded:
            return None
        return regime(self.free_energy, self.data.held_out, self.settings.context, sequences, self.shows)

    def evaluate(self) -> None:
        """Measure perplexity and a report, and add both to the record. Raises Diverged."""
        row = {"perplexity": perplexity(self.model, self.data.held_out, self.shows)}
        if not row["perplexity"] < self.settings.vocabulary**RISE:
            raise self.diverged(self.done, f"held-out perplexity is {row['perplexity']:.4g}")
        report = self.report(min(4, self.reported))
        row |= report.scalars() if report is not None else {}
        self.evaluations.append({"step": self.done, **row})
        self.log(row, self.done)

    def save(self) -> None:
        """Write the checkpoint."""
        tensors, record = self.data.state(self.batches.place)  # every process takes part, rank 0 writes
        self.shards = shards.save(self.path.parent, self.shards, self.model, self.optimizer) if self.sharded else None
        if self.writes:
            tensors |= state(self.model, self.tracker, self.optimizer, self.sharded)
            record |= {} if self.shards is None else {"shards": self.shards}
            tensors |= {"unigram": self.data.counts, "held_out": self.data.held_out.to(torch.int32)}
            record |= {"settings": dataclasses.asdict(self.settings), "step": self.done, "losses": self.losses}
            record |= {"evaluations": self.evaluations, "speed": self.speed, "tokenizer": self.data.tokenizer.to_str()}
            checkpoint.save(self.path, tensors, record)
            shards.remove_others(self.path.parent, self.shards)
        if self.events is not None:
            self.events.flush()
