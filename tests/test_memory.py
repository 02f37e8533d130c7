"""A training step leaves nothing behind, and holds no more than docs/large_runs.md and `step_memory` say."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton import memory
from pc_triton.batch import Batch
from pc_triton.models import Transformer

WAYS = [
    {"order": "error", "steps": 1},
    {"order": "error", "steps": 2},
    {"order": "error", "steps": 2, "precision": 3.0},
    {"order": "sweep"},
    {"order": "simultaneous", "precision": 1.0},
    {"order": "simultaneous", "state_optimizer": lambda states: torch.optim.SGD(states, lr=0.1)},
]


@pytest.mark.parametrize("learns", [True, False], ids=["backward", "loss only"])
@pytest.mark.parametrize("options", WAYS, ids=map(str, range(len(WAYS))))
def test_inference_is_freed(options, learns):
    """A graph that holds its inference, and is held by it, is a cycle through C++ that Python cannot collect."""
    model = nn.Sequential(pc.Linear(4, 5), nn.Tanh(), pc.Linear(5, 5), pc.Categorical(), pc.Linear(5, 3))
    loss, batch = pc.FreeEnergy(model, **options).loss_and_batch(torch.randn(2, 4), torch.tensor([0, 2]))
    if learns:
        loss.backward()
    alive = weakref.ref(batch)
    del loss, batch
    gc.collect()
    assert alive() is None


def test_incremental_inference_is_freed():
    model = nn.Sequential(pc.Linear(4, 5), nn.Tanh(), pc.Linear(5, 3))
    free_energy = pc.FreeEnergy(model, order="incremental")
    before = sum(type(o) is Batch for o in gc.get_objects())
    for loss in free_energy.incremental(torch.randn(2, 4), torch.tensor([0, 2])):
        loss.backward()
    del loss
    gc.collect()
    assert sum(type(o) is Batch for o in gc.get_objects()) == before


def held(blocks, width, tokens, heads, *, order=None, state=True, **options):
    """Values per token that a transformer's training step holds as its backward pass begins, but for parameters."""
    model = Transformer(50, width, heads, blocks, tokens, attention=state)
    x, y = torch.randint(50, (2, 2, tokens))
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if order is None:
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        else:
            free_energy = pc.FreeEnergy(model, order=order, **options)
            batch = free_energy.batch(x, y)
            steps = free_energy.settle(batch, free_energy.moves)
            storages.clear()  # the passes before have freed theirs
            loss = batch.learn()
            remembered = getattr(steps, "remembered", None) or {}
            for node in batch.nodes:
                for t in (node.state, remembered.get(node), node.mu, node.emission):
                    if t is not None:
                        keep(t)
    assert loss.requires_grad
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(s.nbytes() for s in storages.values()) / (4 * x.numel())


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda d, n, h: 16 * d + h + 4),
        ({"order": "error"}, lambda d, n, h: 22 * d + 3 * h * n + 4),
        ({"order": "error", "steps": 4}, lambda d, n, h: 28 * d + 4 * h * n + 4),
        ({"order": "error", "state_dtype": torch.bfloat16}, lambda d, n, h: 19 * d + 2.5 * h * n + 4),
        ({"order": "error", "state_dtype": torch.bfloat16, "steps": 4}, lambda d, n, h: 22 * d + 3 * h * n + 4),
        ({"order": "sweep"}, lambda d, n, h: 29 * d + 4 * h * n + 4),
        ({"order": "simultaneous"}, lambda d, n, h: 29 * d + 4 * h * n + 4),
        ({"order": "error", "state": False}, lambda d, n, h: 22 * d + h + 4),
        ({"order": "error", "steps": 4, "state": False}, lambda d, n, h: 28 * d + h + 4),
        ({"order": "sweep", "state": False}, lambda d, n, h: 30 * d + h + 4),
    ],
)
def test_what_a_block_holds(options, formula):
    """The formulas of docs/large_runs.md, exactly."""
    for size in ((32, 16, 2), (64, 16, 2), (32, 32, 2), (32, 16, 4)):
        assert held(2, *size, **options) - held(1, *size, **options) == formula(*size)


METHODS = {
    "bp": {"method": "bp"},
    "T = 1": {"inference_steps": 1},
    "T = 3": {},
    "T = 5": {"inference_steps": 5},
    "sweep": {"order": "sweep"},
    "simultaneous": {"order": "simultaneous"},
    "incremental": {"order": "incremental"},
    "gaussian-pc": {"method": "gaussian-pc"},
    "gaussian-pc, sweep": {"method": "gaussian-pc", "order": "sweep"},
    "states in bfloat16": {"state_dtype": "bfloat16"},
    "packed": {"stream": "documents"},
    "packed, bp": {"stream": "documents", "method": "bp"},
}
SIZES = {
    "parameters": {"width": 64, "heads": 2, "blocks": 3, "context": 16, "vocabulary": 1000, "batch": 2},
    "pairs": {"width": 32, "heads": 4, "blocks": 1, "context": 96, "vocabulary": 256, "batch": 3},
    "width": {"width": 96, "heads": 2, "blocks": 2, "context": 8, "vocabulary": 256, "batch": 64},
    "logits": {"width": 32, "heads": 2, "blocks": 2, "context": 16, "vocabulary": 3000, "batch": 32},
    "micro-batches": {"width": 32, "heads": 4, "blocks": 2, "context": 16, "vocabulary": 256, "batch": 7},
}


