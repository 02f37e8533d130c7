"""A chain of linear layers with Gaussian value nodes: all of inference, and the learning pass, in one launch.

Node l is predicted by mu_l = W_l f(u_(l-1)) + b_l, with an activation f of its own on each node, and its energy is
P_l |e_l|^2 / 2 with e = u - mu (Pinchetti et al. 2022, arXiv 2211.03481; the error form: Goemaere et al. 2025, arXiv
2505.20137). The last layer is clamped to labels or values. Inference of a sample depends on no other sample: a program
owns a tile of them, whose activations, gradients and errors its multiprocessor's caches hold from pass to pass, and
waits for no other program. The gradients of weights are left to plain products of what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clamped import check_labels, clamp_rows
from .common import UNFUSED, arch, cdiv, check, expm1, moved_by, on_device, product_precision
from .guard import halfway
from .linear import multiply

FACTS = tl.constexpr(7)  # in the table, of each layer
SAMPLES = 16
"""Samples of a program: few, as a GPU is to be full of programs."""
ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")


@triton.jit
def _tanh(x):
    """tanh x, accurate near 0."""
    t = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, t, -t) / (2.0 + t)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x)."""
    if ACTIVATION == "relu":
        y, slope = tl.where(x > 0.0, x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        y = _tanh(x)
        slope = 1.0 - y * y
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
        slope = y * (1.0 - y)
    elif ACTIVATION == "silu":
        p = tl.sigmoid(x)
        y = x * p
        slope = p + y * (1.0 - p)
    elif ACTIVATION == "gelu":
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * p
        slope = p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        y = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        y, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def _layer(table_ptr, l, dtype: tl.constexpr, UNIT: tl.constexpr, LAST_UNIT: tl.constexpr):
    """W and b (0: none) of layer l, their N and K, and where its part and its input's begin in a buffer's rows.

    A number made a pointer loses what is known of its alignment, hence it is said of the pointer; the launcher checks.
    """
    at = table_ptr + l * FACTS
    weight, bias = tl.multiple_of(tl.load(at).to(dtype), 16), tl.load(at + 1).to(dtype)
    n, k = tl.load(at + 2).to(tl.int32) * LAST_UNIT, tl.load(at + 3).to(tl.int32) * UNIT
    return weight, bias, n, k, tl.load(at + 4) * UNIT, tl.load(at + 5) * UNIT


@triton.jit
def _forwards(
    first,  # whether this is the first pass
    node,  # the samples whose node this layer predicts: all, or on the last layer none [ROWS, 1]
    samples,  # of the tile: the first, how many there are from it on, and which rows are some [ROWS, 1]
    layer,
    input_ptr,  # at the tile's first row
    input_stride,
    activation,  # a number in ACTIVATIONS
    buffers,
    stride,  # of their rows
    ACTIVATIONS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One layer: f(u) and f'(u) of u = W x + b + e, in the first pass of mu; the last one's mu in its gradient's place.

    Returns the sum of e^2 of each sample; in the first pass that of mu^2.
    """
    activation_ptr, slope_ptr, error_ptr, _, grad_ptr = buffers
    top, high, inside = samples
    weight_ptr, bias_ptr, n, k, column, _ = layer
    place = (top + tl.arange(0, ROWS)[:, None]) * stride + column
    cols = tl.arange(0, COLS)[None, :]
    squares = tl.zeros([ROWS, 1], tl.float32)
    for left in range(0, n, COLS):
        within = cols < n - left
        mask, tile = inside & within, place + left + cols
        acc = tl.load(error_ptr + tile, mask=mask & node & (first == 0), other=0.0)
        squares += tl.sum(acc * acc, axis=1, keep_dims=True)
        has_bias = cols < tl.where(bias_ptr.to(tl.int64) == 0, 0, n - left)
        acc += tl.load(bias_ptr + left + cols.to(tl.int64), mask=has_bias, other=0.0).to(tl.float32)
        acc = multiply(
            acc, input_ptr, weight_ptr + tl.cast(left, tl.int64) * k, high, n - left, k, input_stride, 1, 1, k,
            ROWS, COLS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
        if first:
            squares += tl.sum(acc * acc, axis=1, keep_dims=True)
        y, slope = _activate(acc, tl.constexpr(ACTIVATIONS[0]))
        for i in tl.static_range(1, len(ACTIVATIONS)):
            if activation == i:
                y, slope = _activate(acc, tl.constexpr(ACTIVATIONS[i]))
        tl.store(activation_ptr + tile, y, mask=mask & node)
        tl.store(slope_ptr + tile, slope, mask=mask & node)
        tl.store(grad_ptr + tile, acc, mask=mask & (node == 0))
    return squares


@triton.jit
def _backwards(
    samples,
    layer,
    buffers,
    stride,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From a layer's gradient that of the node below, f'(u) W' g. Returns the sum of its squares of each sample."""
    _, slope_ptr, _, _, grad_ptr = buffers
    top, high, inside = samples
    weight_ptr, _, n, k, column, below = layer
    place = (top + tl.arange(0, ROWS)[:, None]) * stride + below
    cols = tl.arange(0, COLS)[None, :]
    squares = tl.zeros([ROWS, 1], tl.float32)
    for left in range(0, k, COLS):
        acc = tl.zeros([ROWS, COLS], tl.float32)
        acc = multiply(
            acc, grad_ptr + top * stride + column, weight_ptr + left, high, k - left, n, stride, 1, k, 1,
            ROWS, COLS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
        mask, tile = inside & (cols < k - left), place + left + cols
        g = acc * tl.load(slope_ptr + tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + tile, g, mask=mask)
        squares += tl.sum(g * g, axis=1, keep_dims=True)
    return squares


@triton.jit
def _move(
    t,
    place,  # of the rows' first elements in the node's part of a buffer [ROWS, 1]
    inside,
    buffers,
    n,
    keep,
    push,
    rose,
    REMEMBERS: tl.constexpr,
    COLS: tl.constexpr,
):
    """e <- keep e - push g of one node, with push = move / P; where F rose, from halfway back to the accepted e."""
    _, _, error_ptr, accepted_ptr, grad_ptr = buffers
    cols = tl.arange(0, COLS)[None, :]
    for left in range(0, n, COLS):
        mask, tile = inside & (cols < n - left), place + left + cols
        e = tl.load(error_ptr + tile, mask=mask & (t > 0), other=0.0)
        if REMEMBERS:
            best = tl.load(accepted_ptr + tile, mask=mask & (t > 1), other=0.0)
            e = tl.where(rose & (t > 1), halfway(e, best), e)
            tl.store(accepted_ptr + tile, tl.where(rose, best, e), mask=mask)
        g = tl.load(grad_ptr + tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(error_ptr + tile, moved_by(e, g, keep, push), mask=mask)


@triton.jit
def _clamp_values(mu_ptr, target_ptr, rows, inside, scale, n, stride, COLS: tl.constexpr):
    """|y - mu|^2 / 2 of each sample [ROWS, 1], and scale (mu - y) in the place of mu."""
    squares = tl.zeros(rows.shape, tl.float32)
    for left in range(0, n, COLS):
        cols = left + tl.arange(0, COLS)[None, :]
        mask = inside & (cols < n)
        d = tl.load(mu_ptr + (rows * stride + cols), mask=mask, other=0.0).to(tl.float32)
        d -= tl.load(target_ptr + (rows * n + cols), mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(d * d, axis=1, keep_dims=True)
        tl.store(mu_ptr + (rows * stride + cols), scale * d, mask=mask)
    return 0.5 * squares


@triton.jit
def _precision(squared, columns, nodes, free_energy, displacement, trust):
    """`rules.Displacement` of a node by itself: n |G|^2 / (2 delta |F|), and no move by more than ``trust``."""
    share = nodes * squared / tl.maximum(2.0 * displacement * tl.abs(free_energy), 1.2e-38)
    return tl.maximum(share, tl.sqrt(squared / columns) / trust)


@triton.jit
def _chain(
    x_ptr,  # [S, K]
    target_ptr,  # [S] int64 labels, or [S, N_L] values
    weight_of_item_ptr,  # one float32, by which the learning pass multiplies dF
    table_ptr,  # [L, FACTS] int64, what _layer reads; the pointers are to tensors of x's dtype
    activation_ptr,  # [S, stride]: of each hidden layer, one beside the other, f(u), in x's dtype
    slope_ptr,  # the same: f'(u)
    error_ptr,  # the same in float32: e = u - mu
    accepted_ptr,  # the same: e to which the guard goes back; with REMEMBERS alone
    grad_ptr,  # the same in x's dtype, and then the last layer's: dF/dmu; of the last one first mu itself
    precision_ptr,  # [2 (L - 1), S] float32: P; within the first pass the mean of mu^2, and then |G|^2 of each node
    energy_ptr,  # [S] float32: F
    before_ptr,  # [2, S] float32: F in the first pass, and its slope along the first move
    tracked_ptr,  # one float32, the first step if it is a number; or None
    n_samples,
    layers,
    width_units,  # K / UNIT
    stride_units,  # stride / 16
    steps,
    first_step,
    precision,  # of every node, where it is not to be found
    displacement,
    trust,
    least,
    ignore_index,
    UNIT: tl.constexpr,  # what the layers' input widths are multiples of
    LAST_UNIT: tl.constexpr,  # and their output widths
    ACTIVATIONS: tl.constexpr,  # those that occur
    LABELS: tl.constexpr,
    AUTO: tl.constexpr,  # whether P is found
    GUARDS: tl.constexpr,
    REMEMBERS: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All passes over ROWS samples, of each pass: forwards, from the prediction e = 0 in the first one,

        u = W f(u below) + b + e,  F = sum P |e|^2 / 2 + the energy of the last layer

    then the coefficients of each sample's next move, and backwards g below = f'(u below) W' g, which in the first pass
    gives P, that of a node by itself but at least ``least`` of their mean. Then, but for the last pass, every node
    makes its move e <- keep e - (move / P) g. A barrier stands between what the program's threads write and what others
    of them read.

    Floor, with p weights, h hidden units and N_L outputs: read x and the weights, write f(u) and g, of x's dtype all;
    2 S p FLOPs a forward pass, and without the first layer's weights a backward pass.
    """
    buffers = (activation_ptr, slope_ptr, error_ptr, accepted_ptr, grad_ptr)
    S, program = tl.cast(n_samples, tl.int64), tl.program_id(0)
    width, stride, last = tl.cast(width_units, tl.int64) * UNIT, tl.cast(stride_units, tl.int64) * 16, layers - 1
    top = program.to(tl.int64) * ROWS
    rows = top + tl.arange(0, ROWS)[:, None]
    inside = rows < S
    samples = (top, n_samples - program * ROWS, inside)
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr)
        first_step = tl.where(tl.abs(tracked) < float("inf"), tracked, first_step)
    step = tl.full([ROWS, 1], first_step, tl.float32)
    keep, move, rose = 1.0 - step, step, step < 0.0
    accepted = tl.zeros([ROWS, 1], tl.float32)  # F of the states to which the guard goes back
    fall = tl.zeros([ROWS, 1], tl.float32)  # the slope of F along the first move
    for t in range(steps):
        energy = tl.zeros([ROWS, 1], tl.float32)
        for l in range(layers):
            layer = _layer(table_ptr, l, x_ptr.dtype, UNIT, LAST_UNIT)
            input_at = tl.where(  # a number, since AMD's compiler cannot choose between pointers
                l == 0, (x_ptr + top * width).to(tl.int64), (activation_ptr + (top * stride + layer[5])).to(tl.int64)
            )
            input_ptr = tl.multiple_of(input_at.to(x_ptr.dtype), UNIT * x_ptr.dtype.element_ty.primitive_bitwidth // 8)
            node = rows < tl.where(l < last, S, 0)
            total = _forwards(
                t == 0, node, samples, layer, input_ptr, tl.where(l == 0, width, stride),
                tl.load(table_ptr + l * FACTS + 6), buffers, stride, ACTIVATIONS, EVEN, ROWS, COLS, DEPTH, PRECISION,
            )  # fmt: skip
            place = precision_ptr + l * S + rows
            energy += 0.5 * total * tl.load(place, mask=node & (t > 0), other=0.0)
            tl.store(place, total / layer[2], mask=node & (t == 0))
            tl.debug_barrier()
        layer = _layer(table_ptr, last, x_ptr.dtype, UNIT, LAST_UNIT)
        weight = tl.where(t + 1 == steps, tl.load(weight_of_item_ptr), 1.0)
        if LABELS:
            energy += clamp_rows(
                grad_ptr + layer[4], grad_ptr + layer[4], target_ptr, rows, S, layer[2], stride, ignore_index, weight,
                None, COLS,
            )  # fmt: skip
        else:
            energy += _clamp_values(grad_ptr + layer[4], target_ptr, rows, inside, weight, layer[2], stride, COLS)
        tl.store(energy_ptr + rows, energy, mask=inside)
        tl.debug_barrier()
        if t == 0:
            accepted = energy
            tl.store(before_ptr + rows, energy, mask=inside)
        elif GUARDS:
            energy = tl.where(energy < float("inf"), energy, float("inf"))  # NaN, too, is above all F
            rose = energy > accepted
            back = tl.full([ROWS, 1], 1.0, tl.float32)
            if t == 1:  # the parabola through F before and after the first move, whose slope at its start is known
                slope = tl.where(fall < float("inf"), fall, 0.0)
                curvature = 2.0 * (energy - accepted + step * slope) / (step * step)
                steep = curvature > slope
                back = 1.0 / step
                step = tl.where(steep, slope / tl.where(steep, curvature, 1.0), 1.0)
                back *= step
            else:
                step = tl.where(rose, 0.5 * step, step)
            accepted = tl.where(rose, accepted, energy)
            keep = tl.where(rose, back, 1.0 - step)
            move = tl.where(rose, 0.0, step)
        held = tl.zeros([ROWS, 1], tl.float32)  # the sum of the nodes' precisions, by their own gradients
        for i in range(last):
            layer = _layer(table_ptr, last - i, x_ptr.dtype, UNIT, LAST_UNIT)
            total = _backwards(samples, layer, buffers, stride, EVEN, ROWS, COLS, DEPTH, PRECISION)
            tl.debug_barrier()
            if t == 0:
                place = precision_ptr + (last - 1 - i) * S + rows
                if AUTO:
                    total *= tl.load(place, mask=inside, other=1.0)
                    held += _precision(total, layer[3], last, accepted, displacement, trust)
                tl.store(place + last * S, total, mask=inside)
        tl.debug_barrier()
        for i in range(last):
            layer = _layer(table_ptr, last - i, x_ptr.dtype, UNIT, LAST_UNIT)
            place = precision_ptr + (last - 1 - i) * S + rows
            pi = tl.load(place, mask=inside, other=1.0)
            if t == 0:
                total = tl.load(place + last * S, mask=inside, other=0.0)
                tl.debug_barrier()  # every warp has read the mean of mu^2 before one of them overwrites it
                unit = tl.full([ROWS, 1], 1.0, tl.float32)
                if AUTO:
                    unit = pi
                    pi = _precision(total, layer[3], last, accepted, displacement, trust)
                    pi = tl.minimum(tl.maximum(tl.maximum(pi, least * held / last), 1e-12), 1e12)
                else:
                    pi = tl.full([ROWS, 1], precision, tl.float32)
                fall += total / pi
                pi /= tl.maximum(unit, 1e-30)
                tl.store(place, pi, mask=inside)
            if t + 1 < steps:
                _move(
                    t, rows * stride + layer[5], inside, buffers, layer[3], keep, move / pi, rose, REMEMBERS, COLS
                )  # fmt: skip
        tl.debug_barrier()
    tl.store(before_ptr + (S + rows), fall, mask=inside)


@lru_cache(maxsize=256)
def _table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """The kernel's table of layers: made once, as long as the weights lie where they do."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def chain_gradient(
    x: Tensor,
    target: Tensor,
    weight_of_item: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    *,
    steps: int,
    step: float,
    guards: bool,
    precision: float | None,
    displacement: float,
    trust: float,
    least: float,
    ignore_index: int,
    tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """F ``[S]`` in the last of T = ``steps`` passes, there each layer's input, and its dF/dmu times weight_of_item.

    Before the inputs F in the first pass and its slope along the first move, ``[2, S]``.

    x ``[S, N_0]``; target: labels int64 ``[S]``, of which ``ignore_index`` counts nothing, or values ``[S, N_L]``,
    whose energy is |y - mu|^2 / 2; weight_of_item: one float32. weights ``[N_l, N_(l-1)]``, contiguous, biases
    ``[N_l]`` or None, and the name of the activation on each layer but the last (`ACTIVATIONS`). All but labels of one
    dtype, float32, float16 or bfloat16. precision: pi of each node, or None: it is set for each node and sample from
    the displacement, ``trust`` and ``least``. step: the first one, or ``tracked``, one float32, where that is given and
    finite; guards: whether the later ones are adapted. All of this is as in `pc_triton.FreeEnergy` with
    ``order="error"``.
    Raises ValueError for a number, shape, strides or device that does not fit, TypeError for a dtype that does not.
    """
    labels = _check_chain(x, target, weight_of_item, weights, biases, activations)
    if tracked is not None:
        check("tracked", tracked, x, (), beside="x", coefficient=True)
    x = (
        x.contiguous()
        if x.data_ptr() % (16 * x.element_size()) == 0
        else x.clone(memory_format=torch.contiguous_format)
    )
    samples, widths, last = len(x), (x.shape[1], *(len(w) for w in weights)), len(weights) - 1
    columns = list(accumulate(widths[1:], initial=0))
    stride, remembers = 16 * cdiv(columns[-1], 16), guards and steps > 3
    energy, before, precisions = (
        torch.empty(*sizes, samples, dtype=torch.float32, device=x.device) for sizes in ((), (2,), (2 * last,))
    )
    f, slope, grad = x.new_empty(3, samples, stride)
    errors = torch.empty(1 + remembers, samples, stride, dtype=torch.float32, device=x.device)
    unit, last_unit = (math.gcd(16, *sizes) for sizes in (widths[:-1], widths[1:]))
    kinds = tuple(dict.fromkeys(activations))
    table = tuple(
        (
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            widths[l + 1] // last_unit,
            widths[l] // unit,
            columns[l] // unit,
            columns[max(l - 1, 0)] // unit,
            0 if l == last else kinds.index(activations[l]),
        )
        for l, (weight, bias) in enumerate(zip(weights, biases))
    )
    if samples:
        amd = isinstance(arch(), str)
        products = product_precision(x.dtype)
        depth = 16 if x.dtype == torch.float32 and products == "ieee" else 128 // x.element_size()
        rows, cols = SAMPLES, 64
        with on_device(x):
            _chain[(cdiv(samples, rows),)](
                x,
                target.contiguous(),
                weight_of_item,
                _table(x.device, table),
                f,
                slope,
                errors[0],
                errors[-1],
                grad,
                precisions,
                energy,
                before,
                tracked,
                samples,
                last + 1,
                widths[0] // unit,
                stride // 16,
                steps,
                step,
                0.0 if precision is None else float(precision),
                displacement,
                trust,
                least,
                ignore_index,
                UNIT=unit,
                LAST_UNIT=last_unit,
                ACTIVATIONS=kinds,
                LABELS=labels,
                AUTO=precision is None,
                GUARDS=guards,
                REMEMBERS=remembers,
                EVEN=samples % rows == 0 and not any(n % max(cols, depth) for n in widths),
                ROWS=rows,
                COLS=cols,
                DEPTH=depth,
                PRECISION=products,
                num_warps=8,
                num_stages=2 if amd else 3,
                **({} if amd else {"maxnreg": 224}),  # unasked, ptxas spills rather than take over 128
                **UNFUSED,
            )
    parts = [slice(*ends) for ends in pairwise(columns)]
    return energy, before, [x, *(f[:, part] for part in parts[:-1])], [grad[:, part] for part in parts]


def _check_chain(
    x: Tensor,
    target: Tensor,
    weight_of_item: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
) -> bool:
    """Refuse arguments that the kernel would misread; whether the target is labels."""
    if len(weights) < 2 or len(biases) != len(weights) or len(activations) != len(weights) - 1:
        raise ValueError("give a weight and a bias to each of at least two layers, an activation to each but the last")
    unknown = [name for name in activations if name not in ACTIVATIONS]
    if unknown:
        raise ValueError(f"activation {unknown[0]!r}: choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions: give it [samples, columns]")
    check("x", x, x, x.shape)
    below = x.shape[1]
    for weight, bias in zip(weights, biases):
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight has shape {list(weight.shape)}: give it [N, {below}], as nn.Linear has it")
        check("weight", weight, x, (len(weight), below), beside="x", same=True)
        below = len(weight)
        if bias is not None:
            check("bias", bias, x, (below,), beside="x", same=True)
        if not weight.is_contiguous() or weight.data_ptr() % 16 or (bias is not None and not bias.is_contiguous()):
            raise ValueError("weights and biases are read where they lie: keep them contiguous, from whole 16 bytes on")
    if len(x) > 2**30 or max(x.shape[1], *map(len, weights)) > 2**23:
        raise ValueError("at most 2^30 samples and 2^23 columns at a time")
    check("weight_of_item", weight_of_item, x, (), beside="x", coefficient=True)
    if target.is_floating_point():
        check("target", target, x, (len(x), below), beside="x", same=True)
        return False
    check_labels(x, target)
    return True
