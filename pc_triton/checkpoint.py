"""A checkpoint is one self-contained safetensors file, written atomically. Loading it runs no code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .text import InputError

NAME = "checkpoint.safetensors"
FORMAT = "pc_triton checkpoint 1"


def save(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint: tensors of any dtype and shape by name, and a record that JSON can hold.

    An earlier checkpoint of that name is replaced whole, or left whole if this fails. Raises InputError if the file
    cannot be written (a full disk, a folder without permission).
    """
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(record)
    write(path, to_bytes(whole, {"format": FORMAT, "record": text, "digest": _digest(whole, text)}))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, on the CPU, and its record. path: the file, or its folder.

    Raises InputError for a file that is missing, unreadable, truncated, altered, or no checkpoint of this program.
    """
    try:
        return _load(path)
    except _Damaged:  # safe_open opens the file twice, and a running process may replace it in between: try again
        return _load(path)


def _load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _opened(path) as (archive, metadata):
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        if metadata.get("digest") != _digest(tensors, metadata.get("record", "")):
            raise _Damaged
        return tensors, json.loads(metadata["record"])


def load_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record alone, which is quick because the digest is not checked. Arguments and other errors as in `load`."""
    with _opened(path) as (_, metadata):
        return json.loads(metadata["record"])


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that is given as that, or as its file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


class _Damaged(InputError):
    pass


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, str]]]:
    file = Path(path)
    if file.is_dir():
        file = file / NAME
    if not file.is_file():
        raise InputError(f"{file}: no such checkpoint: train one first, or give its folder")
    try:
        with safe_open(file, framework="pt") as archive:
            metadata = archive.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{file} is no checkpoint of `pc-triton train`: give one that is")
            yield archive, metadata
    except (SafetensorError, _Damaged, KeyError, json.JSONDecodeError):
        raise _Damaged(f"{file} is damaged or truncated: restore it from a copy, or train again") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}: make it readable") from None


@contextlib.contextmanager
def fitting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it the contents of a checkpoint are used. Raises InputError where they do not fit."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{path}: its tensors do not fit its settings: restore it from a copy, or train again"
        ) from None


def _digest(tensors: dict[str, Tensor], record: str) -> str:
    """SHA-256 of everything in a checkpoint, so that a flipped bit is not taken for a trained weight."""
    digest = hashlib.sha256(record.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file whole or, on an error, not at all: to a temporary file beside it, then fsync and a rename.

    Raises InputError if it cannot be written; nothing is then left behind.
    """
    check_replaceable(path)
    temporary = path.parent / f".{path.name[:40]}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the earlier one is kept" if path.exists() else ""
        raise InputError(
            f"cannot write {path}: {error.strerror or error}: free space or choose another path{kept}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise InputError if a path is a folder or a device, or is in no folder that there is, before there is content."""
    try:
        os.lstat(path)
        if not path.is_file():
            raise InputError(f"{path} is no file to be replaced: choose another path")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}: choose another path") from None
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {path.parent} is no folder: make it, or choose another path")


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, if the system can (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
