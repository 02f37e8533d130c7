"""`convert`: a plain model gets value nodes, and stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pc_triton as pc

CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
ORDERS = ["error", "sweep", "simultaneous"]


class Attend(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``, as users write it."""

    def __init__(self, attn_mask=None, key_padding_mask=None, batch_first: bool = True) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 3)
        self.masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}

    def forward(self, x):
        return self.head(x + self.attn(x, x, x, need_weights=False, **self.masks)[0])


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def encoder(layers: int = 2, norm_first: bool = False):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)


def decoder():
    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x, x.flip(1), tgt_mask=CAUSAL)

    return Decode()


class Transformer(nn.Module):
    """Encoder and decoder: ``nn.Transformer``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layers(x, x.flip(1), tgt_mask=CAUSAL)


class ViT(nn.Module):
    """Patches by a convolution, a token for the class, an encoder, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = nn.Conv2d(1, 8, 2, 2), encoder(1, True), nn.Linear(8, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(9, 8))

    def forward(self, x):
        x = self.patches(x[:, None]).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.encoder(x + self.positions)[:, 0])


def convolutions():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.ConvTranspose1d(6, 2, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(14, 3),
    )  # fmt: skip


FLOAT_MASK = torch.zeros(4, 4).masked_fill(CAUSAL, -torch.inf)
MODELS = {
    "mlp": mlp,
    "attention": Attend,
    "attention, causal": lambda: Attend(CAUSAL),
    "attention, float mask": lambda: Attend(FLOAT_MASK + 0.5 * torch.randn(4, 4)),
    "attention, mask per head": lambda: Attend(CAUSAL.expand(6, 4, 4)),
    "attention, padding": lambda: Attend(key_padding_mask=PADDING),
    "attention, both": lambda: Attend(CAUSAL, PADDING),
    "encoder layer": lambda: encoder(1).layers[0],
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(2, True),
    "decoder layer": decoder,
    "transformer": Transformer,
    "vit": ViT,
    "convolutions": convolutions,
    "softmax": lambda: nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 3)),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5)
    x = torch.randn(3, 4, 8)
    return model, x, torch.randn_like(model(x))


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_state_dict_stay(name, training):
    """Outside inference, and in it with the states at the prediction, where the gradient is backpropagation's."""
    model, x, y = make(name)
    model.train(training)
    plain = copy.deepcopy(model)
    converted, changes = pc.convert(model)
    assert converted is model
    assert any("->" in change for change in changes.values())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    truth = plain(x)
    close(model(x), truth)
    for order in ("error", "sweep"):
        close(pc.FreeEnergy(model, order=order, precision=1.0).infer(x).output, truth)
    pc.FreeEnergy(model, steps=1, output=pc.Gaussian())(x, y).backward()
    (((truth - y) ** 2).sum() / 2 / len(x)).backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        scale = max(1.0, float(b.grad.abs().max()))
        close(a.grad / scale, b.grad / scale)
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["mlp", "attention, both", "encoder", "softmax"])
def test_a_converted_model_trains(name, order):
    model, x, y = make(name)
    pc.convert(model)
    free_energy = pc.FreeEnergy(model, order=order, steps=3)
    if order == "error":
        energies = free_energy.report(x, y).free_energies
        assert energies[-1] < energies[0]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = free_energy(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", [CAUSAL, FLOAT_MASK], ids=["bool", "float"])
def test_masked_keys_stay_masked_when_states_move(order, mask):
    """A converted attention with a causal mask settles where `Attention` with ``causal=True`` does."""
    torch.manual_seed(0)
    model = Attend(mask)
    pc.convert(model)
    ours = nn.Sequential(pc.Attention(8, 2, causal=True))
    ours[0].load_state_dict(model.attn.state_dict())

    class Ours(nn.Module):
        def forward(self, x):
            return model.head(x + ours(x))

    reference = Ours()
    reference.ours = ours
    reference.head = model.head
    x, y = torch.randn(3, 4, 8), torch.randn(3, 4, 3)
    options = {"order": order, "precision": 0.5, "steps": 5, "step": 0.3}
    a, b = (pc.FreeEnergy(m, **options).infer(x, y) for m in (model, reference))
    close(a.free_energy, b.free_energy)
    close(a.output, b.output)
    assert (a.states["attn"][:, :, CAUSAL] == 0).all()


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_returned(average):
    """``need_weights``, in inference and outside it; there they are the states' emissions."""

    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            out, self.weights = self.attn(x, x, x, average_attn_weights=average)
            return out + 0

    torch.manual_seed(0)
    model, x = Weights(), torch.randn(3, 4, 8)
    model(x)
    truth = model.weights.detach()
    pc.convert(model)
    model(x)
    close(model.weights.detach(), truth)
    settled = pc.FreeEnergy(model, order="sweep", precision=1.0).infer(x)
    close(model.weights.detach(), truth)
    states = settled.states["attn"]
    close(model.weights.detach(), states.mean(1) if average else states)


class Special(nn.Linear):
    """It may do anything in its forward."""


def test_what_was_changed():
    """Every module by its name, and what had to be left says why."""
    model = nn.ModuleDict(
        {
            "encoder": encoder(1),
            "odd": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
            "bias": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "soft": nn.Softmax(-1),
            "columns": nn.Softmax(1),
            "convolution": nn.Conv2d(1, 2, 3),
            "recurrent": nn.LSTM(2, 2),
            "special": Special(4, 4),
            "head": nn.Linear(8, 3),
            "logits": pc.Head(8, 3),
        }
    )
    _, changes = pc.convert(model)
    layer = "encoder.layers.0"
    left = {"odd", "bias", "columns", "recurrent", "special"}
    assert set(changes) == {
        layer, f"{layer}.self_attn", f"{layer}.linear1", f"{layer}.linear2", "soft", "convolution", "head", *left
    }  # fmt: skip
    assert {name for name, change in changes.items() if change.startswith("left as it is: ")} == left
    assert changes["convolution"] == "Conv2d -> Conv2d, pc.Gaussian"
    assert changes["columns"].endswith("not dim=1")
    assert "LSTM" in changes["recurrent"]
    assert "Special" in changes["special"]
    assert changes["head"] == "Linear -> pc.Linear"
    assert changes["soft"] == "Softmax -> pc.Categorical"
    assert changes[f"{layer}.self_attn"] == "MultiheadAttention -> pc.MultiheadAttention"
    assert type(model["head"]) is pc.Linear
    assert type(model["odd"]) is type(model["bias"]) is nn.MultiheadAttention
    assert type(model["columns"]) is nn.Softmax
    assert type(model["special"]) is Special
    names = set(pc.FreeEnergy(model)._names.values()) - {"input"}
    assert {f"{layer}.self_attn.out_proj.node", "convolution.node"} <= names


def test_a_model_that_is_one_layer():
    layer, changes = pc.convert(nn.Linear(4, 2))
    assert type(layer) is pc.Linear
    assert changes == {"": "Linear -> pc.Linear"}


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.LSTM(2, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)],
    ids=["activation", "recurrent", "left"],
)
def test_nothing_to_convert(model):
    with pytest.raises(ValueError, match="nothing to convert"):
        pc.convert(model)


@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 8))])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_models_are_left_by_name(how):
    """Whole, or a part of a model, which stays what it was."""
    part = how(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"\(the model\): left as it is: torch\.jit has its forward"):
        pc.convert(part)
    model, x = nn.Sequential(part, nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(4, 8)
    truth = model(x)
    _, changes = pc.convert(model)
    assert set(changes) == {"0", "1", "2"}
    close(model(x), truth)
    assert set(pc.FreeEnergy(model).infer(x, torch.arange(4) % 3).states) == {"1"}


def test_no_module():
    with pytest.raises(TypeError, match="not function"):
        pc.convert(lambda x: x)


def test_attention_over_the_first_axis_is_refused_in_inference():
    """Where x itself has its samples along the second axis."""
    model = Attend(batch_first=False)
    x = torch.randn(4, 3, 8)
    truth = model(x)
    pc.convert(model)
    close(model(x), truth)
    with pytest.raises(ValueError, match="batch_first=True"):
        pc.FreeEnergy(model)(x, torch.zeros(4, 3, 3))
