"""Packed sequences: attention within a document, by `Attention`'s segments and the transformer's separator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pc_triton as pc
from pc_triton.compiled import trace
from pc_triton.evaluate import generate
from pc_triton.models import Transformer

LENGTHS = [(4, 1, 3), (2, 6)]  # of the documents of each sequence
SEGMENTS = torch.tensor([[7, 7, 7, 7, -1, 7000000000, 7000000000, 7000000000], [0, 0, 5, 5, 5, 5, 5, 5]])
ORDERS = ["error", "sweep", "simultaneous"]
FIXED = {"precision": 2.0, "steps": 4, "step": 0.3}  # nothing that a sequence has in common
NODES = pytest.mark.parametrize("node", [True, False], ids=["categorical", "none"])


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def documents(*packed: Tensor) -> list[tuple[Tensor, ...]]:
    """The documents of these batches of packed sequences ``[B, N, ...]``, each a batch of one."""
    return [
        tuple(t[row : row + 1] for t in parts)
        for row, lengths in enumerate(LENGTHS)
        for parts in zip(*(t.split(lengths, 1) for t in packed))
    ]


def attention(**options) -> pc.Attention:
    torch.manual_seed(0)
    layer = pc.Attention(16, 4, dtype=torch.float64, **options)
    nn.init.normal_(layer.in_proj_weight, std=0.5)
    return layer


@NODES
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "kv_heads": 2}], ids=str)
def test_attention_is_each_documents(options, node):
    """Outputs and gradients outside inference; F, states and gradients in it, for each order."""
    layer, x, y = attention(node=node, **options), *torch.randn(2, 2, 8, 16, dtype=torch.float64)
    alone = documents(x, y)
    out = layer(x, segments=SEGMENTS)
    close(torch.cat([o for (o,) in documents(out)], 1), torch.cat([layer(a) for a, _ in alone], 1))
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(sum((layer(a) * b).sum() for a, b in alone), parameters)
    close(torch.autograd.grad((out * y).sum(), parameters), wanted)
    for order in ORDERS:
        free_energy = pc.FreeEnergy(layer, order=order, **FIXED)
        packed = free_energy.infer({"x": x, "segments": SEGMENTS}, y)
        each = [free_energy.infer(*document) for document in alone]
        close(packed.free_energy.sum(), sum(e.free_energy.sum() for e in each))
        close(torch.cat([o for (o,) in documents(packed.output)], 1), torch.cat([e.output for e in each], 1))
        wanted = torch.autograd.grad(sum(free_energy(*document) for document in alone), parameters)
        close(torch.autograd.grad(2 * free_energy({"x": x, "segments": SEGMENTS}, y), parameters), wanted)
        if node:
            weights = packed.states["node"]
            for row, segments in enumerate(SEGMENTS):
                assert (weights[row, :, segments[:, None] != segments] == 0).all()
                close(weights[row].sum(-1), torch.ones(4, 8, dtype=torch.float64))


@NODES
def test_segments_beside_padding(node):
    """What stands at a padded key, or in another document, changes nothing; the padding's own rows give zeros."""
    layer, x = attention(causal=True, node=node), torch.randn(2, 8, 16, dtype=torch.float64)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 4] = padding[1, 7] = True
    masks = {"key_padding_mask": padding, "segments": SEGMENTS.int()}
    other = torch.where(padding[..., None], 9.0, x)
    other[0, :4] += 1.0
    for call in (layer, lambda x, **masks: pc.FreeEnergy(layer, **FIXED).infer({"x": x, **masks}).output):
        a, b = call(x, **masks), call(other, **masks)
        close(a[0, 5:], b[0, 5:])
        close(a[1, :7], b[1, :7])
        close(a[0, 4], layer.out_proj.bias)


