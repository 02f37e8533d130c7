"""What a training step of a transformer costs, counted without a GPU, and the time predicted from that for some GPUs.

    python bench/cost.py [--blocks 12] [--width 768] [--steps 1 2 3] [--methods bp pc] ... [--json [FILE]]
    python bench/cost.py --inference-dtype none float8_e4m3fn

The step runs on meta tensors, which have shapes and no values. Every operation of torch's and every launch of a Triton
kernel is counted, with the bytes that it reads and writes and the floating-point operations of its products. No GPU is
asked, so times are predictions; `LEFT_OUT` says what they do not see. ``--json`` writes a list of rows: method, steps,
attention_state, dtype, inference_dtype, launches, bytes, products (of the layers' weights, in units of
backpropagation's), predicted_seconds (by card), and flops (those of attention too), triton_launches, phases and size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import pc_triton as pc
from pc_triton import batch, dispatch, families, float8, head, nn
from pc_triton.cards import listed
from pc_triton.models import Transformer

METHODS = {"bp": "", "pc": "error", "pc-sweep": "sweep", "pc-simultaneous": "simultaneous"}
DTYPES = ("bfloat16", "float16", "float32")
INFERENCE_DTYPES = ("none", "float8_e4m3fn")


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    blocks: int = 12
    width: int = 768
    heads: int = 12
    batch: int = 16
    context: int = 1024
    vocabulary: int = 32768


@dataclass(frozen=True)
class Card:
    """A GPU, by figures that others published."""

    name: str
    bandwidth: float
    """Bytes a second, from its vendor's data sheet."""
    product_rate: float
    """Dense FLOPs a second in bfloat16, from there too; sheets that give the sparse rate give twice this."""
    float8_rate: float | None = None
    """The same of products in 8 bits; None where `pc_triton` makes none."""
    copy_share: float = 0.9
    """Of the bandwidth, what a copy reaches: QuACK's softmax has 3.01 of the 3.35 TB/s of an H100, by its authors."""
    product_share: float = 0.65
    """Of the product rate, what a large product reaches: cuBLAS in 16 bits, 8192 x 8192 x 512 to 16384, has 588 to 665
    TFLOP/s on Hopper and 1,108 to 1,564 on Blackwell (triton-lang/triton, python/tutorials/gluon/07-persistence.py).
    That the other cards reach the same shares is assumed, and that products in 8 bits reach the same of their rate."""
    launch: float = 5e-6
    """Seconds of the host's thread an operation: the low end of the 5 to 25 us that are published for a product's
    dispatch in eager torch on an H100's host (jiahuanglin.xyz, lesson "From PyTorch op to kernel launch")."""
    triton_launch: float = 11e-6
    """The same of a Triton launch: its just-in-time dispatch as profiled in meta-pytorch/tritonbench #1002."""


def of_the_package(name: str) -> tuple[float, float]:
    """Bandwidth and product rate in 16 bits, as `pc_triton.cards` has them."""
    card = listed(name)
    assert card is not None
    return card.bandwidth, card.half


# Their sheets' figures as llmbook.apartsin.com lists them (section G.1), rounded, and B200's glennklockwood.com too.
CARDS = (
    Card("A100 80GB SXM", *of_the_package("A100")),  # NVIDIA's data sheet, 2021: 2,039 GB/s, 312 TFLOPS
    Card("H100 SXM", *of_the_package("H100"), 1979e12),  # its sheet: 3.35 TB/s, 1,979 TFLOPS sparse, 3,958 in 8 bits
    Card("H200", *of_the_package("H200"), 1979e12),  # its sheet: 4.8 TB/s, 1,979 TFLOPS sparse, 3,958 in 8 bits
    Card("B200", *of_the_package("B200"), 4500e12),  # DGX B200's, of 8 GPUs: 64 TB/s, 36 PFLOPS sparse, 72 in 8 bits
    Card("MI300X", 5.3e12, of_the_package("MI300X")[1]),  # AMD Instinct MI300X data sheet: 5.3 TB/s, 1,307.4 TFLOPS
)

LEFT_OUT = """\
A prediction is the longer of two sums over the step: on the GPU, of each operation's bytes over 90 % of the card's
bandwidth or its products over 65 % of its product rate, whichever takes longer; on the host, of 5 us an operation and
11 us a Triton launch.
It leaves out:
- the instructions of the kernels: exponentials, and what else keeps a kernel from its floor of bytes. No file of this
  repository has their rate, so attention with a state takes longer than predicted;
- the optimiser, which is the same for all methods, and the loading of data;
- torch.compile and CUDA graphs: this is eager code, backpropagation too. Fused it needs fewer launches and bytes;
- the caches, where they serve what is counted as memory, and tiles that are read again beyond them;
- whether products in 8 bits with a scale a row are as quick as those with one a tensor, whose rate they are given;
- what the package itself does in Python between the launches; that small products and kernels do not fill a card.
Nothing of this was measured on a GPU."""


