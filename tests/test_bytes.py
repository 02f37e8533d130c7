"""What the kernels load and store, counted in the interpreter, against the floor: every tensor once.

The floors are those that ``bench/bench_kernels.py`` divides by. Rows longer than a tile are read more often by design,
as their kernels' docstrings say; that too is counted here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from pc_triton.dispatch import triton_kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from bench_kernels import node_bytes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
SLACK = 1.05  # a sample's coefficients and energies, beside the tensors
ROWS = 8


class Moved:
    """Bytes that kernels loaded and stored, and those of them in elements of 32 and of 16 bits."""

    loaded = stored = loaded32 = stored32 = loaded16 = stored16 = 0


@pytest.fixture
def moved(monkeypatch) -> Iterator[Moved]:
    from triton.runtime.interpreter import InterpreterBuilder

    count = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def add(what: str, ptrs, mask) -> None:
        bits = ptrs.get_element_ty().primitive_bitwidth
        for name in (what, f"{what}{bits}"):
            setattr(count, name, getattr(count, name, 0) + int(mask.data.sum()) * bits // 8)

    def counted_load(self, ptrs, mask, *rest):
        add("loaded", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        add("stored", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return count


def launch(family: str, phase: str, form: str, *shape: int, state_dtype=torch.float32, **options) -> None:
    """One launch of a node's kernel in float16, whose two bytes are bfloat16's."""
    mu, state, pi = torch.randn(shape).half(), torch.randn(shape).to(state_dtype), torch.ones(shape[0])
    half = (*shape[:-1], shape[-1] // 2)
    extra = (torch.randn(half).half(),) if family == "gaussian_logvar" else ()
    grad = torch.randn(half if extra else shape).half()
    units = (pi,) if family in ("laplace", "student_t") else ()
    if family == "student_t":
        options["nu"] = 4.0
    arguments = (mu, state, pi, *units) if phase == "forward" else (mu, state, grad, pi, *units, pi, pi)
    getattr(triton_kernels(), f"{family}_{phase}")(*arguments, *extra, form=form, **options)


@pytest.mark.parametrize("phase", ["forward", "step"])
@pytest.mark.parametrize(
    ("form", "state_dtype"),
    [("error", torch.float32), ("state", torch.float32), ("error", torch.bfloat16)],
    ids=["error", "state", "error in bfloat16"],
)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "student_t", "gaussian_logvar", "bernoulli", "categorical"])
def test_every_tensor_once(family, form, state_dtype, phase, moved):
    columns = 2048
    launch(family, phase, form, ROWS, columns, state_dtype=state_dtype)
    read, written = node_bytes(family, phase, form, 2, state_dtype.itemsize)
    elements = ROWS * columns // (2 if family == "gaussian_logvar" else 1)
    assert read * elements <= moved.loaded <= SLACK * read * elements
    assert written * elements <= moved.stored <= SLACK * written * elements


@pytest.mark.parametrize(
    ("phase", "form", "options", "times"),
    [
        ("forward", "error", {}, 2),
        ("step", "error", {}, 2),
        ("step", "state", {}, 2),
        ("step", "state", {"moved": True}, 3),
    ],
    ids=["forward", "error", "state", "moved"],
)
def test_a_long_row_is_read_again(phase, form, options, times, moved):
    columns = 20_000
    launch("categorical", phase, form, 2, columns, **options)
    read, written = node_bytes("categorical", phase, form, 2)
    assert times * read * 2 * columns <= moved.loaded <= SLACK * times * read * 2 * columns
    assert written * 2 * columns <= moved.stored <= SLACK * written * 2 * columns


def test_what_causal_hides_is_not_read(moved):
    """But for the rest of a row's last vector of 8."""
    batch, heads, n = 1, 2, 256
    launch("categorical", "step", "error", batch, heads, n, n, causal=True)
    read, written = node_bytes("categorical", "step", "error", 2)
    seen, all_of_it = batch * heads * n * (n + 1) // 2, batch * heads * n * n
    assert read * seen <= moved.loaded <= SLACK * read * seen
    assert written * all_of_it <= moved.stored <= SLACK * written * all_of_it


