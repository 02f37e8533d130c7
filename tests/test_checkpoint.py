"""Checkpoints: whole or not at all, and nothing that is not ours."""

import contextlib
import errno
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")

from safetensors.torch import save_file

from pc_triton import checkpoint
from pc_triton.text import InputError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.zeros(0, 4, dtype=torch.bfloat16)}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NAME, TENSORS, {"step": 3, "text": "ü"})
    for path in (tmp_path, tmp_path / checkpoint.NAME):
        tensors, record = checkpoint.load(path)
        assert record == checkpoint.load_record(path) == {"step": 3, "text": "ü"}
        assert tensors.keys() == TENSORS.keys()
        for name, t in TENSORS.items():
            assert torch.equal(tensors[name], t)
            assert tensors[name].dtype == t.dtype
    assert os.listdir(tmp_path) == [checkpoint.NAME]


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """What safetensors reads first may be of the old file, and what it reads then of the new one."""
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, TENSORS, {"step": 1})
    original, opened = checkpoint.safe_open, []

    @contextlib.contextmanager
    def replaced(file, framework):
        with original(file, framework=framework) as archive:
            opened.append(1)
            if len(opened) == 1:
                checkpoint.save(path, TENSORS, {"step": 2})
                yield SimpleNamespace(metadata=archive.metadata, keys=archive.keys, get_tensor=lambda _: torch.ones(1))
            else:
                yield archive

    monkeypatch.setattr(checkpoint, "safe_open", replaced)
    tensors, record = checkpoint.load(path)
    assert record["step"] == 2
    assert torch.equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, fails):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, TENSORS, {"step": 1})
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(InputError, match=r"No space left on device: free space.*; the earlier one is kept"):
        checkpoint.save(path, TENSORS, {"step": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [checkpoint.NAME]


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / checkpoint.NAME, TENSORS, {})
    assert os.listdir(tmp_path) == []


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / checkpoint.NAME
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(path, TENSORS, {"step": 1})
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged or truncated"):
            checkpoint.load(path)
    for at in (whole.index(b"step"), len(whole) - 1):  # a bit of the record, a bit of a weight
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match="damaged or truncated"):
            checkpoint.load(path)
    path.write_bytes(os.urandom(1000))
    with pytest.raises(InputError, match="damaged or truncated"):
        checkpoint.load(path)
    save_file(TENSORS, path)
    with pytest.raises(InputError, match="no checkpoint of `pc-triton train`"):
        checkpoint.load(path)
    torch.save(TENSORS, path)
    with pytest.raises(InputError, match="damaged or truncated"):
        checkpoint.load(path)
