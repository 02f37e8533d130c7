"""Products in 8 bits, for the passes of inference: they move states by a fraction of a percent, and need few digits.

A number in 8 bits is a float8 times a scale, which each row of an operand shares, and of a weight all rows. A scale is
a power of two, so that scaling rounds nothing: what is lost is the rounding to float8 alone, 2^-4 of a number in e4m3
and 2^-3 in e5m2. Operands of the forward products are in e4m3. Gradients reach farther, and are in e5m2 (Micikevicius
et al. 2022, arXiv 2209.05433); that of a row of the head's logits has its largest part, the label's, for a unit.
``kernels/float8.py`` says why the scales are those of rows, and counts the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import reference
from .dispatch import backend

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""The products of GPUs take sizes that are multiples of this; others stay as they are, on every device."""
PAYS = 640
"""On a GPU, products with fewer columns than this stay as they are.

To round an operand ``[R, K]`` of 16 bits reads it and writes it, 3 R K bytes, and a product ``[R, N]`` of it saves
R K N operations of the slower rate: by an H100's data sheet that is more where N is above some 640.
"""


class Rounded(NamedTuple):
    """A matrix in 8 bits."""

    values: Tensor
    """``[R, K]``, contiguous."""
    scale: Tensor
    """float32 ``[R, 1]``: the matrix is values * scale."""


def rounded(x: Tensor, dtype: torch.dtype) -> Rounded:
    """x ``[..., K]`` in 8 bits ``[R, K]``, no gradient. NaN or infinity in a row of x is NaN everywhere in it."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return Rounded(*_rounds(x).rows_rounded(rows, dtype))


def _rounds(x: Tensor) -> Any:
    """Where x is rounded: in plain torch on a GPU without products of float8, whose kernels may lack them too."""
    return reference if x.is_cuda and not has_products(x.device) else backend(x)


class Weight:
    """A weight W ``[N, K]`` with its 8 bits, for x W' and for g W: made where a product first needs them, and once."""

    def __init__(self, weight: Tensor) -> None:
        self.full = weight.detach()

    @cached_property
    def rounded(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """W, W' where g W is a product in 8 bits, and their scale."""
        transposes = pays(self.full.device, self.full.shape[1])
        return _rounds(self.full).weight_rounded(self.full, FORWARD, transposes)

    @property
    def by_rows(self) -> Rounded:
        """W, with what x W' sums over side by side."""
        values, _, scale = self.rounded
        return Rounded(values, scale[: len(values)])

    @property
    def by_columns(self) -> Rounded:
        """W' ``[K, N]``, with what g W sums over side by side."""
        _, transposed, scale = self.rounded
        assert transposed is not None
        return Rounded(transposed, scale[: len(transposed)])


def product(a: Tensor, dtype: torch.dtype, b: Rounded, out: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a b' + bias ``[..., N]`` in the dtype ``out``, of a ``[..., K]``, rounded to ``dtype`` here, and b ``[N, K]``."""
    return multiply(rounded(a, dtype), b, out, bias).view(*a.shape[:-1], len(b.values))


def multiply(a: Rounded, b: Rounded, out: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a b' + bias ``[R, N]`` in the dtype ``out``, of a ``[R, K]`` and b ``[N, K]``.

    Hardware sums in some 14 bits, more than either operand has, and gives bfloat16's digits, whatever ``out`` is.
    """
    values, scale = a
    if out == torch.float64 or not has_products(values.device):
        x, columns = (values.float() * scale).to(out), (b.values.float() * b.scale).to(out).t()
        y = x @ columns if bias is None else torch.addmm(bias.to(out), x, columns)
    else:
        half = torch.bfloat16  # of the dtypes that all of torch's products with scales of rows give
        adds = None if bias is None else bias.to(half)
        y = torch._scaled_mm(values, b.values.t(), scale, b.scale.t(), adds, out_dtype=half, use_fast_accum=True)
    return y.to(out)


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

    def clamps(self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Any:
        """-log q_y ``[R]``, q = softmax(x W' + b), and dE/dx ``[R, K]`` by g W in 8 bits; None where that does not pay.

        The gradient g of the logits is never there in more digits.
        """
        if not takes(x, weight, bias) or not pays(x.device, weight.shape[1]):
            return None
        energy, *g = _rounds(x).clamped_categorical_rounded(self.linear(x, weight, bias), labels, ignore_index)
        return energy, multiply(Rounded(*g), self.in_8_bits(weight).by_columns, x.dtype)

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
