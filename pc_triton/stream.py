"""Documents, read as they are needed by Hugging Face's ``datasets``, and packed into sequences of tokens."""

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

# File extensions, and what ``datasets`` calls their formats.
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")
AT_ONCE = 64
"""How many documents are encoded at once, on all cores."""


class Documents:
    """The texts in a column of local files or of a set of the Hugging Face hub, in order. Blank texts are left out.

    source: either local files, with ``*`` and ``**`` as in a shell. They are .txt (a line is a document), .jsonl,
    .json, .csv or .parquet, also compressed. Or a set of the hub, or a folder that holds one, as NAME, NAME:CONFIG or
    NAME:CONFIG:SPLIT; the split is "train" if not given. column: its name.

    Raises InputError, here or during reading, for a source or column that is missing or cannot be read.
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
        """Share ``number`` of ``shares``: whole files if they divide evenly, else every n-th document of n shares."""
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
                text = (text or "").removeprefix("\ufeff")  # a file's byte-order mark
                if text.strip():
                    yield text

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:  # datasets, pyarrow, the hub and the decompressors each raise their own kinds
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            remedy = "convert its files to UTF-8" if "codec can't" in what else "check its name, files and network"
            raise InputError(f"cannot read {self.source} ({what}): {remedy}") from None


def _kind(path: str) -> str | None:
    """What ``datasets`` calls the format of a file, from the file's name; None if it is not one of `KINDS`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_held_out(text: str, every: int) -> bool:
    """Whether a document is held out: one in ``every`` is, none if 0. The text decides, so all copies agree."""
    return every > 0 and zlib.crc32(text.encode("utf-8", "surrogatepass")) % every == 0


def encode_documents(tokenizer: Tokenizer, texts: list[str], separator: int) -> Tensor:
    """The tokens of documents, a separator before each: int32 ``[L]``."""
    ids = [[separator, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor([token for document in ids for token in document], dtype=torch.int32)


class Reader:
    """Endless sequences of tokens, packed from documents.

    The documents are read in order, without the one in ``held_out`` that is held out, and from the beginning again
    after the last. A separator token goes before each. One after the other they fill sequences of ``length`` tokens;
    the last token of a sequence is also the first of the next. Sequences are drawn at random, with a generator of
    ``seed``, from a pool of the next ``size``, and each drawn one is replaced by the next.

    `draw` raises InputError if there is no document.
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
        self._texts, self._some = iter(documents), False  # the rest of this round; whether the round gave any text
        self._place: dict[str, Any] | None = None  # the restored place, until the first read after it

    def draw(self, count: int) -> Tensor:
        """The next sequences, int64 ``[count, length]``."""
        if len(self.pool) == 0:
            self.pool = self._next(max(self.size, count))
        drawn = torch.randperm(len(self.pool), generator=self.generator)[:count]
        rows = self.pool[drawn]
        self.pool = self.pool.index_copy(
            0, drawn, self._next(count)
        )  # a new tensor: `state` may have given the old one
        return rows.to(torch.int64)

    def _next(self, count: int) -> Tensor:
        """The next sequences in the order of the documents, int32 ``[count, length]``."""
        stride = self.length - 1
        read, missing = [self.tokens], count * stride + 1 - len(self.tokens)
        while missing > 0:
            read.append(self._read())
            missing -= len(read[-1])
        tokens = torch.cat(read)
        self.tokens = tokens[count * stride :].clone()
        return tokens.unfold(0, self.length, stride)[:count].clone()  # the rows of unfold share memory

    def _read(self) -> Tensor:
        """The tokens of the next `AT_ONCE` documents, int32 ``[L]``. Raises InputError if a whole round gave none."""
        texts = list(islice(self._texts, AT_ONCE))
        if not texts:
            if not self._some:
                source = self.documents.source
                raise InputError(
                    f"{source}: a process finds no document in its share: use fewer processes or give more documents"
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
        """What `restore` needs: the place in the documents, which JSON can hold, and tensors."""
        tensors = {"tokens": self.tokens, "pool": self.pool, "rng": self.generator.get_state()}
        return self._place or self.documents.dataset.state_dict(), tensors

    def restore(self, place: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.documents.dataset.set_epoch(place["epoch"])
        self.documents.dataset.load_state_dict(place)
        self._place = place  # the dataset does not report it before the next read
        self._texts, self._some = iter(self.documents), True
        self.tokens, self.pool = tensors["tokens"], tensors["pool"]
        self.generator.set_state(tensors["rng"])
