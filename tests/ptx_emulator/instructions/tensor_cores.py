"""Products of matrices by tensor cores, and the loads and stores of their tiles."""

from __future__ import annotations

import numpy as np

from .. import matrices
from ..machine import Gang, Mask, Run
from ..parser import Instruction, braced
from .decoder import Decoder, instruction
from .lanes import whole_warps


@instruction("ldmatrix", "stmatrix")
def _matrix(d: Decoder, ins: Instruction) -> Run:
    loads = ins.opcode[0] == "ldmatrix"
    if "m8n8" not in ins.opcode or ins.opcode[-1] != "b16":
        raise NotImplementedError(ins.text)
    names, place = ins.operands if loads else reversed(ins.operands)
    address, number, flipped = d.address(place, 32), len(braced(names)), "trans" in ins.opcode
    if loads:
        sinks = [d.sink(name, "b32") for name in braced(names)]

        def load(g: Gang, m: Mask) -> None:
            whole_warps(g, m)
            lanes = (g.lane < 8 * number) if m is None else (g.lane < 8 * number) & m
            rows = g.load(g.batch.shared, address(g), 16, lanes).view(np.uint16).reshape(-1, number, 8, 8)
            words = np.ascontiguousarray(rows.swapaxes(2, 3) if flipped else rows).view(np.uint32)
            for i, sink in enumerate(sinks):
                x = words[:, i].reshape(-1)
                if m is not None:
                    full = np.zeros(g.n, np.uint32)
                    full[m] = x
                    x = full
                sink(g, x, m)

        return load
    sources = [d.source(name, "b32") for name in braced(names)]

    def store(g: Gang, m: Mask) -> None:
        whole_warps(g, m)
        words = np.stack([source(g).reshape(-1, 32) for source in sources], 1)  # [warps, number, 32]
        tiles = words.view(np.uint16).reshape(-1, number, 8, 8)
        rows = np.zeros((g.n // 32, 4, 8, 8), np.uint16)
        rows[:, :number] = tiles.swapaxes(2, 3) if flipped else tiles
        lanes = (g.lane < 8 * number) if m is None else (g.lane < 8 * number) & m
        g.store(g.batch.shared, address(g), rows.reshape(-1, 8).view(np.uint8), lanes)

    return store


@instruction("mma")
def _mma(d: Decoder, ins: Instruction) -> Run:
    return matrices.mma(ins, [[d.slot(name) for name in braced(x)] for x in ins.operands], whole_warps)


@instruction("wgmma")
def _wgmma(d: Decoder, ins: Instruction) -> Run:
    if ins.opcode[1] == "fence":
        return matrices.order
    if ins.opcode[1] == "commit_group":
        return matrices.commit
    if ins.opcode[1] == "wait_group":
        return matrices.wait(int(ins.operands[0], 0))
    out, a, b, keeps = ins.operands[:4]
    left = [d.slot(name) for name in braced(a)] if a[0] == "{" else d.source(a, "b64")
    slots = [d.slot(name) for name in braced(out)]
    return matrices.wgmma(ins, slots, left, d.source(b, "b64"), d.source(keeps, "pred"), whole_warps)
