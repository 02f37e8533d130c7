"""The layers: torch's own outside inference, with torch's own state dicts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton.models import Transformer

PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def seeded(make, *args, **options):
    torch.manual_seed(0)
    return make(*args, **options)


def attention(**options):
    """`Attention` and torch's own with the same weights."""
    ours = seeded(pc.Attention, 16, 4, **options)
    nn.init.normal_(ours.out_proj.weight)
    if ours.in_proj_bias is not None:
        nn.init.normal_(ours.in_proj_bias)
        nn.init.normal_(ours.out_proj.bias)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, bias=ours.in_proj_bias is not None)
    if ours.kv_heads == 4:
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def settled(model, x, **options):
    """The model's output in inference, with every state at its prediction, made by the node's own pass."""
    return pc.FreeEnergy(model, order="sweep", precision=1.0).infer(x, **options).output


# Linear.


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias):
    ours, theirs = seeded(pc.Linear, 5, 3, bias), seeded(nn.Linear, 5, 3, bias)
    x = torch.randn(2, 7, 5)
    assert isinstance(ours, nn.Linear)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other = nn.Linear(5, 3, bias)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours(x), other(x))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(x), other(x))


def test_linear_has_the_node_it_is_given():
    x = torch.randn(2, 5)
    assert isinstance(pc.Linear(5, 3).node, pc.Gaussian)
    layer = pc.Linear(5, 3, node=pc.Bernoulli())
    close(layer(x), F.linear(x, layer.weight, layer.bias).sigmoid())
    made = pc.Linear(5, 3, device="cpu", dtype=torch.float64)
    assert made.weight.dtype == torch.float64


@pytest.mark.parametrize("node", [True, "gaussian", pc.Gaussian, nn.ReLU()])
def test_a_node_must_be_a_distribution(node):
    with pytest.raises(TypeError, match="give a pc_triton Distribution"):
        pc.Linear(5, 3, node=node)
    if node is not True:
        with pytest.raises(TypeError, match="give a pc_triton Distribution"):
            pc.Attention(8, 2, node=node)


# Attention.


@pytest.mark.parametrize("node", [True, False, pc.Gaussian()], ids=["categorical", "none", "gaussian"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal, padded, node):
    """Outside inference, and in it with the states at the prediction; gradients too."""
    ours, theirs = attention(causal=causal, node=node)
    x, padding = torch.randn(2, 5, 16), PADDING if padded else None
    truth, _ = theirs(x, x, x, key_padding_mask=padding, attn_mask=CAUSAL if causal else None)
    got = ours(x, key_padding_mask=padding)
    close(got, truth)
    weight = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(got, list(ours.parameters()), weight),
        torch.autograd.grad(truth, [dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters()], weight),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    close(settled(ours, {"x": x, "key_padding_mask": padding}), truth)


@pytest.mark.parametrize("node", [True, False])
def test_cross_attention_is_torchs(node):
    ours, theirs = attention(node=node)
    x, context = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    truth, _ = theirs(x, context, context, key_padding_mask=PADDING)
    close(ours(x, context, PADDING), truth)
    close(settled(ours, (x, context, PADDING)), truth)


@pytest.mark.parametrize("node", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_repeated_heads(kv_heads, node):
    """Each key and value head serves num_heads / kv_heads query heads."""
    ours, _ = attention(kv_heads=kv_heads, causal=True, node=node)
    full, _ = attention(causal=True, node=node)
    q, k, v = ours.in_proj_weight.split([16, 4 * kv_heads, 4 * kv_heads])
    bq, bk, bv = ours.in_proj_bias.split([16, 4 * kv_heads, 4 * kv_heads])
    repeat = [t.unflatten(0, (kv_heads, 4)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1) for t in (k, v, bk, bv)]
    with torch.no_grad():
        full.in_proj_weight.copy_(torch.cat([q, *repeat[:2]]))
        full.in_proj_bias.copy_(torch.cat([bq, *repeat[2:]]))
    full.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 5, 16)
    close(ours(x), full(x))
    close(settled(ours, x), full(x))
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in full.parameters())


def test_causal_attention_over_a_longer_context():
    """The last query sees the last key, as with a cache: the output of the end of the full sequence."""
    ours, _ = attention(causal=True)
    x = torch.randn(2, 5, 16)
    close(ours(x[:, 3:], x), ours(x)[:, 3:])
    close(settled(ours, (x[:, 3:], x)), ours(x)[:, 3:])


