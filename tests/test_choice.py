"""Which kernel: by the model of a card, and where times were measured by those. Nothing is launched."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from pc_triton import choice, dispatch
from pc_triton.cards import CARDS, Card, known
from pc_triton.choice import chained, fused
from pc_triton.kernels import chain
from pc_triton.kernels.common import product_precision
from pc_triton.kernels.linear import plan

H100 = known("NVIDIA H100 80GB HBM3", 132)
KINDS = ("bfloat16", "float16", "tf32", "float32")


# The card.


def test_cards_by_their_names():
    assert Card("NVIDIA H100 80GB HBM3", 132, 3.35e12, 989e12, 494e12, 67e12) == H100
    assert known("NVIDIA H100 NVL", 132).bandwidth == 3.9e12
    assert known("NVIDIA GH200 480GB", 132).bandwidth == 4.9e12
    assert known("NVIDIA A100-SXM4-80GB", 108).half == 312e12
    assert known("NVIDIA L40S", 142).half == 362e12
    assert known("NVIDIA A10G", 80) == Card("NVIDIA A10G", 80)  # not an A10
    names = [card.name for card in CARDS]
    assert len(set(names)) == len(names)


def test_a_slice_has_its_share():
    part = known("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16)
    assert part.multiprocessors == 16
    assert part.bandwidth == pytest.approx(H100.bandwidth * 16 / 132)
    assert part.rate("tf32") == pytest.approx(H100.rate("tf32") * 16 / 132)


def test_the_card_of_a_device(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA B200", multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    dispatch.card_of.cache_clear()
    try:
        assert dispatch.card_of(torch.device("cuda:0")) == known("NVIDIA B200", 148)
    finally:
        dispatch.card_of.cache_clear()


def test_a_tensor_on_a_cpu_asks_for_no_card():
    x, weight = torch.zeros(16, 8), torch.zeros(8, 8)
    assert not dispatch.may_chain(x)
    assert not dispatch.fuses(x, weight)


def test_a_tensor_on_a_gpu_asks_for_its_card(monkeypatch):
    """What decides is the shape of the product, the chain's, and the precision of products."""
    monkeypatch.setattr(dispatch, "card_of", lambda device: H100)
    seen = []
    monkeypatch.setattr(dispatch, "fused", lambda *a: seen.append(a) or choice.Choice(True, ""))
    monkeypatch.setattr(dispatch, "chained", lambda *a: seen.append(a) or choice.Choice(False, ""))
    on_gpu = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda:0"), shape=(4, 32, 512), element_size=lambda: 2,
        dim=lambda: 3, numel=lambda: 4 * 32 * 512,
    )  # fmt: skip
    assert dispatch.fuses(on_gpu, SimpleNamespace(dtype=torch.bfloat16, shape=(1024, 512)))
    assert dispatch.may_chain(on_gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    assert not dispatch.fuses(on_gpu, SimpleNamespace(dtype=torch.bfloat16, shape=(1024, 512)))
    assert seen == [(H100, 128, 1024, 512, "bfloat16")]


# The linear layer and its node.


def break_even(card: Card, kind: str) -> int:
    """The first K at which a large layer is not fused."""
    return next(k for k in itertools.count(16, 16) if not fused(card, 2**17, 8192, k, kind).taken)


def test_break_even_on_an_h100():
    """saved / bandwidth = (1 / 0.78 - 1) product / rate, where nothing is idle."""
    expected = 2 * (0.65 * 989e12) / (0.9 * 3.35e12) / (1 / 0.78 - 1)
    assert break_even(H100, "bfloat16") == pytest.approx(expected, rel=0.03)
    assert 1400 < expected < 1600


@pytest.mark.parametrize("card", [card for card in CARDS if card.bandwidth], ids=lambda card: card.name)
def test_small_k_gains_and_large_k_loses(card):
    """Whatever the card: once not worth it, it is not at any larger K; exact float32 gains least."""
    for kind in KINDS:
        taken = [fused(card, 2**17, 8192, k, kind).taken for k in range(16, 8192, 16)]
        assert taken == sorted(taken, reverse=True)
        assert taken[0]
        assert not taken[-1]
    assert break_even(card, "float32") < break_even(card, "tf32")
    assert break_even(card, "float16") == break_even(card, "bfloat16")


def test_a_product_that_leaves_a_card_idle_is_cublas():
    """Of 16 tiles on 132 multiprocessors: cuBLAS cuts such a product otherwise."""
    assert fused(H100, 16384, 1024, 512, "bfloat16").taken
    assert not fused(H100, 512, 512, 512, "bfloat16").taken
    assert fused(known("NVIDIA H100 MIG 1g.10gb", 16), 512, 512, 512, "bfloat16").taken  # which 16 tiles fill


def test_reasons():
    assert fused(H100, 16384, 4096, 512, "bfloat16").reason.startswith("it saves 90.3 us of memory and a launch for ")
    assert "no rows of whole 16 bytes" in fused(H100, 16384, 4096, 4100, "bfloat16").reason
    assert "no rows" in fused(H100, 0, 4096, 512, "bfloat16").reason
    assert fused(H100, 16384, 4096, 500, "tf32").taken  # 2000 bytes
    assert "not listed" in fused(Card("NVIDIA T4", 40), 16384, 4096, 512, "float16").reason
    assert "nothing was measured" in fused(Card("NVIDIA T4", 40), 16384, 4096, 512, "float16").reason


def test_tiles_are_the_kernels():
    for kind, itemsize, arch in itertools.product(KINDS, (2, 4), (80, 90, 100)):
        if (itemsize == 2) == (kind in ("bfloat16", "float16")):
            tiles = plan(4096, 4096, itemsize, arch, "tf32" if kind == "tf32" else "ieee")
            assert tiles.rows == tiles.cols == choice.TILES[kind]
    assert chain.SAMPLES == choice.CHAIN_SAMPLES


# The chain.


@pytest.mark.parametrize(
    ("samples", "width", "answer", "reason"),
    [
        (16, 64, True, "1 programs run at once on 132"),
        (132 * 16, 256, True, "132 programs run at once"),
        (132 * 16 + 1, 256, False, "133 programs are more than 132 multiprocessors run at once"),
        (16, 257, False, "width 257 is over 256"),
        (0, 64, False, "no samples"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_chain(samples, width, answer, reason, kind):
    found = chained(H100, samples, width, 5, kind)
    assert found.taken is answer
    assert reason in found.reason


def test_chain_on_cards_that_are_not_listed():
    """Their multiprocessors say enough."""
    assert chained(Card("NVIDIA T4", 40), 640, 128, 3, "float16").taken
    assert not chained(Card("NVIDIA T4", 40), 641, 128, 3, "float16").taken


# What was measured.

LINEAR = [[16384, 4096, 4096, 1.2], [1024, 256, 256, 0.7]]
CHAIN = [[64, 128, 3, 3.0], [4096, 512, 3, 0.7], [64, 128, 8, 2.0]]


def test_what_was_measured_decides():
    """The nearest in logarithms, where the model would say otherwise; rows of no whole vectors are cuBLAS all the same.

    A chain larger than all that was measured is the layers'.
    """
    assert not fused(H100, 16384, 4096, 4096, "bfloat16").taken
    assert fused(H100, 16384, 4096, 4096, "bfloat16", LINEAR) == (True, "measured: apart takes 1.2 times as long")
    assert fused(H100, 8192, 8192, 2048, "bfloat16", LINEAR).taken
    assert fused(H100, 4096, 512, 256, "bfloat16", LINEAR) == (False, "measured: apart takes 0.7 times as long")
    assert not fused(H100, 16384, 4096, 4100, "bfloat16", LINEAR).taken
    assert chained(H100, 100, 100, 4, "float32", CHAIN).taken
    assert not chained(H100, 1024, 400, 4, "float32", CHAIN).taken
    assert chained(H100, 64, 128, 9, "float32", CHAIN) == (False, "larger than all that was measured")


def test_the_table_is_of_a_device_and_a_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "TUNED", tmp_path / "tuned.json")
    kinds = {"bfloat16": LINEAR, "tf32": [[16384, 4096, 256, 0.5]]}
    table = {"linear": {H100.name: kinds}, "chain": {H100.name: {"float32": CHAIN}}}
    dispatch.TUNED.write_text(json.dumps(table))
    caches = (dispatch.fused, dispatch.chained, dispatch.measured)
    for cache in caches:
        cache.cache_clear()
    try:
        assert dispatch.fused(H100, 16384, 4096, 4096, "bfloat16").taken
        assert not dispatch.fused(H100, 16384, 4096, 4096, "float16").taken
        assert not dispatch.fused(known("NVIDIA A100", 108), 16384, 4096, 4096, "bfloat16").taken
        assert not dispatch.fused(H100, 16384, 4096, 256, "tf32").taken
        assert fused(H100, 16384, 4096, 256, "tf32").taken
        assert not dispatch.chained(H100, 4096, 512, 3, "float32").taken
        assert dispatch.chained(H100, 64, 200, 20, "bfloat16").taken
    finally:
        for cache in caches:
            cache.cache_clear()


# float32's products.


@pytest.fixture
def gpu(monkeypatch):
    """The GPU that the launchers see; and torch's word on float32's products as it was."""
    from pc_triton.kernels import common

    seen = [90]
    monkeypatch.setattr(common, "arch", lambda: seen[0])
    yield lambda arch: seen.__setitem__(0, arch)
    torch.set_float32_matmul_precision("highest")


def test_products_are_as_exact_as_torchs(gpu):
    assert product_precision(torch.float32) == dispatch_kind(torch.float32)[1] == "ieee"
    for word, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(word)
        assert product_precision(torch.float32) == expected
        assert dispatch_kind(torch.float32)[0] == {"ieee": "float32"}.get(expected, expected)
        assert product_precision(torch.bfloat16) == product_precision(torch.float16) == "ieee"
        assert dispatch_kind(torch.bfloat16)[0] == "bfloat16"


def dispatch_kind(dtype: torch.dtype) -> tuple[str, str]:
    """The table's word for it, and the kernels'."""
    return dispatch.kind_of(dtype), product_precision(dtype)


def test_products_by_the_other_switches(gpu):
    """The old name, and the new one of torch 2.9."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    assert product_precision(torch.float32) == "tf32"
    matmul.allow_tf32 = False
    assert product_precision(torch.float32) == "ieee"
    if hasattr(matmul, "fp32_precision"):
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            assert product_precision(torch.float32) == "tf32"
        finally:
            matmul.fp32_precision = before


@pytest.mark.parametrize("arch", [75, "gfx942"])
def test_products_stay_exact_where_there_are_no_such_cores(arch, gpu):
    gpu(arch)
    torch.set_float32_matmul_precision("high")
    assert product_precision(torch.float32) == "ieee"
