"""The numbers of other libraries that docs/notebooks/coming_from_other_libraries.ipynb compares with.

    PYTHON bench/same_numbers.py pcx        # the python of an environment with pcx==0.6.3 and scikit-learn
    PYTHON bench/same_numbers.py fabricpc   # and with fabricpc==0.6.0; the two need different versions of JAX

Prints how far each weight matrix moved in the notebook's training: 64 digits, a network 64-20-20-10 with tanh,
cross-entropy, 20 steps of SGD at 0.1 on all of them, 8 inference steps at 0.1 in each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits

SIZES, STEPS, LR, T, RATE = (64, 20, 20, 10), 20, 0.1, 8, 0.1


def numbers() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """x ``[64, 64]``, one-hot y ``[64, 10]`` and the weights ``[out, in]`` at the start, all float32."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.RandomState(0)
    weights = [(random.randn(n, m) / m**0.5).astype(np.float32) for m, n in pairwise(SIZES)]
    return (pixels[:64] / 16).astype(np.float32), np.eye(10, dtype=np.float32)[labels[:64]], weights


def moved(trained: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> str:
    """How far, in the digits that float32 has."""
    return ", ".join(f"{np.linalg.norm(np.asarray(now, float) - start):.6f}" for now, start in zip(trained, weights))


def pcx() -> None:
    import jax
    import optax
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    class Model(pxc.EnergyModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(m, n) for m, n in pairwise(SIZES)]
            self.vodes = [pxc.Vode(), pxc.Vode(), pxc.Vode(pxc.ce_energy)]
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

    @pxf.jit()
    def train(x, y, *, model, optim_w, optim_h):
        free = pxu.M_hasnot(pxc.VodeParam, frozen=True)
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        optim_h.init(free(model))
        infer = pxf.value_and_grad(pxu.M_hasnot(pxc.VodeParam, frozen=True).to([False, True]), has_aux=True)(energy)
        for _ in range(T):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, gradient = infer(x, model=model)
            optim_h.step(model, gradient["model"])
        optim_h.clear()
        learn = pxf.value_and_grad(pxu.M(pxnn.LayerParam).to([False, True]), has_aux=True)(energy)
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, gradient = learn(x, model=model)
        optim_w.step(model, gradient["model"], scale_by=1.0 / len(x))

    x, y, weights = numbers()
    model = Model()
    for layer, w in zip(model.layers, weights):
        layer.nn.weight.set(jax.numpy.asarray(w))
        layer.nn.bias.set(jax.numpy.zeros(len(w)))
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(x, y, model=model)
    optim_h = pxu.Optim(lambda: optax.sgd(RATE))
    optim_w = pxu.Optim(lambda: optax.sgd(LR), pxu.M(pxnn.LayerParam)(model))
    for _ in range(STEPS):
        train(x, y, model=model, optim_w=optim_w, optim_h=optim_h)
    print("simultaneous:", moved([layer.nn.weight.get() for layer in model.layers], weights))


def fabricpc() -> None:
    import jax
    import optax
    from fabricpc.core.activations import SoftmaxActivation, TanhActivation
    from fabricpc.core.energy import CrossEntropyEnergy
    from fabricpc.core.inference import InferenceSGD
    from fabricpc.core.inference_epc import EPCInference
    from fabricpc.core.topology import Edge
    from fabricpc.graph_assembly import TaskMap, graph
    from fabricpc.graph_initialization import initialize_params
    from fabricpc.nodes import Linear
    from fabricpc.training import make_train_step

    x, y, weights = numbers()
    for solver in (InferenceSGD, EPCInference):
        nodes = [Linear(shape=(SIZES[0],), name="x")]
        nodes += [Linear(shape=(n,), name=f"h{k}", activation=TanhActivation()) for k, n in enumerate(SIZES[1:-1])]
        nodes += [Linear(shape=(10,), name="y", activation=SoftmaxActivation(), energy=CrossEntropyEnergy())]
        structure = graph(
            nodes=nodes,
            edges=[Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)],
            task_map=TaskMap(x=nodes[0], y=nodes[-1]),
            inference=solver(eta_infer=RATE, infer_steps=T),
        )
        key = jax.random.PRNGKey(0)
        params = initialize_params(structure, key)  # biases begin at 0
        for node, w in zip(nodes[1:], weights):
            of_node = params.nodes[node.name].weights
            of_node[next(iter(of_node))] = jax.numpy.asarray(w.T)
        optimizer = optax.sgd(LR)
        state, train = optimizer.init(params), make_train_step(structure, optimizer, algorithm="pc")
        for _ in range(STEPS):
            params, state, *_ = train(params, state, {"x": x, "y": y}, key)
        trained = [next(iter(params.nodes[node.name].weights.values())).T for node in nodes[1:]]
        print(f"{solver.__name__}:", moved(trained, weights))


if __name__ == "__main__":
    {"pcx": pcx, "fabricpc": fabricpc}[sys.argv[1]]()
