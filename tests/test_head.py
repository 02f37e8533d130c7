"""`Head` against ``nn.Linear`` and a clamped Categorical: the same F, states and gradients, without the logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pc_triton as pc
from pc_triton import head
from pc_triton.models import Transformer

SAMPLES, LENGTH, WIDTH, CLASSES = 5, 3, 6, 11


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """15 rows go in chunks of 4, the last one smaller."""
    monkeypatch.setattr(head, "LEAST", 4)


def pair(dtype=torch.float64, device="cpu", bias=True):
    """The same model with a Head and with an ``nn.Linear``."""
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Embedding(CLASSES, WIDTH), pc.Linear(WIDTH, WIDTH), nn.Tanh(), pc.Head(WIDTH, CLASSES, bias)
    )
    ours.to(device, dtype)
    plain = copy.deepcopy(ours)
    plain[3] = nn.Linear(WIDTH, CLASSES, bias).to(device, dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch(device="cpu"):
    torch.manual_seed(1)
    x, y = torch.randint(CLASSES, (2, SAMPLES, LENGTH), device=device)
    y[0, 1] = y[4] = -100
    return x, y


def train(model, x, y, **options):
    free_energy = pc.FreeEnergy(model, **options)
    if options.get("order") == "incremental":
        values = []
        for loss in free_energy.incremental(x, y):
            (loss / 2).backward()
            values.append(loss.detach())
        loss = torch.stack(values)
    else:
        loss = free_energy(x, y)
        (loss / 2).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous", "incremental"])
def test_the_same_as_a_linear_layer(order, steps, bias):
    ours, plain = pair(bias=bias)
    for a, b in zip(train(ours, *batch(), order=order, steps=steps), train(plain, *batch(), order=order, steps=steps)):
        torch.testing.assert_close(a, b)


def test_kernels(device):
    ours, plain = pair(torch.float32, device)
    with pc.use_backend("triton"):
        got = train(ours, *batch(device))
    with pc.use_backend("torch"):
        want = train(plain, *batch(device))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_autocast():
    """Products in bfloat16, as near the float64 gradients as those of ``nn.Linear`` are, but for the last digit."""
    ours, plain = pair(torch.float32)
    exact, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (train(model, *batch(), step=0.25) for model in (ours, plain))
    for a, b, truth in zip(got, want, train(exact, *batch(), step=0.25)):
        assert a.dtype == torch.float32
        assert (a - truth).norm() <= (b - truth).norm() + 2**-8 * truth.norm()


def test_output_and_ignored_label():
    ours, plain = pair()
    x, y = batch()
    output = pc.Categorical(ignore_index=2)
    y[y == -100] = 2
    for a, b in zip(train(ours, x, y, output=output), train(plain, x, y, output=output)):
        torch.testing.assert_close(a, b)


def test_every_label_ignored():
    ours, _ = pair()
    x, y = batch()
    loss, *grads = train(ours, x, torch.full_like(y, -100))
    assert loss == 0
    assert not any(g.any() for g in grads)


def test_tied_to_the_embedding():
    ours, plain = pair(bias=False)
    for model in (ours, plain):
        model[3].weight = model[0].weight
    for a, b in zip(train(ours, *batch()), train(plain, *batch())):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["3.weight", "3.bias", "1.weight"])
def test_frozen(frozen):
    ours, plain = pair()
    for model in (ours, plain):
        model.get_parameter(frozen).requires_grad_(False)
    for a, b in zip(train(ours, *batch()), train(plain, *batch())):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_infer_and_report_see_the_logits():
    ours, plain = pair()
    a, b = (pc.FreeEnergy(model).infer(*batch()) for model in (ours, plain))
    torch.testing.assert_close(a.output, b.output)
    torch.testing.assert_close(a.free_energy, b.free_energy)
    a, b = (pc.FreeEnergy(model).report(*batch()) for model in (ours, plain))
    assert a.free_energies == pytest.approx(b.free_energies)
    assert a.cosine == pytest.approx(b.cosine)


def test_outside_inference_it_is_a_linear_layer():
    ours, plain = pair()
    x, _ = batch()
    assert torch.equal(ours(x), plain(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_values_for_y_use_the_logits():
    ours, plain = pair()
    x, _ = batch()
    y = torch.rand(SAMPLES, LENGTH, CLASSES, dtype=torch.float64).softmax(-1)
    for output in (None, pc.Categorical()):
        for a, b in zip(train(ours, x, y, output=output), train(plain, x, y, output=output)):
            torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The storage of the largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_tensor_of_rows_by_classes(monkeypatch):
    """8,192 rows of 2,048 classes: nothing is larger than 1/8 of the logits, in inference and in learning."""
    monkeypatch.undo()
    torch.manual_seed(0)
    model = Transformer(2048, width=16, heads=1, blocks=1, context=16)
    x, y = torch.randint(2048, (2, 512, 16))
    with Largest() as largest:
        pc.FreeEnergy(model)(x, y).backward()
    assert largest.elements <= 8192 * 2048 / 8
    model.head = nn.Linear(16, 2048)
    with Largest() as largest:
        pc.FreeEnergy(model)(x, y).backward()
    assert largest.elements == 8192 * 2048


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(-1), nn.Flatten(0, 1)], ids=lambda m: type(m).__name__)
def test_its_output_must_be_the_models(last):
    ours, _ = pair()
    model = nn.Sequential(ours, last)
    if isinstance(last, nn.Identity):
        assert pc.FreeEnergy(model)(*batch()).isfinite()
        return
    with pytest.raises((RuntimeError, ValueError), match=r"must return what it returns|for a batch of 5 samples"):
        pc.FreeEnergy(model)(*batch())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y + CLASSES, "outside 0 .. 10"),
        (lambda y: y[:, :2], "logits .* need"),
        (lambda y: y.int(), "labels are torch.int32"),
        (lambda y: y.to("meta"), "y is on meta, the model's output on cpu"),
    ],
)
def test_bad_labels(change, words):
    ours, _ = pair()
    x, y = batch()
    with pytest.raises(ValueError, match=words):
        pc.FreeEnergy(ours)(x, change(y.clamp_min(0)))


def test_small_batches_use_few_chunks(monkeypatch):
    """A chunk has at least LEAST rows, and at most MOST of them."""
    monkeypatch.undo()
    sizes = []
    linear = head.F.linear
    monkeypatch.setattr(head.F, "linear", lambda x, *rest: sizes.append(len(x)) or linear(x, *rest))
    x, y, weight = torch.randn(300, 4), torch.zeros(300, dtype=torch.int64), torch.randn(5, 4)
    head.HeadEnergy.apply(x, weight, None, y, -100, True)
    assert sizes == [256, 44]
    sizes.clear()
    x, y = torch.randn(4_000, 4), torch.zeros(4_000, dtype=torch.int64)
    head.HeadEnergy.apply(x, weight, None, y, -100, True)
    assert sizes == [500] * head.CHUNKS
    sizes.clear()
    x, y = torch.randn(20_000, 4), torch.zeros(20_000, dtype=torch.int64)
    energy = head.HeadEnergy.apply(x, weight, None, y, -100, True)
    assert sizes == [head.MOST] * 9 + [20_000 - 9 * head.MOST]
    assert math.isclose(energy.sum(), torch.nn.functional.cross_entropy(x @ weight.T, y, reduction="sum"), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weight_gradient(device, dtype):
    """Against the float64 oracle on the same numbers: no worse than torch, which sums over all rows in one product."""
    torch.manual_seed(0)
    x, weight = torch.randn(2000, 64, device=device, dtype=dtype), torch.randn(96, 64, device=device, dtype=dtype) / 8
    labels, errors = torch.randint(96, (2000,), device=device), []

    def gradient(energy, weight):
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(energy(x.to(weight.dtype), weight).sum(), weight)[0].double()

    def plain(x, weight):
        return torch.nn.functional.cross_entropy(x @ weight.T, labels, reduction="sum")

    oracle = gradient(plain, weight.double())
    for energy in (lambda x, weight: head.HeadEnergy.apply(x, weight, None, labels, -100, True), plain):
        errors.append(float((gradient(energy, weight) - oracle).norm() / oracle.norm()))
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 4
