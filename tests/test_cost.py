"""What ``bench/cost.py`` counts, by hand; and that what it predicts is called a prediction."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cost

SIZE = cost.Size(blocks=2, width=32, heads=2, batch=2, context=16, vocabulary=50)
OPTIONS = [word for name, value in vars(SIZE).items() for word in (f"--{name}", str(value))]
KEYS = ("method", "steps", "attention_state", "dtype", "launches", "bytes", "products", "predicted_seconds")


def run(*options: str) -> str:
    said: list[str] = []
    cost.main([*OPTIONS, *options], said.append)
    return "\n".join(said)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("state", [False, True], ids=["no state of attention", "state of attention"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_products(steps, state, dtype):
    """(2 T + 1) / 3 of BP's: 1, 5/3, 7/3; less what lies below the lowest node, which inference sends no gradient to.

    That is the first block's product for q, k and v, and without a state of attention its output projection.
    """
    products = SIZE.blocks * 12 * SIZE.width**2 + SIZE.vocabulary * SIZE.width
    below = (3 if state else 4) * SIZE.width**2
    wanted = (2 * steps + 1) / 3 - (steps - 1) * below / (3 * products)
    assert cost.row(SIZE, "pc", steps, state, dtype)["products"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_products_of_a_large_model_are_those_that_the_order_implies(steps):
    size = cost.Size(blocks=12, width=64, heads=2, batch=1, context=8, vocabulary=3000)
    assert cost.row(size, "pc", steps, False, "bfloat16")["products"] == pytest.approx((2 * steps + 1) / 3, rel=0.01)


def test_all_flops_of_backpropagation():
    """Three products of each layer; of attention, for the half of the pairs, 2 forward and 5 backward."""
    rows = SIZE.batch * SIZE.context
    layers = 6 * rows * (SIZE.blocks * 12 * SIZE.width**2 + SIZE.vocabulary * SIZE.width)
    attention = 7 * SIZE.blocks * rows * SIZE.context * SIZE.width
    assert cost.row(SIZE, "bp", 0, False, "bfloat16")["flops"] == layers + attention


def test_bytes_of_a_linear_layer_by_hand():
    rows, n, k = 6, 4, 5
    layer, x = torch.nn.Linear(k, n, bias=False, device="meta"), torch.empty(rows, k, device="meta")
    with cost.counted() as count:
        layer(x).sum().backward()
    mm = 4 * (rows * k + n * k + rows * n)
    # The gradient of the sum is one number, expanded.
    learning = [("ones_like", 4 + 4), ("mm", 4 * (1 + rows * k + n * k))]
    assert [(o.name, o.bytes) for o in count.operations] == [("mm", mm), ("sum", 4 * rows * n + 4), *learning]
    assert [o.flops for o in count.operations] == [2 * rows * n * k, 0, 0, 2 * rows * n * k]


def test_bytes_of_a_gaussian_node_by_hand():
    """Forward: read mu and e, write the emission. Step: read g and e, write e. And a few numbers a sample."""
    from pc_triton.dispatch import triton_kernels

    samples, n = 3, 1024
    mu = torch.empty(samples, n, dtype=torch.bfloat16, device="meta")
    state, pi = torch.empty(samples, n, device="meta"), torch.empty(samples, device="meta")
    with cost.counted() as count:
        triton_kernels().gaussian_forward(mu, state, pi, form="error")
        triton_kernels().gaussian_step(mu, state, mu, pi, pi, pi, form="error")
    forward, step = (o for o in count.operations if o.name.startswith("triton"))
    assert (forward.name, step.name) == ("triton elementwise._forward", "triton elementwise._step")
    assert forward.bytes == samples * (8 * n + 4 + 4)
    assert step.bytes == samples * (10 * n + 3 * 4)


@pytest.mark.parametrize("name", ["_forward", "_grad_queries", "_step_keys"])
def test_tiles_that_causal_attention_visits(name):
    n, tile = 256, 64
    given = {"CAUSAL": True, "n_queries": n, "n_keys": n, "ROWS": tile, "COLS": tile}
    assert cost.visited(name, given) == (n // tile + 1) / (2 * (n // tile))
    assert cost.visited(name, {**given, "CAUSAL": False}) == 1
    assert cost.visited(name, {**given, "n_queries": 1, "ROWS": 16}) == 1, "the last query sees all keys"


def test_launches_are_those_of_the_training_step():
    """As ``test_launches.py`` counts them where the kernels run."""
    for steps in (1, 2, 3, 4):
        block = (8 + (steps - 1) * 4 + (steps - 2) * 3 + 2 * (steps - 1)) if steps > 1 else 0
        block += 4 * (steps - 3) if steps > 3 else 0  # the guard's
        block -= 3 if steps == 2 else 0  # the only move of Gaussians is made where the weights learn
        assert cost.row(SIZE, "pc", steps, True, "float32")["triton_launches"] == SIZE.blocks * block + steps


@pytest.mark.parametrize("method", cost.METHODS)
def test_every_method(method):
    row = cost.row(SIZE, method, 2, False, "bfloat16")
    assert row["launches"] == sum(phase["launches"] for phase in row["phases"].values())
    assert row["bytes"] == sum(phase["bytes"] for phase in row["phases"].values())


def test_json(tmp_path):
    rows = json.loads(run("--json", "--steps", "1", "2"))
    assert [(r["method"], r["steps"], r["attention_state"]) for r in rows] == [
        ("bp", None, False), ("pc", 1, False), ("pc", 2, False), ("pc", 1, True), ("pc", 2, True),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= set(KEYS)
        assert list(row["predicted_seconds"]) == [card.name for card in cost.CARDS]
        assert all(seconds > 0 for seconds in row["predicted_seconds"].values())
    assert rows[0]["products"] == rows[1]["products"] == 1
    path = tmp_path / "cost.json"
    run("--json", str(path), "--steps", "1", "2")
    assert json.loads(path.read_text()) == rows


def test_the_default_is_that_of_free_energy():
    assert {r["steps"] for r in json.loads(run("--json"))} == {None, 2}


def test_a_prediction_is_called_one():
    text = run()
    heading = next(line for line in text.splitlines() if line.startswith("| method"))
    for card in cost.CARDS:
        assert f"prediction, ms, {card.name}" in heading
    assert "times are predictions" in text
    assert "It leaves out:" in text
    assert "instructions of the kernels" in text
    assert "Nothing of this was measured on a GPU." in text


def test_no_prediction_in_float32():
    """The cards' rates are those of products in 16 bits."""
    assert "prediction, ms" not in run("--dtype", "float32")


