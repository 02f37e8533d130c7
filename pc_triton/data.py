"""The data of a run: the batches that it trains on, and the held-out tokens that it is measured on.

`TextData` holds a text in memory; `StreamData` reads documents as they are needed. Both have:

    tokenizer: a byte-pair tokenizer
    separator: the token before each document, or None
    counts: int64 ``[vocabulary]``, how often each token occurs in the training tokens
    held_out: int64 ``[L]``, the held-out tokens
    about: one line that describes the data
    batch(): this process's part of the next batch: x int64 ``[part, context]``, and y, the token after each of x
    place(): where this process is in the data, after the batches so far
    state(place): what a checkpoint needs to continue from there: tensors, and a record that JSON can hold. All
        processes call it, each with its own place

`Ahead` makes the batches before they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint, parallel
from .settings import Settings
from .stream import Documents, Reader, encode_documents, is_held_out
from .text import InputError, blocks, read_text, split, train_tokenizer, waiting

SAMPLE, MEASURED = 10_000_000, 400_000
"""Characters of a stream that the tokenizer is trained on, and that the run is measured on; whole documents each."""
AHEAD = 2
"""Batches made ahead."""
MARKED = 100
"""A resumed run checks the first so many documents, to know that the stream is the same."""


class TextData:
    """A text in memory. A batch is sequences from random places in it.

    tensors, record: those of the checkpoint at ``path`` if a run is resumed, else empty. shows: print progress bars.

    Raises InputError for a text that cannot be used, or that is not the one of the checkpoint.
    """

    separator = None

    def __init__(
        self,
        settings: Settings,
        path: Path,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        shows: bool = False,
    ) -> None:
        if settings.held_out is None:
            training, held_out = split(read_text(settings.data))
        else:
            training, held_out = read_text(settings.data), read_text(settings.held_out)
        self._digest = _digest(training, held_out)
        if record and record["text"] != self._digest:
            options = "--data and --held-out (and the same Python)"
            raise InputError(f"the text is not the one {path} was trained on: give the same {options}")
        self._context, self._batch = settings.context, settings.batch
        self.tokenizer = (
            Tokenizer.from_str(record["tokenizer"])
            if record
            else train_tokenizer(training, settings.vocabulary, shows=shows)
        )
        self._tokens = encode(self.tokenizer, training, shows=shows)
        self.held_out = encode(self.tokenizer, held_out, shows=shows)
        _check_length(self._tokens, self.held_out, settings.context)
        self.counts = torch.bincount(self._tokens, minlength=settings.vocabulary)
        self.about = (
            f"{len(self._tokens):,} training and {len(self.held_out):,} held-out tokens of "
            f"{len(held_out) / len(self.held_out):.1f} characters"
        )
        self._generator = torch.Generator().manual_seed(settings.seed)
        if record:
            with checkpoint.fitting(path):
                self._generator.set_state(tensors["rng.batches"])

    def batch(self) -> tuple[Tensor, Tensor]:
        at = parallel.part(draw(self._tokens, self._context, self._batch, self._generator))
        return self._tokens[at], self._tokens[at + 1]

    def place(self) -> Tensor:
        return self._generator.get_state()

    def state(self, place: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"rng.batches": place}, {"text": self._digest}


class StreamData:
    """Documents, read as they are needed and packed into sequences, with a separator before each document.

    There are as many readers as the run began with processes. Each has its share of the documents and of every batch.
    So the run is the same, but for rounding, with any number of processes that divides the number of readers.

    The tokenizer is trained on the first ten million characters. Without ``held_out`` in the settings one document in a
    hundred is held out, or one in ten of a set below four million characters. The model is measured on the first
    400,000 characters of the held-out documents among the first ten million.

    Arguments and errors as in `TextData`.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        shows: bool = False,
    ) -> None:
        assert settings.stream is not None
        documents = Documents(settings.stream, settings.column)
        self.separator = settings.vocabulary - 1  # a token that the tokenizer does not know
        if record:
            self._digest = self._mark(documents, islice(documents, MARKED))
            if record["text"] != self._digest:
                options = "--stream and --column"
                raise InputError(f"the documents are not those {path} was trained on: give the same {options}")
            with checkpoint.fitting(path):
                self.tokenizer, self._every = Tokenizer.from_str(record["tokenizer"]), record["held_out"]
                shares = len(record["readers"])
                self.held_out, self.counts = tensors["held_out"].to(torch.int64), tensors["unigram"]
        else:
            shares = parallel.processes()
            self._sample(documents, settings, shows)
        if shares % parallel.processes():
            raise InputError(f"{path} was begun by {shares} processes: go on with a number that divides it")
        mine = parallel.part(torch.arange(shares)).tolist()
        self._rows = settings.batch // shares
        self._readers = [
            Reader(
                documents.share(number, shares),
                self.tokenizer,
                self.separator,
                self._every,
                length=settings.context + 1,
                size=settings.pool,
                seed=(settings.seed + number) % 2**63,
            )
            for number in mine
        ]
        if record:
            with checkpoint.fitting(path):
                for number, reader in zip(mine, self._readers):
                    prefix = f"reader.{number}."
                    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                    reader.restore(record["readers"][number], own)
        self.about = f"{settings.stream} as it is read, and {len(self.held_out):,} held-out tokens"

    def _sample(self, documents: Documents, settings: Settings, shows: bool) -> None:
        """Make the tokenizer, the held-out tokens and the counts from the beginning of the documents."""
        sample, ended = _first(documents, SAMPLE, shows)
        if not sample:
            raise InputError(f"{documents.source} holds no document: give one with text")
        self._digest = self._mark(documents, sample[:MARKED])
        if settings.held_out is not None:
            self._every = 0
            held_out, _ = _first(Documents(settings.held_out, settings.column), MEASURED)
        else:
            self._every = 10 if ended and sum(map(len, sample)) < 10 * MEASURED else 100
            held_out, _ = _first((text for text in sample if is_held_out(text, self._every)), MEASURED)
        training = [text for text in sample if not is_held_out(text, self._every)]
        self.tokenizer = train_tokenizer("\n".join(training), settings.vocabulary, special=1, shows=shows)
        parts = []
        with waiting(shows, "encoding", len(training), "document") as bar:
            for k in range(0, len(training), MARKED):
                parts.append(encode_documents(self.tokenizer, training[k : k + MARKED], self.separator))
                bar.update(len(training[k : k + MARKED]))
        tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        self.held_out = encode_documents(self.tokenizer, held_out, self.separator).to(torch.int64)
        _check_length(tokens, self.held_out, settings.context)
        self.counts = torch.bincount(tokens, minlength=settings.vocabulary)

    @staticmethod
    def _mark(documents: Documents, first: Iterable[str]) -> str:
        """A digest that tells documents apart: the number of files, which decides the shares, and the first texts."""
        return _digest(str(documents.dataset.num_shards), *first)

    def batch(self) -> tuple[Tensor, Tensor]:
        rows = torch.cat([reader.draw(self._rows) for reader in self._readers])
        return rows[:, :-1], rows[:, 1:]

    def place(self) -> list[Any]:
        return [reader.state() for reader in self._readers]

    def state(self, place: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        states = parallel.gathered(place)
        tensors = {f"reader.{k}.{name}": t for k, (_, own) in enumerate(states) for name, t in own.items()}
        return tensors, {"text": self._digest, "held_out": self._every, "readers": [place for place, _ in states]}


class Ahead:
    """The batches of some data, each made in a thread while the ones before it are trained on.

    device: where they go, by way of pinned memory if it is a GPU, so that a step does not wait for them. `place` is
    that after the batches that were taken, so a checkpoint knows nothing of those made ahead. Close it in the end.
    """

    def __init__(self, data: TextData | StreamData, device: torch.device) -> None:
        self._data, self._device, self._closed = data, device, False
        self.place: Any = data.place()
        self._made: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def _make(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would pin memory for that
        while not self._closed:
            try:
                pair = self._data.batch()
                if self._device.type == "cuda":
                    pair = pair[0].pin_memory(), pair[1].pin_memory()
                self._made.put((pair, self._data.place()))
            except BaseException as error:
                self._made.put(error)
                return

    def batch(self) -> tuple[Tensor, Tensor]:
        """This process's part of the next batch, on the device. Raises what making it raised."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        (x, y), self.place = made
        return x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Have the thread end: Python's own end must not meet it at work. A read that hangs is left alone."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._made.get_nowait()
        self._thread.join(timeout=5)


def encode(tokenizer: Tokenizer, text: str, separator: int | None = None, shows: bool = False) -> Tensor:
    """The tokens of a text, after the separator if there is one: int64 ``[L]``. shows: print a progress bar."""
    parts = [torch.tensor([] if separator is None else [separator], dtype=torch.int64)]
    with waiting(shows, "encoding", len(text), "character") as bar:
        for block in blocks(text):
            parts.append(torch.tensor(tokenizer.encode(block).ids, dtype=torch.int64))  # Ctrl-C is heard between two
            bar.update(len(block))
    return torch.cat(parts)


def draw(tokens: Tensor, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random places of a batch of sequences in a text ``[L]``, L > context: int64 ``[batch, context]``."""
    return torch.randint(len(tokens) - context, (batch, 1), generator=generator) + torch.arange(context)


def _first(documents: Iterable[str], characters: int, shows: bool = False) -> tuple[list[str], bool]:
    """The first documents, until they have so many characters together; and whether those are all there are."""
    texts: list[str] = []
    length = 0
    with waiting(shows, "reading", characters, "character") as bar:
        for text in documents:
            if length >= characters:
                return texts, False
            texts.append(text)
            length += len(text)
            bar.update(len(text))
    return texts, True


def _check_length(training: Tensor, held_out: Tensor, context: int) -> None:
    for name, tokens in (("training", training), ("held-out", held_out)):
        if len(tokens) <= context:
            few = f"{len(tokens)} tokens of {name} text for a context of {context}"
            more = "more text, --held-out" if name == "held-out" else "more text"
            raise InputError(f"{few}: give {more} or a smaller --context")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
