"""How near each kernel comes to its floor: the time in which a copy would move the bytes that it must read and write,
or in which cuBLAS would do its floating-point operations, whichever is longer.

    pytest bench/bench_kernels.py --benchmark-enable

On a CPU the sizes are small and plain torch computes; on a GPU they fill the card. In the ordinary suite each case runs
once, untimed, and ``gpu.py`` makes a GPU's table from the same cases. Bytes count every tensor once; floating-point
operations (a transcendental function is one) are those of the equations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton import float8, reference
from pc_triton.dispatch import backend, use_chain
from pc_triton.head import HeadEnergy

Call = Callable[[], object]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
STATES = {torch.float32: "", torch.bfloat16: ", bfloat16 state"}
PHASES = (("forward", "error"), ("step", "error"), ("step", "state"))
LOCATION = ("gaussian", "laplace", "student_t")  # in error form their step reads no mu and hands grad on
FLOPS = {  # an element, by phase
    "gaussian": (3, 5, 8),
    "gaussian_logvar": (14, 27, 30),  # a pair (m, s)
    "bernoulli": (14, 27, 23),
    "laplace": (8, 9, 16),
    "student_t": (9, 11, 17),
    "categorical": (14, 33, 27),
}


class Case(NamedTuple):
    """One launch, or forward and backward: what it must move and compute an element, and how to set it up."""

    name: str
    device: str
    elements: int
    bytes_each: float
    flops_each: int
    build: Callable[[], dict[str, Call]]  # "pc_triton", then its rivals by name

    @property
    def bytes(self) -> int:
        """All that must be read and written."""
        return int(self.elements * self.bytes_each)

    @property
    def flops(self) -> float:
        """All that must be computed."""
        return float(self.elements) * self.flops_each


def node_bytes(family: str, phase: str, form: str, size: int, state: int = 4) -> tuple[int, int]:
    """Bytes an element (gaussian_logvar: a pair) that must be read and written; mu has ``size``, the state its own."""
    if family == "gaussian_logvar":
        if phase == "forward":
            return 3 * size + 2 * state, size
        return (3 if form == "error" else 4) * size + 2 * state, 2 * size + 2 * state
    if phase == "forward":
        return size + state, size
    return (size + state, state) if form == "error" and family in LOCATION else (2 * size + state, size + state)


def node(name: str, family: str, device: str, *shape: int, **options) -> Iterator[Case]:
    """A family's forward, and its step in error form and in state form, with plain torch for a rival.

    In error form with a state in bfloat16, too.
    """
    dtype = DTYPE[device]

    def build(phase: str, form: str, state_dtype: torch.dtype) -> dict[str, Call]:
        mu, state = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, device=device).mul_(0.1)
        state = state + mu if form == "state" else state.to(state_dtype)
        pi = torch.rand(shape[0], device=device) + 0.5
        half = (*shape[:-1], shape[-1] // 2)
        noise = (torch.randn(half, dtype=dtype, device=device),) if family == "gaussian_logvar" else ()
        grad = torch.randn(half if noise else shape, dtype=dtype, device=device).mul_(0.1)
        units = (pi,) if family in ("laplace", "student_t") else ()
        arguments = (mu, state, pi, *units) if phase == "forward" else (mu, state, grad, pi, *units, pi / 3, pi / 3)
        run = {"form": form, **options}
        ours = getattr(backend(mu), f"{family}_{phase}")
        calls: dict[str, Call] = {"pc_triton": partial(ours, *arguments, *noise, **run)}
        if device == "cuda":
            eager = getattr(reference, f"{family}_{phase}")
            calls["eager"] = partial(eager, *arguments, *noise, **run)
            calls["compiled"] = partial(torch.compile(eager, dynamic=False), *arguments, *noise, **run)
        if family == "categorical" and phase == "forward":
            calls["torch"] = partial(torch.softmax, mu, -1)
        return calls

    for state_dtype, kind in STATES.items():
        for (phase, form), flops in zip(PHASES, FLOPS[family]):
            if form == "state" and kind:
                continue
            read, written = node_bytes(family, phase, form, dtype.itemsize, state_dtype.itemsize)
            bytes_each = read * (0.5 if options.get("causal") else 1.0) + written  # what causal hides is not read
            elements = ELEMENTS[device] // (2 if family == "gaussian_logvar" else 1)
            call = partial(build, phase, form, state_dtype)
            yield Case(f"{name} {phase}, {form} form{kind}", device, elements, bytes_each, flops, call)


def clamped(device: str, columns: int) -> Case:
    """Energy of the node clamped to labels, and its gradient; the rivals are torch's cross-entropy."""
    rows, dtype = ELEMENTS[device] // columns, DTYPE[device]

    def build() -> dict[str, Call]:
        mu = torch.randn(rows, columns, dtype=dtype, device=device)
        labels, ones = torch.randint(columns, (rows,), device=device), torch.ones(rows, device=device)

        def node(module) -> torch.Tensor:
            _, lse = module.clamped_categorical_forward(mu, labels, -100)
            return module.clamped_categorical_backward(mu, labels, lse, ones, -100)

        def torchs(loss) -> torch.Tensor:
            with torch.enable_grad():
                logits = mu.detach().requires_grad_()
                return torch.autograd.grad(loss(logits, labels, reduction="sum"), logits)[0]

        calls: dict[str, Call] = {"pc_triton": partial(node, backend(mu))}
        if device == "cuda":
            calls["eager"] = partial(node, reference)
            calls["compiled"] = partial(torchs, torch.compile(F.cross_entropy, dynamic=False))
        return {**calls, "torch": partial(torchs, F.cross_entropy)}

    name = f"clamped categorical {columns} forward and backward"
    return Case(name, device, rows * columns, 3 * dtype.itemsize, 9, build)


