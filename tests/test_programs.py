"""Programs as people bring them: what `convert` and `FreeEnergy` make of them, and what they say where they cannot."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pc_triton as pc


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def trains(model, x, y, **options) -> pc.FreeEnergy:
    """T = 1 is backpropagation, T = 2 moves states, and both leave a gradient in every parameter that has one."""
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    pc.FreeEnergy(model, steps=1, **options)(x, y).backward()
    for p, grad in zip(model.parameters(), wanted):
        close(p.grad, grad)
    model.zero_grad()
    free_energy = pc.FreeEnergy(model, **options)
    free_energy(x, y).backward()
    return free_energy


def learns(free_energy, x, y, own_loss) -> set[str]:
    """Two training steps: backpropagation's gradients at T = 1, others at T = 2. Returns the names of the free nodes.

    own_loss: what backpropagation would train the model by, of its arguments and y.
    """
    model = free_energy.model
    learned = [p for p in model.parameters() if p.requires_grad]
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.Adam(learned, 0.01)
    plain = pc.FreeEnergy(model, steps=1, logits=free_energy.logits)
    for _ in range(2):
        wanted = torch.autograd.grad(own_loss(model), learned, materialize_grads=True)
        for loss in (free_energy, plain):
            optimizer.zero_grad()
            loss(x, y).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learned]
            if loss is free_energy:
                assert not all(torch.equal(a, b) for a, b in zip(grads, wanted))
        for grad, truth in zip(grads, wanted):
            close(grad, truth)
        before = [p.detach().clone() for p in learned]
        optimizer.step()
        for p, old, grad in zip(learned, before, wanted):
            assert torch.equal(p, old) == (not grad.any())
    assert all(p.grad is None and torch.equal(p, old) for p, old in frozen)
    return set(free_energy.infer(x, y).states)


class Attend(nn.Module):
    """Attention by a module, with a head."""

    def __init__(self, change=lambda attn: None) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        change(self.attn)

    def forward(self, x):
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


def replace_forward(module: nn.Module) -> None:
    """As accelerate's hooks do: the instance gets a forward of its own."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


CHANGED = {
    "weight_norm": lambda attn: parametrizations.weight_norm(attn.out_proj),
    "spectral_norm": lambda attn: parametrizations.spectral_norm(attn.out_proj),
    "old weight_norm": lambda attn: nn.utils.weight_norm(attn.out_proj),
    "in_proj": lambda attn: parametrizations.weight_norm(attn, "in_proj_weight"),
    "forward": replace_forward,
    "another out_proj": lambda attn: setattr(attn, "out_proj", nn.Linear(8, 8)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:no free value node")
@pytest.mark.parametrize("how", CHANGED)
def test_attention_that_another_library_changed(how):
    """It gets its nodes, or is left by name; either way it is the model that it was."""
    torch.manual_seed(0)
    model, x, y = Attend(CHANGED[how]).eval(), torch.randn(3, 4, 8), torch.randint(3, (3, 4))
    truth = model(x)
    _, changes = pc.convert(model)
    close(model(x), truth)
    free_energy = trains(model, x, y)
    states = set(free_energy.infer(x, y).states)
    gets_nodes = how in ("weight_norm", "spectral_norm", "old weight_norm")
    assert changes["attn"].startswith("MultiheadAttention ->" if gets_nodes else "left as it is: ")
    assert {"attn", "attn.out_proj"} & states == ({"attn", "attn.out_proj"} if gets_nodes else set())


def test_attention_may_be_changed_after_it_was_converted():
    """What the table says of a parametrized in_proj_weight works."""
    model, x, y = Attend(), torch.randn(3, 4, 8), torch.randint(3, (3, 4))
    pc.convert(model)
    parametrizations.weight_norm(model.attn, "in_proj_weight")
    parametrizations.weight_norm(model.attn.out_proj)
    assert {"attn", "attn.out_proj"} <= set(trains(model, x, y).infer(x, y).states)


LAYERS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
    "forward": lambda layer: replace_forward(layer) or layer,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", LAYERS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_layers_that_another_library_changed(kind, how):
    """They have a node, and stay what they were: parameters, keys and outputs."""
    from torch.nn.utils import prune  # noqa: F401

    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if kind == "linear" else nn.Conv1d(4, 6, 1)
    ends = [nn.Flatten(), nn.Linear(24 if kind == "linear" else 48, 3)]
    model, x, y = nn.Sequential(LAYERS[how](layer), nn.Tanh(), *ends).eval(), torch.randn(2, 4, 8), torch.tensor([0, 2])
    keys, truth = list(model.state_dict()), model(x)
    _, changes = pc.convert(model)
    assert "->" in changes["0"]
    assert list(model.state_dict()) == keys
    close(model(x), truth)
    assert set(trains(model, x, y).infer(x, y).states) == {"0"}
    if how in ("weight_norm", "orthogonal"):
        parametrize.remove_parametrizations(model[0], "weight")
        close(model(x), truth)


def test_a_layer_without_parameters_yet():
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3))
    _, changes = pc.convert(model)
    assert changes["0"].startswith("left as it is: it has no parameters yet")
    model(torch.randn(2, 4))
    assert pc.convert(model)[1]["0"] == "Linear -> pc.Linear"


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """A subclass, whose fused path would pass over the nodes within it."""


