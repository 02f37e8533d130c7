"""Loads, stores, atomics, asynchronous copies and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..machine import UNSIGNED, Gang, Mask, Run
from ..memory import Memory
from ..numbers import FLOATS, SIGNED
from ..parser import BITS, Instruction, braced
from .decoder import Decoder, instruction, nothing


def space(ins: Instruction) -> tuple[Callable[[Gang], Memory], int]:
    """Which memory an instruction goes to, and the bits of its addresses."""
    if any(part.startswith("shared") for part in ins.opcode):
        return (lambda g: g.batch.shared), 32
    if "local" in ins.opcode or "global" not in ins.opcode:
        raise NotImplementedError(ins.text)
    return (lambda g: g.batch.arena), 64


@instruction("ld", "ldu")
def _load(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    plain = UNSIGNED[BITS[kind]]
    if "param" in ins.opcode:
        name, _, offset = ins.operands[1].strip("[] ").partition("+")
        if offset:
            raise NotImplementedError(ins.text)
        number, one = int(name.rpartition("_")[2]), d.sink(ins.operands[0], kind)
        mask = (1 << BITS[kind]) - 1
        dtype = SIGNED[BITS[kind]] if kind[0] == "s" else plain
        return lambda g, m: one(g, np.full(g.n, g.batch.params[number] & mask, plain).view(dtype), m)
    memory, bits = space(ins)
    names, address = braced(ins.operands[0]), d.address(ins.operands[1], bits)
    size = BITS[kind] // 8 * len(names)
    sinks = [d.sink(name, kind) for name in names]
    view = SIGNED[BITS[kind]] if kind[0] == "s" else plain

    def run(g: Gang, m: Mask) -> None:
        raw = g.load(memory(g), address(g), size, m).view(view)
        for sink, x in zip(sinks, raw.T):
            if m is None:
                sink(g, x.copy(), None)
            else:
                full = np.zeros(g.n, view)
                full[m] = x
                sink(g, full, m)

    return run


@instruction("st")
def _store(d: Decoder, ins: Instruction) -> Run:
    memory, bits = space(ins)
    names, address, kind = braced(ins.operands[1]), d.address(ins.operands[0], bits), f"b{BITS[ins.opcode[-1]]}"
    sources = [d.source(name, kind) for name in names]

    def run(g: Gang, m: Mask) -> None:
        data = np.stack([np.broadcast_to(source(g), g.n) for source in sources], 1).view(np.uint8)
        g.store(memory(g), address(g), data, m)

    return run


@instruction("atom", "red")
def _atomic(d: Decoder, ins: Instruction) -> Run:
    """One thread after another. Atomics leave no tags: they race with nobody."""
    memory, bits = space(ins)
    kind, returns = ins.opcode[-1], ins.opcode[0] == "atom"
    how = next(part for part in ins.opcode if part in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
    at = 1 if returns else 0
    address, sources = d.address(ins.operands[at], bits), [d.source(x, kind) for x in ins.operands[at + 1 :]]
    put = d.sink(ins.operands[0] if returns else "_", kind)
    if kind not in FLOATS and (kind[0] not in "subf" or BITS[kind] < 32 or kind.endswith("x2") or kind == "bf16"):
        raise NotImplementedError(ins.text)
    f: dict[str, Callable[..., Any]] = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "exch": lambda old, x: x, "cas": lambda old, test, x: x if old == test else old,
    }  # fmt: skip
    dtype = FLOATS.get(kind) or (SIGNED if kind[0] == "s" else UNSIGNED)[BITS[kind]]
    size = BITS[kind] // 8

    def run(g: Gang, m: Mask) -> None:
        active = np.arange(g.n) if m is None else np.flatnonzero(m)
        index, _ = g.locate(memory(g), address(g)[active], size, g.program[active], True)
        cells, given = memory(g).data.view(dtype), [np.broadcast_to(source(g), g.n) for source in sources]
        before = np.zeros(g.n, dtype)
        for thread, place in zip(active, index):
            before[thread] = cells[place]
            cells[place] = f[how](cells[place], *(x[thread] for x in given))
        put(g, before, m)

    return run


@instruction("cp")
def _copy(d: Decoder, ins: Instruction) -> Run:
    if "bulk" in ins.opcode or "mbarrier" in ins.opcode:
        raise NotImplementedError(ins.text)
    if "commit_group" in ins.opcode:
        return lambda g, m: g.commit_copies(m)
    if "wait_all" in ins.opcode:
        return lambda g, m: g.wait_copies(0, m, everything=True)
    if "wait_group" in ins.opcode:
        keep = int(ins.operands[0], 0)
        return lambda g, m: g.wait_copies(keep, m)
    to, of, size = d.address(ins.operands[0], 32), d.address(ins.operands[1], 64), int(ins.operands[2], 0)
    count = d.source(ins.operands[3], "u32") if len(ins.operands) > 3 else lambda g: np.uint32(size)
    return lambda g, m: g.copy(to(g), of(g), size, np.broadcast_to(count(g), g.n), m)


@instruction("fence")
def _fence(d: Decoder, ins: Instruction) -> Run:
    if "proxy" not in ins.opcode or "async" not in ins.opcode:
        return nothing

    def run(g: Gang, m: Mask) -> None:
        warps = slice(None, None, 32) if m is None else np.flatnonzero(m.reshape(-1, 32).all(1)) * 32
        g.batch.fenced[g.program[warps], g.within[warps]] = g.clock

    return run
