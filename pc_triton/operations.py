"""A value node in a pass of the model, as an operation of autograd's.

Forward, it takes the prediction mu and a leaf, the node's state, to the emission and the energy. Backward, it answers
what the children send: with dF/dmu for the layer below, and with the pass's response to the gradient of the state, which
is to move it (`node.Move`) or to hand it over (`node.Gradient`). Two more take in the product that makes mu.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .dispatch import backend
from .families import Gaussian
from .node import Node, Response


class Turn(Protocol):
    """What an operation needs to know of its pass."""

    form: str
    """``"state"`` or ``"error"``: see ``reference.py``."""
    response: Response | None
    """What the states do with their gradients; None in the learning pass."""
    learns: bool


class Emit(torch.autograd.Function):
    """Emission and energy ``[S]`` of any family."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, leaf: Tensor, node: Node, here: Turn, form: str) -> Any:
        ctx.set_materialize_grads(False)
        ctx.node, ctx.here, ctx.form = node, here, form
        ctx.state = leaf.detach()
        reads_mu = form == "state" or type(node.family) is not Gaussian  # a Gaussian's error step does not
        ctx.save_for_backward(mu if reads_mu else None)
        emission, energy = node.forward(mu, ctx.state, form)
        if emission is ctx.state:
            emission = emission.detach()  # autograd marks what is returned, and the state is to stay a leaf
        ctx.like = emission.shape, mu.dtype, mu.device
        if form == "state" and not leaf.requires_grad:
            ctx.mark_non_differentiable(emission)  # learning is local: nothing returns through a state
        return emission, energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        (mu,) = ctx.saved_tensors
        node, form, response = ctx.node, ctx.form, ctx.here.response

        def step(state: Tensor | None, grad: Tensor | None, keep: Any, move: Any, sweep: bool, **options: Any) -> Any:
            if grad is None and not (form == "state" and keep is None):
                shape, dtype, device = ctx.like
                grad = torch.zeros(shape, dtype=dtype, device=device)
            read = grad if mu is None else mu
            return node.step(read, state, grad, keep, move, form=form, moved=sweep, **options)

        if response is None:  # F is linear in its energies, so a loss scaled by its user scales pi
            _, below = step(ctx.state, grad, None, None, False, precision=node.precision * grad_energy)
        else:
            below = response(node, grad, grad_energy, step)
        return below, None, None, None, None


class EmitLinear(torch.autograd.Function):
    """`Emit` in error form for a Gaussian node on a linear layer: one kernel for x W' + b + e and its energy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, node: Node, here: Turn) -> Any:
        ctx.set_materialize_grads(False)
        ctx.node, ctx.here = node, here
        ctx.below = ctx.needs_input_grad[0] and node.number > 0  # no node is beneath the first one
        rows, state = x.flatten(0, -2), leaf.detach()
        family: Any = node.family  # a Gaussian
        ctx.save_for_backward(weight, rows if here.learns else None)
        emission, energy = family.linear_forward(rows, weight, bias, state.flatten(0, -2), node.precision, node.unit)
        ctx.shape = state.shape
        return emission.view(state.shape), energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        node, response = ctx.node, ctx.here.response
        grad = weight.new_zeros(ctx.shape) if grad is None else grad
        shape = (*grad.shape[:-1], weight.shape[1])
        if response is None:
            to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
            rows = grad.flatten(0, -2)
            below = (rows @ weight).view(shape) if to_x else None
            grads = (None, None)
            if to_weight or to_bias:
                grads = backend(rows).linear_weight_gradient(rows, x, bias=to_bias)
            return below, *grads, None, None, None

        def step(state: Tensor, grad: Tensor, keep: Tensor, move: Tensor, sweep: bool) -> Any:
            if not ctx.below:
                return node.step(grad, state, grad, keep, move, form="error")[0], None  # it reads no mu
            rows, errors = grad.flatten(0, -2), state.flatten(0, -2)
            new, below = node.family.linear_step(rows, weight, errors, node.precision, node.unit, keep, move)
            return new.view(state.shape), below.view(shape)

        return response(node, grad, grad_energy, step), None, None, None, None, None


class EmitAttention(torch.autograd.Function):
    """`Emit` in error form for the Categorical node of attention: its logits and weights never reach memory."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, leaf: Tensor, node: Node, here: Turn, options: dict[str, Any]
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.node, ctx.here, ctx.options = node, here, options
        out, energy, facts = backend(q).attention_forward(q, k, v, leaf.detach(), node.precision, **options)
        ctx.save_for_backward(q, k, v, out, facts)
        return out, energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_energy: Tensor) -> Any:
        q, k, v, out, facts = ctx.saved_tensors
        node, response = ctx.node, ctx.here.response
        grad = torch.zeros_like(out) if grad is None else grad

        def step(state: Tensor, grad: Tensor, keep: Any, move: Any, sweep: bool, precision: Any = None) -> Any:
            pi = node.precision if precision is None else precision
            new, *below = backend(q).attention_step(q, k, v, out, grad, state, pi, keep, move, facts, **ctx.options)
            return new, below

        if response is None:
            _, below = step(node.state, grad, None, None, False, precision=node.precision * grad_energy)
        else:
            below = response(node, grad, grad_energy, step)
        return *below, None, None, None, None


def respond_to(leaf: Tensor, node: Node, here: Turn) -> None:
    """Have a leaf e of plain autograd, of a Gaussian node that emits mu + e, answer its gradient as `Emit` does."""

    def answer(leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        assert here.response is not None
        assert node.precision is not None

        def step(state: Tensor, grad: Tensor, keep: Any, move: Any, sweep: bool) -> Any:
            return node.step(grad, state, grad, keep, move, form="error")[0], None  # it reads no mu

        here.response(node, grad, node.precision, step)

    leaf.register_post_accumulate_grad_hook(answer)
