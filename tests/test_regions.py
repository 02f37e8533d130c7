"""torch.compile of the model: eager's numbers, whole graphs and few, weight gradients in the learning pass alone."""

from __future__ import annotations

import copy
import shutil
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import pc_triton as pc
from pc_triton.models import Transformer

COMPILED = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "in place": lambda model, backend: model.compile(backend=backend) or model,
    "blocks": lambda model, backend: [block.compile(backend=backend) for block in model.blocks] and model,
}
ORDERS = [{"steps": 1}, {"steps": 3}, {"order": "sweep", "steps": 2}]


@pytest.fixture(params=["eager"])
def counter(request):
    """A backend that counts the graphs it is given; a test begins with none."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend(request.param)
    torch._dynamo.reset()


whole_backwards = pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)  # as inductor's are


def transformer(attention: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(32, width=16, heads=2, blocks=2, context=8, attention=attention)


def batch(samples: int = 4) -> torch.Tensor:
    return torch.randint(32, (2, samples, 8), generator=torch.Generator().manual_seed(samples))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), pc.Gaussian(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), pc.Bernoulli(),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def assert_same(plain: pc.FreeEnergy, compiled: pc.FreeEnergy, x: torch.Tensor, y: torch.Tensor) -> None:
    """Loss, gradients and buffers of one step are the same but for rounding."""
    losses = []
    for free_energy in (plain, compiled):
        free_energy.zero_grad()
        losses.append(free_energy(x, y))
        losses[-1].backward()
    torch.testing.assert_close(losses[1].detach(), losses[0].detach(), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        atol = 1e-4 * float(wanted.grad.abs().max()) + 1e-9
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=atol)
    for found, wanted in zip(compiled.model.buffers(), plain.model.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("attention", "options"), [*((False, o) for o in ORDERS), (True, {"steps": 3})])
@whole_backwards
def test_a_compiled_model_is_eager(attention, options, counter):
    model = transformer(attention)
    plain = pc.FreeEnergy(copy.deepcopy(model), **options)
    compiled = pc.FreeEnergy(torch.compile(model, backend=counter), **options)
    assert_same(plain, compiled, *batch())
    assert (counter.frame_count > 0) == (options["steps"] > 1)  # the first pass, and so T = 1, is eager


@pytest.mark.parametrize("options", ORDERS, ids=lambda o: f"{o.get('order', 'error')}-{o['steps']}")
def test_convolutions_and_batch_normalisation(options, counter):
    model = convolutions()
    plain = pc.FreeEnergy(copy.deepcopy(model), **options)
    compiled = pc.FreeEnergy(torch.compile(model, backend=counter), **options)
    x, y = torch.randn(6, 1, 8, 8), torch.randint(5, (6,))
    for _ in range(2):
        assert_same(plain, compiled, x, y)
    assert model[2].num_batches_tracked == 2


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@needs_compiler
def test_inductor():
    model = transformer()
    plain = pc.FreeEnergy(copy.deepcopy(model))
    model.blocks[0].compile()
    assert_same(plain, pc.FreeEnergy(model), *batch())


@pytest.mark.parametrize("how", COMPILED)
def test_an_inference_step_is_one_graph(how, counter):
    """After the first pass, which is eager: a graph for inference, one for learning; none more for another batch.

    Blocks share theirs, but for the first, whose input requires no gradient in inference.
    """
    model = transformer()
    free_energy = pc.FreeEnergy(COMPILED[how](model, counter), steps=4)
    for _ in range(2):
        free_energy(*batch()).backward()
    assert counter.frame_count == (3 if how == "blocks" else 2)
    free_energy(*batch(3)).backward()
    free_energy(*batch(2)).backward()
    if not torch.__version__.startswith("2.6."):  # it compiles again for each size
        assert counter.frame_count <= 2 * (3 if how == "blocks" else 2)  # of any size, from here


def test_compile_model(counter):
    """What `FreeEnergy.compile` does on a GPU before its capture; the model itself stays as it was."""
    model = transformer()
    free_energy = pc.FreeEnergy(model)
    free_energy.compile_model(counter)
    assert_same(pc.FreeEnergy(copy.deepcopy(model)), free_energy, *batch())
    assert counter.frame_count == 1
    model(batch()[0])
    assert counter.frame_count == 1
    assert free_energy.state_dict().keys() == pc.FreeEnergy(transformer()).state_dict().keys()


def test_a_copy_has_its_own_weights(counter):
    free_energy = pc.FreeEnergy(transformer())
    free_energy.compile_model(counter)
    other = copy.deepcopy(free_energy)
    with torch.no_grad():
        other.model.head.weight.mul_(3)
    assert_same(pc.FreeEnergy(copy.deepcopy(other.model)), other, *batch())
    assert all(p.grad is None for p in free_energy.parameters())


def test_models_of_many_kinds(counter):
    """Each `FreeEnergy` has its own share of torch.compile's limit of recompilations."""
    for width in range(10, 20):
        free_energy = pc.FreeEnergy(nn.Sequential(pc.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)), steps=2)
        free_energy.compile_model(counter)
        free_energy(torch.randn(5, 6), torch.randint(4, (5,)))
    assert counter.frame_count == 10


