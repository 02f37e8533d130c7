"""A whole training step as one graph: all of inference and the weight gradients, made once per shape of the batch.

Small models spend most of a PC step in Python, in autograd's bookkeeping and in launches, once per inference step. On a
CPU the step is traced to a flat list of ATen operations, as ``torch.compile`` does for one backward pass, and compiled:
what is structurally zero (the error of a node that no signal has reached) and what repeats (the first layer's product
with the clamped input) is then computed once or not at all. On a GPU ``torch.compile`` has the model, and the step
is captured in one CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .batch import Batch
from .checks import check_batch, check_values
from .dispatch import tracing
from .distributions import Distribution
from .errors import see
from .plumbing import once_differentiable
from .rules import Rules
from .tracking import StepTracker

OPTIONS = {"cpp_wrapper": True, "cpp.use_decompose_tanh": True}
"""Inductor's options by default: no Python between its kernels, and tanh by exp, vectorised (error 1e-7)."""


GRAPHS = 8
"""CUDA graphs kept: batches of more shapes than that have the oldest captured again."""


class Owner(Protocol):
    """What a `FreeEnergy` offers to have its training step compiled."""

    model: nn.Module
    output: Distribution | None
    tracker: StepTracker

    @property
    def rules(self) -> Rules: ...

    @property
    def settings(self) -> tuple[Any, ...]: ...

    def loss_and_batch(self, x: Any, y: Tensor | None, *, tracks: bool = False) -> tuple[Tensor, Batch]: ...

    def compile_model(self, backend: Any = "inductor") -> None: ...


def _hashable(spec: TreeSpec | None) -> TreeSpec | str | None:
    """It, or its text: torch 2.6 has no hash of it."""
    try:
        hash(spec)
    except TypeError:
        return str(spec)
    return spec


class Call(NamedTuple):
    """A batch as a graph takes it: its tensors, and those of the model."""

    leaves: list[Any]
    """Of (x, y)."""
    spec: Any
    """How they are nested; None for two tensors."""
    inputs: list[Tensor]
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]


Made = tuple[Callable[..., Sequence[Tensor | None]], Callable[[Any, Tensor | None], None]]
"""A graph of parameters, buffers and inputs, and the check of x and y before it runs."""