def guard(device: str) -> Case:
    """The guard's memory where F rose in no sample; the rival is plain torch."""
    elements = ELEMENTS[device]

    def build() -> dict[str, Call]:
        state, accepted = torch.randn(2, elements // 2**14, 2**14, device=device)
        rose = torch.zeros(len(state), dtype=torch.bool, device=device)
        calls: dict[str, Call] = {"pc_triton": partial(backend(state).guard_step, state, accepted, rose)}
        return calls | ({"eager": partial(reference.guard_step, state, accepted, rose)} if device == "cuda" else {})

    return Case("guard", device, elements, 8, 0, build)


def rounding(device: str, rows: int, columns: int) -> Case:
    """An operand rounded to 8 bits, row by row; the rival is plain torch."""
    dtype = DTYPE[device]

    def build() -> dict[str, Call]:
        x = torch.randn(rows, columns, dtype=dtype, device=device)
        calls: dict[str, Call] = {"pc_triton": partial(float8.rounded, x, float8.FORWARD)}
        eager = partial(reference.rows_rounded, x, float8.FORWARD)
        return calls | ({"eager": eager} if device == "cuda" else {})

    return Case(f"float8 {rows} rows of {columns}", device, rows * columns, dtype.itemsize + 1, 2, build)


def rounding_weight(device: str, rows: int, columns: int) -> Case:
    """A weight rounded to 8 bits, as it lies and transposed; it is read once more for its largest number."""
    dtype = DTYPE[device]

    def build() -> dict[str, Call]:
        weight = torch.randn(rows, columns, dtype=dtype, device=device)
        calls: dict[str, Call] = {"pc_triton": lambda: float8.Weight(weight).rounded}
        eager = partial(reference.weight_rounded, weight, float8.FORWARD)
        return calls | ({"eager": eager} if device == "cuda" else {})

    return Case(f"float8 weight {rows}x{columns}", device, rows * columns, 2 * dtype.itemsize + 2, 2, build)


def language_head(device: str, rows: int, width: int, columns: int, learns: bool) -> Case:
    """`Head`'s energy with dE/dx, as an inference step needs them, or with dE/dW too, as learning does.

    An element is one of the logits, which none of the floor's bytes are. Rivals: the linear layer and torch's
    cross-entropy, eager and compiled, and where they are installed Liger's fused layer and Apple's cut cross-entropy;
    each is asked for the same gradients.
    """
    dtype = DTYPE[device]

    def build() -> dict[str, Call]:
        x = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(columns, width, dtype=dtype, device=device).div_(width**0.5).requires_grad_()
        labels = torch.randint(columns, (rows,), device=device)
        wanted = [x, weight] if learns else [x]

        def gradients(loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(loss(), wanted)

        def torchs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(x, weight), labels, reduction="sum")

        def ours() -> torch.Tensor:
            return HeadEnergy.apply(x, weight, None, labels, -100, learns).sum()

        calls: dict[str, Call] = {"pc_triton": partial(gradients, ours)}
        if device == "cuda":
            calls["compiled"] = partial(gradients, partial(torch.compile(torchs, dynamic=False), x, weight))
            if find_spec("liger_kernel"):
                from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

                liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
                calls["liger"] = partial(gradients, partial(liger, weight, x, labels))
            if find_spec("cut_cross_entropy"):
                from cut_cross_entropy import linear_cross_entropy

                cut = partial(linear_cross_entropy, x, weight, labels, reduction="sum")
                calls["cut cross-entropy"] = partial(gradients, cut)
        return {**calls, "torch": partial(gradients, partial(torchs, x, weight))}

    matrices = dtype.itemsize * 2 * (rows * width + (columns * width if learns else 0))
    name = f"head {rows}x{width}x{columns}, {'learning' if learns else 'inference'}"
    elements = rows * columns
    return Case(name, device, elements, matrices / elements, (6 if learns else 4) * width + 5, build)


def layer(device: str, rows: int, n: int, k: int) -> Case:
    """A linear layer with its node, error form. Rivals: cuBLAS's product, alone and with the node."""
    dtype = DTYPE[device]
    size, elements = dtype.itemsize, rows * n

    def build() -> dict[str, Call]:
        x, weight, bias = (torch.randn(shape, dtype=dtype, device=device) for shape in ((rows, k), (n, k), (n,)))
        state, pi = torch.randn(rows, n, device=device), torch.rand(rows, device=device) + 0.5
        ours = backend(x)

        def apart():
            return ours.gaussian_forward(F.linear(x, weight, bias), state, pi, form="error")

        return {
            "pc_triton": partial(ours.linear_forward, x, weight, bias, state, pi),
            "product and node": apart,
            "torch": partial(F.linear, x, weight, bias),
        }

    bytes_each = size * (rows * k + n * k) / elements + size + 4  # x and W, and the node's
    return Case(f"linear {rows}x{n}x{k}", device, elements, bytes_each, 2 * k + 4, build)


def chain(device: str, samples: int, width: int, layers: int) -> Case:
    """A training step at the defaults (T = 2) on layers of one width, without the products for the weights.

    It is not the first, so that its step is learnt. An element is a hidden unit of a sample. Floor: x and the weights
    read, f(u) and dF/dmu written; T forward passes, and as many backward ones, which need no gradient of x. Rival: the
    same by the layers, with those products.
    """
    dtype, t = DTYPE[device], 2

    def build() -> dict[str, Call]:
        hidden = [module for _ in range(layers - 1) for module in (pc.Linear(width, width), nn.Tanh())]
        model = nn.Sequential(*hidden, nn.Linear(width, 16)).to(device, dtype)
        x, y = torch.randn(samples, width, dtype=dtype, device=device), torch.randint(16, (samples,), device=device)

        free_energy = pc.FreeEnergy(model, steps=t).to(device).eval()  # in eval the step stays
        free_energy.tracker.load_state_dict({"mean": torch.tensor(0.5)})

        def step(one: bool) -> torch.Tensor:
            with use_chain(one and device == "cuda"):
                return free_energy(x, y)

        return {"pc_triton": partial(step, True), "layers": partial(step, False)}

    first, inner, last = samples * width**2, samples * width**2 * (layers - 2), samples * width * 16
    moved = dtype.itemsize * (samples * (2 * width * (layers - 1) + width + 16) + width**2 * (layers - 1) + 16 * width)
    elements = samples * width * (layers - 1)
    flops = 2 * t * (first + 2 * inner + 2 * last) // elements
    return Case(f"chain {samples}: {layers} layers of {width}", device, elements, moved / elements, flops, build)


def attention(
    device: str, n: int, head: int, state_dtype: torch.dtype = torch.float32, documents: int = 1
) -> Iterator[Case]:
    """Causal attention with a state, fused; an element is a query and a key, of which causal hides half.

    documents: those that each sequence is packed of, alike in length; their own pairs alone count in the floor.
    Floor: the state, read by the forward pass, read and written by the step. The step's two kernels read it twice, so
    that it can reach two thirds of its floor. Rivals: the products and the node's kernel, given the mu and p that
    autograd would have kept; and torch's attention, which has no state.
    """
    dtype, heads = DTYPE[device], 8
    items = ELEMENTS[device] // (heads * n * n)

    def build(phase: str) -> dict[str, Call]:
        q, k, v, grad_out = (torch.randn(items, heads, n, head, dtype=dtype, device=device) for _ in range(4))
        state = torch.randn(items, heads, n, n, device=device).mul_(0.1).to(state_dtype)
        pi, scale = torch.rand(items, device=device) + 0.5, head**-0.5
        segments, seen = None, {"is_causal": True}
        if documents > 1:
            segments = (torch.arange(n, device=device) * documents // n).expand(items, n).contiguous()
            seen = {"attn_mask": reference.mask_logits(q.new_zeros(items, 1, n, n), True, None, segments)}
        masks = {"causal": True, "segments": segments}
        ours, node = backend(q), {"form": "error", **masks}
        out, _, facts = ours.attention_forward(q, k, v, state, pi, scale=scale, **masks)
        mu = q @ k.mT * scale
        p, _ = ours.categorical_forward(mu, state, pi, **node)

        def products_forward() -> object:
            weights, energy = ours.categorical_forward(q @ k.mT * scale, state, pi, **node)
            return weights @ v, energy

        def products_step() -> object:
            moved, grad_mu = ours.categorical_step(mu, state, grad_out @ v.mT, pi, pi / 3, pi / 3, **node)
            return moved, scale * (grad_mu @ k), scale * (grad_mu.mT @ q), p.mT @ grad_out

        if phase == "forward":
            fused = partial(ours.attention_forward, q, k, v, state, pi, scale=scale, **masks)
            torchs = partial(F.scaled_dot_product_attention, q, k, v, **seen)
            return {"pc_triton": fused, "products": products_forward, "torch": torchs}
        inputs = (q, k, v, out, grad_out, state, pi, pi / 3, pi / 3, facts)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            without = F.scaled_dot_product_attention(*leaves, **seen)
        return {
            "pc_triton": partial(ours.attention_step, *inputs, scale=scale, **masks),
            "products": products_step,
            "torch": partial(torch.autograd.grad, without, leaves, grad_out, retain_graph=True),
        }

    packing, size = f", {documents} documents" if documents > 1 else "", state_dtype.itemsize
    # Half of a document's pairs; forward 2 products and 40 operations, the step 7 products and 60.
    for phase, moved, flops in (("forward", size, 4 * head + 40), ("step", 2 * size, 14 * head + 60)):
        name = f"fused attention {n} causal{packing}, head dimension {head}, {phase}{STATES[state_dtype]}"
        part = 2 * documents
        yield Case(name, device, items * heads * n * n, moved / part, flops // part, partial(build, phase))


def cases(device: str) -> Iterator[Case]:
    """Every kernel, at the sizes of that device."""
    elements = ELEMENTS[device]
    for family in ("gaussian", "gaussian_logvar", "bernoulli", "laplace"):
        yield from node(family, family, device, elements // 2**14, 2**14)
    yield from node("student_t", "student_t", device, elements // 2**14, 2**14, nu=4.0)
    for columns in (2**10, 2**15, 2**18):
        yield from node(f"categorical {columns}", "categorical", device, elements // columns, columns)
    n = 1024 if device == "cuda" else 256
    yield from node(f"attention {n} causal", "categorical", device, elements // (8 * n * n), 8, n, n, causal=True)
    for head in (64, 128):
        for state_dtype in STATES:
            yield from attention(device, n, head, state_dtype)
    yield from attention(device, n, 64, documents=4)
    for columns in (2**15, 2**18):
        yield clamped(device, columns)
    yield guard(device)
    for columns in (2**10, 2**13):
        yield rounding(device, elements // columns, columns)
    yield rounding_weight(device, elements // 2**14, 2**11 if device == "cuda" else 2**8)
    for samples, width in ((512, 128), (2048, 256)):
        yield chain(device, samples, width, 4)
    head = (16384, 2048, 32768) if device == "cuda" else (1024, 64, 2048)
    for learns in (False, True):
        yield language_head(device, *head, learns=learns)
    for n in (1024, 4096) if device == "cuda" else (256,):
        yield layer(device, elements // (2**13 if device == "cuda" else 2**10), n, n)


def seconds(call: Call, device: str) -> float:
    """The median time of a call, warm; on a GPU between events, with a cold cache."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=100, return_mode="median") * 1e-3
    times: list[float] = []
    call()
    while len(times) < 5 or sum(times) < 0.2:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


@lru_cache
def copy_speed(device: str, moved: int) -> float:
    """Bytes a second, read and written, of a torch copy that moves so many."""
    source = torch.randn(moved // 8, device=device)
    target = torch.empty_like(source)
    return moved / seconds(partial(target.copy_, source), device)


@lru_cache
def product_speed(device: str) -> float:
    """FLOPs a second of torch's product of large square matrices, in the dtype of the cases."""
    n = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, n, n, dtype=DTYPE[device], device=device)
    return 2.0 * n**3 / seconds(partial(torch.mm, a, b), device)


def measure(case: Case, calls: dict[str, Call]) -> dict:
    """A row of the table: time, share of the floor, peak memory, and each rival's time and memory."""
    speed = copy_speed(case.device, 2**32 if case.device == "cuda" else case.bytes)
    floor = max(case.bytes / speed, case.flops / product_speed(case.device))
    row = {"kernel": case.name, "elements": case.elements, "bytes_each": case.bytes_each, "flops_each": case.flops_each}
    found: dict[str, dict] = {}
    for name, call in calls.items():
        try:
            found[name] = {"seconds": seconds(call, case.device)}
        except Exception as error:
            if name == "pc_triton":
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    ours = found.pop("pc_triton")
    return {**row, **ours, "of_floor": floor / ours["seconds"], "rivals": found}


def rivals(row: dict) -> dict[str, float]:
    """How many times as long as ours each rival took."""
    return {name: r["seconds"] / row["seconds"] for name, r in row["rivals"].items() if "seconds" in r}


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{device}-{case.name}", marks=GPU if device == "cuda" else ())
        for device in DTYPE
        for case in cases(device)
    ],
)
@torch.no_grad()
def test_kernel(case, benchmark, capsys):
    calls = case.build()

    def finished():
        calls["pc_triton"]()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
    if not benchmark.enabled:
        return
    row = measure(case, calls)
    against = {f"{name}_times_ours": round(times, 2) for name, times in rivals(row).items()}
    floor = {"bytes_each": case.bytes_each, "flops_each": case.flops_each, "of_floor": round(row["of_floor"], 3)}
    benchmark.extra_info.update(floor | against)
    with capsys.disabled():
        words = "".join(f", {name} takes {times:.2f} times as long" for name, times in rivals(row).items())
        print(f"\n{case.name}: {row['of_floor']:.1%} of the floor of {case.bytes_each:g} bytes an element{words}")
