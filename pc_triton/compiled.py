"""A whole training step as one graph: all of inference and the weight gradients, traced once and compiled.

Small models on a CPU spend most of a PC step in Python and in autograd's bookkeeping, once per inference step. Traced
to a flat list of ATen operations, as ``torch.compile`` does for one backward pass, that is paid once per shape of the
input. What is structurally zero (the error of a node that no signal has reached) and what repeats (the first layer's
product with the clamped input) is then computed once or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .dispatch import tracing
from .inference import check_values, output_family

if TYPE_CHECKING:
    from .free_energy import FreeEnergy

OPTIONS = {"cpp_wrapper": True, "cpp.use_decompose_tanh": True}
"""Inductor's options by default: no Python between its kernels, and tanh by exp, vectorised (error 1e-7)."""


class CompiledSteps:
    """The compiled training steps of a `FreeEnergy`, one for each shape of the batch; called as it is."""

    def __init__(self, owner: FreeEnergy, options: dict[str, Any]) -> None:
        self.owner, self.options = owner, {**OPTIONS, **options}
        self.steps: dict[Any, tuple[Callable[..., Sequence[Tensor | None]], Callable[[Any, Tensor | None], None]]] = {}

    def __call__(self, x: Any, y: Tensor | None) -> Tensor:
        """The free energy per item, with the weight gradients already made for its ``backward()``."""
        model = self.owner.model
        leaves, spec = tree_flatten((x, y))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        parameters = list(model.parameters())
        learned = [p for p in parameters if p.requires_grad]
        key = (
            spec, model.training, *(t if not isinstance(t, Tensor) else None for t in leaves),
            *((t.shape, t.dtype, t.device, t.requires_grad) for t in (*parameters, *inputs)),
        )  # fmt: skip
        if key not in self.steps:
            self.steps[key] = self._make(x, y, leaves, spec, inputs)
        step, check = self.steps[key]
        check(x, y)
        loss, *grads = step(*parameters, *model.buffers(), *inputs)
        return _Replayed.apply(loss, grads, *learned)

    def _make(self, x: Any, y: Tensor | None, leaves: list[Any], spec: Any, inputs: list[Tensor]) -> Any:
        owner = self.owner
        if any(t.is_cuda for t in (*inputs, *owner.model.parameters())):
            raise ValueError("compile() is for a CPU: leave it out on a GPU, where the kernels serve")
        with torch.random.fork_rng():
            _, inference = owner.loss_and_inference(x, y)  # raises what there is to raise, with values to look at

        def loss(*arguments: Tensor) -> Tensor:
            given = iter(arguments)
            batch = [next(given) if isinstance(t, Tensor) else t for t in leaves]
            return owner.loss_and_inference(*tree_unflatten(batch, spec))[0]

        graph, example = trace(loss, owner.model, inputs)
        step = torch._inductor.compile(graph, example, options=self.options)  # type: ignore[arg-type]
        family = None if y is None else output_family(owner.output, inference.output, y)
        return step, partial(check_values, family=family, classes=inference.out.shape[-1])


def trace(
    loss: Callable[..., Tensor], module: nn.Module, inputs: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of ``loss(*inputs)`` and its gradients, and example arguments: parameters, buffers, inputs, in a row.

    loss: a function that calls ``module`` and returns a 0-dim tensor. The graph returns the loss and the gradient of
    each parameter that requires one (None where it has none). Raises ValueError if the step draws dropout, which is
    to be the same at every pass.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = list(state)
    learned = [i for i, name in enumerate(names) if state[name].requires_grad]

    def step(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [t.detach().requires_grad_(state[n].requires_grad) for n, t in zip(names, tensors)]
        with nn.utils.stateless._reparametrize_module(module, dict(zip(names, leaves)), tie_weights=True):
            value = loss(*tensors[len(names) :])
        grads = torch.autograd.grad(value, [leaves[i] for i in learned], allow_unused=True)
        return (value.detach(), *grads)

    example = [t.detach() for t in (*state.values(), *inputs)]
    token = tracing.set(True)
    try:
        with torch.random.fork_rng():
            graph = make_fx(step)(*example)
    finally:
        tracing.reset(token)
    for node in graph.graph.nodes:
        if node.op == "call_function" and any(word in node.target.name() for word in ("dropout", "bernoulli")):
            raise ValueError("compile() cannot hold dropout fixed through inference: set its probability to 0")
    _simplify(graph)
    mode = FakeTensorMode()
    for node in graph.graph.nodes:  # each input was traced with a mode of its own, which inductor's C++ wrapper refuses
        node.meta = {"val": mode.from_tensor(node.meta["val"])} if node.op == "placeholder" else {}
    return graph, example


def _simplify(graph: fx.GraphModule) -> None:
    """Compute constants once, at tracing, and what is computed twice from the same values once; drop what is unused."""
    aten = torch.ops.aten
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    if any(n.target._schema.is_mutable for n in nodes if hasattr(n.target, "_schema")):
        return  # an operation in place, such as a running mean: the same arguments may hold other values
    seen: dict[Any, fx.Node] = {}
    constant: dict[fx.Node, Any] = {}
    zero: set[fx.Node] = set()
    for node in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.target in (aten.detach.default, aten.clone.default):
            node.replace_all_uses_with(node.all_input_nodes[0])
            continue
        try:
            first = seen.setdefault(_key((node.target, node.args, tuple(sorted(node.kwargs.items())))), node)
        except TypeError:
            continue  # an argument that cannot be compared
        if first is not node:
            node.replace_all_uses_with(first)
        elif (node.target is aten.sub.Tensor and node.args[0] is node.args[1]) or (
            node.target in (aten.mul.Tensor, aten.mm.default, aten.neg.default, aten.tanh_backward.default)
            and any(n in zero for n in node.all_input_nodes)
        ):
            zero.add(node)  # a node still at its prediction has no error, and sends none down
            value = node.meta["val"]
            constant[node] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        elif callable(node.target) and all(n in constant for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), constant.__getitem__)
            constant[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(constant.items()):
        if isinstance(value, Tensor) and any(user not in constant for user in node.users):
            graph.register_buffer(f"constant{number}", value)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"constant{number}"))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _key(x: Any) -> Any:
    """x as a dictionary key that keeps 1, 1.0 and True apart."""
    return tuple(map(_key, x)) if isinstance(x, (list, tuple)) else (type(x), x)


class _Replayed(torch.autograd.Function):
    """The loss of a replayed step, whose backward hands out the gradients that the graph computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("backward() a second time: call the FreeEnergy again")
        if grad.item() != 1:
            grads = [None if g is None else g * grad for g in grads]
        return (None, None, *grads)
