"""Products in 8 bits, for the passes of inference: they move states by a fraction of a percent, and need few digits.

A number in 8 bits is a float8 times a scale that its whole tensor shares. The scale is a power of two, so that
scaling rounds nothing: what is lost is the rounding to float8 alone, 2^-4 of a number in e4m3 and 2^-3 in e5m2.
Operands of the forward products are in e4m3. Gradients reach farther, and are in e5m2 (Micikevicius et al. 2022,
arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .arithmetic import wide
from .dispatch import tracing

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {FORWARD: 2.0**8, GRADIENT: 2.0**15}
"""The largest number of a tensor is scaled to at least half of this and below it; float8 holds 1.75 times as much."""
SMALLEST = 2.0**-110
"""What a tensor's largest number counts as if it is smaller, so that scale and inverse are ordinary numbers."""
MULTIPLE = 16
"""The products of GPUs take sizes that are multiples of this; others stay as they are, on every device."""
PAYS = 1024
"""On a GPU, products with fewer columns than this stay as they are.

To round an operand ``[R, K]`` of 16 bits reads it twice and writes it, 5 R K bytes, and a product ``[R, N]`` of it
saves R K N operations of the slower rate: by an H100's data sheet that is more where N is above some 1,000.
"""


class Rounded(NamedTuple):
    """A tensor in 8 bits."""

    values: Tensor
    scale: Tensor
    """float32, 0-dim: the tensor is values * scale."""


def rounded(x: Tensor, dtype: torch.dtype) -> Rounded:
    """x in 8 bits, of any shape and without a gradient. NaN or infinity anywhere in x is NaN everywhere in it."""
    x = x.detach()
    largest = torch.linalg.vector_norm(x, torch.inf).float().clamp_min(SMALLEST)
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent's bits: a power of two
    scale = power * (2 / LARGEST[dtype])
    x = x if x.dtype == torch.bfloat16 else wide(x)  # float16 has no room for the inverse of every scale
    inverse = (1 / scale).to(x.dtype)
    if tracing.get():
        return Rounded((x * inverse).to(dtype), scale)
    return Rounded(torch.mul(x, inverse, out=torch.empty_like(x, dtype=dtype)), scale)  # one kernel on a GPU


class Weight:
    """A weight W ``[N, K]`` with its 8 bits, for x W' and for g W: made where a product first needs them, and once."""

    def __init__(self, weight: Tensor) -> None:
        self.full = weight.detach()

    @cached_property
    def rounded(self) -> Rounded:
        return rounded(self.full, FORWARD)

    @cached_property
    def by_rows(self) -> Rounded:
        """W, with what x W' sums over side by side."""
        return Rounded(self.rounded.values.contiguous(), self.rounded.scale)

    @cached_property
    def by_columns(self) -> Rounded:
        """W' ``[K, N]``, with what g W sums over side by side."""
        return Rounded(self.rounded.values.t().contiguous(), self.rounded.scale)


def product(a: Tensor, dtype: torch.dtype, b: Rounded, out: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a b' + bias ``[..., N]`` in the dtype ``out``, of a ``[..., K]``, rounded to ``dtype`` here, and b ``[N, K]``."""
    values, scale = rounded(a, dtype)
    bias = None if bias is None else bias.to(out)
    if out == torch.float64 or not has_products(a.device):
        return F.linear((values.float() * scale).to(out), (b.values.float() * b.scale).to(out), bias)
    rows, adds = values.reshape(-1, a.shape[-1]).contiguous(), None if out == torch.float32 else bias
    # The fast sum keeps some 14 bits, more than either operand has.
    y = torch._scaled_mm(rows, b.values.t(), scale, b.scale, adds, out_dtype=out, use_fast_accum=True)
    y = y if adds is bias or bias is None else y + bias
    return y.view(*a.shape[:-1], len(b.values))


@lru_cache
def has_products(device: torch.device) -> bool:
    """Whether a device multiplies float8: NVIDIA's GPUs from compute capability 8.9. AMD's have other formats."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def pays(device: torch.device, columns: int) -> bool:
    """Whether a product ``[R, columns]`` is made in 8 bits: always where they are emulated, which is for tests."""
    return columns >= PAYS or not has_products(device)


class Linear(torch.autograd.Function):
    """x W' + b of numbers in 8 bits, and its gradient in x; weights get none, as no pass of inference takes one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, out: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        if not pays(x.device, len(weight.full)):
            return F.linear(x, weight.full, bias)
        return product(x, FORWARD, weight.by_rows, out, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.weight
        if not pays(grad.device, weight.full.shape[1]):
            return grad @ weight.full.to(grad.dtype), None, None, None
        return product(grad, GRADIENT, weight.by_columns, ctx.dtype), None, None, None


class FewDigits(TorchFunctionMode):
    """Within it ``F.linear`` multiplies in 8 bits wherever its weight is a parameter, or a part of one.

    It keeps the weights' 8 bits, for all passes of a batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[Any, tuple[Tensor, Weight]] = {}  # with what is rounded, so that its id stays its own

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``."""
        if not takes(input, weight, bias):
            return F.linear(input, weight, bias)
        device = input.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        out = torch.get_autocast_dtype(device) if casts else input.dtype
        return Linear.apply(input, self.in_8_bits(weight), bias, out)

    def in_8_bits(self, weight: Tensor) -> Weight:
        """The weight, rounded once until it changes."""
        owner = _owner(weight)
        key = id(owner), owner._version, weight.storage_offset(), weight.shape, weight.stride()
        if key not in self.weights:
            self.weights[key] = owner, Weight(weight)
        return self.weights[key][1]


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether x W' + b is made in 8 bits: W and b parameters, which no state reaches, in sizes that GPUs multiply."""
    owner = _owner(weight)
    plain = type(weight) in (Tensor, torch.nn.Parameter) and type(x) in (Tensor, torch.nn.Parameter)
    if not plain or weight.dim() != 2 or any(size % MULTIPLE for size in weight.shape):
        return False
    some = x.dim() > 1 and x.numel() > 0 and x.is_floating_point()
    leaves = owner.is_leaf and (bias is None or _owner(bias).is_leaf)
    return some and leaves and any(pays(x.device, size) for size in weight.shape)


def _owner(weight: Tensor) -> Tensor:
    """The tensor that a view is of."""
    return weight._base if weight._is_view() and weight._base is not None else weight