def test_guard(moved):
    """Where F rose both states are read and one is written; elsewhere one is read, and the other written."""
    state, accepted = torch.randn(2, ROWS, 2048)
    rose = torch.arange(ROWS) < ROWS // 4
    triton_kernels().guard_step(state, accepted, rose)
    each = 4 * state.numel()
    assert 1.25 * each <= moved.loaded <= SLACK * 1.25 * each
    assert each <= moved.stored <= SLACK * each


def test_after_the_only_move(moved):
    """No state: the prediction and the gradient are read, and the emission is written."""
    mu, grad = torch.randn(2, ROWS, 2048).half()
    triton_kernels().gaussian_forward(mu, grad, torch.ones(ROWS), form="error", move=torch.ones(ROWS))
    each = 2 * mu.numel()
    assert 2 * each <= moved.loaded <= SLACK * 2 * each
    assert each <= moved.stored <= SLACK * each


@pytest.mark.parametrize(("rows", "columns", "times"), [(8, 2048, 1), (2, 20_000, 2)])
def test_rounding_to_8_bits(rows, columns, times, moved):
    """Read once and written once; a row longer than a tile is read twice."""
    triton_kernels().rows_rounded(torch.randn(rows, columns).half(), torch.float8_e4m3fn)
    elements = rows * columns
    assert 2 * times * elements <= moved.loaded <= SLACK * 2 * times * elements
    assert elements <= moved.stored <= SLACK * elements


@pytest.mark.parametrize("transposes", [True, False])
def test_rounding_a_weight_to_8_bits(transposes, moved):
    """Read once, beside what torch reads for its largest number, and written once or twice."""
    weight = torch.randn(512, 512).half()
    triton_kernels().weight_rounded(weight, torch.float8_e4m3fn, transposes)
    elements = weight.numel()
    assert 2 * elements <= moved.loaded <= SLACK * 2 * elements
    assert (1 + transposes) * elements <= moved.stored <= SLACK * (1 + transposes) * elements


def test_the_gradient_of_logits_in_8_bits(moved):
    """mu is read twice, and a byte is written."""
    mu, labels = torch.randn(4, 512).half(), torch.zeros(4, dtype=torch.int64)
    triton_kernels().clamped_categorical_rounded(mu, labels, -100)
    elements = mu.numel()
    assert 2 * 2 * elements <= moved.loaded <= SLACK * 2 * 2 * elements
    assert elements <= moved.stored <= SLACK * elements


@pytest.mark.parametrize("columns", [512, 20_000])
def test_clamped(columns, moved):
    """The forward pass reads mu; the backward reads it and writes dE/dmu; in place mu is read twice."""
    rows = 4
    mu, labels, scale = torch.randn(rows, columns).half(), torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    kernels, floor = triton_kernels(), 2 * rows * columns
    _, lse = kernels.clamped_categorical_forward(mu, labels, -100)
    assert floor <= moved.loaded <= SLACK * floor
    backward = partial(kernels.clamped_categorical_backward, mu, labels, lse, scale, -100)
    for call, read in ((backward, 1), (partial(kernels.clamped_categorical_gradient_, mu, labels, -100), 2)):
        moved.loaded = moved.stored = 0
        call()
        assert read * floor <= moved.loaded <= SLACK * read * floor
        assert floor <= moved.stored <= SLACK * floor


