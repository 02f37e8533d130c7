"""Programs as people bring them: what `convert` and `FreeEnergy` make of them, and what they say where they cannot."""

from __future__ import annotations

import copy

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


@pytest.mark.filterwarnings("ignore::FutureWarning")
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


class Functional(nn.Module):
    """Attention by functions, as nanoGPT, timm and diffusers write it, with a layer that the forward never visits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.spare, self.head = (nn.Linear(8, n) for n in (24, 8, 5, 3))
        self.how = how

    def weights(self, q, k):
        return F.softmax(q @ k.mT / 8**0.5, -1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "method":
            out = self.weights(q, k) @ v
        else:
            out = helper(q, k) @ v
        return self.head(x + self.proj(out))


def helper(q, k):
    return (q @ k.mT).softmax(-1)


class WithModule(nn.Module):
    """A softmax that is a module has a node, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.softmax = nn.Linear(8, 8), nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(self.layer(x))


def test_functions_in_the_place_of_a_node_are_named():
    model = nn.Sequential(Functional("sdpa"), WithModule())
    _, changes = pc.convert(model)
    assert "calls scaled_dot_product_attention" in changes["0"]
    assert "pc.Attention" in changes["0"]
    assert "1" not in changes
    assert changes["1.softmax"] == "Softmax -> pc.Categorical"


@pytest.mark.parametrize("how", ["sdpa", "method", "helper"])
def test_a_first_batch_completes_the_table(how):
    """Nodes that the forward never visits, the output's, and functions that only a run finds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.1), Functional(how))
    _, changes = pc.convert(model)
    before, x, y = dict(changes), torch.randn(2, 4, 8), torch.randint(3, (2, 4))
    assert changes.share == 1.0
    random = torch.get_rng_state()
    assert changes.visit(pc.FreeEnergy(model), x, y) is changes
    assert torch.equal(random, torch.get_rng_state())
    function = "scaled_dot_product_attention" if how == "sdpa" else "softmax"
    assert f"calls {function}," in changes["1"]
    assert changes == {**before, "1": changes["1"]}
    assert changes.visits == {
        "1.qkv": "visited", "1.proj": "visited", "1.spare": "not visited", "1.head": "the output"
    }  # fmt: skip
    assert changes.share == pytest.approx(32 / 40)  # of outputs, each with 9 parameters
    shown = str(changes).splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == list(changes)
    assert shown[-1].startswith("80.0% of the parameters")


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
