"""Training the transformer of ``models.py`` on text, by predictive coding or by backpropagation; what the CLI calls."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import signal
import sys
import threading
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


def choose_device(name: str) -> torch.device:
    """The device called auto (a GPU if there is one), cpu or cuda: of several processes each has a GPU of its own.

    Raises InputError if it is not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("no CUDA GPU is available here: use --device cpu, or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise InputError(f"no GPU is left for process {number}: use --nproc-per-node {torch.cuda.device_count()}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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
    if path.exists() and not (resume or overwrite):
        raise InputError(f"{folder} already holds a run: add --resume or --overwrite, or choose another --out")
    if settings.batch % parallel.processes():
        raise InputError(
            f"batch={settings.batch} is no multiple of the {parallel.processes()} processes: give a --batch that is"
        )
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise InputError("tensorboard is not installed: pip install tensorboard") from None
    if resume:
        tensors, record = checkpoint.load(path)
        check_resumed(path, settings, record)
    else:
        tensors, record = {}, {}
    data = (TextData if settings.stream is None else StreamData)(settings, path, tensors, record)
    held_out = data.held_out
    unigram = unigram_perplexity(data.counts, held_out, settings.context)

    torch.manual_seed(settings.seed)
    model, free_energy = build(settings)
    model.to(place)
    optimizer = adamw(model, settings.lr)
    if resume:
        _restore(path, tensors, model, optimizer)
    del tensors  # as large as the model and AdamW's state
    learner, writes = parallel.replicate(model, free_energy), parallel.rank() == 0
    reported = settings.reported(parallel.processes())
    done: int = record.get("step", 0)
    loss_curve: list[float] = record.get("losses", [])
    evaluations: list[dict[str, Any]] = record.get("evaluations", [])
    if writes:
        _make_folder(folder)
    events = SummaryWriter(folder, purge_step=done + 1) if tensorboard and writes else None

    def log(numbers: dict[str, float], step: int) -> None:
        if events is not None:
            for name, number in numbers.items():
                events.add_scalar(name, number, step)

    def save() -> None:
        tensors, record = data.state()
        if writes:
            tensors |= _state(model, optimizer) | {"unigram": data.counts, "held_out": held_out.to(torch.int32)}
            record |= {
                "settings": dataclasses.asdict(settings),
                "step": done,
                "losses": loss_curve,
                "evaluations": evaluations,
                "tokenizer": data.tokenizer.to_str(),
            }
            checkpoint.save(path, tensors, record)
        if events is not None:
            events.flush()

    def evaluate() -> None:
        row = {"perplexity": perplexity(model, held_out)}
        if not row["perplexity"] < settings.vocabulary**RISE:
            raise _diverged(done, f"held-out perplexity is {row['perplexity']:.4g}", "", settings, path)
        if free_energy is not None:
            row |= regime(free_energy, held_out, settings.context, min(4, reported)).scalars()
        evaluations.append({"step": done, **row})
        log(row, done)

    def say(line: str) -> None:
        if writes and not quiet:
            tqdm.write(line)

    say(
        f"{settings.method} on {parallel.processes()} x {place.type}: "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {data.about}"
    )
    say(f"held-out perplexity of the unigram model: {unigram:.1f} per token")
    needs = step_memory(settings, parallel.processes(), triton=backend(model.head.weight) is not reference)
    say(f"memory of a step: {needs}")
    free = free_memory(place)
    if free is not None and free < needs.total:
        say(f"warning: that is more than the {free / 1e9:.2g} GB free on {place.type}: give a smaller --micro-batch")
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    silent = quiet or not writes or not sys.stderr.isatty()
    bar = tqdm(total=settings.steps, initial=done, unit="step", disable=silent)
    often = 1 if place.type == "cpu" else 10  # reading the loss waits for a GPU, so not at every step
    fresh: list[Tensor] = []
    with _ctrl_c() as pressed, bar:
        while done < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(done, settings.steps, settings.warmup)
            x, y = (t.to(place) for t in data.batch())
            for loss in backward(learner, free_energy, x, y, settings.micro_batch):
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                both = torch.stack([loss, norm])
                if often == 1 and not norm.isfinite():
                    break  # with the weights that made it
                optimizer.step()
                optimizer.zero_grad()  # so that the next inference has their memory
            fresh.append(both)
            done += 1
            bar.update()
            due = done % settings.eval_every == 0 or done == settings.steps
            if due and place.type == "cuda" and not evaluations:
                say(f"memory of a step, measured: {torch.cuda.max_memory_allocated(place) / 1e9:.3g} GB")
            stop = False
            if due or len(fresh) == often or (parallel.processes() == 1 and pressed()):
                stop = bool(parallel.total(torch.tensor(int(pressed()))))  # all stop at the same step
                rows = parallel.mean(torch.stack(fresh)).tolist()
                for k, (value, size) in enumerate(rows, done - len(fresh) + 1):
                    fault = _fault(value, size, loss_curve)
                    if fault is not None:
                        finite = math.isfinite(value + size)
                        node = "" if finite else _faulty_node(free_energy, x, y, settings.micro_batch)
                        raise _diverged(k, fault, node, settings, path)
                    loss_curve.append(value)
                    log({"loss": value}, k)
                fresh.clear()
                bar.set_postfix_str(_status(loss_curve, evaluations), refresh=False)
            if due:
                evaluate()
            if due or stop:
                save()
            if due:
                bar.set_postfix_str(_status(loss_curve, evaluations))
                say(f"step {done}/{settings.steps}: {_status(loss_curve, evaluations)} (unigram {unigram:.1f})")
            if stop:
                raise KeyboardInterrupt(f"stopped at step {done}: continue with --resume --out {folder}")

    if not evaluations or evaluations[-1]["step"] < done:  # resumed where it was stopped, with no step to go
        evaluate()
        save()
    if events is not None:
        events.close()
    curves = folder / "curves.png"
    if writes:
        checkpoint.write(curves, plot(settings, loss_curve, evaluations, unigram))
    final = regime(free_energy, held_out, settings.context, reported) if free_energy is not None else None
    return {
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity": evaluations[-1]["perplexity"],
        "unigram_perplexity": unigram,
        "losses": loss_curve,
        "evaluations": evaluations,
        "report": final,
        "regime": final.regime if final is not None else BACKPROPAGATION,
        "checkpoint": path,
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
    _restore(path, tensors, model)
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


def _status(losses: list[float], evaluations: list[dict[str, Any]]) -> str:
    recent = losses[-10:]
    parts = [f"loss {sum(recent) / len(recent):.3f}"] if recent else []
    if evaluations:
        last = evaluations[-1]
        parts.append(f"held-out perplexity {last['perplexity']:.1f}")
        if "settled" in last:
            parts.append(f"settled {last['settled']:.0%}, cosine {last['cosine']:.4f}")
    return ", ".join(parts)


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


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What changes in training: weights, optimiser state and torch's random generator."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for number, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": t for name, t in entries.items()}
    return tensors | {"rng.torch": torch.get_rng_state()}


def _restore(
    path: str | Path, tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put what `_state` took back. Raises InputError if it does not fit the model."""
    with checkpoint.fitting(path):
        model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith("optimizer."):
                    _, number, entry = name.split(".")
                    state.setdefault(int(number), {})[entry] = t
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            torch.set_rng_state(tensors["rng.torch"])


def _make_folder(folder: Path) -> None:
    """Make the folder and try to write in it, so that a run does not fail at its first checkpoint.

    What a killed run left half-written there is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}: choose another --out") from None
    probe = folder / ".probe"
    checkpoint.write(probe, b"")
    for left in (probe, *folder.glob(".*.tmp")):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only sets what the yielded function returns; a second one interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
