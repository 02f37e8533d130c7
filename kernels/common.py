"""What the kernels share: argument checks, the tile of a program, and functions that stay accurate near 0."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNFUSED = {"enable_fp_fusion": False}  # launch option: q - p in one fused instruction is not 0 where q = p


def check(
    name: str,
    x: Tensor,
    like: Tensor,
    shape: torch.Size | tuple[int, ...],
    *,
    beside: str = "mu",
    coefficient: bool = False,
    same: bool = False,
) -> None:
    """Refuse a tensor of the wrong shape, dtype or device, in one line that says what to do.

    beside: the name of ``like``. coefficient: float32 alone will do. same: so will the dtype of ``like`` alone.
    """
    if x.dtype == torch.float64:
        raise TypeError(f"{name} is float64 but the kernels compute in float32: cast it, or use pc_triton.reference")
    if x.dtype not in (DTYPES[:1] if coefficient else DTYPES):
        wanted = "float32" if coefficient else "float32, float16 or bfloat16"
        raise TypeError(f"{name} is {str(x.dtype).removeprefix('torch.')}: cast it to {wanted}")
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}: give it {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} and {beside} on {like.device}: move it there")
    if same and x.dtype != like.dtype:
        kinds = [str(t.dtype).removeprefix("torch.") for t in (x, like)]
        raise TypeError(f"{name} is {kinds[0]} and {beside} {kinds[1]}: cast one to the other's")


def check_precision(precision: Tensor, like: Tensor, beside: str = "mu") -> None:
    """Refuse a precision that does not divide the rows of ``like``, of that name, among samples."""
    check("precision", precision, like, (precision.numel(),), beside=beside, coefficient=True)
    check_samples(len(precision), like, beside)


def check_samples(samples: int, like: Tensor, beside: str = "mu") -> None:
    """Refuse a number of samples that does not divide the rows of ``like``, of that name."""
    if like.shape[0] % samples if samples else like.shape[0]:
        raise ValueError(
            f"{beside} has {like.shape[0]} rows, no multiple of the {samples} samples of precision: "
            "give precision one entry per sample"
        )


def check_in_place(state: Tensor) -> None:
    """Refuse a state that cannot be moved in place."""
    if not state.is_contiguous():
        raise ValueError("state is not contiguous and is moved in place: keep it as state.contiguous()")


def check_state(state: Tensor, mu: Tensor, form: str) -> None:
    """Refuse a state that a node's kernels would misread. Only an error may be bfloat16: u would lose u - mu in it."""
    check("state", state, mu, mu.shape, coefficient=form == "state" or state.dtype != torch.bfloat16)
    check_in_place(state)


def new_state(mu: Tensor, form: str, dtype: torch.dtype | None) -> Tensor:
    """The state that a first move writes, in that dtype; None is float32."""
    state = torch.empty(mu.shape, dtype=dtype or torch.float32, device=mu.device)
    check_state(state, mu, form)
    return state


def check_moves(keep: Tensor | None, move: Tensor | None, precision: Tensor, like: Tensor, beside: str = "mu") -> None:
    """Refuse coefficients of a move that are not one a sample, or one without the other."""
    if (keep is None) != (move is None):
        raise ValueError("keep and move go together: give both, or neither for the learning pass")
    for name, x in (("keep", keep), ("move", move)):
        if x is not None:
            check(name, x, like, precision.shape, beside=beside, coefficient=True)