@pytest.mark.parametrize("bias", [True, False])
def test_attention_and_torch_exchange_state_dicts(bias):
    ours, theirs = attention(bias=bias)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    other = nn.MultiheadAttention(16, 4, batch_first=True, bias=bias)
    ours.load_state_dict(other.state_dict())
    x = torch.randn(2, 5, 16)
    close(ours(x), other(x, x, x)[0])


def test_a_row_without_keys_gives_zeros():
    """The first queries of a sequence padded on the left: no NaN, in the gradients neither."""
    ours, _ = attention(causal=True, bias=False)
    x = torch.randn(2, 5, 16)
    for out in (
        ours(x, key_padding_mask=PADDING.flip(1)),
        settled(ours, {"x": x, "key_padding_mask": PADDING.flip(1)}),
    ):
        assert (out[0, :2] == 0).all()
        assert out.isfinite().all()
    for steps in (1, 3):
        ours.zero_grad()
        pc.FreeEnergy(ours, steps=steps)({"x": x, "key_padding_mask": PADDING.flip(1)}, x).backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_masked_keys_do_not_count():
    """In inference that moves, too: what stands at a padded key changes neither output nor F."""
    ours, _ = attention(causal=True)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    other = x.clone()
    other[0, 3:] = 9.0
    y[0, 3:] = 0.0
    for order in ("error", "sweep", "simultaneous"):
        free_energy = pc.FreeEnergy(ours, order=order, precision=2.0, steps=4, step=0.3)
        a, b = (free_energy.infer({"x": t, "key_padding_mask": PADDING}, y) for t in (x, other))
        close(a.output[0, :3], b.output[0, :3])
        weights = a.states["node"] if "node" in a.states else next(iter(a.states.values()))
        assert (weights[0, :, :, 3:] == 0).all()
        close(weights[1].sum(-1), torch.ones(4, 5))


def test_attention_dropout():
    ours, theirs = attention(dropout=0.5)
    x = torch.randn(2, 5, 16)
    close(ours.eval()(x), theirs.eval()(x, x, x)[0])
    assert not torch.equal(ours.train()(x), ours(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10 is no multiple of num_heads=4"),
        ({"embed_dim": 8, "num_heads": 0}, "no multiple of num_heads=0"),
        ({"embed_dim": 8, "num_heads": 4, "kv_heads": 3}, "num_heads=4 is no multiple of kv_heads=3"),
        ({"embed_dim": 8, "num_heads": 4, "kv_heads": 0}, "kv_heads=0"),
        ({"embed_dim": 8, "num_heads": 4, "dropout": 1.0}, "dropout=1.0"),
        ({"embed_dim": 8, "num_heads": 4, "dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_attention_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        pc.Attention(**options)


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 8), (2, 1, 5, 16)])
def test_attention_refuses_shapes(shape):
    with pytest.raises(ValueError, match=r"Attention needs \[batch, length, 16\]"):
        pc.Attention(16, 4)(torch.zeros(shape))


@pytest.mark.parametrize("mask", [PADDING[:, :4], PADDING[:1], PADDING.float()], ids=["keys", "batch", "dtype"])
def test_attention_refuses_masks(mask):
    with pytest.raises(ValueError, match=r"give a bool tensor \(2, 5\)"):
        pc.Attention(16, 4)(torch.zeros(2, 5, 16), key_padding_mask=mask)


# The transformer.


def test_transformer():
    """Causal; a position sees itself and what came before."""
    model = seeded(Transformer, 11, width=8, heads=2, blocks=2, context=6)
    nn.init.normal_(model.tokens.weight)
    tokens = torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    a, b = model(tokens), model(changed)
    assert a.shape == (2, 6, 11)
    assert torch.equal(a[:, :3], b[:, :3])
    assert (a[:, 3:] != b[:, 3:]).any(-1).all()
    close(settled(model, tokens), a)
    with pytest.raises(ValueError, match="7 tokens: the model's context is 6"):
        model(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize("name", ["vocabulary", "width", "heads", "blocks", "context"])
def test_transformer_refuses_sizes(name):
    with pytest.raises(ValueError, match=r"\b0\b.*whole numbers? of at least 1"):
        Transformer(**{"vocabulary": 8, "width": 8, "heads": 2, name: 0})
