"""From a program's text to steps: operands, addresses, control, and the table of what instructions do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import matrices
from ..machine import BARRIER, BRANCH, PLAIN, RETURN, UNSIGNED, Code, Gang, Mask, Run, Step
from ..memory import Array
from ..numbers import FLOATS, SIGNED, narrow, wide
from ..parser import BITS, Instruction, Program, braced

Source = Callable[[Gang], Array]
Sink = Callable[[Gang, Array, Mask], None]
_CONTROL = {"bra": BRANCH, "ret": RETURN, "exit": RETURN, "bar": BARRIER, "barrier": BARRIER}
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?$")


class Decoder:
    """From one program's text to closures. Registers become places in a list."""

    def __init__(self, program: Program):
        self.program = program
        self.slots: dict[str, int] = {}
        self.bits: list[int] = []
        self.guarded: set[int] = set()  # registers of wgmma's

    def slot(self, register: str) -> int:
        if register not in self.slots:
            self.slots[register] = len(self.bits)
            self.bits.append(self.program.bits(register))
        return self.slots[register]

    def is_register(self, text: str) -> bool:
        try:
            return bool(self.program.bits(text))
        except KeyError:
            return False

    # ---- operands
    def source(self, text: str, kind: str) -> Source:
        """An operand's values as that kind: numpy's own dtypes, float32 for bf16, bool for pred."""
        bits = BITS[kind]
        view = FLOATS.get(kind) or (SIGNED[bits] if kind[0] == "s" else None)
        if kind == "pred" and text[0] == "!":
            inner = self.source(text[1:], kind)
            return lambda g: ~inner(g)
        if self.is_register(text):
            slot, own = self.slot(text), self.program.bits(text)
            plain = UNSIGNED.get(bits)
            if kind == "bf16":
                return lambda g: wide(g.r[slot])
            if own != bits:
                return lambda g: g.r[slot].astype(plain) if view is None else g.r[slot].astype(plain).view(view)
            if view is None:
                return lambda g: g.r[slot]
            return lambda g: g.r[slot].view(view)
        if text[0] == "%":
            return self.special(text, UNSIGNED[bits])
        if kind == "pred":
            truth = np.array(text in ("1", "-1", "true"))
            return lambda g: truth
        if text[:2] in ("0f", "0F", "0d", "0D"):
            number = int(text[2:], 16)
        elif _NUMBER.match(text):
            number = int(text.rstrip("U"), 0) & ((1 << bits) - 1)
        elif text == "global_smem":
            number = 0
        else:
            raise NotImplementedError(f"operand {text}")
        constant = np.array([number], UNSIGNED[bits])
        constant = wide(constant) if kind == "bf16" else constant if view is None else constant.view(view)
        return lambda g: constant[0]

    @staticmethod
    def special(text: str, dtype: Any) -> Source:
        axis = "xyz".find(text[-1])
        name = text.rpartition(".")[0] or text
        if name == "%tid":
            return lambda g: (g.within * 32 + g.lane if axis == 0 else 0 * g.lane).astype(dtype)
        if name == "%ctaid":
            return lambda g: g.places[:, axis].astype(dtype)
        if name == "%nctaid":
            return lambda g: np.full(g.n, g.batch.grid[axis], dtype)
        if name == "%ntid":
            return lambda g: np.full(g.n, g.batch.warps * 32 if axis == 0 else 1, dtype)
        if name == "%laneid":
            return lambda g: g.lane.astype(dtype)
        if name == "%warpid":
            return lambda g: g.within.astype(dtype)
        raise NotImplementedError(f"operand {text}")

    def sink(self, text: str, kind: str) -> Sink:
        """Where a result of that kind goes: it is rounded to bf16, and widened or cut to the register."""
        if text == "_":
            return lambda g, value, mask: None
        slot, own, bits = self.slot(text), self.program.bits(text), BITS[kind]
        if kind == "bf16":
            return lambda g, value, mask: g.put(slot, narrow(value), mask)
        if kind == "pred":
            return lambda g, value, mask: g.put(slot, value, mask)
        if own == bits:
            plain = UNSIGNED[bits]
            return lambda g, value, mask: g.put(slot, value.view(plain), mask)
        signed, plain = SIGNED[own], UNSIGNED[own]
        if kind[0] == "s":
            return lambda g, value, mask: g.put(slot, value.astype(signed).view(plain), mask)
        return lambda g, value, mask: g.put(slot, value.astype(plain), mask)

    def address(self, text: str, bits: int) -> Source:
        found = _ADDRESS.match(text.strip("[] \t"))
        if not found:
            raise NotImplementedError(f"address {text}")
        base, sign, offset = found.groups()
        shift = int(offset or "0", 0) * (-1 if sign == "-" else 1)
        if not self.is_register(base):
            place = (0 if base == "global_smem" else int(base, 0)) + shift
            return lambda g: np.full(g.n, place, np.int64)
        slot = self.slot(base)
        wrap = (1 << bits) - 1 if bits < 64 else -1
        return lambda g: (g.r[slot].astype(np.int64) + shift) & wrap

    # ---- programs
    def decode(self) -> Code:
        grains, code = {"shared": [16], "global": [16]}, self.program.code
        for ins in code:
            if ins.opcode[0] == "wgmma" and ins.opcode[1] == "mma_async":
                registers = braced(ins.operands[0]) + (braced(ins.operands[1]) if ins.operands[1][0] == "{" else [])
                self.guarded |= {self.slot(name) for name in registers}
            space = "shared" if any(part.startswith("shared") for part in ins.opcode) else "global"
            if ins.opcode[0] in ("ld", "st") and "param" not in ins.opcode:
                vector = next((int(part[1:]) for part in ins.opcode if re.fullmatch(r"v\d", part)), 1)
                grains[space].append(vector * BITS[ins.opcode[-1]] // 8)
            elif ins.opcode[0] in ("atom", "red"):
                grains[space].append(BITS[ins.opcode[-1]] // 8)
            elif ins.opcode[0] == "cp" and len(ins.operands) > 1:
                for size in grains.values():
                    size.append(int(ins.operands[2], 0))
        steps = [self.step(ins) for ins in code]
        wgmma = any(ins.opcode[0] == "wgmma" for ins in code)
        return Code(self.program, steps, self.bits, min(grains["shared"]), min(grains["global"]), wgmma)

    def step(self, ins: Instruction) -> Step:
        predicate = -1 if ins.predicate is None else self.slot(ins.predicate)
        kind, target = _CONTROL.get(ins.opcode[0], PLAIN), -1
        run: Run | None = None
        if kind == BARRIER and ins.opcode[1] == "warp":
            kind = PLAIN
            run = nothing
        elif kind == BARRIER and ins.operands[:1] not in ([], ["0"]):
            raise NotImplementedError(f"{self.program.name}: a barrier of a part of a program: {ins.text}")
        elif kind == BRANCH:
            target = self.program.labels[ins.operands[0]]
        elif kind == PLAIN:
            maker = INSTRUCTIONS.get(ins.opcode[0])
            if maker is None:
                raise NotImplementedError(f"{self.program.name}: {ins.text}")
            run = self.guard(ins, maker(self, ins))
        return Step(kind, run, predicate, ins.negated, target, ins)

    def guard(self, ins: Instruction, run: Run) -> Run:
        """Report a register of a wgmma that is touched before the wgmma is waited for."""
        if ins.opcode[0] == "wgmma" or not self.guarded:
            return run
        names = {name for operand in ins.operands for name in re.findall(r"[%\w]+", operand) if name in self.slots}
        touched = self.guarded & {self.slots[name] for name in names}
        if not touched:
            return run

        results = {self.slots[name] for name in re.findall(r"[%\w]+", ins.operands[0]) if name in self.slots}
        written = [] if ins.opcode[0] in ("st", "red", "stmatrix") else sorted(touched & results)

        def guarded(g: Gang, m: Mask) -> None:
            for slot in written:
                g.touched[slot] = g.clock
            if g.products and matrices.pending(g, touched, m):
                g.report("a register of a wgmma is used before the wgmma is waited for")
            run(g, m)

        return guarded


Maker = Callable[[Decoder, Instruction], Run]
INSTRUCTIONS: dict[str, Maker] = {}


def instruction(*names: str) -> Callable[[Maker], Maker]:
    def keep(maker: Maker) -> Maker:
        INSTRUCTIONS.update(dict.fromkeys(names, maker))
        return maker

    return keep


def nothing(g: Gang, m: Mask) -> None:
    pass


INSTRUCTIONS |= dict.fromkeys(
    ("membar", "nanosleep", "prefetch", "createpolicy", "griddepcontrol", "discard", "applypriority"),
    lambda d, ins: nothing,
)