def test_a_query_that_sees_no_key_with_a_node_on_the_softmax():
    """Its weights are 0 and its gradients finite, as with a Categorical node."""
    layer, x = attention(causal=True, node=pc.Gaussian()), torch.randn(2, 8, 16, dtype=torch.float64)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[:, 7] = True
    masks = {"key_padding_mask": padding, "segments": torch.arange(8).div(7, rounding_mode="floor").expand(2, 8)}
    close(layer(x, **masks)[:, 7], layer.out_proj.bias.expand(2, -1))
    pc.FreeEnergy(layer)({"x": x, **masks}, torch.randn_like(x)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_falls_within_a_document():
    layer, x = attention(dropout=0.5), torch.randn(2, 8, 16, dtype=torch.float64)
    other = x.clone()
    other[0, :5] += 1.0
    for masks in ({"segments": SEGMENTS}, {}):
        outs = []
        for batch in (x, other):
            torch.manual_seed(0)
            outs.append(pc.FreeEnergy(layer, **FIXED).infer({"x": batch, **masks}, x).output)
        assert torch.equal(outs[0][0, 5:], outs[1][0, 5:]) == bool(masks)


@pytest.mark.parametrize(
    "segments",
    [SEGMENTS[:, :7], SEGMENTS[:1], SEGMENTS.float(), SEGMENTS > 0],
    ids=["length", "batch", "float", "bool"],
)
def test_attention_refuses_segments(segments):
    with pytest.raises(ValueError, match=r"give an int32 or int64 tensor \(2, 8\)"):
        pc.Attention(16, 4)(torch.zeros(2, 8, 16), segments=segments)


def test_attention_refuses_segments_of_a_context():
    x = torch.zeros(2, 8, 16)
    with pytest.raises(ValueError, match="leave them out, or the context"):
        pc.Attention(16, 4)(x, x, segments=SEGMENTS)


# The transformer.


def transformer(**options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(11, width=8, heads=2, blocks=2, context=8, separator=3, **options).double()
    for embedding in (model.tokens, model.positions):
        nn.init.normal_(embedding.weight)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens whose documents begin with the separator, but for the second sequence's first; and labels."""
    x, y = torch.randint(11, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    x[x == 3] = 4
    x[0, [0, 4, 5]] = x[1, 2] = 3
    return x, y


@pytest.mark.parametrize("attention", [True, False], ids=["categorical", "none"])
def test_a_packed_batch_is_its_documents(attention):
    """Logits; the gradients of BP and of the default at T = 1; F and gradients of settled inference."""
    model, (x, y) = transformer(attention=attention), batch()
    alone, parameters = documents(x, y), list(model.parameters())

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, parameters)

    logits = model(x)
    close(torch.cat([o for (o,) in documents(logits)], 1), torch.cat([model(a) for a, _ in alone], 1))
    backpropagation = gradients(F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    close(gradients(sum(F.cross_entropy(model(a)[0], b[0], reduction="sum") for a, b in alone) / 16), backpropagation)
    close(gradients(pc.FreeEnergy(model, steps=1)(x, y)), backpropagation)
    for order in ORDERS:
        free_energy = pc.FreeEnergy(model, order=order, **FIXED)
        loss = free_energy(x, y)
        each = sum(free_energy(a, b) * b.numel() for a, b in alone) / 16
        assert (loss - F.cross_entropy(logits.flatten(0, 1), y.flatten())).abs() > 1e-3, "inference did nothing"
        close(loss, each)
        close(gradients(loss), gradients(each))


def test_incremental_steps_of_a_packed_batch():
    """Each step's F and gradients, at weights that nothing moves."""
    model, (x, y) = transformer(), batch()
    free_energy, losses = pc.FreeEnergy(model, order="incremental", **FIXED), []
    for parts in ([(x, y)], documents(x, y)):
        model.zero_grad()
        total = torch.zeros(FIXED["steps"], dtype=torch.float64)
        for a, b in parts:
            for step, loss in enumerate(free_energy.incremental(a, b)):
                (loss * b.numel()).backward()
                total[step] += loss.detach() * b.numel()
        losses.append((total, [p.grad.clone() for p in model.parameters()]))
    assert (losses[0][0].diff() < 0).all(), "inference did nothing"
    close(losses[0][0], losses[1][0])
    close(losses[0][1], losses[1][1])


def test_without_a_separator_documents_see_each_other():
    model, (x, _) = transformer(), batch()
    within = model(x)
    model.separator = None
    first, others = within[0, :4], within[0, 4:]
    across = model(x)
    close(across[0, :4], first)
    assert ((across[0, 4:] - others).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("separator", [-1, 11])
def test_a_separator_must_be_a_token(separator):
    with pytest.raises(ValueError, match=f"separator={separator}: give a token, 0 to 10"):
        Transformer(11, separator=separator)


def test_generation_forgets_the_document_before():
    """Within the context; the model is one of tokens alone."""
    model = transformer()
    before, prompt = torch.tensor([5, 6, 7]), torch.tensor([3, 9])
    wanted = generate(model, prompt, 3, temperature=0)
    assert torch.equal(generate(model, torch.cat([before, prompt]), 3, temperature=0)[3:], wanted)


@pytest.mark.parametrize("training", [True, False])
def test_a_packed_model_is_one_graph(training):
    torch._dynamo.reset()
    model, counter = transformer(), CompileCounter()
    compiled = torch.compile(model.train(training), backend=counter, fullgraph=True)
    x, y = batch()
    with torch.set_grad_enabled(training):
        for tokens in (x, x.flip(0)):
            out = compiled(tokens)
            close(out, model(tokens))
    if training:
        F.cross_entropy(out.flatten(0, 1), y.flatten()).backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2}], ids=str)
def test_a_packed_step_is_one_graph(options):
    """What `FreeEnergy.compile` gives inductor serves other documents of the same shape."""
    model, (x, y) = transformer(), batch()
    free_energy = pc.FreeEnergy(model, **options).eval()  # so that no step is learnt from batch to batch
    graph, _ = trace(lambda x, y: free_energy.loss_and_batch(x, y)[0], model, (x, y))
    for tokens in (x, x.flip(0), x.roll(1, 1)):
        loss, *found = graph(*(p.detach() for p in model.parameters()), tokens, y)
        eager = free_energy(tokens, y)
        close(loss, eager.detach())
        for a, b in zip(found, torch.autograd.grad(eager, list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max()))
