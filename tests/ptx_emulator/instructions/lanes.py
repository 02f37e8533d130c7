"""Between the lanes of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..machine import Gang, Mask, Run
from ..parser import Instruction
from .decoder import Decoder, instruction


def whole_warps(g: Gang, m: Mask) -> None:
    if m is not None:
        lanes = np.count_nonzero(m.reshape(-1, 32), axis=1)
        if ((lanes > 0) & (lanes < 32)).any():
            g.report("only a part of a warp takes part in an instruction of whole warps")


@instruction("shfl")
def _shuffle(d: Decoder, ins: Instruction) -> Run:
    first, _, second = ins.operands[0].partition("|")
    a, b, clamp = (d.source(x, "u32") for x in ins.operands[1:4])
    put, other, way = d.sink(first.strip(), "b32"), d.sink(second.strip() or "_", "pred"), ins.opcode[2]

    def run(g: Gang, m: Mask) -> None:
        whole_warps(g, m)
        by, c = b(g).astype(np.int64), clamp(g).astype(np.int64)
        segment, last = (c >> 8) & 31, c & 31
        low, high = g.lane & segment, (g.lane & segment) | (last & ~segment)
        if way == "up":
            source = g.lane - by
            inside = source >= high
        else:
            source = g.lane ^ by if way == "bfly" else g.lane + by if way == "down" else low | (by & 31 & ~segment)
            inside = source <= high
        source = np.where(inside, source, g.lane) & 31
        put(g, np.take_along_axis(a(g).reshape(-1, 32), source.reshape(-1, 32), 1).reshape(-1), m)
        other(g, np.broadcast_to(inside, g.n), m)

    return run


@instruction("redux")
def _reduce(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    f: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    f |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    a, put, reduce = d.source(ins.operands[1], kind), d.sink(ins.operands[0], kind), f[ins.opcode[2]].reduce

    def run(g: Gang, m: Mask) -> None:
        whole_warps(g, m)
        x = np.broadcast_to(a(g), g.n)
        put(g, np.repeat(reduce(x.reshape(-1, 32), axis=1, dtype=x.dtype), 32), m)

    return run


@instruction("vote")
def _vote(d: Decoder, ins: Instruction) -> Run:
    how, p = ins.opcode[2], d.source(ins.operands[1], "pred")
    put = d.sink(ins.operands[0], "b32" if how == "ballot" else "pred")

    def run(g: Gang, m: Mask) -> None:
        x = np.broadcast_to(p(g), g.n)
        votes = (x if m is None or how == "all" else x & m).reshape(-1, 32)
        if how == "ballot":
            one = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        elif how == "all":
            one = (votes if m is None else votes | ~m.reshape(-1, 32)).all(1)
        else:
            one = votes.any(1)
        put(g, np.repeat(one, 32), m)

    return run


@instruction("elect")
def _elect(d: Decoder, ins: Instruction) -> Run:
    put = d.sink(ins.operands[0].partition("|")[2].strip(), "pred")
    return lambda g, m: put(g, g.lane == 0, m)


@instruction("activemask")
def _active(d: Decoder, ins: Instruction) -> Run:
    put = d.sink(ins.operands[0], "b32")
    return lambda g, m: put(g, np.full(g.n, 0xFFFFFFFF, np.uint32), m)