# Counting.


@dataclass(frozen=True)
class Operation:
    """An operation of torch's, or a launch of a Triton kernel."""

    phase: str
    name: str
    launches: int
    bytes: float
    flops: float = 0.0
    """Of its products."""


FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size"}
WRITES_ONLY = ("fill_", "zero_", "copy_")  # their first argument is not read
UNREAD = {"embedding": 0, "nll_loss_forward": 0, "nll_loss_backward": 1}  # an argument of which little is read
LAUNCHES = {  # on a GPU, where an operation is more than one
    "_scaled_dot_product_flash_attention_backward": 3,
    "embedding_dense_backward": 4,
    "native_layer_norm_backward": 2,
    "nll_loss_backward": 2,
}
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
TRITON = "triton "  # how the names of its launches begin
FLOAT8 = "_scaled_mm"
LAYERS = ("mm", "addmm", FLOAT8)  # the products of linear layers; those of attention are bmm's, or inside a kernel


def size_of(x: Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    elements = x.element_size()
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride else min(size, 1)
    return elements


class Count(TorchDispatchMode):
    """Within it every operation on meta tensors is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.phase = "forward"

    def add(self, name: str, moved: float, flops: float = 0.0) -> None:
        """Note an operation."""
        self.operations.append(Operation(self.phase, name, LAUNCHES.get(name, 1), moved, flops))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is FLASH_BACKWARD and args[0] is None:
            return None, None, None  # as on a GPU: nothing comes down from nodes at their predictions
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return out
        read, named = list(args), {key: x for key, x in kwargs.items() if key != "out"}
        if name in UNREAD:
            read.pop(UNREAD[name])
        elif name in WRITES_ONLY:
            read = read[1:]
        inputs = {id(x): size_of(x) for x in tree_leaves((read, named)) if isinstance(x, Tensor) and x.is_meta}
        moved = sum(inputs.values()) + sum(size_of(x) for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_meta)
        if name == "embedding":
            moved += size_of(out)  # the rows of the table that are read
        if moved:
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.add(name, moved, flops / 2 if "flash" in name else flops)  # causal: half of the pairs
        return out

    def launch(self, kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
        """Note a launch of a Triton kernel."""
        module = kernel.fn.__module__.rpartition(".")[2]
        given = dict(zip(kernel.arg_names, args)) | options
        self.add(f"{TRITON}{module}.{kernel.fn.__name__}", *traffic(module, kernel.fn.__name__, given))


def traffic(module: str, name: str, given: dict[str, Any]) -> tuple[float, float]:
    """Bytes that a launch reads and writes, and FLOPs of its products, by the arguments it was given.

    Every tensor once, and what ``tests/test_bytes.py`` counts beside that: a state that moves is read and written, a
    long row of a Categorical node, or to be rounded, is read again, and what causal hides is not read.
    """
    times = {pointer: 1.0 for pointer, x in given.items() if isinstance(x, Tensor)}
    moves, has_state = given.get("MOVE", False), given.get("HAS_STATE", True)
    flops = 0.0
    if module == "attention":
        share = visited(name, given)
        flops = {"_forward": 4, "_grad_queries": 6, "_step_keys": 8}[name] * given["HEAD"] * share
        flops *= given["n_rows"] * given["n_keys"]
        if "state_ptr" in times:
            # A new state is written whole, with zeros where causal hides it.
            times["state_ptr"] = (share * has_state) + (share if has_state else 1.0) * moves
    elif module == "categorical":
        again = 1 if given["ONE_TILE"] else 3 if given.get("MOVED") else 2
        n = given["n_columns"]
        read = again * ((n + 1) / (2 * n) if given["CAUSAL"] else 1.0)
        times["mu_ptr"] = read
        times["state_ptr"] = read * has_state + moves
        if "grad_ptr" in times:
            times["grad_ptr"] = read
    elif name == "_clamped_gradient":
        times["mu_ptr"] = 2.0 if "grad_ptr" in times else 3.0  # for the log-sum-exp, again, and overwritten
    elif module == "float8" and name == "_rows_rounded":
        times["x_ptr"] = 1.0 if given["ONE_TILE"] else 2.0
    elif "state_ptr" in times and "MOVE" in given:
        times["state_ptr"] = float(has_state + moves)
    return sum(times[pointer] * size_of(given[pointer]) for pointer in times if pointer in given), flops


def visited(name: str, given: dict[str, Any]) -> float:
    """Of all pairs of query and key, the part that lies in tiles which an attention kernel visits."""
    if not given["CAUSAL"]:
        return 1.0
    n, keys, rows, cols = (given[name] for name in ("n_queries", "n_keys", "ROWS", "COLS"))
    pairs = 0
    if name == "_step_keys":
        for first in range(0, keys, cols):
            pairs += min(cols, keys - first) * (n - max(first - (keys - n), 0) // rows * rows)
    else:
        for first in range(0, n, rows):
            end = min(keys, first + rows + keys - n)
            pairs += min(rows, n - first) * min(keys, -(-end // cols) * cols)
    return pairs / (n * keys)


@contextmanager
def counted() -> Iterator[Count]:
    """Within it nothing is computed, and operations and launches go where they would on a GPU."""
    count = Count()
    kernels = dispatch.triton_kernels()
    kernel = sys.modules[kernels.attention_forward.__module__]._forward  # compiled or interpreted, as all others
    add_product, free_energy = head._add_product, batch.Batch.free_energy

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        count.launch(self, args, options)

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]

    def add_on_gpu(total: Tensor, a: Tensor, b: Tensor) -> None:
        if total.dtype == a.dtype:
            add_product(total, a, b)
        else:  # one product that adds
            moved = size_of(a) + size_of(b) + 2 * size_of(total)
            count.add("addmm", moved, 2.0 * total.numel() * a.shape[-1])

    def check_on_gpu(self: Any, labels: Tensor, classes: int) -> None:
        _ = ~(((labels < 0) | (labels >= classes)) & (labels != self.ignore_index)).any()

    def with_phase(self: Any, *, learns: bool = False, **options: Any) -> Tensor:
        phase = "learning" if learns else "inference" if self.nodes else "first pass"
        count.phase = f"{phase}, forward"
        energy = free_energy(self, learns=learns, **options)
        count.phase = f"{phase}, backward"
        return energy

    with ExitStack() as patches:
        for place, name, instead in (
            (type(kernel), "run", run),
            (F, "scaled_dot_product_attention", flash),
            (nn, "fuses", lambda x, weight: False),  # `choice.py` may fuse some; which, is the card's
            (head, "_add_product", add_on_gpu),
            (float8, "has_products", lambda device: True),
            (families.Categorical, "_check_labels", check_on_gpu),
            (batch.Batch, "free_energy", with_phase),
        ):
            patches.enter_context(patch.object(place, name, instead))
        patches.enter_context(dispatch.use_backend("triton"))
        patches.enter_context(count)
        yield count


@lru_cache(maxsize=64)
def operations(
    size: Size, method: str, steps: int, state: bool, dtype: str, inference_dtype: str = "none"
) -> tuple[Operation, ...]:
    """What one training step does, but for the optimiser."""
    with torch.device("meta"):
        model = Transformer(size.vocabulary, size.width, size.heads, size.blocks, size.context, attention=state)
    model.to(getattr(torch, dtype))
    x, y = (torch.empty(size.batch, size.context, dtype=torch.int64, device="meta") for _ in range(2))
    with counted() as count:
        if method == "bp":
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            count.phase = "backward"
        else:
            options: dict[str, Any] = {"order": METHODS[method]}
            if inference_dtype != "none":
                options["inference_dtype"] = getattr(torch, inference_dtype)
            free_energy = pc.FreeEnergy(model, steps=steps, **options)
            free_energy.tracker.load_state_dict({"mean": torch.tensor(0.5)})  # a batch that is not the first
            loss = free_energy(x, y)
        loss.backward()
    return tuple(count.operations)


# Rows.


def weight_products(done: Iterable[Operation]) -> float:
    """FLOPs of the products with the layers' weights."""
    return sum(o.flops for o in done if o.name in LAYERS)


def predicted_seconds(done: Sequence[Operation], card: Card) -> float:
    """The time that the card is predicted to take; see `LEFT_OUT`."""
    copy, rate = card.bandwidth * card.copy_share, card.product_rate * card.product_share
    float8 = (card.float8_rate or card.product_rate) * card.product_share
    device = sum(max(o.bytes / copy, o.flops / (float8 if o.name == FLOAT8 else rate)) for o in done)
    host = sum(card.triton_launch if o.name.startswith(TRITON) else card.launch * o.launches for o in done)
    return max(device, host)


def row(size: Size, method: str, steps: int, state: bool, dtype: str, inference_dtype: str = "none") -> dict[str, Any]:
    """What a training step costs; a float32 one has no predictions, as its products' rate is another.

    Inference in 8 bits has none for cards without such products, where it would be emulated.
    """
    done = operations(size, method, steps, state, dtype, inference_dtype)
    cards = [c for c in CARDS if dtype != "float32" and (inference_dtype == "none" or c.float8_rate)]
    base = weight_products(operations(size, "bp", 0, False, dtype))
    phases: dict[str, Counter] = {}
    for o in done:
        phases.setdefault(o.phase, Counter()).update({"launches": o.launches, "bytes": o.bytes, "flops": o.flops})
    return {
        "method": method,
        "steps": None if method == "bp" else steps,
        "attention_state": state,
        "dtype": dtype,
        "inference_dtype": inference_dtype,
        "launches": sum(o.launches for o in done),
        "bytes": round(sum(o.bytes for o in done)),
        "products": weight_products(done) / base,
        "predicted_seconds": {c.name: predicted_seconds(done, c) for c in cards},
        "flops": round(sum(o.flops for o in done)),
        "triton_launches": sum(o.launches for o in done if o.name.startswith(TRITON)),
        "phases": {phase: {name: round(total) for name, total in sums.items()} for phase, sums in phases.items()},
        "size": asdict(size),
    }


def rows(
    size: Size,
    methods: Sequence[str],
    steps: Sequence[int],
    states: Sequence[bool],
    dtype: str,
    inference_dtypes: Sequence[str] = ("none",),
) -> Iterator[dict[str, Any]]:
    """A row for backpropagation, and for each other method one by steps, by state of attention and by dtype."""
    for method in methods:
        if method == "bp":
            yield row(size, method, 0, False, dtype)
        else:
            for state in states:
                for t in steps:
                    for inference_dtype in inference_dtypes if METHODS[method] == "error" else ("none",):
                        yield row(size, method, t, state, dtype, inference_dtype)


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown."""
    cards = dict.fromkeys(card for r in found for card in r["predicted_seconds"])
    return markdown(
        case(r)
        | {"launches": r["launches"], "of them Triton": r["triton_launches"], "GB": f"{r['bytes'] / 1e9:.1f}"}
        | {"products / BP": f"{r['products']:.3f}", "FLOPs / 1e12": f"{r['flops'] / 1e12:.1f}"}
        | {f"prediction, ms, {card}": milliseconds(r["predicted_seconds"].get(card)) for card in cards}
        for r in found
    )


def phase_table(found: Sequence[dict[str, Any]]) -> str:
    """Launches, bytes and products by phase, as markdown."""
    return markdown(
        case(r)
        | {"phase": phase, "launches": sums["launches"], "GB": f"{sums['bytes'] / 1e9:.1f}"}
        | {"FLOPs / 1e12": f"{sums['flops'] / 1e12:.1f}"}
        for r in found
        for phase, sums in r["phases"].items()
    )


def case(r: dict[str, Any]) -> dict[str, Any]:
    t = "-" if r["steps"] is None else r["steps"]
    state = "yes" if r["attention_state"] else "no"
    return {"method": r["method"], "T": t, "state of attention": state, "inference": r["inference_dtype"]}


def milliseconds(seconds: float | None) -> str:
    """A cell of the table; "-" for what is not predicted."""
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def markdown(body: Iterable[dict[str, Any]]) -> str:
    body = list(body)
    lines = [body[0].keys(), ["---"] * len(body[0]), *(line.values() for line in body)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    t = pc.FreeEnergy(pc.Linear(1, 1)).steps
    parser.add_argument("--steps", type=int, nargs="+", default=[t], metavar="T", help=f"of inference (default {t})")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights (default bfloat16)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["bp", "pc"], help="default bp pc")
    parser.add_argument("--attention-state", choices=("both", "yes", "no"), default="both", help="default both")
    parser.add_argument(
        "--inference-dtype", choices=INFERENCE_DTYPES, nargs="+", default=["none"], metavar="DTYPE",
        help=f"of products in passes that do not learn: {', '.join(INFERENCE_DTYPES)} (default none: as those that do)",
    )  # fmt: skip
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write rows there; alone: print them only")
    given = parser.parse_args(arguments)
    size = Size(**{name: getattr(given, name) for name in Size.__dataclass_fields__})
    states = {"both": (False, True), "yes": (True,), "no": (False,)}[given.attention_state]
    counted = rows(size, given.methods, given.steps, states, given.dtype, given.inference_dtype)
    found = list(tqdm(counted, "counting", unit="row", leave=False, disable=None))
    if given.json == "-":
        say(json.dumps(found, indent=1))
        return
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(f"A training step, {given.dtype}, without its optimiser, counted on meta tensors; times are predictions.")
    say(f"{size}\n\n{table(found)}\n\n{phase_table(found)}\n")
    say(LEFT_OUT)


if __name__ == "__main__":
    main()
