"""A user's program, as a type checker sees it with pc_triton installed. It is checked and not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import pc_triton as pc


class Cauchy(pc.Distribution):
    measured = True

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        return torch.log1p((u - mu) ** 2 / 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = pc.Attention(32, 4, causal=True)
        self.up = pc.Linear(32, 10, node=Cauchy())

    def forward(self, x: Tensor) -> Tensor:
        pc.add_energy(x.abs().mean((1, 2)))
        out: Tensor = self.up(self.attn(x))
        return out


def enough(free_energies: Sequence[Tensor]) -> bool:
    return len(free_energies) > 2


x, y = torch.rand(8, 4, 32), torch.randint(10, (8, 4))
plain, changes = pc.convert(nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 10)))
assert_type(plain, nn.Module)
assert_type(changes["0"], str)
assert_type(changes.share, float)

free_energy = pc.FreeEnergy(
    Block(),
    pc.Categorical(),
    steps=3,
    order="error",
    precision=pc.Displacement(0.01),
    step=pc.Guarded(0.5),
    state_optimizer=None,
    state_dtype=torch.bfloat16,
    stop=enough,
    logits=lambda out: out[0],
)
loss = free_energy(x, y, mask=y > 0)
assert_type(loss, Tensor)
loss.backward()  # type: ignore[no-untyped-call]  # in torch

settled = free_energy.infer(x, y, clamp_input=False, start=lambda u: {name: 0.5 * s for name, s in u.items()})
assert_type(settled, pc.Settled)
assert_type(settled.free_energy, Tensor)
assert_type(settled.states, dict[str, Tensor])
assert_type(settled.output, Tensor)

report = free_energy.report(x, y)
assert_type(report, pc.Report)
assert_type(report.settled, float)
assert_type(report.regime, str)
assert_type(report.nodes, tuple[pc.NodeReport, ...])
assert_type(report.nodes[0].residual, float)
assert_type(report.scalars(), dict[str, float])

record = free_energy.record(x, y)
assert_type(record[0]["up"], pc.NodeStep)
assert_type(record[0]["up"].energy, Tensor)

incremental = pc.FreeEnergy(plain, order="incremental", precision=1.0)
assert_type(incremental.incremental(x, y), Iterator[Tensor])
assert_type(incremental.model, nn.Module)
assert_type(pc.Gaussian().emission(x), Tensor)
with pc.use_backend("torch"):
    pass

# What is wrong is seen: with `warn_unused_ignores`, these fail if it is not.
pc.FreeEnergy(plain, order="topdown")  # type: ignore[arg-type]
pc.FreeEnergy(plain, steps="3")  # type: ignore[arg-type]
pc.FreeEnergy(plain, inference_steps=3)  # type: ignore[call-arg]
