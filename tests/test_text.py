"""The text to train on."""

import os
import random
import re
import shutil
import signal
import subprocess
import threading

import pytest

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")

from pc_triton.data import encode
from pc_triton.text import LONGEST, InputError, blocks, interruptible, pieces, read_text, split, train_tokenizer

random.seed(0)
DNA = "".join(random.choices("ACGT", k=5000))


def test_the_default_text_holds_no_paragraph_twice():
    paragraphs = [" ".join(p.split()) for p in read_text().split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(read_text()) > 200_000


@pytest.mark.parametrize("text", ["word " * 20_000, "a line\n" * 20_000, "line\n" * 30, "x", ""])
def test_split_loses_nothing(text):
    train, held_out = split(text)
    assert len(train) + len(held_out) == len(text)
    if len(text) > 1000:
        assert 0.05 < len(held_out) / len(text) < 0.15


def test_split_of_the_default_text_is_whole_lines():
    train, held_out = split(read_text())
    assert set(held_out.splitlines()) | set(train.splitlines()) == set(read_text().splitlines())
    assert 0.08 < len(held_out) / len(read_text()) < 0.12


def test_tokenizer_encodes_any_text():
    tokenizer = train_tokenizer("the cat sat on the mat\n" * 10, 265)
    assert tokenizer.get_vocab_size() == 265
    for text in ("the cat", "  ü 漢字 \x00\n\n\t🙂", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("vocabulary", "message"), [(255, "at least 256"), (5000, "yields"), (10**30, "yields")])
def test_vocabulary_out_of_range(vocabulary, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer("the cat sat on the mat\n", vocabulary)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    path = tmp_path / "text.txt"
    mark = "" if encoding in ("utf-8", "utf-8-sig") else "\ufeff"
    path.write_bytes(f"{mark}ein süßes\r\n漢字\n".encode(encoding))
    assert read_text(str(path)) == "ein süßes\n漢字\n"


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv")
@pytest.mark.parametrize("name", ["text.txt", "a text's.txt"])
def test_the_remedy_for_another_encoding_works(tmp_path, name):
    (tmp_path / name).write_bytes("süß\n".encode("latin-1"))
    with pytest.raises(
        InputError, match=r"is not UTF-8 at byte 1: convert it, with `iconv .*` if it is in Latin-1"
    ) as e:
        read_text(str(tmp_path / name))
    (command,) = re.findall("`(.*)`", str(e.value))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_text(str(tmp_path / "new.txt")) == "süß\n"


@pytest.mark.parametrize("content", [b"\xff\xfea\x00b", b"\xef\xbb\xbf\xff"], ids=["utf-16", "utf-8"])
def test_a_marked_file_that_is_damaged(tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"is not UTF-(8|16) at byte \d: give a whole file"):
        read_text(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("text", [DNA, "x" + " " * 5000 + "y", "a" * LONGEST + " b\n" + DNA, ";".join(DNA)])
def test_long_words_are_learned_from_in_pieces(text):
    """The trainer's time grows with the square of the longest word."""
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert max(len(word) for piece in cut for word in re.findall(r"\S+|\s+", piece)) == LONGEST


def test_other_texts_are_learned_from_line_by_line():
    assert list(pieces(read_text())) == read_text().splitlines(keepends=True)
    assert train_tokenizer(DNA, 300).encode("GATTACA").ids != list(b"GATTACA")


@pytest.mark.parametrize("size", [100, 5000])
def test_blocks_change_no_token(size):
    text = read_text()[:200_000]
    tokenizer = train_tokenizer(text, 500)
    found = [token for block in blocks(text, size) for token in tokenizer.encode(block).ids]
    assert found == tokenizer.encode(text).ids == encode(tokenizer, text).tolist()
    assert max(map(len, blocks(text, size))) <= 2 * size
    assert "".join(blocks(DNA, size)) == DNA


def test_ctrl_c_is_heard_during_a_long_call():
    """The main thread waits for work that does not end."""
    never = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(never.wait)
    never.set()


def test_what_goes_wrong_in_a_long_call_is_raised():
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    assert interruptible(lambda: 3) == 3
