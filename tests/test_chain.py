"""A chain's training step in one launch: the layers' own in float64 is its oracle; and where it must not be taken."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import random
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_kernels import EMULATED, ON_GPU, spots
from torch import nn

import pc_triton as pc
from pc_triton import dispatch
from pc_triton.chain import as_chain
from pc_triton.kernels import chain

ACTIVATIONS = {
    "identity": None,
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}


@pytest.fixture(params=spots(torch.float32, torch.float16, torch.bfloat16))
def spot(request) -> tuple[str, torch.dtype]:
    return request.param


def network(widths, activations=("tanh",), bias=True, output_node=False) -> nn.Sequential:
    """Layers of these widths; the activations in turns."""
    layers: list[nn.Module] = []
    for number, (k, n) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        layers.append((nn.Linear if last and not output_node else pc.Linear)(k, n, bias=bias))
        f = copy.deepcopy(ACTIVATIONS[activations[number % len(activations)]])
        layers += [] if last or f is None else [f]
    return nn.Sequential(*layers)


def compare(model, x, y, spot=("cpu", torch.float32), **options) -> None:
    """Loss and gradients in one launch, scaled by the user, against those of the layers in float64.

    Twice as far from them as those of the layers in the same dtype, and some units in the last place. Where a parabola
    through two F chooses the step, rounding moves the step, and with it what inference changed in a gradient:
    curvature = 2 (F_1 - F_0 + s fall) / s^2, each F rounded, is wrong by 2 eps F / s^2, or, as F is a sum, by twice
    that; and it is no less than fall, where it is used. The step is between 0 and 1, so that all of the change is the
    most that it can spoil: of a bound so wide a test would show nothing, and half of it is refused.
    """
    device, dtype = spot
    options = {"steps": 3, **options}
    if options["steps"] == 2 and options.get("step") is None:
        options["step"] = 0.25  # one that is tracked goes to the layers
    ours, oracle = model.to(device, dtype), copy.deepcopy(model).to(device, dtype).double()
    x, y = x.to(device, dtype), y.to(device) if not y.is_floating_point() else y.to(device, dtype)
    found = []
    runs = ((ours, True, dtype, {}), (ours, False, dtype, {}), (oracle, False, torch.float64, {}))
    for net, one, cast, other in (*runs, (oracle, False, torch.float64, {"steps": 1})):
        net.zero_grad()
        with dispatch.use_chain(one):
            free_energy = pc.FreeEnergy(net, **{**options, **other})
            loss = free_energy(x.to(cast), y.to(cast) if y.is_floating_point() else y)
            assert (type(loss.grad_fn).__name__ == "_LearnedBackward") == one
            (3.0 * loss).backward()
        found.append([loss.detach().double(), *(p.grad.double() for p in net.parameters() if p.requires_grad)])
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    eps, spoiled = torch.finfo(dtype).eps, 0.0
    if options.get("step") is None and options["steps"] > 2:
        first, little = 0.25, 1e-6  # the guard's first step, and one whose curve is a line
        line = pc.FreeEnergy(oracle, **{**options, "steps": 2, "step": little})
        start, end = line.loss_and_batch(x.double(), y.double() if y.is_floating_point() else y)[1].energies
        fall = (start - end) / little
        spoiled = float((4 * eps * start / (first**2 * fall.clamp_min(1e-30))).clamp_max(1.0).max())
    scales = [float(truth.abs().max()) + 1e-6 for truth in found[2]]
    # the largest of any gradient: in one of them the samples' changes may cancel, and their errors not
    change = max(float((t - u).abs().max()) / scale for t, u, scale in zip(*found[2:], scales))
    few = 4 * eps + spoiled * change
    assert few <= change / 2 or options["steps"] == 1 or change == 0
    for a, b, truth, scale in zip(*found[:3], scales):
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max() + few * scale


def batch(samples, k, classes, labels=True) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(samples, k)
    return x, torch.randint(classes, (samples,)) if labels else torch.randn(samples, classes)


@pytest.mark.parametrize("precision", ["auto", 0.7])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("step", [None, 0.3], ids=["guarded", "fixed"])
def test_every_number_of_steps(steps, precision, step):
    torch.manual_seed(steps)
    x, y = batch(19, 6, 4)
    y[3] = -100
    compare(network((6, 9, 12, 4)), x, y, steps=steps, precision=precision, step=step)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    torch.manual_seed(0)
    x, y = batch(5, 7, 3, labels=False)
    compare(network((7, 18, 5, 3), (name,)), 3 * x, y)


@pytest.mark.parametrize("seed", range(6))
def test_any_shape(seed):
    """Widths beyond a tile and beside its edges, any depth, two activations, labels or values, with bias or not."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    widths = [draw.choice((1, 3, 16, 33, 64, 70, 130)) for _ in range(draw.randint(3, 6))]
    labels = draw.random() < 0.5
    model = network(widths, draw.sample(sorted(ACTIVATIONS), 2), draw.random() < 0.7, draw.random() < 0.5)
    x, y = batch(draw.choice((1, 16, 35)), widths[0], widths[-1], labels)
    compare(model, x, y, steps=draw.choice((2, 3, 4)))


