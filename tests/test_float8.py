"""Products in 8 bits: what they lose, where they are made, and that what learns and what is reported lose nothing."""

from __future__ import annotations

import contextlib
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pc_triton as pc
from pc_triton import float8, head, reference
from pc_triton.float8 import FORWARD, GRADIENT, FewDigits, rounded
from pc_triton.models import Transformer

RELATIVE = {FORWARD: 2.0**-4, GRADIENT: 2.0**-3}
"""What rounding may be off by: half of the last of 3 bits behind the point, and of 2."""
ABSOLUTE = {FORWARD: 2.0**-10, GRADIENT: 2.0**-17}
"""And near 0, in units of the scale: half of the smallest number."""
LARGEST = {FORWARD: 2.0**8, GRADIENT: 2.0**15}
"""The largest number of a row, or a weight, is scaled to at least half of this and below it."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()).to(dtype)


def allowed(x: torch.Tensor, dtype: torch.dtype, by_rows: bool = True) -> torch.Tensor:
    """How far x may be from what it is rounded to, in float64. by_rows: each row has a scale of its own."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True) if by_rows else x.abs().max()
    return RELATIVE[dtype] * x.abs() + ABSOLUTE[dtype] * 2 * largest / LARGEST[dtype]


def mlp(dtype: torch.dtype = torch.float32, width: int = 32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = pc.Linear(16, width), nn.Tanh(), pc.Linear(width, 32), nn.Tanh()
    model = nn.Sequential(*hidden, nn.Linear(32, 16)).to(dtype)
    return model, torch.randn(7, 16).to(dtype), torch.randint(16, (7,))


def transformer(vocabulary: int = 64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(vocabulary, 32, 2, 2, 8)
    x, y = torch.randint(vocabulary, (2, 3, 8))
    return model, x, y


def learn(free_energy: pc.FreeEnergy, x, y) -> tuple[float, list[torch.Tensor]]:
    loss = free_energy(x, y)
    return loss.item(), list(torch.autograd.grad(loss, list(free_energy.model.parameters())))


# Numbers.


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype, wanted):
    x = numbers(41, 17, dtype=dtype)
    values, scale = rounded(x, wanted)
    assert values.dtype == wanted
    assert scale.shape == (41, 1)
    assert (scale.frexp().mantissa == 0.5).all(), "a power of two"
    error = (values.double() * scale - x.double()).abs()
    assert (error <= allowed(x, wanted)).all()
    assert (error / x.double().abs()).max() > 0.7 * RELATIVE[wanted]
    largest = values.double().abs().amax(1)
    assert ((largest >= LARGEST[wanted] / 2) & (largest <= LARGEST[wanted])).all()


def test_a_row_depends_on_no_other():
    """So that a sample's states do not depend on the batch that it is in."""
    x, weight = numbers(7, 32), nn.Parameter(numbers(48, 32, seed=1))
    with FewDigits():
        whole = F.linear(x, weight)
        assert torch.equal(F.linear(x[2:3], weight), whole[2:3])
        x[0] *= 2.0**20
        assert torch.equal(F.linear(x, weight)[1:], whole[1:])


@pytest.mark.parametrize("wanted", [FORWARD, GRADIENT])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 2.0**-110, 1.0, 255.999, 448.0, 65504.0, 1e38, 3.3e38])
def test_sizes(size, wanted):
    """From zeros to the largest number: nothing overflows, and what is far below all others becomes 0."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([size, -size, 0.5 * size, 0.0]).to(dtype)
        values, scale = rounded(x, wanted)
        found = values.double() * scale
        x = x.double()
        assert ((found - x).abs() <= (RELATIVE[wanted] * x.abs()).clamp_min(2.0**-120)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_hidden(bad):
    """In an operand it is in its row of the product, in a weight everywhere."""
    x, weight = torch.ones(3, 16), torch.ones(16, 16)
    x[1, 0] = bad
    with FewDigits():
        assert F.linear(x, weight).isfinite().all(1).tolist() == [True, False, True]
        weight[0, 0] = bad
        assert not F.linear(torch.ones(3, 16), weight).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (41, 48), (3, 5, 32)], ids=str)
def test_product_and_its_gradient(shape, dtype):
    """Against float64, within what the two roundings may do to each term; and no closer than they let it be."""
    x = numbers(*shape, dtype=dtype).requires_grad_()
    weight, bias = numbers(80, shape[-1], dtype=dtype, seed=1).requires_grad_(), numbers(80, dtype=dtype, seed=2)
    with FewDigits():
        y = F.linear(x, weight, bias)
    assert y.dtype == dtype
    grad = numbers(*y.shape, dtype=dtype, seed=3)
    (below,) = torch.autograd.grad(y, x, grad)
    assert below.dtype == dtype

    def check(found, a, b, a_dtype, bias):
        """a b' + bias"""
        a, b, bias = a.detach().double(), b.detach().double(), bias.double()
        da, db = allowed(a, a_dtype), allowed(b, FORWARD, by_rows=False)
        bound = da @ b.abs().t() + a.abs() @ db.t() + da @ db.t()
        kept = 16 * torch.finfo(dtype).eps * (a.abs() @ b.abs().t() + bias.abs())
        error = (found.detach().double() - a @ b.t() - bias).abs()
        assert (error <= bound + kept).all()
        assert error.max() > 0.01 * bound.min()

    check(y, x, weight, FORWARD, bias)
    check(below, grad, weight.t(), GRADIENT, torch.zeros(1))


