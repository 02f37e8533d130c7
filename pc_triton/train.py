"""Training the transformer of ``models.py`` on text, by predictive coding or by backpropagation; what the CLI calls."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, parallel, reference
from .data import StreamData, TextData
from .dispatch import backend
from .evaluate import perplexity, regime, target, unigram_perplexity
from .families import Gaussian
from .free_energy import FreeEnergy
from .memory import free_memory, step_memory
from .models import Transformer
from .run_files import choose_device, ctrl_c, make_folder, restore, state, status
from .settings import STATE_DTYPES, Settings, check_resumed, stored_settings
from .text import InputError

BACKPROPAGATION = "backpropagation: no inference"
RISE = 10
"""A loss above so many times the run's first is divergence: the first is about that of a model that knows nothing.
So is a held-out cross-entropy above so many times the logarithm of the vocabulary."""


class Diverged(InputError):
    """The loss is not finite, or far above where it began."""


def build(settings: Settings) -> tuple[Transformer, FreeEnergy | None]:
    """The model, float32 on the CPU, and the free energy it is trained by (None for backpropagation).

    Gaussian PC is that of Pinchetti et al. 2022: Gaussian nodes on attention's softmax, and a Gaussian output energy of
    variance 1 on the softmax of the logits, clamped to one-hot labels. Raises InputError for sizes out of range.
    """
    s = settings
    gaussian = s.method == "gaussian-pc"
    try:
        attention = Gaussian() if gaussian else True
        separator = None if s.stream is None else s.vocabulary - 1
        model = Transformer(
            s.vocabulary, s.width, s.heads, s.blocks, s.context, attention=attention, separator=separator
        )
        if s.method == "bp":
            return model, None
        whole = nn.Sequential(model, nn.Softmax(-1)) if gaussian else model
        output = Gaussian(1.0) if gaussian else None
        options: dict[str, Any] = {"order": s.order, "displacement": s.displacement}
        options["precision"] = s.precision if s.precision == "auto" else float(s.precision)
        options["state_dtype"] = STATE_DTYPES[s.state_dtype]
        return model, FreeEnergy(whole, output, steps=s.inference_steps, **options)
    except ValueError as error:
        raise InputError(str(error)) from None


def losses(learner: nn.Module, free_energy: FreeEnergy | None, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The losses of one training step, float32, 0-dim; one, or T in incremental order.

    learner: what `parallel.replicate` makes of the model and its free energy. x, y: int64 ``[B, N]``, tokens and the
    tokens that follow. In nats per token. Raises ValueError as `FreeEnergy` does.
    """
    if free_energy is None:
        yield F.cross_entropy(learner(x).flatten(0, 1), y.flatten())
        return
    clamped = target(free_energy, y)
    each = 1 if clamped is y else y.shape[1]  # the free energy of a Gaussian output is per sequence
    for loss in free_energy.incremental(x, clamped) if free_energy.order == "incremental" else [learner(x, clamped)]:
        yield loss / each


def backward(
    learner: nn.Module, free_energy: FreeEnergy | None, x: Tensor, y: Tensor, micro_batch: int | None
) -> Iterator[Tensor]:
    """The `losses` of one training step, each once its gradients have been added to those that the parameters have.

    micro_batch: None, or the sequences to have in memory at once: the one loss and its gradients are then the same but
    for rounding, since inference is each sequence's own. Not in incremental order. Other arguments as in `losses`.
    """
    if free_energy is not None and free_energy.order == "incremental":
        for loss in losses(learner, free_energy, x, y):
            loss.backward()
            yield loss.detach()
        return
    pieces, shares = micro_batches(x, y, micro_batch), []
    for k, piece in enumerate(pieces, 1):
        with contextlib.nullcontext() if k == len(pieces) else parallel.unsent(learner):
            loss = next(losses(learner, free_energy, *piece)) * (len(piece[0]) / len(x))
            loss.backward()
        shares.append(loss.detach())
        del loss  # its graph holds the states
    yield torch.stack(shares).sum()


