"""Documents that are read as they are needed: from any format, in any number of processes, and on from where it was."""

import gzip
import itertools
import json
import lzma
import shutil
import sys
import time

import pytest
import torch

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")
pytest.importorskip("datasets", reason="pip install 'pc_triton[stream]'")

import datasets
from test_cli import command, failure, interrupt_at

from pc_triton import checkpoint, parallel, report, stream
from pc_triton.build import load
from pc_triton.cli import main
from pc_triton.data import AHEAD, Ahead, StreamData, TextData
from pc_triton.evaluate import generate
from pc_triton.settings import Settings
from pc_triton.stream import Documents, Reader, is_held_out
from pc_triton.text import InputError, train_tokenizer

TEXTS = [f"document {k} of the {'long' if k % 3 else 'short'} ones{', and so on' * (k % 7)}" for k in range(90)]
TOKENIZER = train_tokenizer("\n".join(TEXTS), 280)
SEPARATOR = 280


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(folder, suffix, texts=TEXTS, files=3):
    """The documents in files of a format; the pattern that finds them."""
    size = -(-len(texts) // files)
    for number in range(files):
        some = texts[number * size : (number + 1) * size]
        path = folder / f"part{number}{suffix}"
        if suffix == ".parquet":
            datasets.Dataset.from_dict({"text": some}).to_parquet(path)
        elif suffix == ".csv":
            datasets.Dataset.from_dict({"text": some}).to_csv(path)
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in some), encoding="utf-8")
        elif suffix == ".jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in some).encode()))
        else:
            path.write_text("\n\n".join(some) + "\n", encoding="utf-8")
    return str(folder / f"*{suffix}")


def reader(documents, held_out=0, length=17, size=8, seed=0):
    return Reader(documents, TOKENIZER, SEPARATOR, held_out, length, size, seed)


def tokens_of(texts):
    return stream.encode_documents(TOKENIZER, texts, SEPARATOR).to(torch.int64)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_every_format(tmp_path, suffix):
    assert list(Documents(write(tmp_path, suffix), "text")) == TEXTS


def test_a_set_as_on_the_hub(tmp_path):
    """A folder laid out as a repository of the hub, with configurations and splits, goes through the same code."""
    for config in ("a", "b"):
        for split in ("train", "validation"):
            (tmp_path / config).mkdir(exist_ok=True)
            (tmp_path / config / f"{split}.jsonl").write_text(json.dumps({"text": f"{config} {split}"}))
    card = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "validation"))
        for config in ("a", "b")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert list(Documents(f"{tmp_path}:b", "text")) == ["b train"]
    assert list(Documents(f"{tmp_path}:a:validation", "text")) == ["a validation"]
    with pytest.raises(InputError, match=r"cannot read .*: check its name"):
        Documents(f"{tmp_path}:c", "text")


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_shares_are_parts_of_the_whole(tmp_path, shares):
    """Whole files where they can be dealt evenly, every so many documents where not: each document once."""
    documents = Documents(write(tmp_path, ".jsonl"), "text")
    parts = [list(documents.share(number, shares)) for number in range(shares)]
    assert sorted(itertools.chain(*parts)) == sorted(TEXTS)
    assert min(map(len, parts)) >= len(TEXTS) // shares


def in_order(reader, count):
    """The tokens of so many sequences, from a pool that keeps their order; each begins with the last one's end."""
    rows = torch.cat([reader.draw(1) for _ in range(count)])
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    return torch.cat([rows[:1, 0], rows[:, 1:].flatten()])


def test_sequences_hold_the_documents_in_order(tmp_path):
    """Once as they come; then again and again, with the files in another order."""
    found = in_order(reader(Documents(write(tmp_path, ".jsonl"), "text"), size=1), 300)
    expected = tokens_of(TEXTS)
    size = len(expected)
    assert len(found) > 2 * size
    assert torch.equal(found[:size], expected)
    assert documents_in(found[size : 2 * size]) == documents_in(expected)
    assert documents_in(expected) == sorted(TEXTS)


def documents_in(tokens, tokenizer=TOKENIZER):
    cuts = [*(tokens == SEPARATOR).nonzero().flatten().tolist(), len(tokens)]
    return sorted(tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(cuts))


def test_a_pool_draws_each_sequence_once(tmp_path):
    texts = [f"{k:07}" for k in range(2000)]  # no two sequences alike
    documents = Documents(write(tmp_path, ".jsonl", texts), "text")
    in_order = {tuple(row) for row in reader(documents, size=5).draw(5).tolist()}
    pooled = reader(documents, size=20)
    drawn = [tuple(row) for _ in range(40) for row in pooled.draw(5).tolist()]
    assert len(set(drawn)) == len(drawn), "none twice"
    assert in_order <= set(drawn), "and none for ever in the pool"
    assert not in_order <= set(drawn[:10])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".csv", ".parquet"])
