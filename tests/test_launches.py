"""How many kernels of its own a training step launches, counted in the interpreter: one a node and pass, not more."""

from __future__ import annotations

import pytest
import torch

import pc_triton as pc
from pc_triton.models import Transformer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels launched."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_error_order(steps, blocks, launches):
    """T = 1 is backpropagation, with no node's kernel.

    Otherwise every node has two launches at the prediction, of which one sees how far F falls by it, and one moves it,
    but a Gaussian only one where that move is the only one: the learning pass makes it. There is one launch a node in
    each later forward pass, and one in each later backward pass that moves it; attention's step is two, and learns too.
    From T = 4 on the guard keeps states, by a launch a node for each move after the second. It is counted in a batch
    after the first, whose step is known.
    """
    torch.manual_seed(0)
    model = Transformer(32, width=16, heads=2, blocks=blocks, context=4)
    x, y = torch.randint(32, (2, 2, 4))
    with pc.use_backend("triton"):
        free_energy = pc.FreeEnergy(model, steps=steps)
        free_energy(x, y).backward()
        launches.clear()
        free_energy(x, y).backward()
    gaussians, attentions, moves = 3, 1, steps - 2
    block = 0
    if steps > 1:
        block = 2 * (gaussians + attentions) + (moves + 1) * (gaussians + attentions) + moves * gaussians
        block += 2 * attentions * (moves + 1)
    if steps == 2:
        block -= gaussians
    if steps > 3:
        block += (moves - 1) * (gaussians + attentions)
    assert len(launches) == blocks * block + steps, launches  # and the head, once a pass
    assert set(launches) <= {
        "elementwise._forward", "elementwise._step", "fall._fall", "clamped._clamped_gradient",
        "attention._forward", "attention._grad_queries", "attention._step_keys", "attention_first._fall",
        "attention_first._first_step", "guard._guard",
    }  # fmt: skip


@pytest.mark.parametrize("order", ["sweep", "simultaneous"])
def test_state_orders(order, launches):
    """One launch in a node's forward and in its backward pass; nothing at the predictions but the head.

    Under the simultaneous order the first node is at its prediction until the second step.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(pc.Linear(4, 5), torch.nn.Tanh(), pc.Linear(5, 6), torch.nn.Tanh(), pc.Head(6, 3))
    x, y = torch.randn(2, 4), torch.randint(3, (2,))
    with pc.use_backend("triton"):
        pc.FreeEnergy(model, order=order, steps=4)(x, y).backward()
    nodes, passes = 2, 4 + 1  # inference, and learning
    assert launches.count("elementwise._forward") == nodes * passes
    assert launches.count("elementwise._step") == nodes * passes - (order == "simultaneous")
    assert launches.count("clamped._clamped_gradient") == passes + 1
