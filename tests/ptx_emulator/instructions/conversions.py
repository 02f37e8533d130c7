"""Comparisons and choices, moves, and conversions from one kind of number to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..machine import UNSIGNED, Gang, Mask, Run
from ..memory import Array
from ..numbers import FLOAT8, FLOATS, SIGNED, float8, flush, half, narrow, wide
from ..parser import BITS, Instruction, braced
from .decoder import Decoder, instruction

_TESTS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": lambda a, b: (a == b) | _unordered(a, b), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: _unordered(a, b), "num": lambda a, b: ~_unordered(a, b),
}  # fmt: skip


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


@instruction("setp")
def _compare(d: Decoder, ins: Instruction) -> Run:
    kind, test = ins.opcode[-1], _TESTS[ins.opcode[1]]
    if ins.opcode[1] == "ne" and (kind in FLOATS or kind.startswith("bf16")):
        test = lambda a, b: (a != b) & ~_unordered(a, b)  # noqa: E731
    first, _, second = ins.operands[0].partition("|")
    put, other = d.sink(first, "pred"), d.sink(second or "_", "pred")
    if kind in ("bf16x2", "f16x2"):
        x, y = (d.source(name, "b32") for name in ins.operands[1:3])
        to = wide if kind == "bf16x2" else lambda h: h.view(np.float16)

        def pair(g: Gang, m: Mask) -> None:
            a, b = np.atleast_1d(x(g)), np.atleast_1d(y(g))
            for shift, sink in ((0, put), (16, other)):
                sink(g, test(to((a >> shift).astype(np.uint16)), to((b >> shift).astype(np.uint16))), m)

        return pair
    a, b = (d.source(x, kind) for x in ins.operands[1:3])
    ftz = "ftz" in ins.opcode

    def compare(g: Gang) -> Array:
        x, y = a(g), b(g)
        return test(flush(x), flush(y)) if ftz else test(x, y)

    if len(ins.operands) < 4 and not second:
        return lambda g, m: put(g, compare(g), m)
    c = d.source(ins.operands[3] if len(ins.operands) > 3 else "true", "pred")
    how = {"or": np.logical_or, "xor": np.logical_xor}.get(ins.opcode[2], np.logical_and)

    def combine(g: Gang, m: Mask) -> None:
        t, more = compare(g), c(g)
        put(g, how(t, more), m)
        other(g, how(~t, more), m)

    return combine


@instruction("selp")
def _select(d: Decoder, ins: Instruction) -> Run:
    kind = "b" + str(BITS[ins.opcode[-1]])
    a, b, c = d.source(ins.operands[1], kind), d.source(ins.operands[2], kind), d.source(ins.operands[3], "pred")
    put = d.sink(ins.operands[0], kind)
    return lambda g, m: put(g, np.where(c(g), a(g), b(g)), m)


@instruction("mov")
def _move(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    kind = kind if kind == "pred" else "b" + str(BITS[kind])
    to, of = ins.operands
    if of[0] == "{":
        parts = [d.source(x, f"b{BITS[kind] // len(braced(of))}") for x in braced(of)]
        put = d.sink(to, kind)
        word = UNSIGNED[BITS[kind]]
        return lambda g, m: put(g, np.stack([np.broadcast_to(p(g), g.n) for p in parts], 1).view(word)[:, 0], m)
    a = d.source(of, kind)
    if to[0] == "{":
        each = BITS[kind] // len(braced(to))
        sinks = [d.sink(x, f"b{each}") for x in braced(to)]

        def unpack(g: Gang, m: Mask) -> None:
            words = np.ascontiguousarray(np.broadcast_to(a(g), g.n)).view(UNSIGNED[each]).reshape(g.n, -1)
            for i, sink in enumerate(sinks):
                sink(g, words[:, i].copy(), m)

        return unpack
    put = d.sink(to, kind)
    return lambda g, m: put(g, a(g), m)


@instruction("cvta")
def _to_address(d: Decoder, ins: Instruction) -> Run:
    a, put = d.source(ins.operands[1], "b64"), d.sink(ins.operands[0], "b64")
    return lambda g, m: put(g, a(g), m)


@instruction("cvt")
def _convert(d: Decoder, ins: Instruction) -> Run:
    to, of = ins.opcode[-2:]
    if to in FLOAT8 and of == "f32" and "satfinite" in ins.opcode:
        upper, lower = (d.source(x, "f32") for x in ins.operands[1:3])
        sink, dtype = d.sink(ins.operands[0], "b16"), FLOAT8[to]

        def two(g: Gang, m: Mask) -> None:
            a, b = (float8(np.broadcast_to(x(g), g.n), dtype).astype(np.uint16) for x in (upper, lower))
            sink(g, (a << 8) | b, m)

        return two
    if to in ("bf16x2", "f16x2"):
        high, low = (d.source(x, "f32") for x in ins.operands[1:3])
        put, bits = d.sink(ins.operands[0], "b32"), narrow if to == "bf16x2" else half
        relu = (lambda x: np.fmax(x, np.float32(0))) if "relu" in ins.opcode else (lambda x: x)

        def pack(g: Gang, m: Mask) -> None:
            a, b = (bits(relu(np.broadcast_to(x(g), g.n))).astype(np.uint32) for x in (high, low))
            put(g, (a << 16) | b, m)

        return pack
    if "tf32" in (to, of) or to not in BITS or of not in BITS:
        raise NotImplementedError(ins.text)
    a, put = d.source(ins.operands[1], of), d.sink(ins.operands[0], to)
    floats = [kind in FLOATS or kind == "bf16" for kind in (to, of)]
    dtype: Any = np.float32 if to == "bf16" else FLOATS.get(to) or (SIGNED if to[0] == "s" else UNSIGNED)[BITS[to]]
    ways = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((ways[part] for part in ins.opcode if part in ways), np.trunc)
    ftz = "ftz" in ins.opcode
    if floats == [True, True]:
        whole = any(key in ins.opcode for key in ("rni", "rmi", "rpi", "rzi"))

        def between(g: Gang, m: Mask) -> None:
            x = flush(a(g)) if ftz and of == "f32" else a(g)
            put(g, np.asarray(rounding(x) if whole else x).astype(dtype), m)

        return between
    if floats == [False, True]:
        info = np.iinfo(dtype)

        def whole_number(g: Gang, m: Mask) -> None:
            x = np.asarray(rounding(a(g).astype(np.float64)))
            inside = np.where((x >= info.min) & (x < float(info.max)), x, 0).astype(dtype)
            y = np.where(x >= float(info.max), dtype(info.max), inside)
            put(g, np.where(x < info.min, dtype(info.min), y), m)

        return whole_number
    if "sat" in ins.opcode:
        raise NotImplementedError(ins.text)
    return lambda g, m: put(g, np.asarray(a(g)).astype(dtype), m)