def peak(settings, backend, replicate=lambda model, free_energy: free_energy or model):
    """The most bytes of tensors that live at once in a training step, with the parameters and AdamW's state."""
    training = pytest.importorskip("pc_triton.train", reason="pip install 'pc_triton[train]'")
    x, y = torch.randint(settings.vocabulary, (2, settings.batch, settings.context))
    with pc.use_backend(backend), torch.profiler.profile(profile_memory=True) as profile:
        model, free_energy = training.build(settings)
        learner = replicate(model, free_energy)
        optimizer = training.adamw(model, settings.lr)
        optimizer.param_groups[0]["fused"] = backend == "triton"  # as on a GPU
        optimizer.param_groups[0]["foreach"] = False
        for step in range(2):
            with torch.profiler.record_function(f"training step {step}"):
                for _ in training.backward(learner, free_energy, x, y, settings.micro_batch, settings.dtype):
                    optimizer.step()
                    optimizer.zero_grad()
    events = profile.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "training step 1")  # AdamW's state is there
    live, most = 0, 0
    for when, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        most = max(most, live if when >= begin else 0)
    return most


@pytest.fixture
def no_launches(monkeypatch):
    """What the kernels compute is not computed: what a step allocates does not depend on it."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *arguments, **options: None)


def check(method, size, backend, **more):
    from pc_triton.settings import Settings

    options = {**METHODS[method], **SIZES[size], **more}
    if size == "micro-batches" and method != "incremental":
        options["micro_batch"] = 3
    settings = Settings(**options)
    told = memory.step_memory(settings, triton=backend == "triton")
    assert told.total == pytest.approx(peak(settings, backend), rel=0.1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_is_told_to_need(method, size):
    """Within a tenth of what is measured."""
    check(method, size, "torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", ["pairs", "width", "logits"])
@pytest.mark.parametrize("method", ["bp", "T = 1", "T = 3", "T = 5", "sweep", "incremental", "gaussian-pc"])
def test_what_a_step_is_told_to_need_in_less(method, size, checkpointing, dtype):
    """In bfloat16, with blocks computed again, and both."""
    if checkpointing or dtype == "bfloat16":
        check(method, size, "torch", dtype=dtype, checkpointing=checkpointing)


def test_what_shards_need():
    """Parameters, gradients and AdamW's state are shared; what is gathered is whole."""
    from pc_triton.settings import Settings

    settings = Settings(width=512, batch=4, context=1, vocabulary=300)
    p = sum(x.numel() for x in Transformer(300, 512, 4, 2, 1).parameters())
    copies = [memory.step_memory(settings, 4, triton=True, shard=shard).parameters / (4 * p) for shard in (False, True)]
    assert copies == [5, 1 + 4 / 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize("size", ["parameters", "pairs", "width", "logits"])
@pytest.mark.parametrize("method", ["T = 1", "T = 3", "T = 5", "sweep", "incremental", "gaussian-pc"])
def test_what_a_step_on_triton_is_told_to_need(no_launches, method, size):
    check(method, size, "triton")


def test_what_a_process_of_two_is_told_to_need():
    """DistributedDataParallel has a copy of the gradients.

    The other process is torch's fake one. Gloo frees tensors in threads of its own, which the profiler does not see.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pc_triton.parallel import replicate
    from pc_triton.settings import Settings

    def unsent(state, bucket):
        sent = torch.futures.Future()
        sent.set_result(bucket.buffer())
        return sent

    def replicate_alone(model, free_energy):
        replica = replicate(model, free_energy)
        replica.register_comm_hook(None, unsent)
        return replica

    sizes = {"width": 64, "heads": 2, "blocks": 3, "context": 16, "vocabulary": 1000}
    told = memory.step_memory(Settings(batch=4, **sizes), processes=2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert told.total == pytest.approx(peak(Settings(batch=2, **sizes), "torch", replicate_alone), rel=0.1)
    finally:
        dist.destroy_process_group()


def test_the_states_bytes():
    """In bfloat16 they take half, and nothing else changes."""
    from pc_triton.settings import Settings

    sizes = {"width": 64, "heads": 2, "blocks": 3, "context": 16, "vocabulary": 256, "batch": 32}
    wide, narrow = (memory.step_memory(Settings(state_dtype=dtype, **sizes)) for dtype in ("float32", "bfloat16"))
    assert wide.blocks - narrow.blocks == 2 * 32 * 16 * 3 * (6 * 64 + 2 * 16)
    assert (wide.parameters, wide.head) == (narrow.parameters, narrow.head)


def test_slopes_of_a_soak(monkeypatch):
    """A line has one slope, after the first tenth."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    pytest.importorskip("matplotlib")
    import soak

    samples = [(step, 1e3 if step < 100 else 400 + 0.002 * step) for step in range(0, 1000, 10)]
    assert soak.slopes(samples) == pytest.approx((2.0, 2.0, 2.0))
