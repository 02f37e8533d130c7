"""The fused attention kernels against the float64 oracle, and the oracle against autograd.

A kernel's error may be twice that of plain torch at the same dtype, plus a few units in the last place of the largest
value (`test_kernels.assert_close`).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import EMULATED, ON_CPU, assert_close, device, double, poison, spot  # noqa: F401
from torch import nn

import pc_triton as pc
from pc_triton import dispatch, reference
from pc_triton.kernels import attention, attention_first

HIDDEN = -torch.inf


def problem(spot, heads, kv_heads, queries, keys, dim, *, size=1.0, scale=1.0, items=2, samples=None):  # noqa: F811
    """q, k, v, grad_out, state, (precision, keep, move); the state's errors have that size, the logits that scale."""
    device, dtype = spot  # noqa: F811
    generator = torch.Generator().manual_seed(queries * 1000 + keys * 10 + dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, grad_out = ((x * normal(items, heads, queries, dim)).to(device, dtype) for x in (scale, 0.7))
    k, v = (normal(items, kv_heads, keys, dim).to(device, dtype) for _ in range(2))
    state = (size * normal(items, heads, queries, keys)).to(device)
    coefficients = [c.to(device) for c in torch.rand(3, samples or items, generator=generator) + 0.25]
    return q, k, v, grad_out, state, coefficients


def hide(keys, items=2, device="cpu"):  # noqa: F811
    """Every third key of the first item, all keys but the last of the second."""
    padding = torch.arange(keys)[None].repeat(items, 1) % 3 == 0
    padding[1:, :-1] = True
    return padding.to(device)


def number(tokens, device="cpu"):  # noqa: F811
    """Segments: documents of seven tokens, each to its end; numbers that no 32 bits hold, mixed."""
    at = torch.arange(tokens)
    return torch.stack([(at + 3) // 7, (at * 5 % 3 - 1) * 2**40]).to(device)


def check(q, k, v, grad_out, state, coefficients, *, learn=False, far=1.0, **options):
    """Forward and step against float64, with what plain torch at this dtype leaves for a tolerance.

    far: the largest |log sum e^u|, where that is large. The step takes p as e^(u - log sum e^u), of float32 numbers: it
    is off by far times what rounds them. Plain torch has the logits centred.
    """
    precision, keep, move = coefficients if not learn else (coefficients[0], None, None)
    options = {"scale": q.shape[-1] ** -0.5, **options}
    masks = (options.get("causal", False), options.get("padding"), options.get("segments"))
    known = (q, k, v, state, precision)
    start = None if state is None else state.clone()
    truth = reference.attention_forward(*map(double, known), **options)
    plain = reference.attention_forward(*known, **options)
    got = attention.attention_forward(*known, **options)
    assert state is None or torch.equal(state, start), "the forward pass moved the state"
    assert (got[1] >= 0).all()
    assert_close("out", got[0], truth[0], plain[0])
    assert_close("energy", got[1], truth[1], plain[1])
    assert_close("facts", got[2], truth[2], plain[2])
    known = (q, k, v, got[0], grad_out, state, precision, keep, move, got[2])
    wide = [double(x) for x in known]
    truth = reference.attention_step(*wide, **options)
    plain = reference.attention_step(*known, **options)
    moved, *grads = attention.attention_step(*known[:5], start, *known[6:], **options)
    if learn:
        assert moved is start
        assert state is None or torch.equal(moved, state), "the learning pass moved the state"
    else:
        assert state is None or moved is start
        logits = moved.new_zeros(moved.shape)
        hidden = reference.mask_logits(logits, *masks) == HIDDEN
        if state is None:
            assert (moved[hidden] == 0).all()
        # <p, g> is <out, grad_out>, and out is rounded to its dtype: an error of the row, which no softmax sees.
        # In float32 too: of one key g and <p, g> are one number, but each is a sum that is rounded in its own order.
        rounding = torch.finfo(q.dtype).eps * grad_out.abs().sum(-1).max().double() * v.abs().max()
        terms = rounding * (move / precision).max() / torch.finfo(torch.float32).eps
        spread = [x.masked_fill(hidden, 0.0) for x in (moved, truth[0], plain[0])]
        assert_close("state", *spread, terms=terms)
    sent = (grad_out.double() @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1).mT).abs().max()
    largest = max(1.0, *(options["scale"] * x.abs().max().item() for x in (q, k)))
    for name, a, b, c in zip(("dF/dq", "dF/dk", "dF/dv"), grads, truth[1:], plain[1:]):
        assert_close(name, a, b, c, terms=(precision.max() + sent) * largest * far)
    return got, moved, grads


CASES = [  # heads, key heads, queries, keys, head dimension, causal, padded, a state, the learning pass
    (1, 1, 1, 1, 16, False, False, True, False),
    (2, 1, 17, 33, 8, True, True, True, False),
    (4, 2, 18, 17, 16, True, False, True, False),
    (1, 1, 65, 65, 40, True, True, True, False),
    (3, 1, 1, 65, 16, False, True, True, True),
    (2, 1, 33, 70, 40, True, True, False, False),
    (2, 1, 65, 33, 8, True, False, False, True),
    (1, 1, 20, 130, 16, False, False, True, False),
    (2, 1, 17, 40, 66, True, True, True, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, map(int, case))))
def test_against_the_oracle(case, spot):  # noqa: F811
    *sizes, causal, padded, has_state, learn = case
    q, k, v, grad_out, state, c = problem(spot, *sizes)
    padding = hide(sizes[3], device=spot[0]) if padded else None
    check(q, k, v, grad_out, state if has_state else None, c, learn=learn, causal=causal, padding=padding)


SEGMENTED = [  # heads, key heads, tokens, head dimension, causal, padded, a state, the learning pass
    (1, 1, 1, 16, False, False, True, False),
    (2, 1, 17, 8, True, True, True, False),
    (2, 1, 65, 16, False, True, False, True),
    (2, 1, 70, 16, True, False, True, True),
    (1, 1, 70, 40, True, True, False, False),
    (1, 1, 97, 16, False, False, True, False),
    (2, 2, 33, 66, True, False, False, False),
]


@pytest.mark.parametrize("case", SEGMENTED, ids=lambda case: "-".join(map(str, map(int, case))))
def test_segments_against_the_oracle(case, spot):  # noqa: F811
    heads, kv_heads, n, dim, causal, padded, has_state, learn = case
    q, k, v, grad_out, state, c = problem(spot, heads, kv_heads, n, n, dim)
    masks = {"padding": hide(n, device=spot[0]) if padded else None, "segments": number(n, spot[0])}
    check(q, k, v, grad_out, state if has_state else None, c, learn=learn, causal=causal, **masks)


@ON_CPU
@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=2), st.booleans())
def test_a_packed_sequence_is_its_documents(causal, lengths, has_state):
    """Outputs, facts, the states after a step and the gradients, whatever the documents' lengths; energies add up."""
    n, items = max(map(sum, lengths)), len(lengths)
    lengths = [[*row, n - sum(row)] for row in lengths]
    q, k, v, grad_out, state, c = problem(("cpu", torch.float32), 2, 1, n, n, 8, items=items)
    segments = torch.tensor([[i for i, size in enumerate(row) for _ in range(size)] for row in lengths])
    options = {"scale": 0.5, "causal": causal}

    def run(q, k, v, grad_out, state, coefficients, **masks):
        state = state.contiguous() if has_state else None
        out, energy, facts = attention.attention_forward(q, k, v, state, coefficients[0], **options, **masks)
        step = attention.attention_step(q, k, v, out, grad_out, state, *coefficients, facts, **options, **masks)
        return (energy, out, *step[1:], *facts), step[0]

    packed, moved = run(q, k, v, grad_out, state.clone(), c, segments=segments.int())
    for item, row in enumerate(lengths):
        energy, end = 0.0, 0
        for size in filter(None, row):
            begin, end = end, end + size
            cut = (slice(item, item + 1), slice(None), slice(begin, end))
            inside = (*cut, slice(begin, end))
            coefficients = [x[item : item + 1] for x in c]
            alone, states = run(*(x[cut] for x in (q, k, v, grad_out)), state[inside].clone(), coefficients)
            energy += alone[0]
            for a, b in zip(packed[1:], alone[1:]):
                torch.testing.assert_close(a[cut], b, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                moved[inside].tril() if causal else moved[inside],
                states.tril() if causal else states,
                rtol=1e-4,
                atol=1e-5,
            )
        torch.testing.assert_close(packed[0][item], energy[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn", [False, True], ids=["move", "learn"])
def test_a_state_in_bfloat16(learn, device):  # noqa: F811
    for dtype in (torch.float32, torch.float16):
        q, k, v, grad_out, state, c = problem((device, dtype), 4, 2, 18, 33, 16)
        padding = hide(33, device=device)
        moved = check(q, k, v, grad_out, state.bfloat16(), c, learn=learn, causal=True, padding=padding)[1]
        assert moved.dtype == torch.bfloat16


def test_samples_of_several_items(device):  # noqa: F811
    """Precision per sample where a sample has two rows of the batch."""
    check(*problem((device, torch.float32), 2, 1, 5, 7, 8, items=4, samples=2), causal=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "fresh"])
def test_a_sample_that_is_held_keeps_its_state(has_state, spot):  # noqa: F811
    """Whatever its gradient; the other sample is as it is beside a finite one. In the first move too, from e = 0."""
    q, k, v, grad_out, state, (precision, keep, move) = problem(spot, 4, 2, 18, 17, 16)
    state = reference.mask_logits(state, True, None).nan_to_num(neginf=0.0) if has_state else None
    keep[0], move[0] = 1.0, 0.0
    spoilt = grad_out.clone()
    spoilt[0, 1], spoilt[0, 2, ::2] = torch.inf, torch.nan
    options = {"scale": 0.25, "causal": True}
    for forward, step, first in (
        (attention.attention_forward, attention.attention_step, attention_first.attention_first_step),
        (reference.attention_forward, reference.attention_step, reference.attention_first_step),
    ):
        out, _, facts = forward(q, k, v, state, precision, **options)
        found = []
        for grad in (grad_out, spoilt):
            start = None if state is None else state.clone()
            found.append(step(q, k, v, out, grad, start, precision, keep, move, facts, **options))
            if not has_state:
                found[-1] = *found[-1], first(q, k, v, out, grad, precision, move, causal=True)
        truth, got = found
        for x in (got[0], got[-1]) if state is None else got[:1]:
            assert torch.equal(x[0], torch.zeros_like(x[0]) if state is None else state[0])
        for a, b in zip(got, truth):
            assert b[1].isfinite().all()
            assert torch.equal(a[1], b[1])


def test_queries_that_see_no_key(device):  # noqa: F811
    """Output, energy and gradients of 0, by padding and by more queries than keys; never NaN."""
    q, k, v, grad_out, state, c = problem((device, torch.float32), 2, 1, 9, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=device)
    padding[0] = True
    for e in (state, None):
        got, moved, grads = check(q, k, v, grad_out, e, c, causal=True, padding=padding)
        for x in (got[0][0], got[1][:1], got[0][:, :, :4], grads[0][0], grads[0][:, :, :4], grads[1][0], grads[2][0]):
            assert (x == 0).all()
        assert moved[1:, :, 4:].isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_products_in_tf32(dim, device):  # noqa: F811
    """Asked for as torch's are, they are rounded to 11 bits, in tiles of their own.

    The interpreter multiplies exactly all the same.
    """
    q, k, v, grad_out, state, c = problem((device, torch.float32), 2, 1, 40, 40, dim, size=0.1)
    options = {"scale": dim**-0.5, "causal": True}
    found = []
    for word in ("highest", "high"):
        torch.set_float32_matmul_precision(word)
        try:
            out, energy, facts = attention.attention_forward(q, k, v, state, c[0], **options)
            moved, *grads = attention.attention_step(q, k, v, out, grad_out, state.clone(), *c, facts, **options)
            fall = attention_first.attention_fall(q, k, v, out, grad_out, 2, **options)
        finally:
            torch.set_float32_matmul_precision("highest")
        found.append([out, energy, fall, moved.tril(), *grads])  # what is masked may be left as it is
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found)]
    assert max(errors) <= 2.0**-8
    compiled = EMULATED or (device == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and not torch.version.hip)
    assert (min(errors) > 1e-5) == compiled


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_at_the_prediction(causal, spot):  # noqa: F811
    """At e = 0 the energy is 0, exactly; with no gradient from above nothing moves."""
    q, k, v, grad_out, state, c = problem(spot, 1, 1, 18, 70, 16, size=0.0, scale=4.0)
    out, energy, facts = attention.attention_forward(q, k, v, state, c[0], scale=0.25, causal=causal)
    assert (energy == 0).all()
    none = torch.zeros_like(grad_out)
    new, *grads = attention.attention_step(q, k, v, out, none, state, *c, facts, scale=0.25, causal=causal)
    for x in (new, *grads):
        assert (x == 0).all()


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1, 1.0, 5.0])
def test_small_energies_keep_their_digits(size, shift, device):  # noqa: F811
    """A relative error of 3e-5 of the energy over several tiles, and what float32 keeps of d beside a mean."""
    q, k, v, _, state, c = problem((device, torch.float32), 1, 1, 8, 300, 16, size=size, scale=3.0)
    state = state + shift
    _, energy, _ = attention.attention_forward(q, k, v, state, c[0], scale=0.25)
    mu = 0.25 * (q.double() @ k.double().mT)
    p = (mu + state.double()).softmax(-1)
    x = state.double() - (p * state.double()).sum(-1, keepdim=True)
    truth = c[0].double() * torch.log1p((p * (torch.expm1(-x) + x)).sum(-1)).sum((1, 2))
    lost = 4 * shift / size * torch.finfo(torch.float32).eps
    torch.testing.assert_close(energy.double(), truth, rtol=3e-5 + lost, atol=0.0)


