"""What a run is computed in and on: the dtype of its products, TF32, and the peak of a card."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .settings import Settings

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}
"""Dense products in bfloat16, floating-point operations a second, by a part of the card's name: the makers' data
sheets, as half of what they give for sparse matrices. In TF32 it is half of that."""


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
    """Floating-point operations a second that a card of that name can make in products; None if it is not known."""
    known = [rate for name, rate in PEAKS.items() if name in card]
    if not known:
        return None
    return known[0] if dtype == "bfloat16" else known[0] / 2


def card(place: torch.device) -> str:
    """The name of a device."""
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
