"""What is right runs and is right; what is planted is found."""

import ptx_emulator
import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator import OPTIONS, STATS, Fault, Kernel
from test_kernels import EMULATED
from triton.runtime.driver import driver

if not EMULATED:
    pytest.skip("runs on the emulator: see docs/kernel.md", allow_module_level=True)

pytestmark = pytest.mark.planted  # whose reports are meant
ORDERS = ("step", "forward", "reverse", "random")


@pytest.fixture(autouse=True, params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setattr(OPTIONS, "order", request.param)
    STATS.reports.clear()
    before = driver.active.get_current_target().arch
    ptx_emulator.activate(80)
    yield
    ptx_emulator.activate(before)


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, MASKED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < n if MASKED else at >= 0
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask) + tl.load(y_ptr + at, mask=mask), mask=mask)


@triton.jit
def increment(x_ptr, BARRIER: tl.constexpr):
    x = tl.load(x_ptr)  # by every warp
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr, x + 1)  # by one


@triton.jit
def product(a_ptr, b_ptr, c_ptr, m, n, k, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    at, acc = tl.arange(0, DEPTH), tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, k, DEPTH):
        a = tl.load(a_ptr + row * k + (first + at)[None, :], mask=(row < m) & (first + at < k)[None, :], other=0.0)
        b = tl.load(b_ptr + (first + at)[:, None] * n + col, mask=(first + at < k)[:, None] & (col < n), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + row * n + col, acc, mask=(row < m) & (col < n))


def multiply(dtype, arch, m=80, n=24, k=112):
    ptx_emulator.activate(arch)
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.full((m, n), torch.nan)
    kernel = product[(triton.cdiv(m, 64),)](a, b, c, m, n, k, 64, 32, 32)
    return kernel, (a, b, c, m, n, k), a.double() @ b.double()


@pytest.mark.parametrize("n", [1, 128, 1000])
def test_addition(n):
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n,), torch.nan)
    add[(triton.cdiv(n, 128),)](x, y, out, n, True, 128)
    assert torch.equal(out, x + y)
    assert not STATS.reports


def test_out_of_bounds():
    x, out = torch.randn(256), torch.zeros(250)
    with pytest.raises(Fault, match=r"write of global memory out of bounds: test_ptx_emulator\.py:"):
        add[(2,)](x, x, out, 250, False, 128)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_race(barrier):
    increment[(1,)](torch.zeros(1), barrier)
    found = [report for report in STATS.reports if "race in global memory" in report]
    assert bool(found) is not barrier


def test_two_programs():
    increment[(2,)](torch.zeros(1), True)
    assert any("two programs" in report for report in STATS.reports)


@pytest.mark.parametrize(("dtype", "arch", "unit"), [
    (torch.float32, 80, "fma.rn"), (torch.float16, 80, "mma.sync"), (torch.bfloat16, 80, "mma.sync"),
    (torch.float16, 90, "wgmma"), (torch.bfloat16, 90, "wgmma"),
])  # fmt: skip
def test_products(dtype, arch, unit):
    kernel, (_, _, c, *_), truth = multiply(dtype, arch)
    assert unit in kernel.asm["ptx"]
    assert (c - truth).abs().max() < 1e-4
    assert not STATS.reports


@pytest.mark.parametrize(("arch", "line", "report"), [
    (80, "cp.async.wait_group", "before its cp.async is waited for"),
    (80, "bar.sync", "race in shared memory"),
    (80, "cp.async.c", "shared memory read unwritten"),
    (90, "fence.proxy.async", "copied by cp.async with no fence.proxy.async since"),
    (90, "wgmma.fence", "written after the last wgmma.fence"),
    (90, "wgmma.wait_group", "before the wgmma is waited for"),
])  # fmt: skip
def test_a_line_is_missing(arch, line, report):
    """Without one kind of instruction a product of matrices is wrong, and the emulator says why."""
    kernel, (*tensors, m, n, k), _ = multiply(torch.bfloat16, arch)
    text = "\n".join(row for row in kernel.asm["ptx"].splitlines() if not row.strip().startswith(line))
    broken = Kernel(text, kernel.metadata.name, kernel.metadata.num_warps, kernel.metadata.shared)
    broken((2, 1, 1), [("*bf16", t) for t in tensors] + [("i32", size) for size in (m, n, k)])
    assert any(report in found for found in STATS.reports), STATS.reports