def test_every_dtype(spot):
    """Where inference changes more than a dtype of few digits rounds: at a low precision, at a large displacement."""
    torch.manual_seed(0)
    for labels in (True, False):
        x, y = batch(40, 24, 10, labels)
        for options in ({"precision": 0.05}, {"displacement": 0.9, "step": 0.3}):
            compare(network((24, 48, 32, 10), ("gelu", "tanh")), x, y, spot, **options)


def test_the_precision_that_every_warp_reads(spot):
    """Of the first pass: one warp writes P where all have read the mean of mu^2, and a late one must not read P.

    At a large displacement the two differ most.
    """
    torch.manual_seed(0)
    x, y = batch(16, 64, 10)
    compare(network((64, 128, 128, 10)), x, y, spot, displacement=0.9, step=0.3)


@pytest.mark.parametrize("steps", [3, 5])
def test_what_raised_f_is_taken_back(steps):
    """A low precision and a steep loss: the first moves overshoot in some samples."""
    torch.manual_seed(0)
    model = network((6, 20, 20, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    x, y = batch(33, 6, 5)
    settled = pc.FreeEnergy(model, steps=steps, precision=0.05).loss_and_batch(x, y)[1]
    assert any((b > a).any() for a, b in pairwise(settled.energies))
    compare(model, x, y, steps=steps, precision=0.05)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("steps", [3, 4, 6])
@pytest.mark.parametrize("place", list(spots(torch.float32)))
def test_samples_whose_first_move_overflows_stay_at_the_prediction(place, steps, labels):
    """Where F is then infinite, as by values, or NaN, as by logits; the others settle as they do in the layers."""
    torch.manual_seed(0)
    model = network((6, 9, 12, 4), ("identity",)).to(place[0])
    x, y = (t.to(place[0]) for t in batch(7, 6, 4, labels))
    far = torch.arange(len(y), device=y.device) % 3 == 0
    if labels:
        y[~far] = -100
        with torch.no_grad():
            model[-1].weight *= 1e3
    else:
        y[far] *= 1e14
    options = {"steps": steps, "precision": 1e-36 if labels else 1e-8}
    with dispatch.use_chain(False):
        inference = pc.FreeEnergy(model, **options).loss_and_batch(x, y)[1]
    first, second, *_, last = inference.energies
    assert torch.equal(far, ~second.isfinite())
    assert (~second[far].isnan()).all() != labels
    assert torch.equal(last[far], first[far])
    layers = [layer for layer in model if hasattr(layer, "weight")]
    energy, before, *found = chain.chain_gradient(
        x, y, torch.ones((), device=x.device), [layer.weight.detach() for layer in layers],
        [layer.bias.detach() for layer in layers], ["identity"] * 2, step=0.25, guards=True, displacement=0.0,
        trust=1.0, least=0.0, ignore_index=-100, **options,
    )  # fmt: skip
    torch.testing.assert_close(before[0], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energy, last, rtol=1e-4, atol=1e-5)
    assert all(t.isfinite().all() for parts in found for t in parts)


def test_a_frozen_layer_and_all_labels_ignored():
    torch.manual_seed(0)
    model = network((6, 9, 12, 4))
    model[2].weight.requires_grad_(False)
    x, y = batch(5, 6, 4)
    compare(model, x, y)
    compare(model, x, torch.full_like(y, -100))


@pytest.mark.parametrize("labels", [True, False])
def test_launches(labels, monkeypatch):
    """One launch, whatever the depth and the number of steps; the products are torch's, one a weight."""
    from triton.runtime.interpreter import GridExecutor

    if torch.cuda.is_available() or EMULATED:
        pytest.skip("counted in the interpreter")
    names: list[str] = []
    run = GridExecutor.__call__
    counted = lambda self, *a, **k: names.append(self.fn.__name__) or run(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    torch.manual_seed(0)
    x, y = batch(5, 6, 4, labels)
    model = network((6, 9, 12, 4))
    with dispatch.use_chain(True), torch.profiler.profile() as profile:
        pc.FreeEnergy(model, steps=4)(x, y).backward()
    assert names == ["_chain"]
    assert sum(event.name == "aten::mm" for event in profile.events()) == 3


def test_backward_twice_and_without_gradients():
    x, y = batch(5, 6, 4)
    model = network((6, 9, 12, 4))
    with dispatch.use_chain(True):
        loss = pc.FreeEnergy(model, steps=3)(x, y)
        with torch.no_grad():
            assert not pc.FreeEnergy(model, steps=3)(x, y).requires_grad
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, y: (x * float("nan"), y),
        lambda x, y: (x, y + 4),
        lambda x, y: (x[:0], y[:0]),
        lambda x, y: (x, y[:-1]),
        lambda x, y: (x, y.int()),
        lambda x, y: (x, torch.full((len(y), 4), float("inf"))),
        lambda x, y: (x, torch.zeros(len(y), 3)),
        lambda x, y: (x[:, :-1], y),
    ],
    ids=["nan", "label", "empty", "few labels", "int32", "infinite values", "narrow values", "narrow input"],
)
def test_the_same_errors(spoil):
    x, y = spoil(*batch(5, 6, 4))
    said = []
    for one in (False, True):
        with dispatch.use_chain(one), pytest.raises((ValueError, RuntimeError)) as error:
            pc.FreeEnergy(network((6, 9, 4)), steps=3)(x, y)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def changed(change) -> nn.Sequential:
    model = network((6, 9, 9, 4))
    change(model)
    return model


OTHERS = {
    "a hook": changed(lambda m: m[1].register_forward_hook(lambda *_: None)),
    "a node's hook": changed(lambda m: m[0].node.register_forward_pre_hook(lambda *_: None)),
    "a forward of its own": changed(lambda m: setattr(m[1], "forward", torch.sin)),
    "another module": nn.Sequential(pc.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)),
    "a plain hidden layer": nn.Sequential(nn.Linear(6, 9), nn.Tanh(), pc.Linear(9, 9), nn.Linear(9, 4)),
    "two activations": nn.Sequential(pc.Linear(6, 9), nn.Tanh(), nn.Tanh(), nn.Linear(9, 4)),
    "an activation first": nn.Sequential(nn.Tanh(), pc.Linear(6, 9), nn.Linear(9, 4)),
    "an activation last": nn.Sequential(pc.Linear(6, 9), nn.Linear(9, 4), nn.Tanh()),
    "a variance": nn.Sequential(pc.Linear(6, 9, node=pc.Gaussian(2.0)), nn.Linear(9, 4)),
    "another family": nn.Sequential(pc.Linear(6, 9, node=pc.Bernoulli()), nn.Linear(9, 4)),
    "in place": nn.Sequential(pc.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)),
    "one layer": nn.Sequential(pc.Linear(6, 4)),
    "no Sequential": nn.ModuleList([pc.Linear(6, 9), nn.Linear(9, 4)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_no_chain(name):
    assert as_chain(OTHERS[name]) is None


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"order": "sweep"}, torch.randn(5, 6)),
        ({"state_optimizer": lambda states: torch.optim.SGD(states, lr=0.5)}, torch.randn(5, 6)),
        ({"output": pc.Gaussian(2.0)}, torch.randn(5, 6)),
        ({}, torch.randn(5, 6, requires_grad=True)),
        ({}, (torch.randn(5, 6),)),
    ],
    ids=["order", "optimizer", "variance", "input gradient", "tuple"],
)
def test_other_calls_go_to_the_layers(options, x, monkeypatch):
    monkeypatch.setattr(chain, "chain_gradient", lambda *_, **__: pytest.fail("one launch"))
    with dispatch.use_chain(True):
        pc.FreeEnergy(network((6, 9, 4)), steps=3, **options)(x, torch.randn(5, 4)).backward()