def test_a_training_step_that_is_compiled_whole(counter):
    """Inference is no part of the graph, and the model's is."""
    model = transformer()
    plain, compiled = pc.FreeEnergy(copy.deepcopy(model)), pc.FreeEnergy(torch.compile(model, backend=counter))
    x, y = batch()
    step = torch.compile(lambda: compiled(x, y) * 2, backend="eager")
    torch.testing.assert_close(step().detach(), 2 * plain(x, y).detach(), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1  # that of the learning pass: T = 2 has no other after the first


def test_attention_with_a_state_breaks_the_graph(counter):
    """Blocks share the pieces between the breaks, so that depth adds none."""
    free_energy = pc.FreeEnergy(torch.compile(transformer(True), backend=counter))
    for _ in range(3):
        free_energy(*batch()).backward()
    assert 0 < counter.frame_count <= 8


def test_backpropagation_is_one_graph(counter):
    """With a state of the attention weights too, before and after inference, and while another thread infers."""
    model = transformer(True)
    plain = copy.deepcopy(model)
    whole = torch.compile(model, backend=counter, fullgraph=True)
    x, y = batch()
    torch.testing.assert_close(whole(x), plain(x))
    pc.FreeEnergy(model)(x, y).backward()
    F.cross_entropy(whole(x).flatten(0, -2), y.flatten()).backward()
    assert counter.frame_count == 1


def test_a_model_called_beside_an_inference(counter):
    """Another thread's inference is none of this one's."""
    other, x = torch.compile(transformer(), backend=counter), batch()[0]
    wanted, found = other(x), []

    class Calls(nn.Module):
        def forward(self, h):
            thread = threading.Thread(target=lambda: found.append(other(x)))
            thread.start()
            thread.join()
            return h

    pc.FreeEnergy(nn.Sequential(pc.Linear(3, 4), Calls(), nn.Linear(4, 2)), steps=2, step=0.25)(
        torch.randn(2, 3), torch.ones(2, 2)
    )
    assert len(found) == 2
    torch.testing.assert_close(found[1], wanted)


@pytest.mark.parametrize("attention", [False, True])
@whole_backwards
def test_products(attention, counter):
    """Compiled, a step has no product that it has not in eager, and no weight gradients but the learning pass's."""
    counts = []
    for compiled in (False, True):
        model = transformer(attention)
        free_energy = pc.FreeEnergy(torch.compile(model, backend=counter) if compiled else model)
        with FlopCounterMode(display=False) as flops:
            free_energy(*batch()).backward()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1]


def test_weights_require_gradients_again(counter):
    """After a batch, one that is refused too; those that were frozen stay so."""
    model = transformer()
    model.tokens.weight.requires_grad_(False)
    free_energy = pc.FreeEnergy(torch.compile(model, backend=counter))
    x, y = batch()
    with pytest.raises(ValueError, match="label 32 is outside"):
        free_energy(x, torch.full_like(y, 32))
    free_energy(x, y)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["tokens.weight"]
    assert not any("error" in vars(module) for module in model.modules())


def test_dropout_is_the_same_in_every_pass(counter):
    """With errors that may not move, F of every pass after the first, which is eager, is the same."""
    model = nn.Sequential(pc.Linear(6, 50), nn.Dropout(0.5), pc.Linear(50, 50), nn.Dropout(0.5), nn.Linear(50, 4))
    free_energy = pc.FreeEnergy(torch.compile(model, backend=counter), steps=4, precision=1e12)
    x, y = torch.randn(5, 6), torch.randint(4, (5,))
    _, settled = free_energy.loss_and_batch(x, y)
    first, *others = settled.energies
    for energy in others:
        torch.testing.assert_close(energy, first)


@needs_compiler
def test_dropout_of_inductor():
    """It draws the numbers of the first pass."""
    torch._dynamo.reset()
    model = nn.Sequential(pc.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4))
    free_energy = pc.FreeEnergy(torch.compile(model), precision=1e12)
    _, settled = free_energy.loss_and_batch(torch.randn(5, 6), torch.randint(4, (5,)))
    first, *others = settled.energies
    for energy in others:
        torch.testing.assert_close(energy, first)


def test_an_error_leaves_nothing_behind(counter, monkeypatch):
    free_energy = pc.FreeEnergy(torch.compile(transformer(), backend=counter))
    free_energy(*batch())
    monkeypatch.setattr(pc.Gaussian, "error_energy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        free_energy(*batch())
    assert all(m.error is None for m in free_energy.modules() if isinstance(m, pc.Gaussian))
    assert all(p.requires_grad for p in free_energy.parameters())


def test_another_path_is_refused(counter):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = pc.Linear(6, 6), pc.Linear(6, 6), nn.Linear(6, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.out(self.b(self.a(x) if self.calls == 1 else x))

    free_energy = pc.FreeEnergy(torch.compile(Changes(), backend=counter), steps=3)
    with pytest.raises(RuntimeError, match="node 'a': the model's forward passes it by"):
        free_energy(torch.randn(5, 6), torch.randint(4, (5,)))


def test_report_and_infer(counter, monkeypatch):
    """Names are the model's own, values eager's."""
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 4)
    model = transformer(True)
    model.blocks[1] = torch.compile(model.blocks[1], backend=counter)
    plain = pc.FreeEnergy(transformer(True), steps=3)
    compiled = pc.FreeEnergy(torch.compile(model, backend=counter), steps=3)
    x, y = batch()
    compiled(x, y).backward()
    graphs = counter.frame_count
    wanted, found = plain.report(x, y), compiled.report(x, y)
    compiled(x, y).backward()
    assert counter.frame_count == graphs  # the report leaves the graphs whole
    assert [node.name for node in found.nodes] == [node.name for node in wanted.nodes]
    assert found.free_energies == pytest.approx(wanted.free_energies)
    assert found.cosine == pytest.approx(wanted.cosine, abs=1e-4)
    wanted, found = plain.infer(x, y), compiled.infer(x, y)
    assert list(found.states) == list(wanted.states)
    torch.testing.assert_close(found.free_energy, wanted.free_energy)
    torch.testing.assert_close(found.output, wanted.output, rtol=1e-3, atol=1e-4)
