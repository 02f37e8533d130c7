"""`FreeEnergy.compile`: the compiled step gives eager's numbers, and refuses what it cannot hold."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch import nn

import pc_triton as pc
from pc_triton import compiled as module
from pc_triton import dispatch
from pc_triton.compiled import trace

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
ORDERS = [
    {"order": "error", "steps": 1},
    {"order": "error", "steps": 2},
    {"order": "error", "steps": 4},
    {"order": "sweep", "steps": 2},
    {"order": "simultaneous", "steps": 3, "precision": 1.0, "step": 0.1},
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(pc.Linear(6, 9), nn.Tanh(), pc.Linear(9, 7), nn.Tanh(), pc.Linear(7, 4))


def batch(samples: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


def assert_same(found, wanted) -> None:
    """But for rounding: the guard's step comes of a difference of two F in float32."""
    for a, b in zip(found, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: f"{o['order']}-{o['steps']}")
def test_trace_is_eager(options):
    """The flat graph, before inductor, gives the same loss and gradients on other values of the same shape."""
    model = network()
    free_energy = pc.FreeEnergy(model, **options)
    graph, _ = trace(lambda x, y: free_energy.loss_and_batch(x, y)[0], model, batch())
    x, y = batch()
    x = x + 1.0
    with torch.no_grad():
        model[0].weight.mul_(1.3)
    loss, *found = graph(*(p.detach() for p in model.parameters()), x, y)
    eager = free_energy(x, y)
    torch.testing.assert_close(loss, eager.detach(), rtol=1e-5, atol=1e-6)
    assert_same(found, gradients(eager, model))


def test_trace_skips_what_is_zero():
    """Under the simultaneous order the error has reached only the top t nodes at step t."""
    model = network()
    free_energy = pc.FreeEnergy(model, order="simultaneous", steps=2, precision=1.0, step=0.1)
    graph, _ = trace(lambda x, y: free_energy.loss_and_batch(x, y)[0], model, batch())
    products = sum(
        n.op == "call_function" and n.target.name() in ("aten::mm", "aten::addmm") for n in graph.graph.nodes
    )
    # forward: 3 at the prediction, then what lies above nodes that have moved: 1 at step 2, 2 in learning; backward:
    # the output's error twice, the second node's once; weights: 3
    assert products == 3 + 1 + 2 + 3 + 3


def test_trace_of_a_frozen_parameter():
    model = network()
    model[0].weight.requires_grad_(False)
    free_energy = pc.FreeEnergy(model)
    graph, _ = trace(lambda x, y: free_energy.loss_and_batch(x, y)[0], model, batch())
    _, *found = graph(*(p.detach() for p in model.parameters()), *batch())
    wanted = gradients(free_energy(*batch()), model)
    assert wanted[0] is None
    assert_same(found, wanted[1:])


@needs_compiler
def test_compiled():
    """A compiled step through backward(): eager's numbers, and bad values refused before anything is changed."""
    eager, model = network(), network()
    plain, compiled = pc.FreeEnergy(eager), pc.FreeEnergy(model)
    compiled.compile(cpp_wrapper=False)  # compiles faster
    x, y = batch()
    with torch.no_grad():
        assert not compiled(x, y).requires_grad
    assert_same(gradients(3 * compiled(x, y), model), gradients(3 * plain(x, y), eager))
    model.zero_grad()
    with pytest.raises(ValueError, match="x holds NaN"):
        compiled(torch.full_like(x, torch.nan), y)
    with pytest.raises(ValueError, match="label 4 is outside"):
        compiled(x, torch.full_like(y, 4))
    with pytest.raises(ValueError, match="batch of at least one"):
        compiled(x[:0], y[:0])
    with pytest.raises(ValueError, match="labels have shape"):
        compiled(x, y[:3])
    assert all(p.grad is None for p in model.parameters())
    y[0] = -100  # ignored
    torch.testing.assert_close(compiled(x, y), plain(x, y))
    loss = compiled(x, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def settings_set_later(free_energy, model):
    free_energy.steps = 1


def another_precision(free_energy, model):
    free_energy.precision = 2.0


def another_weight_of_the_output(free_energy, model):
    free_energy.output_weight = -0.5


def a_layer_in_evaluation(free_energy, model):
    model[1].eval()


def another_buffer(free_energy, model):
    model[-1].register_buffer("unused", torch.zeros(3))


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [settings_set_later, another_precision, another_weight_of_the_output, a_layer_in_evaluation, another_buffer],
)
def test_what_a_compiled_step_follows(change):
    """The step is made again for all that it follows from, and found again when that is back."""
    pair = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(pc.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), pc.Linear(8, 4))
        free_energy = pc.FreeEnergy(model)
        if compiles:
            free_energy.compile(cpp_wrapper=False)
        free_energy(*batch())
        change(free_energy, model)
        loss = free_energy(*batch())
        pair.append([loss.detach(), *gradients(loss, model)])
    assert_same(*pair)