def test_gradients_keep_their_digits_at_a_high_precision(device):  # noqa: F811
    """pi (q_ - p) cancels against pi p (d - <p, d>) to second order in d: where d is 1 / pi, float32 would lose it."""
    q, k, v, grad_out, state, c = problem((device, torch.float32), 1, 1, 33, 70, 16, size=1e-5)
    c[0] = torch.full_like(c[0], 1e5)
    got, _, grads = check(q, k, v, grad_out, state, c)
    truth = reference.attention_step(
        *map(double, (q, k, v, got[0], grad_out, state, *c, got[2])), scale=q.shape[-1] ** -0.5
    )
    for a, b in zip(grads, truth[1:]):
        assert (a.double() - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("peak", [80.0, 300.0])
def test_extreme_logits(peak, device):  # noqa: F811
    """u and mu one-hot, agreeing and opposed, across tiles."""
    dim, keys = 16, 70
    q = torch.ones(2, 1, 4, dim, device=device)
    values = torch.tensor([1.0, -1.0, 0.0, 0.99, -0.98, 0.5, 0.0], device=device) * peak / dim
    k = values.repeat(10)[:keys, None].expand(2, 1, keys, dim)
    v = torch.linspace(-1, 1, 2 * keys * dim, device=device).view(2, 1, keys, dim)
    mu = (q @ k.mT)[0, 0, 0]
    state = torch.stack([mu.roll(i) - mu for i in (0, 1, 33, 64)]).expand(2, 1, 4, keys).contiguous()
    grad_out = torch.linspace(-1, 1, 2 * 4 * dim, device=device).view(2, 1, 4, dim)
    c = [torch.full((2,), x, device=device) for x in (1.0, 0.7, 0.3)]
    check(q, k, v, grad_out, state, c, scale=1.0, far=peak)


def test_strided_inputs(device):  # noqa: F811
    """Views of one projection are read where they lie; other strides are copied."""
    q, k, v, grad_out, state, c = problem((device, torch.float32), 2, 1, 9, 9, 8)
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    views = [x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in packed.split([16, 8, 8], -1)]
    for x in views:
        same, row = attention.by_token(x)
        assert same is x
        assert row == 32
    whole = check(q, k, v, grad_out, state, c, causal=True)
    for inputs in (views, [x.mT.contiguous().mT for x in (q, k, v)]):
        again = check(*inputs, grad_out.expand_as(grad_out), state, c, causal=True)
        for a, b in zip((*whole[0], whole[1], *whole[2]), (*again[0], again[1], *again[2])):
            assert torch.equal(a, b)
    ones = torch.ones(1, device=device).expand_as(grad_out)
    check(q, k, v, ones, state, [x[:1].expand(2) for x in c])


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 2, 0, 4), (2, 2, 4, 0)], ids=str)
def test_empty(shape, device):  # noqa: F811
    items, heads, queries, keys = shape
    q, k, v, grad_out, state, c = problem((device, torch.float32), heads, 1, queries, keys, 8, items=items, samples=2)
    if not items:
        c = [x[:0] for x in c]
    out, energy, facts = attention.attention_forward(q, k, v, state, c[0], scale=1.0)
    assert (out == 0).all()
    assert torch.equal(energy, torch.zeros_like(c[0]))
    for x, like in zip(attention.attention_step(q, k, v, out, grad_out, None, *c, facts, scale=1.0), (state, q, k, v)):
        assert x.shape == like.shape
        assert (x == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_again(causal, device):  # noqa: F811
    q, k, v, grad_out, state, c = problem((device, torch.float32), 2, 1, 18, 40, 16)
    options = {"scale": 0.25, "causal": causal}

    def run():
        out, energy, facts = attention.attention_forward(q, k, v, state, c[0], **options)
        return out, energy, *attention.attention_step(q, k, v, out, grad_out, state.clone(), *c, facts, **options)

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


def arguments(**changes):
    q, k, pi = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.ones(2)
    return {
        "q": q,
        "k": k,
        "v": k,
        "out": q,
        "grad_out": q,
        "state": torch.zeros(2, 4, 3, 5),
        "precision": pi,
        "keep": pi,
        "move": pi,
        "facts": torch.zeros(3, 2, 4, 3),
        "scale": 1.0,
    } | changes


BAD = [
    ({"q": torch.zeros(2, 4, 3, 8).double()}, TypeError, "q is float64 .* cast it, or use pc_triton.reference"),
    ({"q": torch.zeros(4, 3, 8)}, ValueError, "q has 3 dimensions: give it"),
    ({"q": torch.zeros(2, 4, 3, 130)}, ValueError, "q has head dimension 130: the kernels take 1 to 128"),
    ({"k": torch.zeros(2, 3, 5, 8)}, ValueError, "k has shape .* its heads a divisor of q's 4"),
    ({"k": torch.zeros(2, 2, 5, 7)}, ValueError, r"k has shape \[2, 2, 5, 7\]: give it \[2, 2, 5, 8\]"),
    ({"v": torch.zeros(2, 2, 4, 8)}, ValueError, r"v has shape \[2, 2, 4, 8\]: give it \[2, 2, 5, 8\]"),
    ({"v": torch.zeros(2, 2, 5, 8).half()}, TypeError, "v is float16 and q float32: give them one dtype"),
    ({"k": torch.zeros(2, 2, 5, 8, device="meta")}, ValueError, "k is on meta"),
    ({"state": torch.zeros(2, 4, 3, 4)}, ValueError, r"state has shape \[2, 4, 3, 4\]: give it \[2, 4, 3, 5\]"),
    ({"state": torch.zeros(2, 4, 5, 3).mT}, ValueError, "state is not contiguous and is moved in place"),
    ({"precision": torch.ones(3)}, ValueError, "no multiple of the 3 samples of precision"),
    ({"keep": None}, ValueError, "keep and move go together"),
    ({"move": torch.ones(2).half()}, TypeError, "move is float16: cast it to float32"),
    ({"out": torch.zeros(2, 4, 3, 7)}, ValueError, "out has shape"),
    ({"grad_out": torch.zeros(2, 4, 3)}, ValueError, "grad_out has shape"),
    ({"facts": torch.zeros(2, 2, 4, 3)}, ValueError, r"facts has shape \[2, 2, 4, 3\]: give it \[3, 2, 4, 3\]"),
    ({"padding": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"padding has shape \[2, 4\]: give it \[2, 5\]"),
    ({"padding": torch.zeros(2, 5)}, TypeError, "padding is float32: give a bool tensor"),
    ({"segments": torch.zeros(2, 4).int()}, ValueError, r"segments has shape \[2, 4\]: give it \[2, 5\]"),
    ({"segments": torch.zeros(2, 5).int()}, ValueError, "segments need as many queries as keys"),
    ({"segments": torch.zeros(2, 5)}, TypeError, "segments is float32: give int32 or int64"),
    ({"segments": torch.zeros(2, 5, device="meta").int()}, ValueError, "segments is on meta and mu on cpu"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[words[:30] for _, _, words in BAD])
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        attention.attention_step(**arguments(**changes))


@pytest.mark.parametrize(
    ("causal", "padded", "segmented"), [(False, False, False), (True, True, False), (True, True, True)]
)
def test_the_oracle_is_autograd(causal, padded, segmented):
    """Its gradients are those of the energy plus <out, grad_out> at a held e; it moves by g - <p, g>."""
    q, k, v, grad_out, state, c = (
        [y.double() for y in x] if isinstance(x, list) else x.double()
        for x in problem(("cpu", torch.float64), 4, 2, 7 if segmented else 6, 7, 8)
    )
    masks = {"causal": causal, "padding": torch.arange(14).view(2, 7) % 3 == 1 if padded else None}
    if segmented:
        masks |= {"padding": torch.arange(7).expand(2, 7) == 6, "segments": number(7)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mu = 0.3 * (q @ k.repeat_interleave(2, 1).mT)
    mu = mu.masked_fill(reference.mask_logits(torch.zeros_like(mu), **masks) == HIDDEN, -1e9)
    log_p, log_q = (mu + state).log_softmax(-1), mu.log_softmax(-1)
    p, values, pi = log_p.exp(), v.repeat_interleave(2, 1), c[0].view(2, 1, 1, 1)
    energy = (pi * p * (log_p - log_q)).sum((1, 2, 3))
    truth = torch.autograd.grad(energy.sum() + (p @ values * grad_out).sum(), leaves)
    with torch.no_grad():
        out, same, facts = reference.attention_forward(q, k, v, state, c[0], scale=0.3, **masks)
        new, *grads = reference.attention_step(q, k, v, out, grad_out, state, *c, facts, scale=0.3, **masks)
        push = grad_out @ values.mT - (out * grad_out).sum(-1, keepdim=True)
        wanted = c[1].view(2, 1, 1, 1) * state - c[2].view(2, 1, 1, 1) / pi * push
    for a, b in zip((out, same, *grads), (p @ values, energy, *truth)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(new, wanted.where(p > 0, 0.0), rtol=1e-9, atol=1e-11)


# In inference.


class TwoAttentions(nn.Module):
    """Causal with grouped heads, then plain; keys of token 0 are padding."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Embedding(7, 16), nn.Linear(16, 7)
        self.first, self.second = pc.Attention(16, 4, kv_heads=2, causal=True), pc.Attention(16, 2)

    def forward(self, x):
        h = self.inp(x)
        h = h + self.first(h, key_padding_mask=x == 0)
        return self.out(h + self.second(h, key_padding_mask=x == 0))


@ON_CPU
@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"precision": 3.0, "step": 0.3}], ids=str)
def test_inference_is_the_same_fused(options, monkeypatch):
    """Loss, gradients and states with the kernels and with torch; the fused step is the one that runs.

    The last sequence begins with padding: there a causal query sees no key.
    """
    torch.manual_seed(0)
    model = TwoAttentions()
    x, y = torch.randint(1, 7, (3, 6)), torch.randint(7, (3, 6))
    x[0, 4:], x[1, 3], x[2, :2] = 0, 0, 0
    kernels, steps, begun = dispatch.triton_kernels(), [], []
    plain, first = kernels.attention_step, kernels.attention_first_step
    monkeypatch.setattr(kernels, "attention_first_step", lambda *a, **b: begun.append(1) or first(*a, **b))
    monkeypatch.setattr(kernels, "attention_step", lambda q, *a, **b: steps.append(q.shape) or plain(q, *a, **b))

    def run(backend):
        free_energy = pc.FreeEnergy(model, **options)
        model.zero_grad()
        with pc.use_backend(backend):
            loss = free_energy(x, y)
            (2.5 * loss).backward()
            settled = free_energy.infer(x, y)
        return loss, settled.free_energy, [p.grad.clone() for p in model.parameters()], settled.states

    fused, taken = run("triton"), len(steps)
    whole = run("torch")
    assert set(steps) == {(3, 4, 6, 4), (3, 2, 6, 8)}
    assert len(steps) == taken
    assert len(begun) == 2, "each attention's first move in learning; infer shows its nodes"
    torch.testing.assert_close(fused[:2], whole[:2], rtol=2e-5, atol=0.0)
    for a, b in zip(fused[2], whole[2]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    for name, b in whole[3].items():
        torch.testing.assert_close(fused[3][name], b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=name)