def micro_batches(x: Tensor, y: Tensor, size: int | None) -> list[tuple[Tensor, Tensor]]:
    """x and y ``[B, N]`` in parts of so many sequences, the last of what is left; whole if size is None."""
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
) -> dict[str, Any]:
    """Train a transformer on text; leaves ``checkpoint.safetensors`` and ``curves.png`` in the folder ``out``.

    resume: go on from the checkpoint in ``out``: on a CPU bit for bit as if the run had not stopped. overwrite: replace
    the run that ``out`` holds. quiet: print nothing. tensorboard: write the losses and evaluations to event files in
    ``out`` too, up to each checkpoint.

    In a group of processes (`parallel.joined`, or one that you made) each process calls this, takes its part of every
    batch and returns the same: of a text any number of them trains the same model, but for rounding. Rank 0 prints and
    writes.

    Returns ``held_out_perplexity`` and ``unigram_perplexity`` (per token), ``losses`` (one a step, see `losses`),
    ``evaluations`` (a dict with step, perplexity and, for PC, `Report.scalars` for each), ``report`` (a `Report`, or
    None for backpropagation), ``regime`` (its line), ``parameters`` (their number), ``settings``, ``checkpoint`` and
    ``curves`` (paths).

    Raises InputError for settings, text, a checkpoint or a folder that cannot be used; Diverged where the loss is no
    longer finite or more than `RISE` times the first (the last checkpoint is kept); KeyboardInterrupt, with a message,
    after the first Ctrl-C, once it is saved.
    """
    folder, place = Path(out), choose_device(device)
    path = folder / checkpoint.NAME
    _check_start(settings, folder, resume or overwrite)
    writer = _summary_writer() if tensorboard else None
    run = _start(settings, path, place, resume, quiet)
    if run.writes:
        make_folder(folder)
        run.events = writer(folder, purge_step=run.done + 1) if writer is not None else None
    _announce(run)
    silent = quiet or not run.writes or not sys.stderr.isatty()
    bar = tqdm(total=settings.steps, initial=run.done, unit="step", disable=silent)
    with ctrl_c() as pressed, bar:
        while run.done < settings.steps:
            x, y = (t.to(place) for t in run.data.batch())
            _step(run, x, y)
            bar.update()
            _after_step(run, x, y, pressed, bar)
    if not run.evaluations or run.evaluations[-1]["step"] < run.done:  # resumed at its last step, not yet evaluated
        _evaluate(run)
        _save(run)
    return _finish(run)


@dataclasses.dataclass
class _Training:
    """A run in progress: what it trains, on what, and how far it is."""

    settings: Settings
    path: Path
    place: torch.device
    quiet: bool
    data: TextData | StreamData
    unigram: float
    model: Transformer
    free_energy: FreeEnergy | None
    learner: nn.Module
    optimizer: torch.optim.Optimizer
    done: int
    losses: list[float]
    evaluations: list[dict[str, Any]]
    writes: bool
    reported: int
    events: Any = None
    fresh: list[Tensor] = dataclasses.field(default_factory=list)
    """The loss and the gradient's norm of each step since they were last read."""

    @property
    def often(self) -> int:
        """Steps between two readings of the loss: reading it waits for a GPU, so not at every step there."""
        return 1 if self.place.type == "cpu" else 10

    def say(self, line: str) -> None:
        if self.writes and not self.quiet:
            tqdm.write(line)

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.events is not None:
            for name, number in numbers.items():
                self.events.add_scalar(name, number, step)


def _check_start(settings: Settings, folder: Path, may_exist: bool) -> None:
    if (folder / checkpoint.NAME).exists() and not may_exist:
        raise InputError(f"{folder} already holds a run: add --resume or --overwrite, or choose another --out")
    if settings.batch % parallel.processes():
        raise InputError(
            f"batch={settings.batch} is no multiple of the {parallel.processes()} processes: give a --batch that is"
        )


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise InputError("tensorboard is not installed: pip install tensorboard") from None
    return SummaryWriter


def _start(settings: Settings, path: Path, place: torch.device, resume: bool, quiet: bool) -> _Training:
    """A new run, or the one of the checkpoint."""
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    if resume:
        tensors, record = checkpoint.load(path)
        check_resumed(path, settings, record)
    data = (TextData if settings.stream is None else StreamData)(settings, path, tensors, record)
    unigram = unigram_perplexity(data.counts, data.held_out, settings.context)
    torch.manual_seed(settings.seed)
    model, free_energy = build(settings)
    model.to(place)
    optimizer = adamw(model, settings.lr)
    if resume:
        restore(path, tensors, model, optimizer)
    return _Training(
        settings,
        path,
        place,
        quiet,
        data,
        unigram,
        model,
        free_energy,
        parallel.replicate(model, free_energy),
        optimizer,
        done=record.get("step", 0),
        losses=record.get("losses", []),
        evaluations=record.get("evaluations", []),
        writes=parallel.rank() == 0,
        reported=settings.reported(parallel.processes()),
    )


