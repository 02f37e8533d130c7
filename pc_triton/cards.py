"""What is known of GPUs: multiprocessors, bandwidth, and how many products they make in a second."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU, or a slice of one."""

    name: str
    multiprocessors: int
    bandwidth: float = 0.0
    """Bytes a second; 0: not known."""
    half: float = 0.0
    """Dense FLOPs a second in float16 and bfloat16, summed in float32."""
    tf32: float = 0.0
    float32: float = 0.0

    def rate(self, kind: str) -> float:
        """FLOPs a second of products of that kind: a dtype's name, or "tf32"."""
        return self.tf32 if kind == "tf32" else self.float32 if kind == "float32" else self.half


CARDS = (  # of the makers' data sheets, dense; where a name stands for several, those with the most bandwidth a FLOP
    Card("A100", 108, 2.039e12, 312e12, 156e12, 19.5e12),
    Card("H100 NVL", 132, 3.9e12, 835e12, 418e12, 60e12),
    Card("H100 PCIe", 114, 2.0e12, 756e12, 378e12, 51e12),
    Card("H100", 132, 3.35e12, 989e12, 494e12, 67e12),
    Card("H200", 132, 4.8e12, 989e12, 494e12, 67e12),
    Card("GH200", 132, 4.9e12, 989e12, 494e12, 67e12),
    Card("B200", 148, 8.0e12, 2250e12, 1125e12, 75e12),
    Card("L4", 58, 0.3e12, 121e12, 60e12, 30.3e12),
    Card("L40S", 142, 0.864e12, 362e12, 183e12, 91.6e12),
    Card("A10", 72, 0.6e12, 125e12, 62.5e12, 31.2e12),
    Card("RTX 3090", 82, 0.936e12, 71e12, 35.6e12, 35.6e12),
    Card("RTX 4090", 128, 1.008e12, 165e12, 82.6e12, 82.6e12),
    Card("RTX 5090", 170, 1.792e12, 209e12, 104.8e12, 104.8e12),
    Card("MI300X", 304, 0.0, 1307e12, 653e12, 163e12),  # without a bandwidth: no model of its kernels was made
)


def listed(name: str) -> Card | None:
    """The card of that name, as ``torch.cuda.get_device_name`` says it; None if it is not listed."""
    return next((card for card in CARDS if re.search(rf"\b{card.name}\b", name)), None)


def known(name: str, multiprocessors: int) -> Card:
    """What is known of a card with so many multiprocessors. A part of a listed one, such as a MIG slice, has its share
    of bandwidth and rates; of one that is not listed no more is known than these two."""
    card = listed(name)
    if card is None:
        return Card(name, multiprocessors)
    part = multiprocessors / card.multiprocessors
    rates = (part * rate for rate in (card.bandwidth, card.half, card.tf32, card.float32))
    return Card(name, multiprocessors, *rates)
