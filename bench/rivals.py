"""The digits network of ``digits.py`` in other predictive coding libraries, written as their own tutorials do.

Each function takes the batches, a list of x ``[128, 64]`` float32 and y ``[128]`` int64 in numpy. Network:
64-128-128-10, tanh, squared errors on the hidden nodes, cross-entropy on the output, plain SGD at 0.1, states at 0.1
too. weights ``[out, in]`` to begin with make it a network of their sizes, whose biases begin at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Batches = Sequence[tuple[np.ndarray, np.ndarray]]
SIZES = (64, 128, 128, 10)
ONE_HOT = np.eye(10, dtype=np.float32)


class Trained(NamedTuple):
    """A network to train, by a library of its own."""

    step: Callable[[int], Any]
    """Trains on the batch of that number."""
    wait: Callable[[], Any]
    """Ends when all steps have."""
    accuracy: Callable[[np.ndarray, np.ndarray], float]
    """Of (x, y)."""
    weights: Callable[[], list[np.ndarray]]
    """``[out, in]``, as they are now."""


def sizes_of(weights: Sequence[np.ndarray] | None) -> tuple[int, ...]:
    return SIZES if weights is None else (weights[0].shape[1], *map(len, weights))


def pcx(batches: Batches, steps: int, weights: Sequence[np.ndarray] | None = None) -> Trained:
    """PCX (Pinchetti et al. 2024, arXiv 2407.01163), simultaneous order, everything in one jitted function."""
    import jax
    import optax
    import pcx as px
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    sizes = sizes_of(weights)

    class Model(pxc.EnergyModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(m, n) for m, n in pairwise(sizes)]
            self.vodes = [pxc.Vode() for _ in sizes[2:]] + [pxc.Vode(pxc.ce_energy)]
            self.vodes[-1].h.frozen = True

        def __call__(self, x, y):
            for number, (layer, vode) in enumerate(zip(self.layers, self.vodes)):
                x = vode(layer(jax.nn.tanh(x) if number else x))
            if y is not None:
                self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    states = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))

    @pxf.vmap(states, in_axes=(0, 0), out_axes=0)
    def forward(x, y, *, model):
        return model(x, y)

    @pxf.vmap(states, in_axes=(0,), out_axes=(None, 0), axis_name="batch")
    def energy(x, *, model):
        y = model(x, None)
        return jax.lax.psum(model.energy(), "batch"), y

    @pxf.jit(static_argnums=0)
    def train(steps, x, y, *, model, optim_w, optim_h):
        model.train()
        free = pxu.M_hasnot(pxc.VodeParam, frozen=True)
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        optim_h.init(free(model))
        infer = pxf.value_and_grad(pxu.M_hasnot(pxc.VodeParam, frozen=True).to([False, True]), has_aux=True)(energy)
        for _ in range(steps):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, gradient = infer(x, model=model)
            optim_h.step(model, gradient["model"])
        optim_h.clear()
        learn = pxf.value_and_grad(pxu.M(pxnn.LayerParam).to([False, True]), has_aux=True)(energy)
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, gradient = learn(x, model=model)
        optim_w.step(model, gradient["model"], scale_by=1.0 / x.shape[0])

    px.RKG.seed(0)
    model = Model()
    for layer, w in zip(model.layers, weights or ()):
        layer.nn.weight.set(jax.numpy.asarray(w))
        layer.nn.bias.set(jax.numpy.zeros(len(w)))
    x, y = batches[0]
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(x, ONE_HOT[y], model=model)
    optim_h = pxu.Optim(lambda: optax.sgd(0.1))
    optim_w = pxu.Optim(lambda: optax.sgd(0.1), pxu.M(pxnn.LayerParam)(model))
    on_device = [(jax.numpy.asarray(x), jax.numpy.asarray(ONE_HOT[y])) for x, y in batches]
    weight = model.layers[-1].nn.weight

    def step(number: int) -> None:
        x, y = on_device[number % len(on_device)]
        train(steps, x, y, model=model, optim_w=optim_w, optim_h=optim_h)

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        for number, layer in enumerate(model.layers):
            x = (np.tanh(x) if number else x) @ np.asarray(layer.nn.weight.get()).T + np.asarray(layer.nn.bias.get())
        return float((x.argmax(-1) == y).mean())

    def now() -> list[np.ndarray]:
        return [np.asarray(layer.nn.weight.get()) for layer in model.layers]

    return Trained(step, lambda: weight.get().block_until_ready(), accuracy, now)


def fabricpc(
    batches: Batches, steps: int, error_order: bool = False, weights: Sequence[np.ndarray] | None = None
) -> Trained:
    """FabricPC, its jitted training step: state inference by SGD, or error inference (EPCInference)."""
    import jax
    import optax
    from fabricpc import setup_jax
    from fabricpc.core.activations import SoftmaxActivation, TanhActivation
    from fabricpc.core.energy import CrossEntropyEnergy
    from fabricpc.core.inference import InferenceSGD
    from fabricpc.core.inference_epc import EPCInference
    from fabricpc.core.topology import Edge
    from fabricpc.graph_assembly import TaskMap, graph
    from fabricpc.graph_initialization import initialize_params
    from fabricpc.nodes import Linear
    from fabricpc.training import evaluate, make_train_step

    setup_jax(jax.default_backend())
    sizes = sizes_of(weights)
    nodes = [Linear(shape=(sizes[0],), name="x")]
    nodes += [Linear(shape=(n,), name=f"h{k}", activation=TanhActivation()) for k, n in enumerate(sizes[1:-1])]
    nodes += [Linear(shape=(10,), name="y", activation=SoftmaxActivation(), energy=CrossEntropyEnergy())]
    structure = graph(
        nodes=nodes,
        edges=[Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)],
        task_map=TaskMap(x=nodes[0], y=nodes[-1]),
        inference=(EPCInference if error_order else InferenceSGD)(eta_infer=0.1, infer_steps=steps),
    )
    key = jax.random.PRNGKey(0)
    optimizer = optax.sgd(0.1)
    params = initialize_params(structure, key)  # biases begin at 0
    for node, w in zip(nodes[1:], weights or ()):
        of_node = params.nodes[node.name].weights
        of_node[next(iter(of_node))] = jax.numpy.asarray(w.T)
    state = optimizer.init(params)
    train = make_train_step(structure, optimizer, algorithm="pc")
    on_device = [{"x": jax.numpy.asarray(x), "y": jax.numpy.asarray(ONE_HOT[y])} for x, y in batches]

    def step(number: int) -> None:
        nonlocal params, state
        params, state, *_ = train(params, state, on_device[number % len(on_device)], key)

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        found = evaluate(params, structure, [{"x": x, "y": ONE_HOT[y]}], {}, key)
        return float(found["accuracy"])

    def now() -> list[np.ndarray]:
        return [np.asarray(next(iter(params.nodes[node.name].weights.values()))).T for node in nodes[1:]]

    return Trained(step, lambda: jax.block_until_ready(params), accuracy, now)