def _announce(run: _Training) -> None:
    """Say what is trained, and whether a step fits in memory."""
    settings, place = run.settings, run.place
    run.say(
        f"{settings.method} on {parallel.processes()} x {place.type}: "
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {run.data.about}"
    )
    run.say(f"held-out perplexity of the unigram model: {run.unigram:.1f} per token")
    needs = step_memory(settings, parallel.processes(), triton=backend(run.model.head.weight) is not reference)
    run.say(f"memory of a step: {needs}")
    free = free_memory(place)
    if free is not None and free < needs.total:
        run.say(
            f"warning: that is more than the {free / 1e9:.2g} GB free on {place.type}: give a smaller --micro-batch"
        )
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)


def _step(run: _Training, x: Tensor, y: Tensor) -> None:
    """One training step."""
    settings = run.settings
    for group in run.optimizer.param_groups:
        group["lr"] = settings.lr * schedule(run.done, settings.steps, settings.warmup)
    for loss in backward(run.learner, run.free_energy, x, y, settings.micro_batch):
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        both = torch.stack([loss, norm])
        if run.often == 1 and not norm.isfinite():
            break  # before the update, so that the faulty weights can be inspected
        run.optimizer.step()
        run.optimizer.zero_grad()  # so that the next inference has their memory
    run.fresh.append(both)
    run.done += 1


def _after_step(run: _Training, x: Tensor, y: Tensor, pressed: Callable[[], bool], bar: Any) -> None:
    """Read the losses, evaluate and save where it is time; raises KeyboardInterrupt after a Ctrl-C."""
    settings, done = run.settings, run.done
    due, stop = done % settings.eval_every == 0 or done == settings.steps, False
    if due and run.place.type == "cuda" and not run.evaluations:
        run.say(f"memory of a step, measured: {torch.cuda.max_memory_allocated(run.place) / 1e9:.3g} GB")
    if due or len(run.fresh) == run.often or (parallel.processes() == 1 and pressed()):
        stop = bool(parallel.total(torch.tensor(int(pressed()))))  # all stop at the same step
        _read_losses(run, x, y)
        bar.set_postfix_str(status(run.losses, run.evaluations), refresh=False)
    if due:
        _evaluate(run)
    if due or stop:
        _save(run)
    if due:
        line = status(run.losses, run.evaluations)
        bar.set_postfix_str(line)
        run.say(f"step {done}/{settings.steps}: {line} (unigram {run.unigram:.1f})")
    if stop:
        raise KeyboardInterrupt(f"stopped at step {done}: continue with --resume --out {run.path.parent}")


def _read_losses(run: _Training, x: Tensor, y: Tensor) -> None:
    """Move the fresh losses to the record; raises Diverged at the first that is at fault."""
    rows = parallel.mean(torch.stack(run.fresh)).tolist()
    for k, (value, size) in enumerate(rows, run.done - len(run.fresh) + 1):
        fault = _fault(value, size, run.losses)
        if fault is not None:
            finite = math.isfinite(value + size)
            node = "" if finite else _faulty_node(run.free_energy, x, y, run.settings.micro_batch)
            raise _diverged(k, fault, node, run.settings, run.path)
        run.losses.append(value)
        run.log({"loss": value}, k)
    run.fresh.clear()


def _evaluate(run: _Training) -> None:
    settings, held_out = run.settings, run.data.held_out
    row = {"perplexity": perplexity(run.model, held_out)}
    if not row["perplexity"] < settings.vocabulary**RISE:
        raise _diverged(run.done, f"held-out perplexity is {row['perplexity']:.4g}", "", settings, run.path)
    if run.free_energy is not None:
        row |= regime(run.free_energy, held_out, settings.context, min(4, run.reported)).scalars()
    run.evaluations.append({"step": run.done, **row})
    run.log(row, run.done)