def test_float16_gradients_far_below_its_range_of_scales():
    x = torch.randn(4, 16).half().requires_grad_()
    weight = torch.randn(16, 16).half()
    with FewDigits():
        y = F.linear(x, weight)
    grad = torch.full_like(y, 1e-6)
    (below,) = torch.autograd.grad(y, x, grad)
    wanted = grad.double() @ weight.double()
    assert (below - wanted).norm() < 0.15 * wanted.norm()


def test_small_gradients_beside_large_ones():
    """Some reach a millionth of others, as of the logits of a large vocabulary: e4m3 would have none of them."""
    x, weight = torch.randn(2, 16, requires_grad=True), torch.rand(16, 16)
    with FewDigits():
        y = F.linear(x, weight)
    grad = torch.tensor([[1.0], [2.0**-24]]).expand(2, 16)
    (below,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(below, grad @ weight, rtol=0.15, atol=0)


@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_emulation_is_the_product_of_hardware(out, monkeypatch):
    """torch's own product of float8, on whatever this runs on: where a CPU has it, that; bias or none."""
    x, weight = numbers(41, 48, dtype=out).requires_grad_(), nn.Parameter(numbers(80, 48, dtype=out, seed=1))
    grad = numbers(41, 80, dtype=out, seed=2)
    monkeypatch.setattr(float8, "PAYS", 0)
    for bias in (None, numbers(80, dtype=out, seed=3)):
        found = []
        for hardware in (False, True):
            monkeypatch.setattr(float8, "has_products", lambda device, hardware=hardware: hardware)
            try:
                with FewDigits():
                    y = F.linear(x, weight, bias)
                found.append((y, *torch.autograd.grad(y, x, grad)))
            except NotImplementedError:
                pytest.skip("no torch._scaled_mm here")
        for emulated, made in zip(*found):
            rtol = 2.0**-8 if out != torch.float64 else 1e-12  # hardware gives bfloat16's digits, of each term too
            torch.testing.assert_close(made, emulated, rtol=rtol, atol=rtol * float(emulated.detach().abs().mean()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_multiplies_what_a_cpu_emulates(dtype, monkeypatch):
    monkeypatch.setattr(float8, "PAYS", 0)
    found = []
    for device in ("cpu", "cuda"):
        x, weight = numbers(41, 48, dtype=dtype).to(device).requires_grad_(), numbers(80, 48, dtype=dtype, seed=1)
        weight, bias = (t.to(device) for t in (weight, numbers(80, dtype=dtype, seed=2)))
        grad = numbers(41, 80, dtype=dtype, seed=3).to(device)
        with FewDigits():
            y = F.linear(x, weight, bias)
        found.append([t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, x, grad))])
    for emulated, made in zip(*found):  # a GPU's fast sum keeps 14 bits, and its product bfloat16's digits
        rtol = 2.0**-8 if dtype != torch.float64 else 1e-12
        torch.testing.assert_close(made, emulated, rtol=rtol, atol=rtol * float(emulated.abs().max()))


# Where they are made.


@pytest.mark.parametrize("sizes", [(16, 17), (17, 16), (41, 40)])
def test_odd_sizes_stay_as_they_are(sizes):
    layer, x = nn.Linear(*sizes), torch.randn(5, sizes[0])
    with FewDigits():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_else_stays_as_it_is():
    layer = nn.Linear(16, 16)
    made = layer.weight * 1.0  # such as a weight norm's, or one that states reach
    with FewDigits() as few:
        for x in (torch.randn(0, 16), torch.randn(16)):
            assert torch.equal(layer(x), x @ layer.weight.t() + layer.bias) or x.dim() == 1
        x = torch.randn(3, 16)
        assert torch.equal(F.linear(x, made), x @ made.t())
        assert torch.equal(x @ layer.weight, x @ layer.weight.detach())
        y = F.linear(x, layer.weight, layer.bias * 1.0)
        assert torch.equal(y, x @ layer.weight.t() + layer.bias)
        assert not few.weights
        assert not torch.equal(layer(x), F.linear(x, made, layer.bias))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_only_where_it_pays(monkeypatch):
    """Where hardware multiplies, a product into few columns is made of all digits, forwards and backwards each."""
    monkeypatch.setattr(float8, "has_products", lambda device: True)
    monkeypatch.setattr(float8, "PAYS", 32)
    monkeypatch.setattr(float8, "product", lambda a, dtype, b, out, bias=None: a.new_zeros(len(a), len(b.values)))
    for rows, columns, forward, backward in ((32, 16, True, False), (16, 32, False, True), (16, 16, False, False)):
        weight, x = nn.Parameter(torch.randn(rows, columns)), torch.randn(3, columns, requires_grad=True)
        with FewDigits():
            y = F.linear(x, weight)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (not y.any(), not grad.any()) == (forward, backward)


def test_weights_are_rounded_once_until_they_change(monkeypatch):
    made, plain = [], reference.weight_rounded
    monkeypatch.setattr(reference, "weight_rounded", lambda w, *rest: made.append(w.shape) or plain(w, *rest))
    weight, x = nn.Parameter(torch.randn(32, 16)), torch.randn(5, 16)
    with FewDigits():
        first = F.linear(x, weight)
        again = F.linear(x, weight), F.linear(x, weight[:16]), F.linear(x, weight[:16])
        assert torch.equal(first, again[0])
        assert made.count((32, 16)) == 1
        assert made.count((16, 16)) == 1
        with torch.no_grad():
            weight.mul_(2.0)
        assert torch.equal(F.linear(x, weight), 2 * first)
        assert made.count((32, 16)) == 2


def test_a_part_of_a_weight_is_told_from_another():
    weight, x = nn.Parameter(torch.randn(32, 16)), torch.randn(5, 16)
    with FewDigits():
        top, bottom = F.linear(x, weight[:16]), F.linear(x, weight[16:])
        square = weight[:16]
        turned = F.linear(x, square.t())
    assert not torch.equal(top, bottom)
    assert (turned - x @ square).norm() < 0.1 * (x @ square).norm()
    assert (bottom - x @ weight[16:].t()).norm() < 0.1 * bottom.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_of_the_head(bias, monkeypatch):
    """dE/dx by g W in 8 bits, a few rows of logits at a time; where that does not pay it is of all digits."""
    monkeypatch.setattr(head, "LEAST", 4)
    torch.manual_seed(0)
    x, weight = torch.randn(10, 32, requires_grad=True), nn.Parameter(torch.randn(48, 32))
    labels, b = torch.randint(48, (10,)), nn.Parameter(torch.randn(48)) if bias else None
    labels[3] = -100
    found = []
    for few, pays in ((None, 0), (FewDigits(), 0), (FewDigits(), 40)):
        monkeypatch.setattr(float8, "pays", lambda device, columns, pays=pays: columns >= pays)
        with few or contextlib.nullcontext():
            energy = head.HeadEnergy.apply(x, weight, b, labels, -100, False, few)
        found.append((energy.detach(), *torch.autograd.grad(energy.sum(), x)))
    (energy, grad), (few_energy, few_grad), (_, half) = found
    assert not torch.equal(few_energy, energy)
    torch.testing.assert_close(few_energy, energy, rtol=0.05, atol=0.1)
    for other in (few_grad, half):
        assert not torch.equal(other, grad)
        assert (other - grad).norm() < 0.2 * grad.norm()
        assert not other[3].any()
    assert (half - grad).norm() < (few_grad - grad).norm()


def products(module, monkeypatch, **options) -> list[tuple[int, ...]]:
    """The shapes of the weights that a training step rounds, in T = 2."""
    found = []
    whole = FewDigits.in_8_bits
    monkeypatch.setattr(FewDigits, "in_8_bits", lambda self, w: found.append(tuple(w.shape)) or whole(self, w))
    model, x, y = module
    pc.FreeEnergy(model, inference_dtype=FORWARD, **options)(x, y).backward()
    return found


def test_every_layer_of_a_transformer(monkeypatch):
    """For each block the projections of attention and the two of its feed-forward layer, and twice the head: one pass.

    The head's gradient is made with its logits.
    """
    block = [(96, 32), (32, 32), (128, 32), (32, 128)]
    assert products(transformer(), monkeypatch) == [*block, *block, (64, 32), (64, 32)]


def test_multihead_attention(monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(pc.convert(layer)[0], nn.Linear(32, 16))
    found = products((model, torch.randn(3, 5, 32), torch.randint(16, (3, 5))), monkeypatch)
    assert found == [(96, 32), (32, 32), (64, 32), (32, 64), (16, 32)]


# Inference and learning.


@pytest.mark.parametrize("make", [mlp, transformer])
def test_one_step_is_backpropagation_as_before(make):
    model, x, y = make()
    (loss, grads), (plain, wanted) = (
        learn(pc.FreeEnergy(model, steps=1, inference_dtype=d), x, y) for d in (FORWARD, None)
    )
    assert loss == plain
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_learning_keeps_its_digits(steps):
    """The weight gradient is that of products in float64, at the states that inference reached."""
    model, x, y = mlp()
    free_energy = pc.FreeEnergy(model, steps=steps, inference_dtype=FORWARD)
    loss, batch = free_energy.loss_and_batch(x, y)
    found = torch.autograd.grad(loss, list(model.parameters()))
    exact = copy.deepcopy(model).double()
    h, energy = x.double(), 0.0
    layers = iter(exact)
    for node in batch.nodes:
        e, pi = node.state.double(), node.precision.double()
        h = next(layers)(h) + e
        h = next(layers)(h)
        energy = energy + 0.5 * (pi * e.square().sum(1)).sum()
    energy = energy + F.cross_entropy(next(layers)(h), y, reduction="sum")
    wanted = torch.autograd.grad(energy / len(y), list(exact.parameters()))
    assert loss.item() == pytest.approx(energy.item() / len(y), rel=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("make", [mlp, transformer])
def test_states_move_by_rounded_gradients(make):
    """The first move differs from that of all digits, by no more than the rounding of a few layers."""
    model, x, y = make()
    moved = []
    for dtype in (None, FORWARD):
        free_energy = pc.FreeEnergy(model, step=1.0, steps=2, inference_dtype=dtype)
        _, batch = free_energy.loss_and_batch(x, y)
        moved.append(torch.cat([node.state.flatten() for node in batch.nodes if node.state is not None]))
    difference = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert 1e-3 < difference < 0.2


@pytest.mark.parametrize("make", [mlp, transformer])
def test_one_move_goes_by_newtons_step(make):
    """F before the move, of few digits, and F of the learning pass differ by rounding: no step is learnt of that."""
    model, x, y = make()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    free_energy = pc.FreeEnergy(model, inference_dtype=FORWARD)
    for _ in range(3):
        free_energy(x, y).backward()
        assert free_energy.tracker.mean == 1.0
    assert len(passes) == 3 * 2, "not even the first batch looks"
    assert free_energy.rules.step.coarse
    plain = pc.FreeEnergy(model)
    plain(x, y)
    assert plain.tracker.mean != 1.0


def test_why_no_step_is_learnt():
    """F of rounded products is off by more than a tenth of what inference lowers it by; its slope by little."""
    model, x, y = transformer()
    plain, few = (pc.FreeEnergy(model, step=1.0, inference_dtype=dtype) for dtype in (None, FORWARD))
    (_, exact), (_, rough) = (free_energy.loss_and_batch(x, y) for free_energy in (plain, few))
    fall, off = exact.energies[0] - exact.energies[1], rough.energies[0] - exact.energies[0]
    assert (off.abs() > 0.1 * fall).any()
    assert rough.energies[1].sum() == pytest.approx(exact.energies[1].sum().item(), abs=0.05 * fall.sum().item())
    slopes = [
        free_energy.settle(free_energy.batch(x, y), 1, None, rules)
        for free_energy, rules in (
            (plain, pc.FreeEnergy(model, steps=3).rules),
            (few, pc.FreeEnergy(model, steps=3, inference_dtype=FORWARD).rules),
        )
    ]
    torch.testing.assert_close(slopes[1].slope, slopes[0].slope, rtol=0.02, atol=0)


def test_step_of_one_move_may_be_given():
    model, x, y = mlp()
    (_, given), (_, newton) = (
        learn(pc.FreeEnergy(model, step=step, inference_dtype=FORWARD), x, y) for step in (1.0, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(given, newton))


@pytest.mark.parametrize("steps", [2, 4])
def test_settled_as_without(steps):
    """F falls as far as with all digits, but for a tenth of the fall."""
    model, x, y = transformer()
    fall = []
    for dtype in (None, FORWARD):
        report = pc.FreeEnergy(model, steps=steps, inference_dtype=dtype).report(x, y)
        fall.append(report.free_energies[0] - report.free_energies[-1])
        assert len(report.free_energies) == steps
    assert fall[1] == pytest.approx(fall[0], rel=0.1)


def test_what_is_reported_keeps_its_digits():
    """F at the prediction is cross-entropy; `infer` and `record` are those of a FreeEnergy without the option."""
    model, x, y = mlp()
    few, all_digits = (pc.FreeEnergy(model, steps=3, inference_dtype=dtype) for dtype in (FORWARD, None))
    assert few.report(x, y).free_energies[0] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert few.report(x, y).long_run == pytest.approx(all_digits.report(x, y).long_run, rel=1e-3)
    a, b = few.infer(x, y), all_digits.infer(x, y)
    assert torch.equal(a.free_energy, b.free_energy)
    assert torch.equal(a.output, b.output)
    for one, other in zip(few.record(x, y), all_digits.record(x, y), strict=True):
        assert all(torch.equal(one[name].energy, other[name].energy) for name in other)


@pytest.mark.parametrize("order", ["sweep", "simultaneous", "incremental", pc.FreeEnergy.settle])
def test_states_u_are_refused(order):
    """Their u - mu would be the rounding of mu."""
    with pytest.raises(ValueError, match="u - mu would be the rounding; use order='error'"):
        pc.FreeEnergy(mlp()[0], order=order, inference_dtype=FORWARD)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, "float8_e4m3fn", 8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"give torch\.float8_e4m3fn or None"):
        pc.FreeEnergy(mlp()[0], inference_dtype=dtype)


def test_start_and_mask():
    model, x, y = mlp()
    free_energy = pc.FreeEnergy(model, steps=3, inference_dtype=FORWARD)
    given = {"0": torch.randn(7, 32)}
    loss = free_energy(x, y, start=given, mask=torch.arange(7) < 5)
    assert loss.isfinite()
    settled = free_energy.settle(batch := free_energy.batch(x, y), 0, given)
    assert settled is not None
    mu = model[0](x)
    torch.testing.assert_close(batch.nodes[0].state, (given["0"] - mu).detach(), rtol=0, atol=0)


# Beside other things.


def test_autocast():
    model, x, y = mlp()
    free_energy = pc.FreeEnergy(model, steps=3, inference_dtype=FORWARD)
    with torch.autocast("cpu", torch.bfloat16):
        loss = free_energy(x, y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    plain, wanted = learn(pc.FreeEnergy(model, steps=3), x, y)
    assert loss.item() == pytest.approx(plain, rel=0.02)
    for a, b in zip(grads, wanted):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_models(dtype):
    model, x, y = mlp(dtype)
    _, grads = learn(pc.FreeEnergy(model, steps=3, inference_dtype=FORWARD), x, y)
    _, wanted = learn(pc.FreeEnergy(model, steps=3), x, y)
    for a, b in zip(grads, wanted):
        assert a.dtype == dtype
        assert F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0) > 0.98


class Checkpointed(nn.Module):
    """A model, its first layers in a checkpoint."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        h = checkpoint(self.model[:4], x, use_reentrant=False, context_fn=pc.checkpoint_contexts)
        return self.model[4](h)


@pytest.mark.parametrize("steps", [2, 3])
def test_checkpoint(steps):
    """What is computed again for its backward is rounded again."""
    model, x, y = mlp()
    plain, wanted = learn(pc.FreeEnergy(model, steps=steps, inference_dtype=FORWARD), x, y)
    loss, grads = learn(pc.FreeEnergy(Checkpointed(model), steps=steps, inference_dtype=FORWARD), x, y)
    assert loss == plain
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("make", [mlp, transformer])
def test_compiled_model(make, steps):
    """Its passes of few digits are eager, and its learning pass is one graph."""
    model, x, y = make()
    plain, wanted = learn(pc.FreeEnergy(model, steps=steps, inference_dtype=FORWARD), x, y)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=make is mlp)
    free_energy = pc.FreeEnergy(compiled, steps=steps, inference_dtype=FORWARD)
    for _ in range(2):
        loss, grads = learn(free_energy, x, y)
        assert loss == pytest.approx(plain, rel=1e-5)
        for a, b in zip(grads, wanted):
            assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_whole_step_compiled():
    model, x, y = mlp()
    plain = pc.FreeEnergy(model, inference_dtype=FORWARD)
    plain(x, y)
    wanted_loss, wanted = learn(plain, x, y)
    free_energy = pc.FreeEnergy(model, inference_dtype=FORWARD)
    free_energy.compile()
    free_energy(x, y)
    loss, grads = learn(free_energy, x, y)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for a, b in zip(grads, wanted):
        assert (a - b).norm() <= 1e-4 * b.norm()
    free_energy.inference_dtype = None  # of which another graph is made
    other, _ = learn(free_energy, x, y)
    assert other != loss


def test_nothing_is_kept_and_nothing_is_saved():
    """State dict and repr as before; a batch lets go of its weights in 8 bits before learning."""
    model, x, y = mlp()
    free_energy = pc.FreeEnergy(model, inference_dtype=FORWARD)
    assert free_energy.state_dict().keys() == pc.FreeEnergy(model).state_dict().keys()
    _, batch = free_energy.loss_and_batch(x, y)
    assert batch.few_digits is None
    copied = copy.deepcopy(free_energy)
    assert copied.inference_dtype == FORWARD
    assert learn(copied, x, y)[0] == learn(free_energy, x, y)[0]
