"""Checkpoints: one self-contained safetensors file, written atomically. Loading one runs no code from it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .text import InputError

NAME = "checkpoint.safetensors"
FORMAT = "pc_triton checkpoint 1"


def save(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint: tensors of any dtype and shape by name, and a record that JSON can hold.

    An earlier checkpoint of that name is replaced whole or, where this fails, left whole. Raises InputError if the
    file cannot be written (a full disk, a folder without permission).
    """
    from safetensors.torch import save as to_bytes

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write(path, to_bytes(whole, {"format": FORMAT, "record": json.dumps(record)}))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the record of a checkpoint; path is the file or the folder it is in.

    Raises InputError for a file that is missing, unreadable, truncated, or no checkpoint of this program.
    """
    from safetensors import SafetensorError, safe_open

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
            record = json.loads(metadata["record"])
            return {name: archive.get_tensor(name) for name in archive.keys()}, record  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged or truncated: restore it from a copy, or train again") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}: make it readable") from None


def write(path: Path, content: bytes) -> None:
    """Put content in the file at once or, on an error, not at all: a temporary file beside it, fsync, and a rename.

    Raises InputError if it cannot be written; then nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
            f"cannot write {path}: {error.strerror or error}: free space or choose another --out{kept}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
