"""`Head`: the linear layer to a Categorical output, whose logits are never all in memory during inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import wide
from .context import infers, outside_graphs, pass_here
from .dispatch import backend
from .float8 import FewDigits
from .plumbing import once_differentiable

CHUNKS, LEAST, MOST = 8, 256, 2048
"""The logits are made for 1 / CHUNKS of the rows at a time, for LEAST of them at least and MOST at most.

With fewer than MOST the weight gradient's product is bound by memory: it reads and writes all of dW for every part.
"""


def rows_at_once(rows: int) -> int:
    """Of how many of so many rows the logits are in memory at once."""
    return min(rows, max(LEAST, min(MOST, -(-rows // CHUNKS))))


class Head(nn.Linear):
    """``nn.Linear`` to the C classes of a Categorical output: a language model's head. Use it as the model's last step.

    In inference with labels for y, energy -log q_y, dE/dx and the weight gradients are made together, a few rows of
    logits at a time, so that no tensor of rows x C exists (as in Hsu et al. 2024, arXiv 2410.10989); elsewhere, and
    with its state dict, it is ``nn.Linear``. The weight may be that of an embedding.

    The model must then return what this layer returns, untouched; RuntimeError says so where it does not.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[B, ..., C]`` of input ``[B, ..., in_features]``; in inference their shape alone, without memory."""
        return outside_graphs(self._clamped, input) if infers() else super().forward(input)

    def _clamped(self, input: Tensor) -> Tensor:
        here = pass_here()
        logits = input.detach().new_zeros(()).expand(*input.shape[:-1], self.out_features)
        clamped = None if here is None else here.labels_for(logits)
        if here is None or clamped is None:
            return super().forward(input)
        labels, ignore_index, learns = clamped
        rows = input.reshape(-1, self.in_features)
        labels = labels.reshape(-1)
        energy = HeadEnergy.apply(rows, self.weight, self.bias, labels, ignore_index, learns, here.few_digits)
        here.clamp(logits, energy)
        return logits


class HeadEnergy(torch.autograd.Function):
    """-log q_y of each row, q = softmax(x W' + b), float32 ``[R]``. Its gradients are made with it.

    The loss must weigh all rows alike, as the free energy does: the weight gradients are sums over the rows.
    Products: one for the logits, one for dE/dx and, where learns, one for dE/dW; nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        learns: bool,
        few_digits: FewDigits | None = None,
    ) -> Tensor:
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        energy = wide(x).new_empty(len(x))
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=energy.dtype) if need_weight and learns else None
        grad_bias = torch.zeros_like(bias, dtype=energy.dtype) if bias is not None and need_bias and learns else None
        size = max(1, rows_at_once(len(x)))
        for rows in (slice(start, start + size) for start in range(0, len(x), size)):
            if few_digits is not None and grad_x is not None:
                made = few_digits.clamps(x[rows], weight, bias, labels[rows], ignore_index)
                if made is not None:
                    energy[rows], grad_x[rows] = made
                    continue
            grad = F.linear(x[rows], weight, bias)
            energy[rows] = backend(grad).clamped_categorical_gradient_(grad, labels[rows], ignore_index)
            if grad_x is not None:
                grad_x[rows] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, x[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=grad_bias.dtype)
            del grad  # before the next rows' logits are made
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return energy

    @staticmethod
    @once_differentiable("pc.Head makes gradients with its energy, once; use nn.Linear in its place")
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        scale = grad_energy[0]
        x = None if x is None else (x * grad_energy.unsqueeze(-1)).to(x.dtype)
        weight, bias = (None if t is None else (t * scale).to(ctx.dtype) for t in (weight, bias))
        return x, weight, bias, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; of half precision on a GPU in one pass, with the product in float32 as it was summed."""
    half = total.dtype != a.dtype == b.dtype
    if total.is_cuda and half and torch.__version__ >= "2.11":  # before that the total had to be half too
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
