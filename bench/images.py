"""Images to train on: MNIST and FashionMNIST from their idx files, or the 8x8 digits that come with scikit-learn."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_triton.text import InputError


class Images(NamedTuple):
    """Pixels in [0, 1], float32 ``[N, D]``, and labels int64 ``[N]``: to train on, and to measure on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def images(data: Path | None, tuning: bool = False) -> Images:
    """The images in a folder of the four idx .gz files, or scikit-learn's digits, a fifth of them to measure on.

    tuning: measure on the last sixth of those to train on instead, and train on the others.
    Raises InputError where a file is missing.
    """
    found = _load(data)
    if not tuning:
        return found
    end = len(found.y) - len(found.y) // 6
    return Images(found.x[:end], found.y[:end], found.x[end:], found.y[end:])


@cache
def _load(data: Path | None) -> Images:
    if data is not None:
        names = (f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
        return Images(*(_idx(data / name) for name in names))
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.from_numpy(pixels[order]).float() / 16, torch.from_numpy(labels[order]).long()
    test = len(y) // 5
    return Images(x[test:], y[test:], x[:test], y[:test])


def _idx(path: Path) -> Tensor:
    if not path.exists():
        raise InputError(f"{path}: no such file; --data is a folder of the four idx .gz files of MNIST or FashionMNIST")
    with gzip.open(path) as file:
        raw = file.read()
    if raw[3] == 1:  # the number of axes; 4 bytes each follow
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))
    count = int.from_bytes(raw[4:8], "big")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(count, -1).astype(np.float32) / 255)
