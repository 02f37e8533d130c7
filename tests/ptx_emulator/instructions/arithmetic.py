"""Arithmetic on numbers, and on their bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..machine import UNSIGNED, Gang, Mask, Run
from ..memory import Array
from ..numbers import SIGNED, flush, half, narrow, wide
from ..parser import BITS, Instruction
from .decoder import INSTRUCTIONS, Decoder, instruction


def elementwise(d: Decoder, ins: Instruction, f: Callable[..., Array], kind: str = "") -> Run:
    """d = f(a, ...), all of one kind; pairs of 16-bit floats half by half; .ftz flushes what goes in and comes out."""
    kind = kind or ins.opcode[-1]
    names = ins.operands[1:]
    if kind in ("bf16x2", "f16x2"):
        return _pairs(d, ins, f, kind)
    a, put = [d.source(name, kind) for name in names], d.sink(ins.operands[0], kind)
    if "ftz" in ins.opcode:
        inner = f

        def f(*x: Array) -> Array:
            return flush(inner(*map(flush, x)))

    if len(a) == 1:
        (one,) = a
        return lambda g, m: put(g, f(one(g)), m)
    if len(a) == 2:
        one, two = a
        return lambda g, m: put(g, f(one(g), two(g)), m)
    return lambda g, m: put(g, f(*(x(g) for x in a)), m)


def _pairs(d: Decoder, ins: Instruction, f: Callable[..., Array], kind: str) -> Run:
    sources, put = [d.source(name, "b32") for name in ins.operands[1:]], d.sink(ins.operands[0], "b32")
    to, of = (wide, narrow) if kind == "bf16x2" else (lambda x: x.view(np.float16).astype(np.float32), half)

    def run(g: Gang, m: Mask) -> None:
        words = [np.atleast_1d(source(g)) for source in sources]
        low, high = (of(f(*(to((w >> shift).astype(np.uint16)) for w in words))) for shift in (0, 16))
        put(g, low.astype(np.uint32) | (high.astype(np.uint32) << 16), m)

    return run


def simple(names: str, f: Callable[..., Array]) -> None:
    for name in names.split():
        INSTRUCTIONS[name] = lambda d, ins: elementwise(d, ins, f)


simple("add", np.add)
simple("sub", np.subtract)
simple("and", np.bitwise_and)
simple("or", np.bitwise_or)
simple("xor", np.bitwise_xor)
simple("abs", np.abs)
simple("neg", np.negative)
simple("not", np.invert)
simple("ex2", lambda x: np.exp2(x, dtype=np.float64).astype(x.dtype))
simple("lg2", lambda x: np.log2(x, dtype=np.float64).astype(x.dtype))
simple("sin", np.sin)
simple("cos", np.cos)
simple("tanh", lambda x: np.tanh(x, dtype=np.float64).astype(x.dtype))
simple("rcp", lambda x: (1 / x).astype(x.dtype))
simple("sqrt", np.sqrt)
simple("rsqrt", lambda x: (1 / np.sqrt(x, dtype=np.float64)).astype(x.dtype))
simple("copysign", lambda a, b: np.copysign(b, a))


@instruction("min", "max")
def _extremum(d: Decoder, ins: Instruction) -> Run:
    low, exact = ins.opcode[0] == "min", "NaN" in ins.opcode
    if ins.opcode[-1][0] in "su":
        return elementwise(d, ins, np.minimum if low else np.maximum)
    return elementwise(d, ins, (np.minimum if low else np.maximum) if exact else (np.fmin if low else np.fmax))


@instruction("mul", "mad")
def _multiply(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    if kind[0] not in "su":
        return _fused(d, ins) if ins.opcode[0] == "mad" else elementwise(d, ins, np.multiply)
    bits, more = BITS[kind], ins.opcode[0] == "mad"
    if "wide" not in ins.opcode and "hi" not in ins.opcode:
        return elementwise(d, ins, (lambda a, b, c: a * b + c) if more else np.multiply)
    if bits == 64:
        raise NotImplementedError(ins.text)
    big = kind[0] + str(2 * bits)
    dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
    a, b = (d.source(x, kind) for x in ins.operands[1:3])
    if "hi" in ins.opcode:
        put, plain = d.sink(ins.operands[0], kind), (SIGNED if kind[0] == "s" else UNSIGNED)[bits]
        c = d.source(ins.operands[3], kind) if more else None

        def high(g: Gang, m: Mask) -> None:
            x = ((a(g).astype(dtype) * b(g).astype(dtype)) >> dtype(bits)).astype(plain)
            put(g, x if c is None else x + c(g), m)

        return high
    put = d.sink(ins.operands[0], big)
    if not more:
        return lambda g, m: put(g, a(g).astype(dtype) * b(g).astype(dtype), m)
    plus = d.source(ins.operands[3], big)
    return lambda g, m: put(g, a(g).astype(dtype) * b(g).astype(dtype) + plus(g), m)


@instruction("fma")
def _fused(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    if kind == "f64":
        return elementwise(d, ins, lambda a, b, c: a * b + c)  # rounded twice
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return elementwise(d, ins, lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype))

    def fma(a: Array, b: Array, c: Array) -> Array:
        product = np.multiply(a, b, dtype=np.float64)  # exact
        product += c
        return product.astype(np.float32)

    return elementwise(d, ins, fma)


@instruction("div", "rem")
def _divide(d: Decoder, ins: Instruction) -> Run:
    if ins.opcode[-1][0] not in "su":
        return elementwise(d, ins, np.divide)

    def divide(x: Array, y: Array) -> Array:
        y = np.where(y == 0, y.dtype.type(1), y)  # on a GPU some number
        rest = np.fmod(x, y)
        return rest if ins.opcode[0] == "rem" else (x - rest) // y

    return elementwise(d, ins, divide)


@instruction("shl", "shr")
def _shift(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    bits, left = BITS[kind], ins.opcode[0] == "shl"
    a, by, put = d.source(ins.operands[1], kind), d.source(ins.operands[2], "u32"), d.sink(ins.operands[0], kind)
    last = np.uint32(bits - 1)

    def run(g: Gang, m: Mask) -> None:
        x, s = a(g), by(g)
        inside = np.minimum(s, last).astype(x.dtype)
        y = x << inside if left else x >> inside
        if (left or kind[0] != "s") and (s > last).any():
            y = np.where(s > last, x.dtype.type(0), y)
        put(g, y, m)

    return run


@instruction("shf")
def _funnel(d: Decoder, ins: Instruction) -> Run:
    a, b, by = (d.source(x, "u32") for x in ins.operands[1:4])
    put, left, clamp = d.sink(ins.operands[0], "u32"), "l" in ins.opcode, "clamp" in ins.opcode

    def run(g: Gang, m: Mask) -> None:
        s = (np.minimum(by(g), 32) if clamp else by(g) & 31).astype(np.uint64)
        both = a(g).astype(np.uint64) | (b(g).astype(np.uint64) << np.uint64(32))
        put(g, ((both << s) >> np.uint64(32) if left else both >> s).astype(np.uint32), m)

    return run


@instruction("bfe")
def _extract(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    if BITS[kind] != 32:
        raise NotImplementedError(ins.text)
    a, at, length = d.source(ins.operands[1], "u32"), *(d.source(x, "u32") for x in ins.operands[2:4])
    put = d.sink(ins.operands[0], "u32")

    def run(g: Gang, m: Mask) -> None:
        n = (length(g) & 255).astype(np.int64)
        x = a(g).astype(np.int64)
        if kind == "s32":
            x = (x ^ 0x80000000) - 0x80000000
        x = (x >> np.minimum(at(g) & 255, 63).astype(np.int64)) & ((1 << np.minimum(n, 32)) - 1)
        if kind == "s32":
            sign = 1 << np.maximum(n - 1, 0)
            x = (x ^ sign) - sign
        put(g, x.astype(np.uint32), m)

    return run


@instruction("bfi")
def _insert(d: Decoder, ins: Instruction) -> Run:
    a, b, at, length = (d.source(x, "u32") for x in ins.operands[1:5])
    put = d.sink(ins.operands[0], "u32")

    def run(g: Gang, m: Mask) -> None:
        shift = np.minimum(at(g) & 255, 32).astype(np.uint64)
        field = ((np.uint64(1) << np.minimum(length(g) & 255, 32).astype(np.uint64)) - np.uint64(1)) << shift
        put(g, ((b(g) & ~field) | ((a(g).astype(np.uint64) << shift) & field)).astype(np.uint32), m)

    return run


@instruction("popc", "clz")
def _count(d: Decoder, ins: Instruction) -> Run:
    kind = ins.opcode[-1]
    a, put, bits = d.source(ins.operands[1], kind), d.sink(ins.operands[0], "u32"), BITS[kind]

    def run(g: Gang, m: Mask) -> None:
        x = np.atleast_1d(a(g))
        if ins.opcode[0] == "popc":
            return put(g, np.bitwise_count(x).astype(np.uint32), m)
        for by in (1, 2, 4, 8, 16, 32):
            x = x | (x >> x.dtype.type(by)) if by < bits else x
        return put(g, (bits - np.bitwise_count(x)).astype(np.uint32), m)

    return run


@instruction("lop3")
def _logic(d: Decoder, ins: Instruction) -> Run:
    table = int(ins.operands[4], 0)
    sources, put = [d.source(x, "u32") for x in ins.operands[1:4]], d.sink(ins.operands[0], "u32")

    def run(g: Gang, m: Mask) -> None:
        words = [source(g) for source in sources]
        y = np.zeros(g.n, np.uint32)
        for i in range(8):
            if table >> i & 1:
                a, b, c = (w if i >> (2 - j) & 1 else ~w for j, w in enumerate(words))
                y |= a & b & c
        put(g, y, m)

    return run


@instruction("prmt")
def _permute(d: Decoder, ins: Instruction) -> Run:
    a, b, select = (d.source(x, "u32") for x in ins.operands[1:4])
    put = d.sink(ins.operands[0], "u32")
    if len(ins.opcode) > 2:
        raise NotImplementedError(ins.text)

    def run(g: Gang, m: Mask) -> None:
        both = a(g).astype(np.uint64) | (b(g).astype(np.uint64) << np.uint64(32))
        s, out = select(g).astype(np.uint64), np.uint64(0)
        for i in range(4):
            which = s >> np.uint64(4 * i)
            byte = (both >> ((which & np.uint64(7)) << np.uint64(3))) & np.uint64(255)
            byte = np.where(which & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            out = out | (byte << np.uint64(8 * i))
        put(g, np.asarray(out).astype(np.uint32), m)

    return run
