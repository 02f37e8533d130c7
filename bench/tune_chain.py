"""Measure where a chain's training step in one launch beats its layers, for the rule of dispatch.

    python bench/tune_chain.py [--dtype float32] [--tf32] [--out pc_triton/tuned.json]

For each size it times `FreeEnergy` at its defaults, with a step learnt from earlier batches and with the backward
pass, on layers of one width with tanh and 16 classes: in one launch, by the layers, and by the layers in a CUDA graph
(``compile()``), once all gave the same results. It prints the times, and puts the ratio of the faster of the layers' to
the launch's into the table, in place of this device's and dtype's rows. ``--tf32``: float32 whose products may be TF32.
Exit status 1: a result differs, and nothing is written; 2: no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from tune_linear import begin, write

SIZES = [  # samples, width, layers
    (samples, width, layers)
    for samples in (32, 128, 512, 2048, 8192)
    for width in (64, 128, 256, 512)
    for layers in (2, 3, 5, 9)
]
Step = Callable[[], list[torch.Tensor]]


def steps(samples: int, width: int, layers: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Step]:
    """A training step each way: its loss and gradients."""
    import pc_triton as pc
    from pc_triton import dispatch

    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (pc.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(width, 16)).to(device, dtype)
    x, y = torch.randn(samples, width, dtype=dtype, device=device), torch.randint(16, (samples,), device=device)
    free_energy, graph = (pc.FreeEnergy(model).to(device).eval() for _ in range(2))  # in eval the step stays
    for one in (free_energy, graph):
        one.tracker.load_state_dict({"mean": torch.tensor(0.5)})
    graph.compile()

    def step(free_energy: pc.FreeEnergy, one: bool) -> list[torch.Tensor]:
        with dispatch.use_chain(one), torch.enable_grad():
            loss = free_energy(x, y)
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    return {
        "launch": lambda: step(free_energy, True),
        "layers": lambda: step(free_energy, False),
        "graph": lambda: step(graph, False),
    }


def differs(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether two ways differ beyond the rounding of both; the guard's parabola is a difference of two F."""
    from pc_triton.dispatch import kind_of

    dtype = wanted[-1].dtype
    few = 1e-3 if kind_of(dtype) == "float32" else 8 * max(torch.finfo(dtype).eps, 1e-3)
    return any(not (a.float() - b.float()).abs().max() <= few * b.float().abs().max() for a, b in zip(found, wanted))


def measure(samples: int, width: int, layers: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a training step each way. Raises RuntimeError if the ways differ."""
    from bench_kernels import seconds

    ways = steps(samples, width, layers, dtype)
    results = {name: way() for name, way in ways.items()}
    if any(differs(results[name], results["layers"]) for name in ("launch", "graph")):
        raise RuntimeError(f"{(samples, width, layers)}: one launch or the graph differs from the layers")
    return {name: seconds(way, "cuda") for name, way in ways.items()}


def main(arguments: list[str] | None = None) -> int:
    options = begin("Measure where one launch a training step wins, and keep it.", "float32", arguments)
    if options is None:
        return 2
    rows: list[list[float]] = []
    print("| samples | width | layers | launch ms | layers / launch | graph / launch |\n|---|---|---|---|---|---|")
    for size in SIZES:
        try:
            time = measure(*size, getattr(torch, options.dtype))
        except RuntimeError as error:
            print(f"{error}: nothing is written", file=sys.stderr)
            return 1
        ratios = [time[name] / time["launch"] for name in ("layers", "graph")]
        cells = (*size, f"{1e3 * time['launch']:.3f}", *(f"{ratio:.3f}" for ratio in ratios))
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        rows.append([*size, round(min(ratios), 3)])
    write(options.out, "chain", torch.cuda.get_device_name(), options.kind, rows)
    print(f"in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