def test_a_wgmma_still_reads():
    """A store to its operand before it is waited for."""
    kernel, (*tensors, m, n, k), _ = multiply(torch.bfloat16, 90)
    store = "\tmov.b32 %r1, 0;\n\tst.shared.b32 [global_smem], %r1;\n\t"
    text = kernel.asm["ptx"].replace("wgmma.commit_group.sync.aligned;", "wgmma.commit_group.sync.aligned;\n" + store)
    broken = Kernel(text, kernel.metadata.name, kernel.metadata.num_warps, kernel.metadata.shared)
    broken((2, 1, 1), [("*bf16", t) for t in tensors] + [("i32", size) for size in (m, n, k)])
    assert any("while a wgmma" in found for found in STATS.reports), STATS.reports


HAND = """.visible .entry hand(.param .u64 hand_param_0)
.reqntid 64
{
	.reg .pred %p<3>;
	.reg .b32 %r<6>;
	.reg .b64 %rd<4>;
	ld.param.b64 %rd1, [hand_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	setp.lt.u32 %p1, %r1, 10;
	BODY
	st.global.b32 [%rd3], %r3;
	ret;
REST
}
"""


def by_hand(body, rest=""):
    out = torch.zeros(64, dtype=torch.int32)
    Kernel(HAND.replace("BODY", body).replace("REST", rest), "hand", 2, 256)((1, 1, 1), [("*i32", out)])
    return out


def test_threads_meet_again():
    """Where a join stands before its branches, all lanes are there to shuffle after it."""
    body = "@%p1 bra $A;\n bra.uni $B;\n$JOIN:\n shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;"
    out = by_hand(body, "$A:\n mov.b32 %r2, 7;\n bra.uni $JOIN;\n$B:\n add.s32 %r2, %r1, 100;\n bra.uni $JOIN;")
    value = torch.where(torch.arange(64) < 10, 7, torch.arange(64) + 100)
    assert torch.equal(out.long(), value[torch.arange(64) ^ 1])
    assert not STATS.reports


def test_loops_of_several_lengths():
    """Lane i goes round i + 1 times; what follows waits for all."""
    body = """mov.b32 %r2, 0;
$LOOP:
	add.s32 %r2, %r2, 1;
	setp.le.u32 %p2, %r2, %r1;
	@%p2 bra $LOOP;
	redux.sync.max.u32 %r3, %r2, -1;"""
    assert by_hand(body).tolist() == [32] * 32 + [64] * 32
    assert not STATS.reports


@pytest.mark.parametrize(("body", "report"), [
    ("shl.b32 %r2, %r1, 2;\n ld.shared.b32 %r3, [%r2];", "shared memory read unwritten"),
    ("mov.b32 %r2, 0;\n st.shared.b32 [%r2], %r1;\n mov.b32 %r3, %r1;", "different values to one place"),
    ("shl.b32 %r2, %r1, 2;\n st.shared.b32 [%r2], %r1;\n xor.b32 %r2, %r2, 128;\n ld.shared.b32 %r3, [%r2];",
     "race in shared memory"),
    ("@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "a part of a warp"),
])  # fmt: skip
def test_mistakes(body, report):
    by_hand(body)
    assert any(report in found for found in STATS.reports), STATS.reports


@pytest.mark.parametrize(
    "body", ["ld.shared.b32 %r3, [global_smem+512];", "mov.b32 %r2, 2;\n ld.shared.b32 %r3, [%r2];"]
)
def test_no_such_place(body):
    with pytest.raises(Fault, match="shared memory"):
        by_hand(body)
