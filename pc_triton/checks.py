"""What a model and a batch may not be: refused before anything changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from .dispatch import tracing
from .distributions import Distribution
from .errors import see


def check_values(inputs: Any, target: Tensor | None, family: Distribution | None, classes: int) -> None:
    """Raise ValueError for what a batch may not hold: no samples, NaN, infinity, labels that are no class."""
    check_batch(inputs, target)
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


def check_positive(name: str, t: Tensor) -> None:
    """Raise ValueError if a rule gave a number that is not positive and finite (on a GPU assert on the device)."""
    if tracing.get():
        return
    fine = ((t > 0) & t.isfinite()).all()
    if t.is_cuda:
        torch._assert_async(fine, f"{name} gave numbers that are not positive and finite")
    elif not fine:
        raise ValueError(f"{name} gave numbers that are not positive and finite")


def check_batch(inputs: Any, target: Any = None) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The model's arguments, keyword arguments, and the tensor that is a batch of samples, which may not be infinite.

    That is the first tensor as long as the target, since a mask may come before it; without one, the first.
    """
    _refuse_transforms()
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args, kwargs = tuple(ordinary(t) for t in args), {name: ordinary(t) for name, t in kwargs.items()}
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError("x: give a tensor, or a tuple or dict of the model's arguments with a tensor among them")
    length = len(target) if isinstance(target, Tensor) and target.dim() else None
    first = next((t for t in tensors if t.dim() and len(t) == length), tensors[0])
    if first.dim() == 0 or first.numel() == 0:
        raise ValueError(f"x has shape {tuple(first.shape)}: give a batch of at least one sample")
    others = [t for t in tensors if t is not first]
    check_finite(f"x (its tensor {tuple(first.shape)}; masks go after the data, in a dict)" if others else "x", first)
    for t in others:
        check_finite("x", t, infinite=True)  # such as a mask to add to attention's logits
    return args, kwargs, first


def _refuse_transforms() -> None:
    """Raise RuntimeError within what would transform, or record, all of inference."""
    transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    if transforms is not None and transforms() is not None:
        raise RuntimeError(
            "FreeEnergy within torch.func (grad, vmap, jvp, jacrev, ...): inference is made of gradients of its own. "
            "Take loss.backward() or torch.autograd.grad of what it returns, and loop in place of vmap"
            + see("function-transforms")
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "FreeEnergy in forward-mode differentiation: its derivatives are those of backward() alone"
            + see("function-transforms")
        )
    exporting = getattr(torch.compiler, "is_exporting", None)
    if torch.jit.is_tracing() or (exporting is not None and exporting()):
        raise RuntimeError(
            "FreeEnergy trains, and is not exported: give torch.export or torch.jit.trace the model itself"
            + see("export")
        )


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


def check_model(model: Any, order: Any) -> dict[Distribution, str]:
    """The families in a model that can be trained, by name. Raises TypeError or ValueError for any other."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a module (torch.nn.Module)")
    if isinstance(model, nn.parallel.DistributedDataParallel):  # static_graph would not average the gradients
        if order != "incremental":
            raise ValueError(
                "the model is in DistributedDataParallel: write DistributedDataParallel(FreeEnergy(model)), by "
                "which all of inference is one call of it" + see("distributeddataparallel-inside")
            )
        if model.static_graph or model.find_unused_parameters:
            raise ValueError(
                "order='incremental' takes the model in DistributedDataParallel without static_graph and "
                "find_unused_parameters: leave both False"
            )
    names = {
        module: name.replace("_orig_mod.", "")  # as torch.compile calls what it wraps
        for name, module in model.named_modules()
        if isinstance(module, Distribution)
    }
    if not names:
        raise ValueError(
            "the model has no value node: use pc.Linear or pc.Gaussian() in it, or pc.convert(model)"
            + see("no-value-node")
        )
    return names


def described(x: Any) -> str:
    """What x is, for an error: a tensor's dtype and shape, else its type."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_free_input(x: Any, clamp_input: Any) -> None:
    """Raise ValueError where x cannot be freed, as a whole or in part."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        raise ValueError(
            "clamp_input=False: a free input must be one floating-point tensor; embed tokens first"
            + see("a-free-input")
        )
    if clamp_input is False:
        return
    if not isinstance(clamp_input, Tensor) or clamp_input.dtype != torch.bool or clamp_input.shape != x.shape:
        raise ValueError(
            f"clamp_input is {described(clamp_input)}: give a bool, or a bool tensor {tuple(x.shape)}, True where x "
            "is clamped"
        )


def check_options(
    steps: Any,
    order: Any,
    form: str,
    optimizes: bool,
    state_dtype: torch.dtype | None,
    inference_dtype: torch.dtype | None,
    output_weight: Any,
) -> None:
    """Raise ValueError for an option out of range, or for two that do not go together."""
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps={steps!r}: the number of inference steps is a whole number of at least 1")
    if optimizes and order in ("sweep", "incremental"):
        raise ValueError(f"order={order!r} moves its states within the backward pass: leave state_optimizer=None")
    if state_dtype not in (None, torch.bfloat16):
        raise ValueError(f"state_dtype={state_dtype!r}: give torch.float32, torch.bfloat16 or None")
    if state_dtype is not None and form != "error":
        raise ValueError(
            f"state_dtype=torch.bfloat16 with order={order!r}, whose states are u: rounded, they lose the small "
            "u - mu; use order='error', or float32 states"
        )
    if state_dtype is not None and optimizes:
        raise ValueError(
            "state_dtype=torch.bfloat16 with a state_optimizer, which would do its arithmetic in it: leave "
            "state_optimizer=None, or use float32 states"
        )
    if inference_dtype not in (None, torch.float8_e4m3fn):
        raise ValueError(f"inference_dtype={inference_dtype!r}: give torch.float8_e4m3fn or None")
    if inference_dtype is not None and form != "error":
        raise ValueError(
            f"inference_dtype with order={order!r}, whose states are u: by predictions of more digits u - mu would "
            "be the rounding; use order='error', or inference_dtype=None"
        )
    number = isinstance(output_weight, Real) and not isinstance(output_weight, bool)
    if not (number and math.isfinite(output_weight)):
        raise ValueError(f"output_weight={output_weight!r}: give a finite number; a negative one nudges away")


@contextlib.contextmanager
def samples_first(layers: Mapping[str, nn.Module], samples: int) -> Iterator[None]:
    """Within it a recurrent layer, or attention, that takes the batch's samples for its steps in time is refused.

    layers: those with ``batch_first=False``. Where there are as many samples as steps, that cannot be told.
    """

    def check(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if t is not None and t.dim() == 3 and t.shape[0] == samples != t.shape[1]:
            raise ValueError(
                f"{name!r} has batch_first=False and is given {tuple(t.shape)} in a batch of {samples}: it takes the "
                "samples, along the first axis, for steps in time. Use batch_first=True and x [samples, time, ...]"
                + see("time-first")
            )

    hooks = [
        layer.register_forward_pre_hook(partial(check, name), with_kwargs=True, prepend=True)  # type: ignore[arg-type]
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
