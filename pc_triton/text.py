"""The text to train on: reading it, splitting off a held-out part, and learning a byte-pair vocabulary."""

from __future__ import annotations

import codecs
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tqdm import tqdm

BLOCK = 2000
"""About so many characters in a row go to the same side of the split."""
DELAY = 1.0
"""Seconds until a progress bar shows, so that what is quick shows none."""
LONGEST = 256
"""Characters of a word that the tokenizer learns from in one piece: its time grows with the square of the longest."""
CUT = re.compile(rf"(?:\S{{{LONGEST}}}(?=\S)|\s{{{LONGEST}}}(?=\s))")
SEAM = re.compile(r"(?<=\S)(?=[ \n])")
"""Where a text can be cut without changing its tokens: no token of `train_tokenizer` reaches across."""
# By its byte-order mark; UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
T = TypeVar("T")


class InputError(ValueError):
    """The user's input cannot be used. The message is one line, ``problem: remedy``."""


def read_text(path: str | None = None) -> str:
    """The text of a file or, without a path, Python's own language reference (``pydoc_data.topics``).

    The file is in UTF-8, or in the UTF that its byte-order mark tells; the mark is no part of the text.

    The reference repeats a fifth of its paragraphs under several topics. Each is kept once, so that no held-out
    paragraph is also a training paragraph. Its size differs among Python versions.

    Raises InputError for a file that is missing, unreadable, empty or in another encoding.
    """
    if path is None:
        return _language_reference()
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{Path(path)}: {error.strerror}: give a readable text file") from None
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        command = f"iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > new.txt"
        remedy = f"convert it, with `{command}` if it is in Latin-1" if encoding == "utf-8" else "give a whole file"
        raise InputError(f"{path} is not {kind} at byte {error.start}: {remedy}") from None
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text.replace("\r\n", "\n")


def _language_reference() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("this Python comes without pydoc_data: give a text file with --data") from None
    paragraphs: dict[str, str] = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


def split(text: str) -> tuple[str, str]:
    """The training part and the held-out part of a text: every tenth block of about 2,000 characters is held out.

    A block ends at the end of a line if one is near. Of a text beyond 4 million characters less is held out, about
    400,000 characters. A text below 40,000 characters has smaller blocks.
    """
    size = max(1, min(BLOCK, len(text) // 20))
    blocks, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
        blocks.append(text[start:end])
        start = end
    every = max(10, len(text) // 400_000)
    held_out = blocks[every - 1 :: every]
    del blocks[every - 1 :: every]
    return "".join(blocks), "".join(held_out)


def pieces(text: str) -> Iterator[str]:
    """The lines of a text, cut further where a word or a run of spaces has more than `LONGEST` characters."""
    for line in text.splitlines(keepends=True):
        start = 0
        for long in CUT.finditer(line):
            yield line[start : long.end()]
            start = long.end()
        yield line[start:]


def blocks(text: str, size: int = 100_000) -> Iterator[str]:
    """A text in parts of ``size`` to twice as many characters, whose tokens one after the other are the text's.

    A word that long is cut all the same.
    """
    start = 0
    while start < len(text):
        seam = SEAM.search(text, start + size, start + 2 * size)
        end = start + 2 * size if seam is None else seam.start()
        yield text[start:end]
        start = end


def interruptible(work: Callable[[], T]) -> T:
    """What work returns, made in a thread of its own: a long call into compiled code would be deaf to Ctrl-C."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()


def waiting(shows: bool, what: str, total: int, unit: str) -> tqdm[NoReturn]:
    """A progress bar on stderr, if it shows, for what may take longer than `DELAY`; to be used by ``with``.

    Nothing is left of it at its end, also after Ctrl-C.
    """
    from tqdm import tqdm

    many = total > 100_000
    return tqdm(desc=what, total=total, unit=unit, unit_scale=many, leave=False, delay=DELAY, disable=not shows)


def train_tokenizer(text: str, vocabulary: int, special: int = 0, shows: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with ``vocabulary`` - ``special`` >= 256 tokens, learned from a text.

    It can encode any text, and learns no token of more than `LONGEST` characters. Byte-pair encoding is that of
    Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2.

    special: how many tokens at the end of the vocabulary are kept free. The tokenizer never makes them. shows: print a
    progress bar on stderr. Ctrl-C ends the wait at once.

    Raises InputError if the vocabulary is too small, or larger than the text yields.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learned = vocabulary - special
    if learned < 256:
        raise InputError(f"vocabulary={vocabulary}: a byte-level vocabulary needs at least {256 + special} tokens here")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The trainer allocates the size it is asked for. A text of n bytes yields at most n merges.
    most = min(learned, 256 + len(text.encode()))
    trainer = trainers.BpeTrainer(vocab_size=most, initial_alphabet=alphabet, show_progress=shows)
    interruptible(lambda: tokenizer.train_from_iterator(pieces(text), trainer))
    size = tokenizer.get_vocab_size() + special
    if size < vocabulary:
        raise InputError(f"vocabulary={vocabulary}: this text yields {size} tokens: give more text or that vocabulary")
    return tokenizer
