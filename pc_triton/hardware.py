"""What a run is computed in and on: the dtype of its products, TF32, and the peak of a card."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .cards import listed
from .settings import Settings


def settled_dtype(settings: Settings, place: torch.device) -> Settings:
    """The settings with ``dtype="auto"`` replaced: bfloat16 on a GPU that has it, else float32."""
    if settings.dtype != "auto":
        return settings
    narrow = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(settings, dtype="bfloat16" if narrow else "float32")


@contextlib.contextmanager
def tf32(place: torch.device) -> Iterator[None]:
    """Within it products in float32 are made in TF32 on a GPU: 10 bits of mantissa, several times as fast."""
    before = torch.get_float32_matmul_precision()
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak(card: str, dtype: str) -> float | None:
    """Floating-point operations a second of a card's products, those in float32 by TF32; None if it is not known."""
    found = listed(card)
    return None if found is None else found.rate("bfloat16" if dtype == "bfloat16" else "tf32")


def card(place: torch.device) -> str:
    """The name of a device."""
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
