"""A training step of a chain of linear layers in one launch of ``kernels/chain.py``, and the products for the weights.

It serves a call of `FreeEnergy` on an ``nn.Sequential`` of ``pc.Linear`` layers with Gaussian nodes, elementwise
activations between them and a last linear layer, where ``choice.py`` says that it is faster. Of a tracked step the
first batch is the layers', as it corrects its own move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .checks import check_batch, check_finite
from .dispatch import chains, may_chain
from .distributions import Distribution
from .families import Categorical, Gaussian, output_family
from .nn import Linear
from .plumbing import once_differentiable
from .rules import LEAST, TRUST, Constant, Displacement, Fixed, Guarded, Rules
from .tracking import StepTracker, Tracked

ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.GELU: "gelu"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Chain(NamedTuple):
    """The layers of a model that is a chain, and the activation on each of them but the last."""

    layers: list[nn.Linear]
    activations: list[str]


def as_chain(model: nn.Module) -> Chain | None:
    """The chain that a model is; None where it holds anything else, or a hook, which one launch would pass over."""
    if type(model) is not nn.Sequential or any(getattr(torch_module, f"_global{hooks}") for hooks in HOOKS):
        return None
    for module in model.modules():
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
            return None
    layers: list[nn.Linear] = []
    activations: list[str] = []
    for module in model:
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, Linear):
            if layers and type(layers[-1]) is nn.Linear:
                return None  # a hidden layer without a node
            activations += ["identity"] * (len(layers) - len(activations))
            layers.append(module)
        elif type(module) in ACTIVATIONS and len(activations) < len(layers) and not getattr(module, "inplace", False):
            tanh = getattr(module, "approximate", "none") == "tanh"
            activations.append(ACTIVATIONS[type(module)] + "_tanh" * tanh)
        else:
            return None
    if len(layers) < 2 or len(activations) == len(layers):
        return None
    hidden = [layer.node for layer in layers[:-1] if isinstance(layer, Linear)]
    if len(hidden) < len(layers) - 1 or not all(type(node) is Gaussian and node.given is None for node in hidden):
        return None
    return Chain(layers, activations)


class Owner(Protocol):
    """What a `FreeEnergy` says of its training step."""

    model: nn.Module
    output: Distribution | None
    order: Any
    steps: int
    output_weight: float
    local: bool
    logits: Callable[[Any], Any] | None
    tracker: StepTracker

    @property
    def rules(self) -> Rules: ...


def chain_loss(owner: Owner, x: Any, y: Tensor | None, tracks: bool) -> Tensor | None:
    """The free energy per item of a call of ``owner``; None where its modules have to be called for it.

    tracks: whether the batches that follow learn their step from this one. Raises what a call does, before anything
    changes.
    """
    if type(x) is not Tensor or type(y) is not Tensor or not may_chain(x):
        return None
    rules = owner.rules
    if not _plain(owner, rules, x.dtype):
        return None
    chain = as_chain(owner.model)
    if chain is None or not _fits(chain, x, y):
        return None
    last = chain.layers[-1]
    own = last.node if isinstance(last, Linear) else None
    family = output_family(owner.output, own, y)
    labels = type(family) is Categorical and not y.is_floating_point()
    if not labels and not (type(family) is Gaussian and family.given in (None, 1.0)):
        return None
    products = sum(layer.weight.numel() for layer in chain.layers)
    if not chains(x, round((products / len(chain.layers)) ** 0.5), len(chain.layers)):
        return None
    check_batch(x)
    check_finite("y", y)
    items = family.check_target(y, x.new_empty(len(x), last.out_features)).clamp_min(1)
    from .kernels.chain import chain_gradient  # needs triton

    step = rules.step
    coarse = isinstance(step, Tracked) and _coarse(step, x.dtype)
    tracked = step.mean if isinstance(step, Tracked) and not coarse else None
    weights, biases = [layer.weight for layer in chain.layers], [layer.bias for layer in chain.layers]
    with torch.no_grad():
        energy, before, inputs, grads = chain_gradient(
            x,
            y if labels else y.to(x.dtype),
            1.0 / items.float(),
            weights,
            biases,
            chain.activations,
            steps=owner.steps,
            step=1.0 if coarse else step.first,
            guards=type(step) is Guarded,
            precision=rules.precision.pi if isinstance(rules.precision, Fixed) else None,
            displacement=rules.precision.delta if isinstance(rules.precision, Displacement) else 0.0,
            trust=TRUST,
            least=LEAST,
            ignore_index=family.ignore_index if isinstance(family, Categorical) else 0,
            tracked=None if tracked is None else tracked.to(x.device),
        )
    if tracks and isinstance(step, Tracked):
        made = cast(Tracked, step.start(before[0], before[1], False))
        made.coarse = coarse
        owner.tracker.learn(made, energy)
    return _Learned.apply(energy.sum() / items, inputs, grads, *weights, *biases)


def _plain(owner: Owner, rules: Rules, dtype: torch.dtype) -> bool:
    """Whether inference goes by rules that the kernel knows."""
    step = rules.step
    if owner.order != "error" or rules.state_optimizer is not None or rules.stop is not None:
        return False
    if type(step) is Tracked and step.mean is None and not _coarse(step, dtype):
        return False  # a first batch, which a pass more corrects
    known = type(step) in (Constant, Guarded, Tracked) and type(rules.precision) in (Displacement, Fixed)
    usual = owner.output_weight == 1 and owner.logits is None and rules.inference_dtype is None
    return known and usual and not owner.local


def _coarse(step: Tracked, dtype: torch.dtype) -> bool:
    """Whether F is too coarse to learn from, and the step 1: see `Tracked.unguarded`."""
    return step.coarse or dtype == torch.bfloat16


def _fits(chain: Chain, x: Tensor, y: Tensor) -> bool:
    """Whether the kernel takes this batch and these weights: else the layers do, or say what is wrong."""
    if (
        x.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or x.dim() != 2
        or x.requires_grad
        or x.is_inference()
        or y.requires_grad
    ):
        return False
    if x.device != y.device or torch.is_autocast_enabled(x.device.type):
        return False
    if not any(p.requires_grad for layer in chain.layers for p in layer.parameters()):
        return False
    below = x.shape[1]
    for layer in chain.layers:
        for p in (layer.weight, layer.bias):
            if p is not None and (type(p) is not nn.Parameter or p.dtype != x.dtype or p.device != x.device):
                return False
        if layer.weight.shape[1] != below or not layer.weight.is_contiguous() or layer.weight.data_ptr() % 16:
            return False
        below = len(layer.weight)
    return True


class _Learned(torch.autograd.Function):
    """The loss, whose backward multiplies each layer's input with its dF/dmu: the gradients of weights and biases."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, inputs: list[Tensor], grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs, *grads)
        return loss

    @staticmethod
    @once_differentiable("this step was one launch, gradients included; put it within dispatch.use_chain(False)")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers = len(ctx.saved_tensors) // 2
        inputs, grads = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        if grad.is_cuda or grad.item() != 1:  # to look at it would wait for the GPU
            grads = torch._foreach_mul(grads, grad)
        needed = ctx.needs_input_grad[3:]
        weights = [g.t() @ f if need else None for g, f, need in zip(grads, inputs, needed)]
        biases = [g.sum(0) if need else None for g, need in zip(grads, needed[layers:])]
        return None, None, None, *weights, *biases
