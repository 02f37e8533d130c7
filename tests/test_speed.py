"""A run's arithmetic and speed: the dtype of products, one graph, blocks computed again, tokens a second, a trace."""

# ruff: noqa: F811 (a fixture is the argument of its name)

import json
import shutil

import pytest
import torch

pytest.importorskip("tokenizers", reason="the command line's extras: pip install 'pc_triton[train]'")

from test_cli import _fast, data, failure, train_arguments  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from pc_triton import build, checkpoint, hardware, speed
from pc_triton import train as training
from pc_triton.cli import main
from pc_triton.settings import Settings

SIZES = {"width": 16, "heads": 2, "blocks": 2, "context": 8, "vocabulary": 300}
WAYS = [
    {"method": "bp"},
    {},
    {"inference_steps": 3},
    {"order": "sweep"},
    {"order": "simultaneous", "precision": "2"},
    {"order": "incremental"},
    {"method": "gaussian-pc"},
]


def step(micro_batch=None, seen=None, **options):
    """The losses of a training step of a batch of 4, and its gradients."""
    torch.manual_seed(0)
    settings = Settings(batch=4, micro_batch=micro_batch, **SIZES, **options)
    model, free_energy = build.build(settings)
    if seen is not None:
        model.blocks[0].up.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    learner = free_energy or model
    if settings.compile:
        learner = build.compiled(learner, free_energy, micro_batch is None)
    x, y = torch.randint(300, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    found = list(training.backward(learner, free_energy, x, y, micro_batch, settings.dtype))
    return torch.stack(found), torch.cat([p.grad.flatten() for p in model.parameters()])


# The dtype of products.


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_products_in_bfloat16(options):
    """They are made in it, weights and losses stay float32, and the gradient is that of float32 but for rounding."""
    seen = []
    losses, grad = step(dtype="bfloat16", seen=seen, **options)
    assert set(seen) == {torch.bfloat16}
    assert losses.dtype == grad.dtype == torch.float32
    whole, whole_grad = step(dtype="float32", **options)
    rounding = 8 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(losses, whole, rtol=rounding, atol=0)
    assert 0 < float((grad - whole_grad).norm()) <= 2 * rounding * float(whole_grad.norm())
    assert not torch.is_autocast_enabled("cpu")


def test_auto_is_what_the_device_has(monkeypatch):
    settings = Settings()
    assert hardware.settled_dtype(settings, torch.device("cpu")).dtype == "float32"
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert hardware.settled_dtype(settings, torch.device("cuda")).dtype == dtype
    given = Settings(dtype="float32")
    assert hardware.settled_dtype(given, torch.device("cuda")) is given


def test_a_run_in_bfloat16(tmp_path, data, capsys):
    """The checkpoint knows its dtype: a run goes on in it, and another is refused; an old one was in float32."""
    assert main(train_arguments(data, tmp_path / "run", "--dtype bfloat16 --steps 4")) == 0
    assert "pc in bfloat16 on 1 x cpu" in capsys.readouterr().out
    resume = ["train", "--resume", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert "--dtype bfloat16, not float32" in failure(capsys, [*resume, "--dtype", "float32", "--steps", "5"])
    assert main([*resume, "--steps", "5", "--dtype", "auto"]) == 0
    assert "pc in bfloat16" in capsys.readouterr().out
    tensors, record = checkpoint.load(tmp_path / "run")
    assert record["settings"]["dtype"] == "bfloat16"
    assert {t.dtype for name, t in tensors.items() if name.startswith(("model.", "optimizer."))} == {torch.float32}
    del record["settings"]["dtype"], record["speed"]
    checkpoint.save(tmp_path / "run" / checkpoint.NAME, tensors, record)
    assert "--dtype float32, not bfloat16" in failure(capsys, [*resume, "--dtype", "bfloat16"])
    assert main([*resume, "--steps", "6"]) == 0
    assert "pc in float32" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "within"), [("cuda", "high"), ("cpu", "highest")])
def test_tf32_on_a_gpu_alone(device, within):
    with hardware.tf32(torch.device(device)):
        assert torch.get_float32_matmul_precision() == within
    assert torch.get_float32_matmul_precision() == "highest"


def test_adamw_is_fused_on_a_gpu():
    model = torch.nn.Linear(2, 2)
    assert not build.adamw(model, 1.0).param_groups[0]["fused"]
    if torch.cuda.is_available():
        assert build.adamw(model.cuda(), 1.0).param_groups[0]["fused"]