@needs_compiler
def test_a_compiled_step_within_autocast():
    """Each is its own graph; a graph casts the weights at every call, after they have moved as well."""
    models = [network() for _ in range(2)]
    plain, compiled = (pc.FreeEnergy(model) for model in models)
    compiled.compile(cpp_wrapper=False)
    x, y = batch()
    for autocast in (False, True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [free_energy(x, y) for free_energy in (plain, compiled)]
        found = [gradients(loss, model) for loss, model in zip(losses, models)]
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= (0.1 if autocast else 0.01) * a.norm()
        with torch.no_grad():
            for model in models:
                for p in model.parameters():
                    p.mul_(1.3)
    assert len(compiled._compiled.steps) == 2


def test_refusals():
    with pytest.raises(ValueError, match="compile"):
        pc.FreeEnergy(network(), order="incremental").compile()
    with pytest.raises(ValueError, match="compile"):
        pc.FreeEnergy(network(), state_optimizer=torch.optim.SGD).compile()
    model = nn.Sequential(pc.Linear(6, 9), nn.Dropout(0.5), pc.Linear(9, 4))
    free_energy = pc.FreeEnergy(model)
    free_energy.compile()
    with pytest.raises(ValueError, match="dropout"):
        free_energy(*batch())


def test_batch_norm_counts_a_batch_once():
    """Neither the look at the first batch nor the trace moves running statistics; each training step does, once."""
    model = nn.Sequential(pc.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    free_energy = pc.FreeEnergy(model)
    free_energy.compile(cpp_wrapper=False)
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    for step in range(1, 3):
        free_energy(*batch()).backward()
        assert model[1].num_batches_tracked == step


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has no word for it")
def test_a_graph_is_of_one_precision_of_products(monkeypatch):
    """What was captured with exact products is not replayed where they may be TF32."""
    made = []

    def make(self, *_):
        made.append(torch.get_float32_matmul_precision())
        return lambda *_: [torch.zeros(()), *map(torch.zeros_like, self.whole.parameters())], lambda x, y: None

    monkeypatch.setattr(module.CompiledSteps, "_make", make)
    free_energy = pc.FreeEnergy(network(), steps=1)
    free_energy.compile()
    try:
        for word in ("highest", "high", "highest", "high"):
            torch.set_float32_matmul_precision(word)
            free_energy(*batch())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert made == ["highest", "high"]


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("options", [pytest.param(o, id=f"{o['order']}-{o['steps']}", marks=gpu) for o in ORDERS])
def test_a_cuda_graph_is_eager(options, monkeypatch):
    """Several shapes in turn, more of them than graphs are kept, with an optimiser that moves the weights in place."""
    monkeypatch.setattr(module, "GRAPHS", 2)
    models = [network().cuda() for _ in range(2)]
    plain, graphed = (pc.FreeEnergy(model, **options) for model in models)
    graphed.compile()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
    for number, samples in enumerate((5, 5, 9, 5, 3, 9, 5)):
        x, y = (t.cuda() for t in batch(samples))
        values = []
        for free_energy, optimizer in zip((plain, graphed), optimizers):
            optimizer.zero_grad()
            with dispatch.use_chain(False):
                loss = free_energy(x + number, y)
            (2 * loss).backward()
            optimizer.step()
            values.append(loss.detach())
        torch.testing.assert_close(values[1], values[0])
        assert_same(*([p.grad for p in model.parameters()] for model in reversed(models)))
    assert len(graphed._compiled.steps) <= 2


@pytest.mark.parametrize("layer", [pytest.param(nn.Dropout(0.5), id="dropout", marks=gpu)])
def test_a_cuda_graph_draws_nothing(layer):
    model = nn.Sequential(pc.Linear(6, 9), layer, pc.Linear(9, 4)).cuda()
    free_energy = pc.FreeEnergy(model)
    free_energy.compile()
    with pytest.raises(ValueError, match="random numbers"):
        free_energy(*(t.cuda() for t in batch()))


@needs_compiler
def test_a_first_batch_in_which_nothing_moves_makes_no_graph():
    """The step is learnt of the first batch that moves something; here all labels of the first are ignored."""
    (x, y), eager, compiled = batch(), pc.FreeEnergy(network()), pc.FreeEnergy(network())
    compiled.compile()
    for labels in (torch.full_like(y, -100), y, y):
        loss, wanted = compiled(x, labels), eager(x, labels)
        torch.testing.assert_close(loss, wanted)
        assert_same(gradients(loss, compiled.model), gradients(wanted, eager.model))


@pytest.mark.parametrize("later", [{"stop": 0.1}, {"state_optimizer": lambda states: torch.optim.SGD(states, lr=0.5)}])
def test_what_a_graph_cannot_hold_is_refused_when_it_is_set_later(later):
    free_energy = pc.FreeEnergy(network())
    free_energy.compile()
    for name, value in later.items():
        setattr(free_energy, name, value)
    with pytest.raises(ValueError, match="compile"):
        free_energy(*batch())


def test_rules_that_cannot_be_hashed_are_refused_in_words():
    @dataclasses.dataclass
    class Ones:
        pi: float = 1.0

        def __call__(self, node, squared, free_energy, nodes):
            return torch.full_like(free_energy, self.pi)

    free_energy = pc.FreeEnergy(network(), precision=Ones(), steps=3)
    free_energy.compile()
    with pytest.raises(TypeError, match="frozen=True"):
        free_energy(*batch())
