"""A value node in a pass of the model, as an operation of autograd's.

Forward, it takes the prediction mu and the node's state to the emission and the energy. Backward, it answers what the
children send: with dF/dmu for the layer below, and with the pass's response to the gradient of the state, which is to
move it (`node.Move`) or to hand it over (`node.Gradient`). Two more operations take in the product that makes mu.
``anchor`` stands for the states in autograd's graph. Were the state itself a part of it, the graph would keep
the old one in memory after it has moved. Where the anchor requires no gradient the weights learn: the graph then keeps
of a node what its backward reads, as tensors that autograd lets go of with the rest, and neither node nor batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .dispatch import backend
from .families import Gaussian
from .node import Node, OnlyMove, Response
from .plumbing import once_differentiable

REFUSAL = (
    "a derivative taken within the model passes a value node, whose gradient inference makes once; take it around a "
    "part of the model without nodes"
)


class Turn(Protocol):
    """What an operation needs to know of its pass."""

    form: str
    """``"state"`` or ``"error"``: see ``reference.py``."""
    response: Response | None
    """What the states do with their gradients; None in the learning pass."""
    learns: bool


class Emit(torch.autograd.Function):
    """Emission and energy ``[S]`` of any family. state: None for a Gaussian after its `Node.only_move`."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, anchor: Tensor, node: Node, here: Turn, form: str, state: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        learns = not anchor.requires_grad
        ctx.node, ctx.here, ctx.form = (node.without_state(), None, form) if learns else (node, here, form)
        reads_mu = form == "state" or type(node.family) is not Gaussian  # a Gaussian's error step does not
        ctx.save_for_backward(mu if reads_mu else None, state if reads_mu and learns else None)
        if state is None:
            grad, move, _ = cast(OnlyMove, node.only_move)
            emission, energy = cast(Gaussian, node.family).moved_forward(mu, grad, node.precision, node.unit, move)
        else:
            emission, energy = node.forward(mu, state, form)
        if state is not None and emission is state:
            emission = emission.detach()  # autograd marks what is returned, and the state is to stay a leaf
        ctx.like = emission.shape, mu.dtype, mu.device
        if form == "state" and learns:
            ctx.mark_non_differentiable(emission)  # learning is local: nothing returns through a state
        return emission, energy

    @staticmethod
    @once_differentiable(REFUSAL)
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        mu, state = ctx.saved_tensors
        node, form = ctx.node, ctx.form
        if ctx.here is None:
            if grad is None and form == "error":
                grad = _zeros(*ctx.like)
            below = node.gradient(grad if mu is None else mu, state, grad, grad_energy, form)
            return below, None, None, None, None, None
        if not node.is_free:  # it became the output: it emits what it is predicted
            return grad, None, None, None, None, None

        def step(state: Tensor, grad: Tensor | None, keep: Tensor, move: Tensor, sweep: bool) -> Any:
            grad = _zeros(*ctx.like) if grad is None else grad
            return node.step(grad if mu is None else mu, state, grad, keep, move, form=form, moved=sweep)

        return ctx.here.response(node, grad, grad_energy, step), None, None, None, None, None


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


class EmitLinear(torch.autograd.Function):
    """`Emit` in error form for a Gaussian node on a linear layer: one kernel for x W' + b + e and its energy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, node: Node, here: Turn
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.node, ctx.here = (node, here) if anchor.requires_grad else (None, None)
        ctx.below = ctx.needs_input_grad[0] and node.number > 0  # no node is beneath the first one
        rows, family, state = x.flatten(0, -2), cast(Gaussian, node.family), cast(Tensor, node.state)
        ctx.save_for_backward(weight, rows if here.learns else None)
        emission, energy = family.linear_forward(rows, weight, bias, state.flatten(0, -2), node.precision, node.unit)
        ctx.shape = state.shape
        return emission.view(state.shape), energy

    @staticmethod
    @once_differentiable(REFUSAL)
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        node, here = ctx.node, ctx.here
        grad = weight.new_zeros(ctx.shape) if grad is None else grad
        if here is None:
            to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
            rows = grad.flatten(0, -2)
            below = grad @ weight if to_x else None
            grad_weight, grad_bias = rows.t() @ x if to_weight else None, rows.sum(0) if to_bias else None
            return below, grad_weight, grad_bias, None, None, None

        def step(state: Tensor, grad: Tensor, keep: Tensor, move: Tensor, sweep: bool) -> Any:
            new, _ = node.step(grad, state, grad, keep, move, form="error")  # it reads no mu
            return new, grad @ weight if ctx.below else None

        return here.response(node, grad, grad_energy, step), None, None, None, None, None


class EmitAttention(torch.autograd.Function):
    """`Emit` in error form for the Categorical node of attention: its logits and weights never reach memory."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, node: Node, here: Turn, options: dict[str, Any]
    ) -> Any:
        ctx.set_materialize_grads(False)
        learns = not anchor.requires_grad
        ctx.node, ctx.here, ctx.options = (None, None, options) if learns else (node, here, options)
        out, energy, facts = backend(q).attention_forward(q, k, v, node.state, node.precision, **options)
        ctx.save_for_backward(q, k, v, out, facts, *((node.state, node.precision) if learns else (None, None)))
        return out, energy

    @staticmethod
    @once_differentiable(REFUSAL)
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        q, k, v, out, facts, state, precision = ctx.saved_tensors
        node, here = ctx.node, ctx.here
        grad = torch.zeros_like(out) if grad is None else grad

        def step(state: Tensor, grad: Tensor, keep: Any, move: Any, sweep: bool) -> Any:
            run = backend(q).attention_step
            new, *below = run(q, k, v, out, grad, state, node.precision, keep, move, facts, **ctx.options)
            return new, below

        if here is None:
            pi, run = precision * grad_energy, backend(q).attention_step
            _, *below = run(q, k, v, out, grad, state, pi, None, None, facts, **ctx.options)
        else:
            below = here.response(node, grad, grad_energy, step)
        return *below, None, None, None, None


@dataclass(frozen=True)
class AttentionAtPrediction:
    """Attention's node in the first pass (`node.AtPrediction`): of size N K only the moved state is made."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    masks: dict[str, Any]

    @property
    def variables(self) -> float:
        return self.q[..., 0].numel()

    def fall(self, grad: Tensor, samples: int) -> Tensor:
        run = backend(self.q).attention_fall
        return run(self.q, self.k, self.v, self.out, grad, samples, scale=self.scale, **self.masks)

    def first_step(self, grad: Tensor, precision: Tensor, move: Tensor, state_dtype: torch.dtype | None) -> Tensor:
        run = backend(self.q).attention_first_step
        return run(self.q, self.k, self.v, self.out, grad, precision, move, state_dtype=state_dtype, **self.masks)


def respond_to(leaf: Tensor, node: Node, here: Turn) -> None:
    """Have a leaf e of plain autograd, of a Gaussian node that emits mu + e, answer its gradient as `Emit` does."""

    def answer(grad: Tensor) -> Tensor:
        assert here.response is not None

        def step(state: Tensor, grad: Tensor, keep: Any, move: Any, sweep: bool) -> Any:
            return node.step(grad, state, grad, keep, move, form="error")[0], None  # it reads no mu

        here.response(node, grad, node.precision, step)
        return grad.new_zeros(()).expand_as(grad)  # autograd keeps what is returned until the backward pass has ended

    leaf.register_hook(answer)