def test_products_in_8_bits(monkeypatch):
    """Those of inference, forwards and backwards, but for what lies below the lowest node."""
    size = cost.Size(blocks=2, width=32, heads=2, batch=2, context=16, vocabulary=64)
    rows = size.batch * size.context
    monkeypatch.setattr(cost.float8, "PAYS", 0)
    cost.operations.cache_clear()
    blocks = size.blocks * 12 * size.width**2
    for steps in (1, 2, 3):
        done = cost.operations(size, "pc", steps, False, "bfloat16", "float8_e4m3fn")
        found = sum(o.flops for o in done if o.name == cost.FLOAT8)
        head = size.vocabulary * size.width
        forward, backward = blocks + head, blocks + head - 4 * size.width**2
        assert found == (steps - 1) * 2 * rows * (forward + backward)
        assert cost.weight_products(done) == cost.weight_products(cost.operations(size, "pc", steps, False, "bfloat16"))
    cost.operations.cache_clear()


def test_bytes_of_rounding_by_hand():
    """Read once and written once, in 8 bits, with a scale a row; a row too long for a tile is read twice."""
    for rows, columns, times in ((16, 32, 1), (2, 20_000, 2)):
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        with cost.counted() as count:
            cost.float8.rounded(x, torch.float8_e4m3fn)
        moved = {o.name: o.bytes for o in count.operations}
        assert moved == {"triton float8._rows_rounded": (2 * times + 1) * x.numel() + 4 * rows}


def test_bytes_of_the_gradient_of_logits_by_hand():
    """Logits are read twice and their gradient written once, over them or in 8 bits."""
    mu, labels = (
        torch.empty(16, 48, dtype=torch.bfloat16, device="meta"),
        torch.empty(16, dtype=torch.int64, device="meta"),
    )
    for launch, each in (("gradient_", 2 + 2 + 2), ("rounded", 2 + 2 + 1)):
        with cost.counted() as count:
            getattr(cost.dispatch.triton_kernels(), f"clamped_categorical_{launch}")(mu, labels, -100)
        found = {o.name: o.bytes for o in count.operations}
        rows = 16 * (8 + 4 + (4 if launch == "rounded" else 0))  # labels, energies and scales
        assert found == {"triton clamped._clamped_gradient": each * mu.numel() + rows}


def test_bytes_of_rounding_a_weight_by_hand(monkeypatch):
    """Read for its largest number, read again, written as it lies and, where the gradient needs that, transposed."""
    n, k = 48, 32
    weight = torch.empty(n, k, dtype=torch.bfloat16, device="meta")
    for pays, written in ((0, 2), (40, 1)):
        monkeypatch.setattr(cost.float8, "PAYS", pays)
        with cost.counted() as count:
            _ = cost.float8.Weight(weight).rounded
        moved = {o.name: o.bytes for o in count.operations}
        rounds = (2 + written) * n * k + 2 + 4 * n
        assert moved == {"linalg_vector_norm": 2 * n * k + 2, "triton float8._weight_rounded": rounds}


def test_cards_without_products_in_8_bits_have_no_prediction():
    rows = json.loads(run("--json", "--attention-state", "no", "--inference-dtype", "none", "float8_e4m3fn"))
    assert [(r["method"], r["inference_dtype"]) for r in rows] == [
        ("bp", "none"), ("pc", "none"), ("pc", "float8_e4m3fn"),
    ]  # fmt: skip
    assert list(rows[-1]["predicted_seconds"]) == ["H100 SXM", "H200", "B200"]
    text = run("--attention-state", "no", "--inference-dtype", "float8_e4m3fn")
    line = next(line for line in text.splitlines() if line.startswith("| pc") and "float8" in line)
    assert line.count("| - ") == 2


def test_a_prediction_is_the_longer_of_device_and_host():
    card = cost.Card("a card", bandwidth=100.0, product_rate=10.0, copy_share=0.5, product_share=0.5, launch=1.0)
    moves, multiplies = cost.Operation("", "add", 1, bytes=500.0), cost.Operation("", "mm", 1, bytes=1.0, flops=100.0)
    assert cost.predicted_seconds([moves, multiplies], card) == 10 + 20
    many = [cost.Operation("", "add", 4, bytes=50.0), cost.Operation("", "triton x", 1, bytes=0.0)]
    assert cost.predicted_seconds(many, card) == 4 + card.triton_launch
    card = replace(card, float8_rate=20.0)
    eight = cost.Operation("", cost.FLOAT8, 1, bytes=1.0, flops=100.0)
    assert cost.predicted_seconds([multiplies, eight], card) == 20 + 10