class CompiledSteps:
    """The compiled training steps of a `FreeEnergy`, one for each shape of the batch; called as it is."""

    def __init__(self, owner: Owner, options: dict[str, Any]) -> None:
        self.owner, self.options = owner, options
        self.whole = cast(nn.Module, owner)  # the model, and the tracked step among the buffers
        self.steps: dict[tuple[Any, ...], Made] = {}
        self.pool: Any = None  # the memory that the CUDA graphs share: one runs at a time

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "steps": {}, "pool": None}  # a copy makes its own graphs

    def __call__(self, x: Any, y: Tensor | None, tracks: bool) -> Tensor:
        """The free energy per item, with the weight gradients already made for its ``backward()``.

        tracks: as for `FreeEnergy.loss_and_batch`.
        """
        owner = self.owner
        if owner.tracker.holds:
            return owner.loss_and_batch(x, y, tracks=tracks)[0]  # what is held is no part of a graph
        key, call = self._key(x, y, tracks)
        try:
            made = self.steps.get(key)  # looked up once: on a small model to hash a key is a good part of a step
        except TypeError as error:
            check_batch(x, y)
            raise TypeError(
                f"compile() tells its graphs apart by the arguments and rules they are of: {error}. Give rules and "
                "arguments that can be hashed, such as a dataclass with frozen=True"
            ) from None
        if made is None:
            if tracks and owner.tracker.awaits(owner.rules.step):
                first, _ = owner.loss_and_batch(x, y, tracks=True)  # it sets the step; the graph is of those after it
                if not owner.tracker.awaits(owner.rules.step):
                    self._keep(x, y, *self._key(x, y, tracks), tracks)
                return first
            made = self._keep(x, y, key, call, tracks)
        step, check = made
        check(x, y)
        loss, *grads = step(*call.parameters, *call.buffers, *call.inputs)
        return _Replayed.apply(loss, grads, *(p for p in call.parameters if p.requires_grad))

    def _key(self, x: Any, y: Tensor | None, tracks: bool) -> tuple[tuple[Any, ...], Call]:
        """What tells one graph from another, and what a graph is given."""
        plain = type(x) is Tensor and type(y) is Tensor
        leaves, spec = ([x, y], None) if plain else tree_flatten((x, y))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        if not inputs:
            check_batch(x, y)  # raises
        modules = list(self.whole.modules())  # walked once: on a small model that is a good part of a step
        parameters = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
        buffers = list(dict.fromkeys(b for m in modules for b in m._buffers.values() if b is not None))
        device = inputs[0].device.type
        key = (
            _hashable(spec), tracks, self.owner.settings, self.owner.output, *(m.training for m in modules),
            torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
            getattr(torch.backends.cuda.matmul, "fp32_precision", None),  # of products, from torch 2.9 on
            *(t if not isinstance(t, Tensor) else None for t in leaves),
            *((t.shape, t.dtype, t.device, t.requires_grad) for t in (*parameters, *buffers, *inputs)),
            *(t.data_ptr() for t in (*parameters, *buffers) if t.is_cuda),  # a CUDA graph reads them where they lie
        )  # fmt: skip
        return key, Call(leaves, spec, inputs, parameters, buffers)

    def _keep(self, x: Any, y: Tensor | None, key: tuple[Any, ...], call: Call, tracks: bool) -> Made:
        """Make the graph of this key. On a GPU the oldest goes where there are too many."""
        made = self.steps[key] = self._make(x, y, call, tracks)
        if call.inputs[0].is_cuda and len(self.steps) > GRAPHS:
            del self.steps[next(iter(self.steps))]
        return made

    def _make(self, x: Any, y: Tensor | None, call: Call, tracks: bool) -> Made:
        owner, inputs = self.owner, call.inputs

        def loss(*arguments: Tensor) -> Tensor:
            given = iter(arguments)
            tree = [next(given) if isinstance(t, Tensor) else t for t in call.leaves]
            both = tree if call.spec is None else tree_unflatten(tree, call.spec)
            return owner.loss_and_batch(*both, tracks=tracks)[0]

        if inputs[0].is_cuda:
            owner.compile_model()
            with torch.cuda.device(inputs[0].device), _casts_anew():
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                return capture(loss, self.whole, inputs, self.pool), lambda x, y: None  # it checks on the device
        with torch.random.fork_rng(), _unmoved(owner.model):
            _, batch = owner.loss_and_batch(x, y)  # raises what there is to raise, with values to look at
        if batch.calls.draws_elsewhere:
            raise ValueError(
                "compile() cannot hold random numbers that the model draws from Python or NumPy, or from a generator "
                "of its own: leave it out" + see("random-numbers-in-compile")
            )
        with _casts_anew():
            graph, example = trace(loss, self.whole, inputs)
        rounds = {} if owner.rules.state_dtype is None else {"emulate_precision_casts": True}  # where a state is kept
        defaults = {k: v for k, v in OPTIONS.items() if k in torch._inductor.list_options()}  # torch 2.6 lacks one
        options = {**defaults, **rounds, **self.options}
        step = torch._inductor.compile(graph, example, options=options)  # type: ignore[arg-type]
        family = None if y is None else batch.output.family
        return step, partial(check_values, family=family, classes=batch.out.shape[-1])


@contextlib.contextmanager
def _casts_anew() -> Iterator[None]:
    """Within it autocast keeps no casts of the weights: a graph that is made here casts them at every replay."""
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextlib.contextmanager
def _unmoved(module: nn.Module) -> Iterator[None]:
    """After it the module's buffers, such as running means, are what they were before."""
    buffers = list(module.buffers())
    before = [b.clone() for b in buffers]
    yield
    for buffer, value in zip(buffers, before):
        buffer.copy_(value)