def test_no_fused_path_in_subclasses():
    torch.manual_seed(0)
    layer = OwnEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    model, x = nn.Sequential(layer, nn.Linear(8, 3)), torch.randn(3, 4, 8)
    pc.convert(model)
    with torch.no_grad():
        states = pc.FreeEnergy(model).infer(x, torch.randint(3, (3, 4))).states
    assert set(states) == {"0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.linear2"}


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), Attend], ids=["mlp", "mha"])
def test_twice_is_once(make):
    """As a notebook's cell that is run again."""
    model, first = pc.convert(make())
    nodes = list(pc.FreeEnergy(model)._names.values())
    again, second = pc.convert(model)
    assert again is model
    assert second.keys() == first.keys()
    assert set(second.values()) == {"has its node already"}
    assert list(pc.FreeEnergy(model)._names.values()) == nodes
    model.added = nn.Linear(3, 2)
    assert pc.convert(model)[1]["added"] == "Linear -> pc.Linear"
    assert pc.convert(pc.Linear(2, 2))[1] == {"": "has its node already"}


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on what ``take`` takes of it, after a node of one's own or without."""

    def __init__(self, recurrent=nn.GRU, take=lambda out: out[0], node: bool = False) -> None:
        super().__init__()
        self.rnn, self.head = recurrent(8, 6, batch_first=True), nn.Linear(6, 3)
        self.node, self.take = pc.Gaussian() if node else nn.Identity(), take

    def forward(self, x):
        return self.head(self.node(self.take(self.rnn(x))))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("last", [False, True], ids=["sequence", "last state"])
def test_the_advice_for_a_recurrent_layer_works(kind, last):
    def take(out):
        states = out[1][0] if kind is nn.LSTM else out[1]
        return states[-1] if last else out[0]

    advice = pc.convert(Recurrent(kind))[1]["rnn"]
    assert "self.node = pc.Gaussian()" in advice
    assert "batch_first=True" in advice
    x, y = torch.randn(2, 5, 8), torch.randint(3, (2,) if last else (2, 5))
    model, _ = pc.convert(Recurrent(kind, take, node=True))
    assert set(pc.FreeEnergy(model).infer(x, y).states) == {"node"}


def test_an_attribute_called_node_is_not_overwritten_and_not_passed_over():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1), nn.Linear(4, 3))
    model[0].node, model[1].node = "gpu-3", nn.Identity()
    model.node = "of a container, which needs none"
    _, changes = pc.convert(model)
    assert model[0].node == "gpu-3"
    assert "an attribute `node` of its own" in changes["0"]
    assert "an attribute `node` of its own" in changes["1"]
    assert changes["2"] == "Linear -> pc.Linear"
    assert "" not in changes


class Adapter(nn.Module):
    """What PEFT makes of a layer: the layer, and a product of two small ones beside it."""

    def __init__(self, base, down, up) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Scale(nn.Module):
    """As PEFT's IA3: its own mark of an adapter, and no lora_A."""

    adapter_layer_names = ("scale",)

    def __init__(self, base) -> None:
        super().__init__()
        self.base_layer, self.scale = base, nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.base_layer(x) * self.scale


class OwnLinear(nn.Linear):
    """Stands for the quantized layers that adapters wrap."""


