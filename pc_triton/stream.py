"""Documents that are read as they are needed, by Hugging Face's ``datasets``, and packed into sequences."""

from __future__ import annotations

import contextlib
import copy
import glob
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .text import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from tokenizers import Tokenizer

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")
AT_ONCE = 64
"""Documents that are encoded at once, on all cores."""


class Documents:
    """The texts in a column of local files or of a set of the Hugging Face hub, in order, but for blank ones.

    source: local files, ``*`` and ``**`` as in a shell: .txt (a line is a document), .jsonl, .json, .csv or .parquet,
    compressed ones too; or a set of the hub or a folder of one, as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT ("train" if
    not given). Raises InputError, here or as they are read, for a source or column that is not there or cannot be read.
    """

    def __init__(self, source: str, column: str) -> None:
        self.source, self.column = source, column
        with self._faults():
            self.dataset = self._open()

    def _open(self) -> IterableDataset:
        try:
            import datasets
        except ModuleNotFoundError:
            raise InputError("datasets is not installed: pip install 'pc_triton[stream]'") from None
        files = [self.source] if Path(self.source).is_file() else []
        files = files or sorted(path for path in glob.glob(self.source, recursive=True) if Path(path).is_file())
        kinds = {_kind(path) for path in files or [self.source]}
        kind = kinds.pop()
        if kinds or (files and kind is None):
            raise InputError(f"{self.source}: give files of one kind, {', '.join(KINDS)}")
        if kind is not None and not files:
            raise InputError(f"{self.source}: no such file: give one that is there, or a set of the hub")
        if kind is not None:
            return datasets.load_dataset(
                kind, data_files=[glob.escape(path) for path in files], split="train", streaming=True
            )
        name, config, split, *more = [*self.source.split(":"), "", ""]
        if not name or any(more):
            raise InputError(f"{self.source!r}: a set of the hub is given as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)

    def share(self, number: int, shares: int) -> Documents:
        """One of as many shares: whole files where they can be dealt evenly, else every so many documents."""
        from datasets.distributed import split_dataset_by_node

        share = copy.copy(self)
        share.dataset = split_dataset_by_node(self.dataset, number, shares)
        return share

    def __iter__(self) -> Iterator[str]:
        with self._faults():
            for row in self.dataset:
                text = row.get(self.column)
                if not isinstance(text, str) and (text is not None or self.column not in row):
                    names = ", ".join(name for name, value in row.items() if isinstance(value, str)) or "none"
                    raise InputError(
                        f"{self.source} has no text in column {self.column!r}: give a --column that has ({names})"
                    )
                if text is not None and text.strip():
                    yield text

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:  # of many kinds, from datasets, pyarrow, the hub and what unpacks a file
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(f"cannot read {self.source} ({what}): check its name, files and network") from None


def _kind(path: str) -> str | None:
    """What ``datasets`` calls the format of a file, by its name."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_held_out(text: str, every: int) -> bool:
    """Whether a document is of the one in ``every`` that is not trained on, by its text, so that its copies are too."""
    return every > 0 and zlib.crc32(text.encode("utf-8", "surrogatepass")) % every == 0


def encode_documents(tokenizer: Tokenizer, texts: list[str], separator: int) -> Tensor:
    """The tokens of documents, each behind the separator: int32 ``[L]``."""
    ids = [[separator, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor([token for document in ids for token in document], dtype=torch.int32)


class Reader:
    """Sequences of documents, endlessly, from those that it reads in order but for ``held_out`` ones.

    Each document follows a separator token; one after the other they fill sequences of ``length`` tokens, the last
    of each the first of the next. They are drawn at random from a pool of the next ``size``, and each that is drawn is
    replaced. Where the documents end they begin again.

    Raises InputError if there is no document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        separator: int,
        held_out: int,
        length: int,
        size: int,
        seed: int,
    ) -> None:
        self.documents, self.tokenizer, self.separator, self.held_out = documents, tokenizer, separator, held_out
        self.length, self.size = length, size
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.empty(0, dtype=torch.int32)  # read, and not yet in a sequence
        self.pool = torch.empty(0, length, dtype=torch.int32)
        self._texts, self._some = iter(documents), False  # of this time through them; whether it gave any
        self._place: dict[str, Any] | None = None  # where it was restored, until it reads on

    def draw(self, count: int) -> Tensor:
        """The next sequences, int64 ``[count, length]``."""
        if len(self.pool) == 0:
            self.pool = self._next(max(self.size, count))
        drawn = torch.randperm(len(self.pool), generator=self.generator)[:count]
        rows = self.pool[drawn]
        self.pool[drawn] = self._next(count)
        return rows.to(torch.int64)

    def _next(self, count: int) -> Tensor:
        """The sequences that follow in the order of the documents, int32 ``[count, length]``."""
        stride = self.length - 1
        read, missing = [self.tokens], count * stride + 1 - len(self.tokens)
        while missing > 0:
            read.append(self._read())
            missing -= len(read[-1])
        tokens = torch.cat(read)
        self.tokens = tokens[count * stride :].clone()
        return tokens.unfold(0, self.length, stride)[:count].clone()  # its rows share tokens

    def _read(self) -> Tensor:
        """The tokens of the next few documents."""
        texts = list(islice(self._texts, AT_ONCE))
        if not texts:
            if not self._some:
                source = self.documents.source
                raise InputError(
                    f"{source}: a process finds no document in its share: use fewer processes or give more"
                )
            self._some = False
            self.documents.dataset.set_epoch(self.documents.dataset.epoch + 1)
            self._texts = iter(self.documents)
        self._place = None
        tokens = encode_documents(
            self.tokenizer, [text for text in texts if not is_held_out(text, self.held_out)], self.separator
        )
        self._some = self._some or len(tokens) > 0
        return tokens

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it takes to go on: the place in the documents, for JSON, and tensors."""
        tensors = {"tokens": self.tokens, "pool": self.pool, "rng": self.generator.get_state()}
        return self._place or self.documents.dataset.state_dict(), tensors

    def restore(self, place: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.documents.dataset.set_epoch(place["epoch"])
        self.documents.dataset.load_state_dict(place)
        self._place = place  # which the dataset does not tell before it has been read from
        self._texts, self._some = iter(self.documents), True
        self.tokens, self.pool = tensors["tokens"], tensors["pool"].clone()
        self.generator.set_state(tensors["rng"])