def check_node(mu: Tensor, state: Tensor | None, precision: Tensor, form: str, noise: Tensor | None = None) -> None:
    """Refuse arguments of a node that its kernels would misread."""
    if form not in ("error", "state"):
        raise ValueError(f'form is {form!r}: say "error" or "state"')
    check("mu", mu, mu, mu.shape)
    if mu.dim() < (1 if noise is None else 2):
        raise ValueError(f"mu has {mu.dim()} dimensions: give it [samples, ...]")
    check_precision(precision, mu)
    if noise is not None:
        if mu.shape[-1] % 2:
            raise ValueError(f"mu has {mu.shape[-1]} columns: give it an even number, [mean | log variance]")
        check("noise", noise, mu, (*mu.shape[:-1], mu.shape[-1] // 2))
    if state is not None:
        check_state(state, mu, form)


def check_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    form: str,
    noise: Tensor | None = None,
) -> None:
    """Refuse arguments of an inference step that its kernel would misread."""
    check_node(mu, state, precision, form, noise)
    check_moves(keep, move, precision, mu)
    if grad is not None:
        check("grad", grad, mu, mu.shape if noise is None else noise.shape)
    elif form == "error" or keep is not None:
        raise ValueError("grad is None: only the learning pass (keep=None) in state form does without it")


def count_rows(mu: Tensor) -> int:
    """Rows along the last axis. The kernels that divide a row's number do so in 32 bits: in 64 it spills registers."""
    rows = mu.numel() // mu.shape[-1]
    if rows >= 2**31:
        raise ValueError(f"mu has {rows} rows: give at most {2**31 - 1} at a time")
    return rows


def cdiv(n: int, size: int) -> int:
    """How many parts of that size n has, the last one begun: plain integers, triton.cdiv takes microseconds."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The lowest power of 2 from n >= 1 on."""
    return 1 << (n - 1).bit_length()


def packed(x: Tensor | None) -> Tensor | None:
    """x without strides, as the kernels read it."""
    return None if x is None else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's GPU even where another one is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch() -> int | str:
    """The current GPU as Triton names it: 90 for a Hopper, "gfx942"; in the interpreter 90.

    Ahead of time, and in an emulator, there is a driver for tensors of any device.
    """
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return 90


def product_precision(dtype: torch.dtype) -> str:
    """How the kernels multiply, as ``tl.dot`` calls it: "tf32" for float32 where torch may do so too, else "ieee".

    Torch may after ``torch.set_float32_matmul_precision("high")``, or ``torch.backends.cuda.matmul.fp32_precision =
    "tf32"``. The tensor cores for it begin with sm_80; on AMD's GPUs products stay exact.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    asked = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on; to ask for the old name may then be an error
    if not (matmul.allow_tf32 if asked is None else asked == "tf32"):
        return "ieee"
    target = arch()
    return "tf32" if isinstance(target, int) and target >= 80 else "ieee"


def tile(columns: int, elements: int, longest: int) -> tuple[int, int, int]:
    """ROWS, COLS and num_warps of a program over rows of that length: several short rows make up ``elements``."""
    cols = min(power_of_2(columns), longest)
    rows = max(1, elements // cols)
    return rows, cols, max(4, min(16, rows * cols // 256))


def sum_partials(energy: Tensor, samples: int) -> Tensor:
    """Energies of the samples [S] from those of their parts [S * r, blocks]; no launch where each has one part."""
    return energy.view(samples) if energy.numel() == samples else energy.view(samples, -1).sum(1)


@triton.jit
def row_tile(n_rows, n_columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS, 1] and columns [1, COLS] in int64, and the place of each row's partial energy."""
    blocks = tl.cdiv(n_columns, COLS)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    return rows, cols, rows * blocks + program % blocks


@triton.jit
def coefficients(precision_ptr, keep_ptr, move_ptr, sample, inside, MOVE: tl.constexpr):
    """pi, keep and move / pi of each row's sample."""
    pi = tl.load(precision_ptr + sample, mask=inside, other=1.0)
    keep = pi
    push = pi
    if MOVE:
        keep = tl.load(keep_ptr + sample, mask=inside, other=0.0)
        push = tl.load(move_ptr + sample, mask=inside, other=0.0) / pi
    return pi, keep, push


@triton.jit
def moved_by(d, g, keep, push):
    """keep d - push g; keep d where push is 0, whatever g is.

    So the guard holds a sample. Where its F overflowed g is infinite, and 0 times that is NaN.
    """
    return keep * d - push * tl.where(push == 0.0, 0.0, g)


@triton.jit
def changes(keep, push):
    """Which rows of states u are written. One that is held keeps its own: u - mu + mu is NaN where mu overflowed."""
    return (keep != 1.0) | (push != 0.0)


@triton.jit
def exp(x):
    """e^x as 2^(x log2 e), in two instructions; on NVIDIA's GPUs 0 where it is below float32's normal numbers."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def near_tail(x):
    """e^x - 1 - x for |x| < 1, to float32's relative precision."""
    series = tl.fma(x, 1.0 / 3628800.0, 1.0 / 362880.0)
    series = tl.fma(x, tl.fma(x, series, 1.0 / 40320.0), 1.0 / 5040.0)
    series = tl.fma(x, tl.fma(x, series, 1.0 / 720.0), 1.0 / 120.0)
    series = tl.fma(x, tl.fma(x, series, 1.0 / 24.0), 1.0 / 6.0)
    return x * x * tl.fma(x, series, 0.5)


@triton.jit
def exp_tail(x):
    """e^x - 1 - x: never negative, and accurate to float32's relative precision however small x is."""
    near = tl.abs(x) < 1.0
    return tl.where(near, near_tail(tl.where(near, x, 0.0)), tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1, accurate near 0."""
    near = tl.abs(x) < 1.0
    small = tl.where(near, x, 0.0)
    return tl.where(near, small + near_tail(small), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate near 0: log(y) x / (y - 1) undoes the rounding of y = 1 + x."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
