"""What a batch may not hold: refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import tracing


def check_values(inputs: Any, target: Tensor | None, family: Any, classes: int) -> None:
    """Raise ValueError for what a batch may not hold: no samples, NaN, infinity, labels that are no class."""
    check_batch(inputs)
    check_finite("y", target)
    if target is not None and family is not None:
        family.check_values(target, classes)


def check_finite(name: str, t: Tensor | None, *, infinite: bool = False) -> None:
    """Raise ValueError if t holds NaN, or infinity unless it may (on a GPU a device-side assertion, not to wait)."""
    if t is None or tracing.get() or not t.is_floating_point():
        return
    t = t.detach()
    if not t.is_cuda and math.isfinite(t.sum()):  # a sum may overflow, but is one pass
        return
    fine = (t == t if infinite else t.isfinite()).all()
    held = "NaN" if infinite else "NaN or infinity"
    if t.is_cuda:
        torch._assert_async(fine, f"{name} holds {held}")
    elif not fine:
        raise ValueError(f"{name} holds {held}: clean the data before inference")


def check_batch(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The model's arguments, keyword arguments and first tensor. Checks that it is a batch of finite numbers."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args, kwargs = tuple(ordinary(t) for t in args), {name: ordinary(t) for name, t in kwargs.items()}
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError("x: give a tensor, or a tuple or dict of the model's arguments with a tensor among them")
    if tensors[0].dim() == 0 or tensors[0].numel() == 0:
        raise ValueError(f"x has shape {tuple(tensors[0].shape)}: give a batch of at least one sample")
    check_finite("x", tensors[0])
    for t in tensors[1:]:
        check_finite("x", t, infinite=True)  # such as a mask to add to attention's logits
    return args, kwargs, tensors[0]


def check_devices(parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Raise ValueError if a parameter is not on this device (but where FSDP2 keeps its shards elsewhere)."""
    for name, p in parameters.items():
        if p.device != device and type(p) is nn.Parameter:
            raise ValueError(
                f"x is on {device}, the model's parameter {name!r} on {p.device}: move model and batch to one device"
            )


def ordinary(t: Any) -> Any:
    """t, or where it was made in torch.inference_mode, and autograd takes no such tensor, a copy."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t