def capture(
    loss: Callable[..., Tensor], module: nn.Module, inputs: Sequence[Tensor], pool: Any
) -> Callable[..., Sequence[Tensor | None]]:
    """``loss(*inputs)`` and its gradients as one CUDA graph: a function of parameters, buffers and inputs, in a row.

    It returns the loss and the gradient of each parameter of module that requires one (None where it has none).
    Parameters and buffers are read where they lay at the capture. Raises ValueError if the step draws random numbers,
    which are to be the same in every pass and new in every batch.
    """
    static = [t.detach().clone() for t in inputs]
    learned = [p for p in module.parameters() if p.requires_grad]

    def step() -> tuple[Tensor | None, ...]:
        value = loss(*static)
        return (value.detach(), *torch.autograd.grad(value, learned, allow_unused=True))

    stream, random = torch.cuda.Stream(), torch.cuda.get_rng_state()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), _unmoved(module):
        for _ in range(2):  # compiles the kernels, and allocates what libraries keep
            step()
    torch.cuda.current_stream().wait_stream(stream)
    if not torch.equal(random, torch.cuda.get_rng_state()):
        torch.cuda.set_rng_state(random)
        raise ValueError(
            "compile() cannot hold random numbers fixed in a CUDA graph: set dropout to 0, or leave it out"
            + see("random-numbers-in-compile")
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's threads may ask for events
        outputs = step()

    def replay(*arguments: Tensor) -> Sequence[Tensor | None]:
        torch._foreach_copy_(static, list(arguments[-len(static) :]))
        graph.replay()
        return [None if t is None else t.clone() for t in outputs]  # the next replay writes over them

    return replay


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
        with torch.random.fork_rng(), _unmoved(module):
            graph = make_fx(step)(*example)
    finally:
        tracing.reset(token)
    for node in graph.graph.nodes:
        if node.op == "call_function" and any(word in str(node.target) for word in ("dropout", "bernoulli")):
            raise ValueError(
                "compile() cannot hold dropout fixed through inference: set its probability to 0"
                + see("random-numbers-in-compile")
            )
    _simplify(graph)
    mode = FakeTensorMode()
    for node in graph.graph.nodes:  # each input was traced with a mode of its own, which inductor's C++ wrapper refuses
        node.meta = {"val": mode.from_tensor(node.meta["val"])} if node.op == "placeholder" else {}
    return graph, example


def _simplify(graph: fx.GraphModule) -> None:
    """Compute constants once, at tracing, and what is computed twice from the same values once; drop what is unused."""
    aten = torch.ops.aten
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    if any(_is_read_after_writing(n) for n in nodes):
        return  # such as a running mean: the same arguments may hold other values
    seen: dict[Any, fx.Node] = {}
    constant: dict[fx.Node, Any] = {}
    zero: set[fx.Node] = set()
    for node in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.target is aten.copy_.default:
            continue
        if node.target in (aten.detach.default, aten.clone.default) and not node.kwargs:  # no copy for its strides
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


def _is_read_after_writing(node: fx.Node) -> bool:
    """Whether an operation writes in place, but for a copy into an input that nothing reads later."""
    if not (hasattr(node.target, "_schema") and node.target._schema.is_mutable):
        return False
    into = node.args[0]
    if node.target is not torch.ops.aten.copy_.default or not isinstance(into, fx.Node) or into.op != "placeholder":
        return True
    return any(user > node for user in into.users) or any(user.op != "output" for user in node.users)


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
    @once_differentiable("a compiled step makes gradients with its loss, once; leave FreeEnergy.compile() out")
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("backward() a second time: call the FreeEnergy again")
        if grad.is_cuda or grad.item() != 1:  # to look at it would wait for the GPU
            grads = [None if g is None else g * grad for g in grads]
        return (None, None, *grads)