# One graph, and blocks computed again.


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("options", [{"method": "bp"}, {}, {"order": "sweep"}], ids=str)
def test_compiled_steps(monkeypatch, options, micro_batch):
    """They are the same; a PC step that is one call is one graph, and else the model alone is compiled."""
    calls = []
    for name in ("compile", "compile_model"):
        original = getattr(training.FreeEnergy, name)
        monkeypatch.setattr(
            training.FreeEnergy, name, lambda self, n=name, f=original: calls.append(n) or f(self), raising=True
        )
    losses, grad = step(micro_batch, compile=True, **options)
    whole, whole_grad = step(micro_batch, **options)
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-3, atol=1e-5)
    assert calls == ([] if options.get("method") == "bp" else ["compile" if micro_batch is None else "compile_model"])


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_blocks_computed_again(options):
    """The gradients are the same but for the order of sums, and each block is called more often."""
    plain, again = [], []
    losses, grad = step(seen=plain, **options)
    losses_again, grad_again = step(checkpointing=True, seen=again, **options)
    torch.testing.assert_close(losses_again, losses, rtol=1e-6, atol=0)
    assert float((grad - grad_again).norm()) <= 32 * torch.finfo(torch.float32).eps * float(grad.norm())
    assert len(again) > len(plain)


def test_a_run_takes_up_checkpointing(tmp_path, data):
    """It may be switched on and off when a run is resumed, and changes no loss."""
    options = "--steps 4 --eval-every 2"
    assert main(train_arguments(data, tmp_path / "straight", options)) == 0
    assert main(train_arguments(data, tmp_path / "run", "--steps 2 --eval-every 2 --checkpointing")) == 0
    assert checkpoint.load(tmp_path / "run")[1]["settings"]["checkpointing"]
    resume = ["train", "--resume", "--device", "cpu", "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main([*resume, "--no-checkpointing"]) == 0
    record = checkpoint.load(tmp_path / "run")[1]
    assert not record["settings"]["checkpointing"]
    assert len(record["losses"]) == 4


# Speed.


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_products_are_counted(options):
    """As torch counts them, but for what the first block need not send back and attention's own."""
    settings = Settings(batch=4, **SIZES, **options)
    step(**options)  # a first batch of the tracked step costs one forward pass more
    torch.manual_seed(0)
    model, free_energy = build.build(settings)
    x, y = torch.randint(300, (2, 4, 8))
    list(training.backward(free_energy or model, free_energy, x, y, None))
    with FlopCounterMode(display=False) as counter:
        list(training.backward(free_energy or model, free_energy, x, y, None))
    assert speed.products(settings) * x.numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_clock(monkeypatch):
    monkeypatch.setattr(speed.time, "perf_counter", iter([10.0, 12.0]).__next__)
    settings = Settings(batch=4, **SIZES)
    clock = speed.Clock(settings, 1e6)
    monkeypatch.setattr(speed.time, "perf_counter", iter([20.0, 22.0]).__next__)
    clock.start(5)
    found = clock.read(15)
    assert found == {"tokens_per_second": 160.0, "share_of_peak": pytest.approx(160 * speed.products(settings) / 1e6)}
    assert speed.told({"tokens_per_second": 1234.5, "share_of_peak": 0.456}) == "1,234 tokens/s, 46% of the peak"
    assert speed.told({"tokens_per_second": 1234.5}) == "1,234 tokens/s"


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("a card of next year", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_the_peak_of_a_card(name, dtype, rate):
    assert hardware.peak(name, dtype) == rate


def test_tokens_a_second_are_told_and_kept(tmp_path, data, capsys):
    assert main(train_arguments(data, tmp_path)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert all(" tokens/s (unigram" in line for line in lines)
    rows = checkpoint.load(tmp_path)[1]["speed"]
    assert [row["step"] for row in rows] == [10, 20]
    assert all(row["tokens_per_second"] > 0 and "share_of_peak" not in row for row in rows)


def test_a_trace_of_a_few_steps(tmp_path, data):
    assert main(train_arguments(data, tmp_path, "--steps 6 --profile --quiet")) == 0
    events = json.loads((tmp_path / training.TRACE).read_text())["traceEvents"]
    assert sum(str(event.get("name", "")).startswith("ProfilerStep#") for event in events) >= speed.TRACED
    assert any(event.get("name") == "aten::mm" for event in events)
