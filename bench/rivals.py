"""The digits network of ``digits.py`` in other predictive coding libraries, written as their own tutorials do.

Each function takes the batches (a list of x ``[128, 64]`` float32 and y ``[128]`` int64 in numpy) and returns three:
the step, a function of a batch's number that trains on it; the wait for all steps to end; the accuracy of (x, y).
Network: 64-128-128-10, tanh, squared errors on the hidden nodes, cross-entropy on the output, plain SGD at 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Batches = Sequence[tuple[np.ndarray, np.ndarray]]
Trained = tuple[Callable[[int], Any], Callable[[], Any], Callable[[np.ndarray, np.ndarray], float]]
SIZES = (64, 128, 128, 10)
ONE_HOT = np.eye(10, dtype=np.float32)


def pcx(batches: Batches, steps: int) -> Trained:
    """PCX (Pinchetti et al. 2024, arXiv 2407.01163), simultaneous order, everything in one jitted function."""
    import jax
    import optax
    import pcx as px
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    class Model(pxc.EnergyModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(m, n) for m, n in pairwise(SIZES)]
            self.vodes = [pxc.Vode() for _ in SIZES[2:]] + [pxc.Vode(pxc.ce_energy)]
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

    return step, lambda: weight.get().block_until_ready(), accuracy


def fabricpc(batches: Batches, steps: int, error_order: bool = False) -> Trained:
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
    nodes = [Linear(shape=(SIZES[0],), name="x")]
    nodes += [Linear(shape=(n,), name=f"h{k}", activation=TanhActivation()) for k, n in enumerate(SIZES[1:-1])]
    nodes += [Linear(shape=(10,), name="y", activation=SoftmaxActivation(), energy=CrossEntropyEnergy())]
    structure = graph(
        nodes=nodes,
        edges=[Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)],
        task_map=TaskMap(x=nodes[0], y=nodes[-1]),
        inference=(EPCInference if error_order else InferenceSGD)(eta_infer=0.1, infer_steps=steps),
    )
    key = jax.random.PRNGKey(0)
    optimizer = optax.sgd(0.1)
    params = initialize_params(structure, key)
    state = optimizer.init(params)
    train = make_train_step(structure, optimizer, algorithm="pc")
    on_device = [{"x": jax.numpy.asarray(x), "y": jax.numpy.asarray(ONE_HOT[y])} for x, y in batches]

    def step(number: int) -> None:
        nonlocal params, state
        params, state, *_ = train(params, state, on_device[number % len(on_device)], key)

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        found = evaluate(params, structure, [{"x": x, "y": ONE_HOT[y]}], {}, key)
        return float(found["accuracy"])

    return step, lambda: jax.block_until_ready(params), accuracy