def test_a_gradient_in_the_target_and_a_frozen_model_go_to_the_layers(monkeypatch):
    monkeypatch.setattr(chain, "chain_gradient", lambda *_, **__: pytest.fail("one launch"))
    model, y = network((6, 9, 4)), torch.randn(5, 4, requires_grad=True)
    with dispatch.use_chain(True):
        pc.FreeEnergy(model, steps=3)(torch.randn(5, 6), y).backward()
        assert y.grad.norm() > 0
        pc.FreeEnergy(model.requires_grad_(False), steps=3)(torch.randn(5, 6), y.detach())


# The tracked step, the default's.


def train(free_energy, batches, one: bool):
    """The loss, its gradients and the step that comes next, after each of these batches."""
    found = []
    for x, y in batches:
        free_energy.zero_grad()
        with dispatch.use_chain(one):
            loss = free_energy(x, y)
            loss.backward()
        gradients = [p.grad.clone() for p in free_energy.parameters()]
        found.append((loss.detach(), free_energy.tracker.mean.clone(), *gradients))
    return found


@pytest.mark.parametrize("precision", ["auto", 0.7])
@pytest.mark.parametrize("labels", [True, False])
def test_a_tracked_step(labels, precision, spot):
    """Loss, gradients and the step learnt, batch by batch, against the layers in float64; the first batch is theirs.

    The step is a ratio of differences of F, each rounded: like the layers' own in the same dtype it is off by that.
    """
    device, dtype = spot
    torch.manual_seed(0)
    model = network((6, 20, 20, 4)).to(device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    batches = [[t.to(device) for t in batch(33, 6, 4, labels)] for _ in range(4)]
    batches = [(x.to(dtype), y if labels else y.to(dtype)) for x, y in batches]
    doubles = [(x.double(), y if labels else y.double()) for x, y in batches]
    options = {"precision": precision, "displacement": 0.3}
    ours, plain = (train(pc.FreeEnergy(model, **options), batches, one) for one in (True, False))
    truth = train(pc.FreeEnergy(copy.deepcopy(model).double(), **options), doubles, False)
    if dtype == torch.bfloat16:  # Newton's step
        assert all(float(step) == 1.0 for _, step, *_ in (*ours, *plain))
        return
    steps = [float(step) for _, step, *_ in truth]
    assert len(set(steps)) == 4
    assert min(steps) < 0.9
    few = 64 * torch.finfo(dtype).eps
    for a, b, exact in zip(ours, plain, truth):
        for own, apart, t in zip(a, b, exact):
            scale = t.abs().max()
            assert (own.double() - t).abs().max() <= 2 * (apart.double() - t).abs().max() + few * scale


def launches(monkeypatch) -> list[dict]:
    """The options of every launch from here on."""
    seen, run = [], chain.chain_gradient
    monkeypatch.setattr(chain, "chain_gradient", lambda *a, **o: seen.append(o) or run(*a, **o))
    return seen


def test_the_first_batch_of_a_tracked_step_goes_to_the_layers(monkeypatch):
    """It is corrected by one forward pass more; the others are one launch, in evaluation too, which learns nothing."""
    seen = launches(monkeypatch)
    free_energy = pc.FreeEnergy(network((6, 9, 4)))
    with dispatch.use_chain(True):
        free_energy.eval()
        free_energy(*batch(5, 6, 4))
        free_energy.train()
        free_energy(*batch(5, 6, 4))
        assert not seen
        step = free_energy.tracker.mean.clone()
        assert torch.isfinite(step)
        free_energy(*batch(5, 6, 4))
        assert len(seen) == 1
        assert seen[0]["tracked"].data_ptr() == free_energy.tracker.mean.data_ptr()
        after = free_energy.tracker.mean.clone()
        assert after != step
        free_energy.eval()
        free_energy(*batch(5, 6, 4))
        with torch.no_grad():
            free_energy.train()(*batch(5, 6, 4))
        assert len(seen) == 3
        assert free_energy.tracker.mean == after


def test_held_batches_of_a_tracked_step_count_as_one():
    batches = [batch(5, 6, 4) for _ in range(3)]
    found = []
    for one in (True, False):
        torch.manual_seed(0)
        free_energy = pc.FreeEnergy(network((6, 9, 9, 4)))
        with dispatch.use_chain(one):
            free_energy(*batches[0])
            before = free_energy.tracker.mean.clone()
            with free_energy.tracker.hold():
                for x, y in batches[1:]:
                    free_energy(x, y)
                assert free_energy.tracker.mean == before
            assert free_energy.tracker.mean != before
        found.append(free_energy.tracker.mean)
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


def test_a_tracked_step_that_is_no_number():
    """As a checkpoint may hold it: the first step is then the one without a history."""
    x, y = batch(5, 6, 4)
    model, losses = network((6, 9, 4)), []
    for mean in (float("nan"), float("inf"), 0.25):
        free_energy = pc.FreeEnergy(model, displacement=0.3)
        free_energy.tracker.begun = True
        free_energy.tracker.mean.fill_(mean)
        with dispatch.use_chain(True):
            losses.append(free_energy(x, y).detach())
    assert losses[0] == losses[1] == losses[2]


def test_a_tracked_step_in_bfloat16_is_newtons(monkeypatch):
    """From the first batch on: F is too coarse there to correct it."""
    seen = []

    def launch(x, *_, **options):
        seen.append(options)
        f = torch.ones(len(x))
        return f, torch.ones(2, len(x)), [x, x.new_zeros(5, 9)], [x.new_zeros(5, 9), x.new_zeros(5, 4)]

    monkeypatch.setattr(chain, "chain_gradient", launch)
    free_energy = pc.FreeEnergy(network((6, 9, 4)).bfloat16())
    x, y = batch(5, 6, 4)
    with dispatch.use_chain(True):
        for _ in range(2):
            free_energy(x.bfloat16(), y)
    assert [(o["step"], o["tracked"], o["guards"]) for o in seen] == [(1.0, None, False)] * 2
    assert free_energy.tracker.mean == 1.0
    assert free_energy.tracker.begun


def test_autocast_goes_to_the_layers(monkeypatch):
    monkeypatch.setattr(chain, "chain_gradient", lambda *_, **__: pytest.fail("one launch"))
    with dispatch.use_chain(True), torch.autocast("cpu"):
        pc.FreeEnergy(network((6, 9, 4)), steps=3)(*batch(5, 6, 4))


@pytest.fixture
def tuner(monkeypatch):
    """The module of ``bench/tune_chain.py``."""
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(str(bench))
    spec = importlib.util.spec_from_file_location("tune_chain", bench / "tune_chain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tuner(tuner, monkeypatch, tmp_path, capsys):
    """It refuses without a GPU; writes the ratio to the faster of the layers' two; and nothing if a result differs."""
    import bench_kernels

    table = tmp_path / "tuned.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuner.main(["--out", str(table)]) == 2
    assert capsys.readouterr().err.startswith("no GPU: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(tuner, "SIZES", [(32, 64, 2)])
    ways = {name: partial(torch.ones, 2, 1) for name in ("launch", "layers", "graph")}
    times = dict(zip(map(id, ways.values()), (6.0, 9.0, 3.0)))
    monkeypatch.setattr(tuner, "steps", lambda *_: ways)
    monkeypatch.setattr(bench_kernels, "seconds", lambda way, _: times[id(way)])
    assert tuner.main(["--out", str(table)]) == 0
    assert json.loads(table.read_text()) == {"chain": {"NVIDIA H100": {"float32": [[32, 64, 2, 0.5]]}}}
    before = table.read_text()
    ways["graph"] = partial(torch.full, (2, 1), float("nan"))
    assert tuner.main(["--out", str(table)]) == 1
    assert table.read_text() == before


def test_tuner_times_the_same_step_each_way(tuner):
    ways = tuner.steps(17, 16, 3, torch.float32, "cpu")
    assert not tuner.differs(ways["launch"](), ways["layers"]())


def arguments(**changes):
    given = {
        "x": torch.zeros(3, 4),
        "target": torch.zeros(3, dtype=torch.int64),
        "weight_of_item": torch.ones(()),
        "weights": [torch.zeros(5, 4), torch.zeros(2, 5)],
        "biases": [None, torch.zeros(2)],
        "activations": ["tanh"],
    }
    rest = {
        "steps": 2,
        "step": 0.25,
        "guards": True,
        "precision": None,
        "displacement": 0.003,
        "trust": 0.3,
        "least": 1e-3,
    }
    return {**given, **rest, "ignore_index": -100, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": [torch.zeros(5, 4)]}, "at least two layers"),
        ({"activations": ["sine"]}, "activation 'sine'"),
        ({"x": torch.zeros(4)}, "x has 1 dimensions"),
        ({"weights": [torch.zeros(5, 4), torch.zeros(2, 6)]}, "weight has shape"),
        ({"weights": [torch.zeros(4, 5).t(), torch.zeros(2, 5)]}, "contiguous"),
        ({"biases": [torch.zeros(4), None]}, "bias has shape"),
        ({"target": torch.zeros(3, 3)}, "target has shape"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, "labels have shape"),
        ({"weight_of_item": torch.ones(2)}, "weight_of_item has shape"),
        ({"tracked": torch.ones(1)}, "tracked has shape"),
    ],
)
def test_wrong_arguments(changes, words):
    with pytest.raises(ValueError, match=words):
        chain.chain_gradient(**arguments(**changes))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=ON_GPU)])
def test_no_launch_waits_for_the_gpu(dtype):
    """And every step gives the same bits."""
    model = network((64, 128, 128, 10)).to("cuda", dtype)
    x, y = (t.cuda() for t in batch(300, 64, 10))
    free_energy = pc.FreeEnergy(model, steps=3)

    def step():
        model.zero_grad()
        loss = free_energy(x, y)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    with dispatch.use_chain(True):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            once = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, once, step()))
    assert math.isfinite(once[0])