ADAPTERS = {
    "linear": lambda: Adapter(nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)),
    "subclass": lambda: Adapter(OwnLinear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), Adapter(nn.Conv1d(1, 1, 3, 1, 1), nn.Conv1d(1, 2, 1), nn.Conv1d(2, 1, 1)), nn.Flatten()
    ),
    "scaled": lambda: Scale(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_layer_is_one_prediction(kind):
    """One node on what the whole adapter returns, and none within it."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(ADAPTERS[kind](), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 8), torch.arange(4) % 3
    truth = model(x)
    _, changes = pc.convert(model)
    close(model(x), truth)
    name = "0.1" if kind == "convolution" else "0"
    assert set(changes) == {name, "2"}
    assert set(trains(model, x, y).infer(x, y).states) == {name}
    assert pc.convert(model)[1].keys() == changes.keys()
    assert changes.share == 1.0


def test_adapters_that_come_after_convert_are_left_by_name():
    layer, _ = pc.convert(nn.Linear(8, 8))
    model = nn.Sequential(Adapter(layer, nn.Linear(8, 2), nn.Linear(2, 8)), nn.Linear(8, 3))
    _, changes = pc.convert(model)
    assert set(changes) == {"0", "1"}
    assert "convert after the adapters are there" in changes["0"]


ACTIVATIONS = [nn.ReLU(True), nn.SiLU(True), nn.Hardswish(True), nn.LeakyReLU(inplace=True), nn.Dropout(0.0, True)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(2, 2, 1)], ids=["linear", "convolution"])
def test_activations_in_place_are_switched_off(layer, activation):
    model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(activation), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(4, 2, 8), torch.arange(4) % 3
    truth = model(x.clone())
    _, changes = pc.convert(model)
    assert changes["1"].startswith("inplace switched off")
    close(model(x), truth)
    pc.FreeEnergy(model)(x, y).backward()


def test_nothing_is_switched_off_where_nothing_is_converted():
    model = nn.Sequential(nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="nothing to convert"):
        pc.convert(model)
    assert model[0].inplace


HIDDEN = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Functional(nn.Module):
    """Attention as nanoGPT, timm and diffusers write it, in several ways, and a layer that is never visited."""

    def __init__(self, how: str, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.spare, self.head = (nn.Linear(8, n) for n in (24, 8, 5, 3))
        self.how, self.heads = how, heads
        if how == "module":
            self.weigh = nn.Softmax(-1)

    def weights(self, mu):
        if self.how == "helper":
            return helper(mu)
        if self.how == "module":
            return self.weigh(mu)
        return torch.softmax(mu, dim=3) if self.how == "torch" else F.softmax(mu, -1, dtype=torch.float32)

    def attention(self, q, k, v):
        visible, bias = ~HIDDEN, torch.zeros(5, 5).masked_fill(HIDDEN, -torch.inf)
        if self.how == "sdpa, causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.how == "sdpa, bool":
            return F.scaled_dot_product_attention(q, k, v, visible)
        if self.how == "sdpa, float":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), 1, 5, 5), scale=0.5)
        if self.how == "sdpa, no heads":
            return F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias).view_as(q)
        mu = q @ k.mT * (0.5 if self.how == "module, scaled" else 4**-0.5)
        hidden = -1e9 if self.how == "finite" else -torch.inf
        return self.weights(mu + bias if self.how == "added" else mu.masked_fill(HIDDEN, hidden)) @ v

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = self.attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.proj(out))


def helper(mu):
    return mu.softmax(-1)


class Deep(nn.Module):
    """Its softmax lies two functions deep, where only a run finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(deep(self.a(x)))


def deep(mu):
    return helper(mu)


class WithModule(nn.Module):
    """A softmax that is a module has a node, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.softmax = nn.Linear(8, 8), nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(self.layer(x))


class Mixed(nn.Module):
    """A softmax of parameters, over another axis, of fewer rows than samples, without a gradient: no node is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(8, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        mix = F.softmax(self.mix, -1).sum() + F.softmax(self.mix[:1], -1).sum() + F.softmax(self.mix[0], -1).sum()
        h = self.a(x)
        with torch.no_grad():
            self.confidence = F.softmax(h, -1)
        return self.b(mix * F.softmax(h, 1))


WAYS = ["sdpa, causal", "sdpa, bool", "sdpa, float", "sdpa, no heads", "function", "helper", "torch", "added", "finite"]


@pytest.mark.parametrize("order", ["error", "sweep"])
@pytest.mark.parametrize("how", WAYS)
def test_attention_by_functions_has_its_node(how, order):
    """It infers as the same network does whose softmax is a module, and is the same network outside inference."""
    torch.manual_seed(0)
    model, wanted = Functional(how), Functional("module")
    wanted.load_state_dict(model.state_dict())
    x, y = torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    truth = model(x)
    _, changes = pc.convert(model)
    pc.convert(wanted)
    assert changes[""].endswith("in Functional -> pc.Categorical")
    close(model(x), truth)
    close(copy.deepcopy(model)(x), truth)
    trains(model, x, y)
    options = {"order": order, "steps": 4}
    a, b = (pc.FreeEnergy(m, **options).infer(x, y) for m in (model, wanted))
    close(a.free_energy, b.free_energy)
    close(a.output, b.output)
    (name,) = a.states.keys() - b.states.keys()
    close(a.states[name].reshape(2, 2, 5, 5), b.states["weigh"])
    model.zero_grad()
    for m in (model, wanted):
        pc.FreeEnergy(m, **options)(x, y).backward()
    for p, q in zip(model.parameters(), wanted.parameters()):
        close(p.grad, q.grad)
    assert pc.convert(model)[1][""] == "has its node already"


def test_functions_that_are_no_node():
    model, x, y = nn.Sequential(Mixed()), torch.randn(4, 5, 8), torch.randint(3, (4, 5))
    pc.convert(model)
    assert set(trains(model, x, y).infer(x, y).states) == {"0.a"}
    nested = nn.Sequential(WithModule(), nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    _, changes = pc.convert(nested)
    assert "0" not in changes
    assert changes["0.softmax"] == "Softmax -> pc.Categorical"


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_functional_attention_in_a_checkpoint_and_in_a_compiled_model():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(Functional("function"), nn.Linear(3, 3)), torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    pc.convert(model)
    pc.FreeEnergy(model)(x, y).backward()
    wanted = [p.grad for p in model.parameters()]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            from torch.utils.checkpoint import checkpoint

            h = checkpoint(model[0], x, use_reentrant=False, context_fn=pc.checkpoint_contexts)
            return model[1](h)

    for other in (Checkpointed(), torch.compile(model, backend="eager")):
        model.zero_grad()
        pc.FreeEnergy(other)(x, y).backward()
        for p, grad in zip(model.parameters(), wanted):
            assert (p.grad is None) == (grad is None)
            if grad is not None:
                close(p.grad, grad)


@pytest.mark.parametrize("how", ["sdpa, causal", "function"])
def test_a_first_batch_completes_the_table(how):
    """Nodes that the forward never visits, and the output's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.1), Functional(how))
    _, changes = pc.convert(model)
    before, x, y = dict(changes), torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    assert changes.share == 1.0
    random = torch.get_rng_state()
    assert changes.visit(pc.FreeEnergy(model), x, y) is changes
    assert torch.equal(random, torch.get_rng_state())
    assert changes == before
    assert changes.visits == {
        "1": "visited", "1.qkv": "visited", "1.proj": "visited", "1.spare": "not visited", "1.head": "the output"
    }  # fmt: skip
    assert changes.share == pytest.approx(32 / 40)  # of outputs, each with 9 parameters
    shown = str(changes).splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == list(changes)
    assert shown[-1].startswith("80.0% of the parameters")


def test_functions_that_only_a_run_finds_are_named():
    _, changes = pc.convert(model := nn.Sequential(Deep()))
    assert "0" not in changes
    changes.visit(pc.FreeEnergy(model), torch.randn(2, 8), torch.tensor([0, 1]))
    assert changes["0"].startswith("left as it is: its forward calls softmax")
    assert changes.visits == {"0.a": "visited", "0.b": "the output"}


def test_the_table_says_where_nothing_is_left_for_inference():
    _, changes = pc.convert(model := Recurrent())
    assert "backpropagation" not in str(changes)
    assert f"{7 * 3 / sum(p.numel() for p in model.parameters()):.1%} of the parameters" in str(changes)
    changes.visit(pc.FreeEnergy(model), torch.randn(2, 5, 8), torch.randint(3, (2, 5)))
    assert "0.0% of the parameters" in str(changes)
    assert "training is backpropagation" in str(changes)


def test_attention_and_its_projection_count_as_one_entry_of_the_table():
    _, changes = pc.convert(model := Attend())
    assert changes.share == 1.0
    changes.visit(pc.FreeEnergy(model), torch.randn(2, 4, 8), torch.randint(3, (2, 4)))
    assert changes.visits == {"attn": "visited", "head": "the output"}


class Constant(nn.Module):
    """A node that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = pc.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        self.a(x)
        return self.b(x)


WITHOUT = {
    "recurrent": lambda: pc.convert(nn.Sequential(Recurrent(), nn.Identity()))[0],
    "the output alone": lambda: pc.Linear(8, 3),
    "unused": Constant,
}


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous", "incremental"])
@pytest.mark.parametrize("kind", WITHOUT)
def test_a_model_in_which_nothing_moves_is_told_so_once(kind, order, recwarn):
    torch.manual_seed(0)
    model, x, y = WITHOUT[kind](), torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    free_energy = pc.FreeEnergy(model, order=order)
    for _ in range(2):
        for loss in free_energy.incremental(x, y) if order == "incremental" else [free_energy(x, y)]:
            loss.backward()
    report = free_energy.report(x, y)
    (warning,) = [str(w.message) for w in recwarn if "no free value node" in str(w.message)]
    assert "pc.Gaussian() after a hidden layer" in warning
    assert report.settled == 0
    assert "visits no free value node" in str(report)


@pytest.mark.parametrize("options", [{}, {"order": "sweep"}, {"order": "incremental"}, {"precision": 1.0}])
def test_no_such_warning_where_something_moves_or_nothing_should(options, recwarn):
    model, x, y = Attend(), torch.randn(2, 5, 8), torch.randint(3, (2, 5))
    pc.convert(model)
    free_energy = pc.FreeEnergy(model, **options)
    for _ in free_energy.incremental(x, y) if "incremental" in options.values() else [free_energy(x, y)]:
        pass
    free_energy.infer(x)
    pc.FreeEnergy(pc.Linear(8, 3)).infer(x)
    pc.FreeEnergy(pc.Linear(8, 3), steps=1)(x, y).backward()
    assert not [w for w in recwarn if "value node" in str(w.message)]


@dataclasses.dataclass
class Answer:
    """As transformers' outputs, but no mapping."""

    logits: torch.Tensor
    other: torch.Tensor | None = None


class Loss(NamedTuple):
    """As a tuple, with names."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returns(nn.Module):
    """A network that returns more than a tensor."""

    def __init__(self, form) -> None:
        super().__init__()
        self.a, self.b, self.form = pc.Linear(8, 6), pc.Linear(6, 3), form

    def forward(self, x):
        return self.form(self.b(self.a(x).tanh()))


FORMS = {
    "tuple": (lambda out: (out, None), lambda out: out[0]),
    "loss first": (lambda out: [out.mean(), {"scores": out}], lambda out: out[1]["scores"]),
    "dict": (lambda out: {"scores": out}, lambda out: out["scores"]),
    "squeezed": (lambda out: (out[..., None],), lambda out: out[0].squeeze(-1)),
    "logits of a dataclass": (Answer, None),
    "logits of a named tuple": (Loss, None),
    "logits of a mapping": (lambda out: {"logits": out, "loss": None}, None),
}


@pytest.mark.parametrize("order", ["error", "sweep"])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_model_returns(form, order):
    """The tensor that is clamped, found by the user's function; the node that emits it is the output and not free."""
    make, logits = FORMS[form]
    torch.manual_seed(0)
    model, plain, x, y = Returns(make), Returns(lambda out: out), torch.randn(4, 8), torch.arange(4) % 3
    plain.load_state_dict(model.state_dict())
    free_energy, wanted = pc.FreeEnergy(model, logits=logits, order=order), pc.FreeEnergy(plain, order=order)
    loss, truth = free_energy(x, y), wanted(x, y)
    close(loss, truth)
    loss.backward()
    truth.backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        close(p.grad, q.grad)
    settled = free_energy.infer(x, y)
    close(settled.output, wanted.infer(x, y).output)
    assert set(settled.states) == {"a"}
    if logits is not None and form != "squeezed":
        with pytest.raises(TypeError, match=r"FreeEnergy\(model, logits=lambda out: out\[0\]\)"):
            pc.FreeEnergy(model)(x, y)


class Spans(nn.Module):
    """As a head that answers questions: where the answer starts and ends in ``[B, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = pc.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        start, end = self.b(self.a(x).tanh()).split(1, -1)
        return start.squeeze(-1), end.squeeze(-1)


def test_two_outputs_are_clamped_as_one_tensor():
    torch.manual_seed(0)
    model, x, y = Spans(), torch.randn(3, 5, 8), torch.randint(5, (3, 2))
    free_energy = pc.FreeEnergy(model, logits=lambda out: torch.stack(out, 1), steps=1)
    close(free_energy(x, y), sum(F.cross_entropy(logits, y[:, i]) for i, logits in enumerate(model(x))) / 2)
    model = pc.FreeEnergy(model, logits=lambda out: torch.stack(out, 1))
    assert set(model.infer(x, y).states) == {"a"}


def test_a_function_of_the_output_is_not_left_out_by_a_faster_path():
    """A chain of layers in one launch, and a step that is one graph."""
    from pc_triton.chain import _plain

    model = nn.Sequential(pc.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    free_energy = pc.FreeEnergy(model, step=0.25)
    assert _plain(free_energy, free_energy.rules, torch.float32)
    free_energy = pc.FreeEnergy(model, step=0.25, logits=lambda out: 2 * out)
    assert not _plain(free_energy, free_energy.rules, torch.float32)
    before = free_energy.settings
    free_energy.logits = None
    assert free_energy.settings != before


class Masked(nn.Module):
    """Its mask comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, mask, x):
        return self.head(x + self.attn(x, x, x, attn_mask=mask, need_weights=False)[0])


MASKS = {
    "bool": HIDDEN,
    "float": torch.zeros(5, 5).masked_fill(HIDDEN, -torch.inf),
    "per head": HIDDEN.expand(6, 5, 5),
    "scalar": torch.tensor(0.5),
}


@pytest.mark.parametrize("given", ["tuple", "dict"])
@pytest.mark.parametrize("kind", MASKS)
def test_another_argument_before_the_samples(kind, given):
    torch.manual_seed(0)
    model, mask, x, y = Masked(), MASKS[kind], torch.randn(3, 5, 8), torch.randint(3, (3, 5))
    if kind == "scalar":
        model.forward = lambda mask, x: model.head(model.attn(x, x, x * mask, need_weights=False)[0])
    pc.convert(model)
    arguments = (mask, x) if given == "tuple" else {"mask": mask, "x": x}
    close(pc.FreeEnergy(model, steps=1)(arguments, y), F.cross_entropy(model(mask, x).flatten(0, 1), y.flatten()))
    assert pc.FreeEnergy(model).infer(arguments, y).free_energy.shape == (3,)
    if kind in ("bool", "float"):
        with pytest.raises(ValueError, match=r"x's first tensor|masks go after the data"):
            pc.FreeEnergy(model).infer(arguments)
    assert pc.FreeEnergy(model).infer({"x": x, "mask": mask}).free_energy.shape == (3,)


def test_y_of_another_length_than_x():
    model = nn.Sequential(pc.Linear(8, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"labels have shape \(2,\): logits \(4, 3\)"):
        pc.FreeEnergy(model)(torch.randn(4, 8), torch.tensor([0, 1]))


class TimeFirst(nn.Module):
    """Takes samples first, and turns them for a module of torch's, whose default has time first; ``self.inner``."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        sizes = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": batch_first}
        self.kind, self.turns, self.head = kind, not batch_first, nn.Linear(8, 3)
        if kind == "transformer":
            self.inner = nn.Transformer(8, 2, 1, 1, **sizes)
        elif kind == "encoder":
            self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **sizes), 2)
        elif kind == "decoder layer":
            self.inner = nn.TransformerDecoderLayer(8, 2, **sizes)
        else:
            self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        x = x.transpose(0, 1) if self.turns else x
        padding = PADDING if self.kind == "encoder" else None
        if self.kind == "transformer":
            out = self.inner(x, tgt=x.flip(2), tgt_mask=HIDDEN)
        elif self.kind == "encoder":
            out = self.inner(x, src_key_padding_mask=padding)
        elif self.kind == "decoder layer":
            out = self.inner(x, memory=x.flip(2), tgt_mask=HIDDEN)
        else:
            out = self.inner(x, x, value=x, attn_mask=HIDDEN)[0]
        return self.head(out.transpose(0, 1) if self.turns else out)


PADDING = torch.zeros(3, 5, dtype=torch.bool)
PADDING[1, 3:] = True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["transformer", "encoder", "decoder layer", "attention"])
def test_torch_s_default_of_time_first(kind):
    """Converted, it does what the same weights with ``batch_first=True`` do, and is the same module outside."""
    torch.manual_seed(0)
    model, wanted = TimeFirst(kind, False), TimeFirst(kind, True)
    wanted.load_state_dict(model.state_dict())
    x, y = torch.randn(3, 5, 8), torch.randint(3, (3, 5))
    truth = model(x)
    _, changes = pc.convert(model)
    pc.convert(wanted)
    assert "transposes within" in changes["inner"]
    assert sum("transposes within" in change for change in changes.values()) == 1
    for training in (True, False):
        close(model.train(training)(x), truth)
    close(copy.deepcopy(model)(x), truth)
    a, b = (pc.FreeEnergy(m).infer(x, y) for m in (model, wanted))
    assert list(a.states) == list(b.states)
    for name in a.states:
        close(a.states[name], b.states[name])
    close(a.free_energy, b.free_energy)
    trains(model, x, y)
    pc.convert(model)
    close(model(x), truth)


@pytest.mark.parametrize(
    "kind", [nn.Transformer, nn.TransformerEncoder, nn.MultiheadAttention], ids=lambda k: k.__name__
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_time_first_from_outside_is_refused_by_name(kind):
    """The model's own input has time first: no sample has a row of it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16)
            self.turned = kind(layer, 1) if kind is nn.TransformerEncoder else kind(8, 2)

        def forward(self, x):
            out = self.turned(*[x] * {nn.Transformer: 2, nn.TransformerEncoder: 1}.get(kind, 3))
            return out[0] if isinstance(out, tuple) else out

    model, _ = pc.convert(Net())
    with pytest.raises(ValueError, match=r"'turned' has batch_first=False and is given \(5, 3, 8\)"):
        pc.FreeEnergy(model)(torch.randn(5, 3, 8), torch.randn(5, 3, 8))


def test_one_sequence_without_samples_is_refused():
    model, _ = pc.convert(Attend())
    with pytest.raises(ValueError, match=r"query has shape \(5, 8\)"):
        pc.FreeEnergy(model)(torch.randn(5, 8), torch.randint(3, (5,)))


class NanoGPT(nn.Module):
    """As nanoGPT: tied weights, attention by a function with dropout, logits and loss in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.block, self.lm_head = (
            nn.Embedding(11, 8), nn.Embedding(6, 8), NanoBlock(), nn.Linear(8, 11, bias=False)
        )  # fmt: skip
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.block(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), 2, 0.1
        self.flash = hasattr(F, "scaled_dot_product_attention")

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(8, dim=2))
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            y = F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v
        return x + self.c_proj(y.transpose(1, 2).contiguous().flatten(2))


@pytest.mark.parametrize("training", [True, False])
def test_nano_gpt(training):
    torch.manual_seed(0)
    model, idx, targets = NanoGPT().train(training), torch.randint(11, (3, 6)), torch.randint(11, (3, 6))
    _, changes = pc.convert(model)
    free_energy = pc.FreeEnergy(model, logits=lambda out: out[0])
    changes.visit(free_energy, (idx, targets), targets)
    assert changes.visits == {
        "block": "visited", "block.c_attn": "visited", "block.c_proj": "visited", "lm_head": "the output"
    }  # fmt: skip
    torch.manual_seed(1)
    loss = pc.FreeEnergy(model, logits=lambda out: out[0], steps=1)((idx, targets), targets)
    if not training:
        close(loss, model(idx, targets)[1])
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = free_energy((idx, targets), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert free_energy.report((idx, targets), targets).settled > 0.5


def test_nano_gpt_learns_as_by_backpropagation():
    torch.manual_seed(0)
    model, idx, targets = NanoGPT(), torch.randint(11, (3, 6)), torch.randint(11, (3, 6))
    targets[1, 4:] = -1  # what nanoGPT leaves out of its loss
    model.block.dropout = 0.0
    pc.convert(model)
    free_energy = pc.FreeEnergy(model, logits=lambda out: out[0])
    y = targets.masked_fill(targets == -1, -100)
    nodes = learns(free_energy, (idx, targets), y, lambda model: model(idx, targets)[1])
    assert nodes == {"block", "block.c_attn", "block.c_proj"}
    assert model.wte.weight is model.lm_head.weight


class Patches(nn.Module):
    """As timm's PatchEmbed."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(1, 8, 4, 4), nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class FusedAttention(nn.Module):
    """As timm's Attention: q, k and v of one layer, norms on q and k, the function or its formula."""

    def __init__(self, fused_attn: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.fused_attn = 2, 4, 4**-0.5, fused_attn
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class Scaled(nn.Module):
    """As timm's LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.5 * torch.ones(8))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    """As timm's Block."""

    def __init__(self, fused_attn: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(8), FusedAttention(fused_attn), Scaled()
        self.norm2, self.ls2 = nn.LayerNorm(8), Scaled()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """As timm's VisionTransformer: patches, a class token, positions, and the head on the class token."""

    def __init__(self, fused_attn: bool) -> None:
        super().__init__()
        self.patch_embed, self.cls_token = Patches(), nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed, self.blocks = nn.Parameter(torch.randn(1, 5, 8)), nn.Sequential(ViTBlock(fused_attn))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize("fused_attn", [True, False])
def test_a_vision_transformer_learns_as_by_backpropagation(fused_attn):
    torch.manual_seed(0)
    model, x, y = ViT(fused_attn), torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    _, changes = pc.convert(model)
    nodes = learns(pc.FreeEnergy(model), x, y, lambda model: F.cross_entropy(model(x), y))
    block = ("attn", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    assert nodes == {"patch_embed.proj", *(f"blocks.0.{name}" for name in block)}
    assert set(changes) == {*nodes, "head"}


def tiny_gpt2(**options):
    hf = pytest.importorskip("transformers")
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 4}
    return hf, hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)


def test_adapters_in_a_model_of_transformers():
    """Of its own linear layer, and of the logits, which stay as they are."""
    hf, config = tiny_gpt2()
    model = hf.GPT2LMHeadModel(config)
    attn = model.transformer.h[0].attn
    attn.c_attn = Adapter(attn.c_attn, nn.Linear(16, 2, bias=False), nn.Linear(2, 48, bias=False))
    head = Adapter(model.lm_head, nn.Linear(16, 2, bias=False), nn.Linear(2, 32, bias=False))
    model.set_output_embeddings(head)
    _, changes = pc.convert(model)
    layer = "transformer.h.0"
    with_node = {f"{layer}.attn", *(f"{layer}.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))}
    assert set(changes) == {*with_node, "lm_head"}
    tokens = torch.randint(32, (3, 6))
    assert set(pc.FreeEnergy(model).infer(tokens, tokens.roll(-1, 1)).states) == with_node
    assert pc.convert(model)[1].keys() == changes.keys()
    attn.c_proj = Adapter(attn.c_proj, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False))
    _, changes = pc.convert(model)
    assert "convert after the adapters are there" in changes[f"{layer}.attn.c_proj"]
    assert f"{layer}.attn.c_proj.lora_A.default" not in changes


@pytest.mark.parametrize("whole", [False, True], ids=["frozen base", "all parameters"])
def test_adapters_in_a_model_of_transformers_learn_as_by_backpropagation(whole):
    """As PEFT has them: on attention, with a base that does not learn, and an up-projection that begins at zero."""
    hf, config = tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = hf.GPT2LMHeadModel(config).requires_grad_(whole)
    attn = model.transformer.h[0].attn
    attn.c_attn = Adapter(attn.c_attn, nn.Linear(16, 2, bias=False), nn.Linear(2, 48, bias=False))
    nn.init.zeros_(attn.c_attn.lora_B["default"].weight)
    pc.convert(model)
    tokens = torch.randint(32, (3, 6))
    tokens[1, 4:] = 31
    labels = tokens.masked_fill(tokens == 31, -100)
    y = F.pad(labels[:, 1:], (0, 1), value=-100)
    free_energy = pc.FreeEnergy(model)
    nodes = learns(free_energy, tokens, y, lambda model: model(tokens, labels=labels).loss)
    names = ("attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert nodes == {f"transformer.h.0.{name}" for name in names}


def test_a_head_of_transformers_that_answers_questions():
    hf, config = tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model, tokens, y = hf.GPT2ForQuestionAnswering(config), torch.randint(32, (3, 6)), torch.randint(6, (3, 2))
    pc.convert(model)
    spans = {"logits": lambda out: torch.stack([out.start_logits, out.end_logits], 1)}
    own = model(tokens, start_positions=y[:, 0], end_positions=y[:, 1]).loss
    close(pc.FreeEnergy(model, steps=1, **spans)(tokens, y), own)
    free_energy = pc.FreeEnergy(model, **spans)
    free_energy(tokens, y).backward()
    with pytest.raises(TypeError, match="logits=lambda"):
        pc.FreeEnergy(model)(tokens, y)
