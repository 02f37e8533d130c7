"""Value nodes of one batch, and a node in a pass of the model as an autograd.Function.

Its forward takes the prediction mu and returns the emission of the state; its backward takes what the children send
back, moves the state, and returns dF/dmu to the layer below. Two more take in the product that makes mu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dispatch import backend
from .distributions import Gaussian
from .reference import per_sample

if TYPE_CHECKING:
    from .distributions import Distribution


class ValueNode:
    """One visit of a family's module in the model's forward: a value node of one batch."""

    def __init__(self, family: Distribution, name: str, number: int, mu: Tensor, frozen: dict[str, Any]) -> None:
        self.family, self.name, self.frozen = family, name, frozen
        self.number = number  # in the order of visits
        self.mu = mu  # the prediction, of the first pass (of the last one for the output node)
        self.emission = mu
        self.version = 0
        self.pi = torch.empty(0)  # [S], the precision
        self.unit: Tensor | None = None  # [S], the root mean square of mu per sample
        self.state: Tensor | None = None  # u or e by the form; None: at the prediction
        self.accepted: Tensor | None = None  # the last state the guard accepted
        self.energy: Tensor | None = None  # [S], of the last forward pass
        self.residual: Tensor | None = None  # [S], the norm of the natural gradient at the last probe
        self.reached = False  # whether a backward pass has moved the state from the prediction
        self.free = True  # False: the output node, and a node that does not reach the output


class Start(torch.autograd.Function):
    """The emission of a node at its prediction, where nothing below requires a gradient: there autograd begins."""

    @staticmethod
    def forward(ctx, emission, anchor):
        return emission.detach()


class Visit(torch.autograd.Function):
    """A value node in a pass of the model. ``anchor`` makes its backward run when nothing below needs a gradient."""

    @staticmethod
    def forward(ctx, mu, anchor, node, inference):
        ctx.set_materialize_grads(False)
        ctx.node, ctx.inference = node, inference
        reads_mu = inference.form == "state" or type(node.family) is not Gaussian  # of which the error is all
        ctx.save_for_backward(mu if reads_mu else None)
        emission, energy = node.family.node_forward(
            mu, node.state, node.pi, node.unit, form=inference.form, **node.frozen
        )
        if emission is node.state:
            emission = emission.detach()  # autograd marks what a Function returns; the state itself stays a leaf
        ctx.shape, ctx.dtype = emission.shape, mu.dtype
        if inference.mode == "learn" and inference.form == "state":
            ctx.mark_non_differentiable(emission)  # learning is local: nothing returns through a state
        return emission, energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_energy):
        (mu,) = ctx.saved_tensors
        node, inference = ctx.node, ctx.inference
        skips = inference.skips and inference.mode == "infer" and node.number < inference.lowest
        if skips and grad is None:
            return None, None, None, None  # at its prediction, and nothing has come down to it
        node.reached = True
        if grad is None and (inference.form == "error" or inference.mode != "learn"):
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=node.pi.device)
        mu = grad if mu is None else mu
        # F is linear in its energies, so a loss scaled by its user (mean over items, GradScaler) scales pi.
        if inference.mode == "learn":
            _, grad_mu = node.family.node_step(
                mu, node.state, grad, node.pi * grad_energy, node.unit, None, None,
                form=inference.form, **node.frozen,
            )  # fmt: skip
            return grad_mu, None, None, None
        scale = grad_energy if inference.mode == "incremental" else None
        if scale is not None:  # a loss that its user scaled by 0 sends nothing down
            grad = torch.where(per_sample(scale, grad) == 0, 0.0, grad / per_sample(scale, grad)).to(grad.dtype)

        def step(state):
            return node.family.node_step(
                mu, state, grad, node.pi, node.unit, inference.keep, inference.move,
                form=inference.form, moved=inference.order == "sweep", **node.frozen,
            )  # fmt: skip

        grad_mu = inference.move_state(node, step)
        if skips:
            return None, None, None, None  # its error was 0, and nothing comes of that in the layers below
        if scale is not None:
            grad_mu = grad_mu * per_sample(scale, grad_mu).to(grad_mu.dtype)
        return grad_mu, None, None, None


class LinearVisit(torch.autograd.Function):
    """`Visit` in error form, for the prediction x W' + b of a Gaussian node: product and node in one kernel."""

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, node, inference):
        ctx.set_materialize_grads(False)
        ctx.node, ctx.inference = node, inference
        ctx.below = ctx.needs_input_grad[0] and node.number > 0  # no node is beneath the first one
        rows = x.flatten(0, -2)
        ctx.save_for_backward(weight, rows if inference.mode == "learn" else None)
        emission, energy = node.family.linear_forward(rows, weight, bias, node.state.flatten(0, -2), node.pi, node.unit)
        return emission.view(node.state.shape), energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_energy):
        weight, x = ctx.saved_tensors
        node, inference = ctx.node, ctx.inference
        if grad is None:
            grad = weight.new_zeros(node.state.shape)
        shape, rows = (*grad.shape[:-1], weight.shape[1]), grad.flatten(0, -2)
        if inference.mode == "learn":
            to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
            grad_x = (rows @ weight).view(shape) if to_x else None
            grads = (None, None)
            if to_weight or to_bias:
                grads = backend(rows).linear_weight_gradient(rows, x, bias=to_bias)
            return grad_x, *grads, None, None, None

        def step(state):
            family, coefficients = node.family, (node.pi, node.unit, inference.keep, inference.move)
            if not ctx.below:
                return family.node_step(grad, state, grad, *coefficients, form="error")[0], None  # it reads no mu
            new, grad_x = family.linear_step(rows, weight, state.flatten(0, -2), *coefficients)
            return new.view(state.shape), grad_x.view(shape)

        return inference.move_state(node, step), None, None, None, None, None


class AttentionVisit(torch.autograd.Function):
    """`Visit` in error form, for the Categorical node of attention: its logits and weights never reach memory."""

    @staticmethod
    def forward(ctx, q, k, v, anchor, node, inference, scale):
        ctx.set_materialize_grads(False)
        ctx.node, ctx.inference, ctx.options = node, inference, {"scale": scale, **node.frozen}
        out, energy, facts = backend(q).attention_forward(q, k, v, node.state, node.pi, **ctx.options)
        ctx.save_for_backward(q, k, v, out, facts)
        return out, energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_energy):
        q, k, v, out, facts = ctx.saved_tensors
        node, inference = ctx.node, ctx.inference
        grad = torch.zeros_like(out) if grad is None else grad

        def step(state, pi, keep, move):
            run = backend(q).attention_step
            moved, *grads = run(q, k, v, out, grad, state, pi, keep, move, facts, **ctx.options)
            return moved, grads

        if inference.mode == "learn":
            _, grads = step(node.state, node.pi * grad_energy, None, None)
        else:
            grads = inference.move_state(node, lambda state: step(state, node.pi, inference.keep, inference.move))
        return *grads, None, None, None, None
