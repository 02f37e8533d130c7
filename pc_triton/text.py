"""The text to train on: reading it, splitting off a held-out part, and learning a byte-pair vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCK = 2000
"""About so many characters in a row go to the same side of the split."""


class InputError(ValueError):
    """The user's input cannot be used. The message is one line, ``problem: remedy``."""


def read_text(path: str | None = None) -> str:
    """The text of a UTF-8 file or, without a path, Python's own language reference (``pydoc_data.topics``).

    The reference repeats a fifth of its paragraphs under several topics. Each is kept once, so that no held-out
    paragraph is also a training paragraph. Its size differs among Python versions.

    Raises InputError for a file that is missing, unreadable, empty or not UTF-8.
    """
    if path is None:
        return _language_reference()
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{Path(path)}: {error.strerror}: give a readable text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it, as with `iconv -t UTF-8`") from None
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


def train_tokenizer(text: str, vocabulary: int, special: int = 0) -> Tokenizer:
    """A byte-level BPE tokenizer with ``vocabulary`` - ``special`` >= 256 tokens, learned from a text.

    It can encode any text. Byte-pair encoding is that of Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2.

    special: how many tokens at the end of the vocabulary are kept free. The tokenizer never makes them.

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
    trainer = trainers.BpeTrainer(vocab_size=most, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    size = tokenizer.get_vocab_size() + special
    if size < vocabulary:
        raise InputError(f"vocabulary={vocabulary}: this text yields {size} tokens: give more text or that vocabulary")
    return tokenizer
