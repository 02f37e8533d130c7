"""The text to train on."""

import pytest

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")

from pc_triton.text import InputError, read_text, split, train_tokenizer


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