@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("draws", [1, 30])
def test_it_goes_on_where_it_was(tmp_path, suffix, shares, draws):
    """Through JSON, within the first pass and after it: what is drawn next is the same, token for token."""
    pattern = write(tmp_path, suffix)
    straight = reader(Documents(pattern, "text").share(shares - 1, shares), held_out=10)
    for _ in range(draws):
        straight.draw(5)
    place, tensors = straight.state()
    place, tensors = json.loads(json.dumps(place)), {name: t.clone() for name, t in tensors.items()}
    resumed = reader(Documents(pattern, "text").share(shares - 1, shares), held_out=10, seed=1)
    resumed.restore(place, tensors)
    again, kept = resumed.state()
    assert again == place, "before it has read on, too"
    assert all(torch.equal(t, kept[name]) for name, t in tensors.items())
    assert all(torch.equal(straight.draw(5), resumed.draw(5)) for _ in range(60))


def test_held_out_documents_are_not_read(tmp_path):
    """Nor are their copies."""
    pattern = write(tmp_path, ".jsonl", TEXTS + TEXTS[::-1])
    rest = [text for text in TEXTS if not is_held_out(text, 10)]
    assert 0 < len(TEXTS) - len(rest) < 30
    found = in_order(reader(Documents(pattern, "text"), held_out=10, size=1), 150)
    whole = documents_in(found[: found.tolist().index(SEPARATOR, 2300)])
    assert set(whole) == set(rest)
    assert len(whole) > 100
    assert not is_held_out(TEXTS[0], 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("*.csv", "no such file"),
        ("*", "files of one kind, .txt, .jsonl"),
        ("other.bin", "files of one kind"),
        ("an/unknown-set", "cannot read an/unknown-set"),
        ("a:b:c:d", "is given as NAME"),
        ("bad.jsonl", "cannot read"),
        ("bad.jsonl.gz", "cannot read"),
        ("bad.txt", "cannot read"),
        ("bad.parquet", "cannot read"),
        ("bad.xz", "give files of one kind"),
        ("bad.jsonl.xz", "cannot read"),
        ("empty.jsonl", "cannot read"),
        ("", "is given as NAME"),
        (":", "is given as NAME"),
        ("other.jsonl", r"has no text in column 'text': give a --column that has \(words\)"),
        ("numbers.jsonl", r"has no text in column 'text': give a --column that has \(none\)"),
    ],
)
def test_a_source_that_cannot_be_used(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "bad.jsonl": b'{"text": "whole"}\n{"text": "cut',
        "bad.jsonl.gz": gzip.compress(b'{"text": "whole"}\n' * 50)[:-20],
        "bad.txt": b"good \xff\xfe bad\n",
        "bad.parquet": b"PAR1, it says",
        "bad.xz": b"",
        "bad.jsonl.xz": lzma.compress(b'{"text": "whole"}\n' * 50)[:-20],
        "empty.jsonl": b"",
        "other.bin": b"",
        "other.jsonl": b'{"words": "text"}\n',
        "numbers.jsonl": b'{"text": 3}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(Documents(source, "text"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.csv", "text,n\none,1\ntwo,2\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(Documents(str(tmp_path / name), "text")) == ["one", "two"]
    (tmp_path / name).write_text(content, encoding="utf-16")
    with pytest.raises(InputError, match="cannot read"):
        list(Documents(str(tmp_path / name), "text"))


def test_the_remedy_for_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-16")
    with pytest.raises(InputError, match="convert its files to UTF-8"):
        list(Documents(str(tmp_path / "a.txt"), "text"))


def test_documents_without_text_are_left_out(tmp_path):
    (tmp_path / "a[1].jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two"}\n')
    assert list(Documents(str(tmp_path / "a[1].jsonl"), "text")) == ["one", "two"]


def test_no_documents_at_all(tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n\n \n")
    line = failure(capsys, train_arguments(tmp_path / "blank.txt", tmp_path / "run"))
    assert "blank.txt holds no document: give one with text" in line
    few = write(tmp_path, ".jsonl", [text for text in TEXTS if not is_held_out(text, 10)])
    line = failure(capsys, train_arguments(few, tmp_path / "run"))
    assert "0 tokens of held-out text for a context of 16: give more text, --held-out or a smaller --context" in line


def test_a_share_without_documents(tmp_path):
    documents = Documents(write(tmp_path, ".jsonl", TEXTS[:2], files=1), "text")
    with pytest.raises(InputError, match="finds no document in its share: use fewer processes"):
        reader(documents.share(2, 3)).draw(1)
    with pytest.raises(InputError, match="finds no document in its share"):
        reader(documents, held_out=1).draw(1)


# A run.

SIZES = (
    "--width 16 --heads 2 --blocks 1 --context 16 --vocabulary 281 --batch 4 --steps 20 --eval-every 10 --pool 8 "
    "--device cpu"
)


def train_arguments(pattern, out, more=""):
    return ["train", "--stream", str(pattern), "--out", str(out), *SIZES.split(), *more.split()]


@pytest.fixture(autouse=True, scope="module")
def _short_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LONG_RUN", 3)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), ".jsonl", TEXTS * 3, files=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("runs") / "pc"
    assert main(train_arguments(source, folder)) == 0
    return folder


def same(one, other):
    """Whether two checkpoints hold the same, bit for bit."""
    (tensors, record), (others, record_of_other) = checkpoint.load(one), checkpoint.load(other)
    del record["speed"], record_of_other["speed"]
    return record == record_of_other and all(torch.equal(t, others[name]) for name, t in tensors.items())


def test_a_run_resumes_bit_for_bit(tmp_path, source, run, monkeypatch, capsys):
    """20 steps straight are 13 steps, a Ctrl-C, and the rest; what is measured on and drawn from is kept too."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)
        assert main(train_arguments(source, tmp_path)) == 130
    assert main(["train", "--resume", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert same(run, tmp_path)
    trained = capsys.readouterr().out.splitlines()[-1]
    assert main(["eval", "--checkpoint", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == trained


def test_data_as_it_is_read(source, tmp_path):
    """Held-out documents are no training documents; every sequence is of the vocabulary."""
    settings = Settings(stream=source, context=16, vocabulary=281, batch=4, pool=8)
    data = StreamData(settings, tmp_path, {}, {})
    held_out = set(documents_in(data.held_out, data.tokenizer))
    x, y = data.batch()
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    drawn = torch.cat([data.batch()[0].flatten() for _ in range(100)])
    assert not held_out & set(documents_in(drawn, data.tokenizer))
    assert held_out == {text for text in TEXTS if is_held_out(text, 10)}
    assert int(data.counts.sum()) > 1000
    assert int(data.counts[data.separator]) == len([text for text in TEXTS * 3 if not is_held_out(text, 10)])


def test_the_same_batches_in_any_number_of_processes(source, tmp_path, monkeypatch):
    """A run that two processes began: one process, or two, read the same sequences from its checkpoint."""
    settings = Settings(stream=source, context=16, vocabulary=281, batch=4, pool=8)

    def at(rank, processes, tensors, record):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "processes", lambda: processes)
        return StreamData(settings, tmp_path, tensors, record)

    both = [at(rank, 2, {}, {}) for rank in range(2)]
    monkeypatch.setattr(parallel, "gathered", lambda rows: [row for data in both for row in data.place()])
    for data in both:
        data.batch()
    tensors, record = both[0].state(both[0].place())
    tensors = {name: t.clone() for name, t in tensors.items()}
    tensors |= {"held_out": both[0].held_out, "unigram": both[0].counts}
    record = json.loads(json.dumps(record)) | {"tokenizer": both[0].tokenizer.to_str()}
    alone, second = at(0, 1, tensors, record), at(1, 2, tensors, record)
    for _ in range(20):
        rows = [data.batch()[0] for data in both]
        assert not torch.equal(*rows)
        assert torch.equal(torch.cat(rows), alone.batch()[0])
        assert torch.equal(rows[1], second.batch()[0])
    with pytest.raises(InputError, match="begun by 2 processes: go on with a number that divides it"):
        at(0, 4, tensors, record)


@pytest.mark.parametrize("kind", ["text", "stream"])
def test_batches_made_ahead(tmp_path, source, kind):
    """They are those of the data, in order; the place is after those that were taken, however many were made."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    kinds = {"text": (TextData, {"data": str(tmp_path / "text.txt")}), "stream": (StreamData, {"stream": source})}
    make, options = kinds[kind]
    settings = Settings(context=16, vocabulary=281, batch=4, pool=8, **options)
    straight, data = (make(settings, tmp_path, {}, {}) for _ in range(2))
    ahead = Ahead(data, torch.device("cpu"))
    for step in range(8):
        tensors, record = straight.state(straight.place())
        tensors = {name: t.clone() for name, t in tensors.items()}
        while len(ahead._made.queue) < AHEAD:  # until it is as far ahead as it gets
            time.sleep(0.001)
        found, record_of_found = data.state(ahead.place)
        assert record_of_found == record, step
        assert all(torch.equal(t, found[name]) for name, t in tensors.items()), step
        assert all(map(torch.equal, straight.batch(), ahead.batch()))
    ahead.close()


def test_a_fault_in_a_batch_made_ahead():
    """It is raised where that batch is asked for, and not before."""

    class Data:
        left = 2

        def place(self):
            return self.left

        def batch(self):
            if not self.left:
                raise InputError("no more: give more")
            self.left -= 1
            return torch.zeros(1, 2), torch.ones(1, 2)

    ahead = Ahead(Data(), torch.device("cpu"))
    assert [ahead.place, ahead.batch() and ahead.place, ahead.batch() and ahead.place] == [2, 1, 0]
    with pytest.raises(InputError, match="no more"):
        ahead.batch()
    ahead.close()


def test_two_processes(tmp_path, source):
    """torchrun begins a run, of two readers; one process goes on with both."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _, stderr = command(*train_arguments(source, tmp_path, "--steps 3"), launcher=launcher).communicate(timeout=100)
    assert checkpoint.load(tmp_path)[1]["step"] == 3, stderr
    assert main(["train", "--resume", "--steps", "6", "--out", str(tmp_path), "--device", "cpu"]) == 0
    tensors, record = checkpoint.load(tmp_path)
    assert len(record["readers"]) == 2
    assert not torch.equal(tensors["reader.0.pool"], tensors["reader.1.pool"])
    assert len(record["losses"]) == 6


def test_generation_ends_with_the_document(run, capsys, monkeypatch):
    arguments = ["generate", "--checkpoint", str(run), "--prompt", "", "--tokens", "40", "--seed", "3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    run = load(run, "cpu")
    tokens = torch.tensor([SEPARATOR])
    assert run.model.separator == SEPARATOR
    with torch.no_grad():
        run.model.ln.weight.zero_()
        run.model.ln.bias.fill_(1.0)
        run.model.head.weight.fill_(-1.0)
        run.model.head.weight[SEPARATOR] = 1.0
    assert generate(run.model, tokens, 5).tolist() == [SEPARATOR], "nothing is likelier than the end"
    assert text != "\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data text.txt", "data and stream are both given"),
        ("--pool 0", "pool=0"),
        ("--context 2000", "tokens of held-out text"),
        ("--column words", "has no text in column 'words': give a --column that has (text)"),
        ("--held-out missing.jsonl", "no such file"),
        ("--vocabulary 5000", "vocabulary=5000: this text yields"),
        ("--vocabulary 256", "vocabulary=256: a byte-level vocabulary needs at least 257"),
    ],
)
def test_settings_out_of_range(tmp_path, source, capsys, more, message):
    assert message in failure(capsys, train_arguments(source, tmp_path / "run", more))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_finds_its_documents(tmp_path, source, run, capsys):
    """They may have been moved; others are refused."""
    shutil.copytree(run, tmp_path / "run")
    resume = ["train", "--resume", "--device", "cpu", "--out", tmp_path / "run", "--steps", "21", "--stream"]
    assert "are not those" in failure(capsys, [*resume, write(tmp_path, ".jsonl", TEXTS[::-1])])
    more = tmp_path / "more"
    more.mkdir()
    assert "are not those" in failure(capsys, [*resume, write(more, ".jsonl", TEXTS * 3, files=3)])
    assert "--held-out None, not x.jsonl" in failure(capsys, [*resume[:-1], "--held-out", "x.jsonl"])
    assert "was made with --stream: leave --data out" in failure(capsys, [*resume[:-1], "--data", "x.txt"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert main([str(a) for a in [*resume, write(elsewhere, ".jsonl", TEXTS * 3, files=2)]]) == 0


def test_documents_that_go_missing(tmp_path, capsys):
    """A file that is cut while the run reads it ends the run with one line; the last checkpoint is kept."""
    pattern = write(tmp_path, ".jsonl.gz", TEXTS * 3, files=2)
    damaged = tmp_path / "part1.jsonl.gz"
    whole = damaged.read_bytes()
    assert main(train_arguments(pattern, tmp_path / "run", "--steps 10")) == 0
    capsys.readouterr()
    damaged.write_bytes(whole[:50])
    resume = ["train", "--resume", "--device", "cpu", "--out", tmp_path / "run", "--steps", "1000"]
    assert "cannot read" in failure(capsys, resume)
    assert checkpoint.load(tmp_path / "run")[1]["step"] >= 10


def test_datasets_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = failure(capsys, train_arguments("x.jsonl", tmp_path / "run"))
    assert "datasets is not installed: pip install 'pc_triton[stream]'" in line