@pytest.mark.parametrize("causal", [False, True], ids=["all pairs", "causal"])
def test_attention_reads_its_state_once_forward_and_twice_in_a_step(causal, moved):
    """Float32 is the state, and a few numbers a row; with causal what its tiles above the diagonal hold is not read."""
    items, heads, n, dim, tile = 1, 2, 256, 16, 64
    q, k, v, grad = (torch.randn(items, heads, n, dim).half() for _ in range(4))
    state, pi, kernels = torch.randn(items, heads, n, n) / 9, torch.ones(items), triton_kernels()
    pairs, rows = items * heads * n * n, items * heads * n
    seen = pairs * (n // tile + 1) // (2 * (n // tile)) if causal else pairs
    least = seen // 2 if causal else seen  # on the diagonal, tiles are read in part
    few = 4 * rows * (8 + 4 * n // tile)  # the rows' facts, by each block of keys
    options = {"scale": 0.25, "causal": causal}
    out, _, facts = kernels.attention_forward(q, k, v, state, pi, **options)
    assert 4 * least <= moved.loaded32 <= 4 * seen + few
    moved.loaded32 = moved.stored32 = 0
    kernels.attention_step(q, k, v, out, grad, state, pi, pi / 3, pi / 3, facts, **options)
    assert 8 * least <= moved.loaded32 <= 8 * seen + few
    assert 4 * least <= moved.stored32 <= 4 * seen + few


def check_attention_reads_what_is_seen(moved, items, heads, n, seen, few, **masks):
    """Of a float32 state the pairs that are seen, and few bytes of other things."""
    q, k, v, grad = (torch.randn(items, heads, n, 16).half() for _ in range(4))
    state, pi, kernels = torch.randn(items, heads, n, n) / 9, torch.ones(items), triton_kernels()
    out, _, facts = kernels.attention_forward(q, k, v, state, pi, scale=0.25, **masks)
    assert 4 * seen <= moved.loaded32 <= 4 * seen + few
    moved.loaded32 = moved.stored32 = 0
    kernels.attention_step(q, k, v, out, grad, state, pi, pi / 3, pi / 3, facts, scale=0.25, **masks)
    assert 8 * seen <= moved.loaded32 <= 8 * seen + few
    assert 4 * seen <= moved.stored32 <= 4 * seen + few


def test_attention_reads_no_state_behind_the_padding(moved):
    """Of an item whose last half is padding half the pairs are read, in the tiles of its keys."""
    items, heads, n = 2, 1, 256
    padding = torch.arange(n).expand(items, n) >= torch.tensor([[n // 2], [n]])
    few = 4 * items * heads * n * (8 + 4 * n // 64)
    check_attention_reads_what_is_seen(moved, items, heads, n, heads * n * n * 3 // 2, few, padding=padding)


def test_attention_reads_no_state_of_other_documents(moved):
    """Of a sequence packed of four documents a quarter of the pairs is read, in the tiles of each."""
    items, heads, n = 1, 2, 256
    segments = (torch.arange(n, dtype=torch.int32) // 64)[None]
    few = 4 * items * heads * n * (8 + 4 * n // 64) + 4 * 3 * heads * (n // 64) * (512 + n)  # and segments, by block
    check_attention_reads_what_is_seen(moved, items, heads, n, heads * n * n // 4, few, segments=segments)


def test_states_in_bfloat16_are_half_the_bytes(moved):
    """Of attention and of a linear layer in float32, where nothing else has 16 bits."""
    items, heads, n, dim = 1, 2, 64, 16
    q, k, v, grad = torch.randn(4, items, heads, n, dim)
    state, pi, kernels, pairs = (
        torch.randn(items, heads, n, n).bfloat16(),
        torch.ones(items),
        triton_kernels(),
        2 * n * n,
    )
    out, _, facts = kernels.attention_forward(q, k, v, state, pi, scale=0.25)
    assert (moved.loaded16, moved.stored16) == (2 * pairs, 0)
    moved.loaded16 = 0
    kernels.attention_step(q, k, v, out, grad, state, pi, pi / 3, pi / 3, facts, scale=0.25)
    assert (moved.loaded16, moved.stored16) == (4 * pairs, 2 * pairs)
    moved.loaded16 = moved.stored16 = 0
    x, weight, state, pi = torch.randn(64, 48), torch.randn(32, 48), torch.randn(64, 32).bfloat16(), torch.ones(64)
    kernels.linear_forward(x, weight, None, state, pi)
    assert (moved.loaded16, moved.stored16) == (2 * state.numel(), 0)


def test_a_linear_layer_reads_each_state_once(moved):
    """Float32 is the state and the energies: the product's tiles share the states of their rows."""
    rows, n, k = 256, 192, 160
    x, weight, bias = (torch.randn(shape).half() for shape in ((rows, k), (n, k), (n,)))
    state, pi, kernels = torch.randn(rows, n), torch.ones(rows), triton_kernels()
    kernels.linear_forward(x, weight, bias, state, pi)
    assert 4 * rows * n <= moved.loaded32 <= SLACK * 4 * rows * n
    assert moved.stored == 2 * rows * n + moved.stored32