def _save(run: _Training) -> None:
    tensors, record = run.data.state()  # every process takes part, rank 0 writes
    if run.writes:
        tensors |= state(run.model, run.optimizer)
        tensors |= {"unigram": run.data.counts, "held_out": run.data.held_out.to(torch.int32)}
        record |= {
            "settings": dataclasses.asdict(run.settings),
            "step": run.done,
            "losses": run.losses,
            "evaluations": run.evaluations,
            "tokenizer": run.data.tokenizer.to_str(),
        }
        checkpoint.save(run.path, tensors, record)
    if run.events is not None:
        run.events.flush()


def _finish(run: _Training) -> dict[str, Any]:
    """Draw the curves; returns what `train` returns."""
    if run.events is not None:
        run.events.close()
    curves = run.path.parent / "curves.png"
    if run.writes:
        checkpoint.write(curves, plot(run.settings, run.losses, run.evaluations, run.unigram))
    final = None
    if run.free_energy is not None:
        final = regime(run.free_energy, run.data.held_out, run.settings.context, run.reported)
    return {
        "settings": run.settings,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "held_out_perplexity": run.evaluations[-1]["perplexity"],
        "unigram_perplexity": run.unigram,
        "losses": run.losses,
        "evaluations": run.evaluations,
        "report": final,
        "regime": final.regime if final is not None else BACKPROPAGATION,
        "checkpoint": run.path,
        "curves": curves,
    }


class Run(NamedTuple):
    """What `load` returns."""

    model: Transformer
    free_energy: FreeEnergy | None
    tokenizer: Tokenizer
    counts: Tensor
    """int64 ``[vocabulary]``, of the training tokens."""
    held_out: Tensor
    """int64 ``[L]``: the tokens that the run measures on."""
    record: dict[str, Any]


def load(path: str | Path, device: str = "auto") -> Run:
    """The run of a checkpoint, its model on a device; path: the file, or the folder of the run.

    Raises InputError for a checkpoint or a device that cannot be used.
    """
    place = choose_device(device)
    tensors, record = checkpoint.load(path)
    model, free_energy = build(stored_settings(path, record))
    restore(path, tensors, model)
    with checkpoint.fitting(path):
        tokenizer, held_out = Tokenizer.from_str(record["tokenizer"]), tensors["held_out"].to(torch.int64)
        return Run(model.to(place), free_energy, tokenizer, tensors["unigram"], held_out, record)


def plot(settings: Settings, losses: list[float], evaluations: list[dict[str, Any]], unigram: float) -> bytes:
    """A PNG of both curves: the training loss of each step, and the held-out perplexity beside the unigram model's.

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


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """The optimiser of every run."""
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a fraction of its peak: a linear warm-up, and a cosine to a tenth."""
    return min(1.0, (step + 1) / max(1, int(steps * warmup))) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _fault(loss: float, norm: float, earlier: list[float]) -> str | None:
    """What is wrong with a step's loss or the norm of its gradient, after the earlier losses; None where nothing is."""
    if not math.isfinite(loss):
        return f"loss is not finite ({loss})"
    if not math.isfinite(norm):
        return f"gradient's norm is not finite ({norm})"
    if earlier and loss > RISE * earlier[0]:
        return f"loss is {loss:.4g}, over {RISE} times the first ({earlier[0]:.4g})"
    return None


def _faulty_node(free_energy: FreeEnergy | None, x: Tensor, y: Tensor, micro_batch: int | None) -> str:
    """The first node of the forward pass whose prediction is not finite, for a message; empty where there is none."""
    if free_energy is None or not all(p.isfinite().all() for p in free_energy.parameters()):
        return ""  # weights that are not finite make every node so
    for piece, labels in micro_batches(x, y, micro_batch):
        batch = free_energy.batch(piece, target(free_energy, labels))
        energy = batch.at_prediction()
        names = [node.name for node in batch.nodes if node.mu is not None and not node.mu.isfinite().all()]
        if not names and not energy.isfinite().all():
            names = ["output"]
        if names:
            return f", first in node {names[0]!r}"
    return ""


def _diverged(step: int, fault: str, where: str, settings: Settings, path: Path) -> Diverged:
    kept = f"; the earlier checkpoint is kept in {path}" if path.exists() else ""
    return Diverged(f"at step {step} the {fault}{where}: train with a --lr below {settings.lr}{kept}")
