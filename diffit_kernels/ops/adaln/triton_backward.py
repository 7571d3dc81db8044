"""The backward kernels of adaln: one pass over the activations, then the sums over its programs.

With x̂ = (x - mean) rstd, du = dout, or dout (1 + scale) where scale is per token, and
g = dout (1 + scale) weight::

    dx = rstd (g - mean(g) - x̂ mean(g x̂)) + grad_residual    dy = gate dx

Every gradient that is a sum over tokens follows from a few sums of C numbers, which a program takes
over its chunk of one sample in registers and leaves as a row of its own: Σ du, Σ du x̂, Σ dx y, and
Σ dout where du is not dout. :func:`finish_kernel` adds the rows in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.adaln.triton_rows import (
    center_part,
    load_part,
    load_row,
    modulation_start,
    store_part,
    sum_row,
)
from diffit_kernels.ops.triton_math import sum_rows


@triton.jit
def backward_kernel(
    dout_ptr,
    dresidual_ptr,
    residual_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    du_sum_ptr,
    normed_sum_ptr,
    gate_sum_ptr,
    dout_sum_ptr,
    tokens,
    chunk,
    stride_gate,
    stride_scale,
    GATE_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """A chunk of one sample's tokens, BLOCK_ROWS at a time; PROGRAMS decided how long a chunk is.

    The *_sum_ptr are (B, chunks, C) float32, or None where no gradient needs the sum; dgate_ptr,
    dshift_ptr and dscale_ptr are None unless the modulation is per token.
    """
    chunks = tl.cdiv(tokens, chunk)
    sample = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks) * chunk
    count = tl.minimum(chunk, tokens - first)
    first_row = sample.to(tl.int64) * tokens + first
    zero = tl.zeros((BLOCK_ROWS, 1), tl.int64)
    scale_start = modulation_start(zero, sample, stride_scale, False)
    slope_1 = slope_part(scale_ptr, weight_ptr, scale_start, SCALE_PER_TOKEN, 0, C1, C)
    slope_2 = slope_part(scale_ptr, weight_ptr, scale_start, SCALE_PER_TOKEN, C1, C2, C)
    if dy_ptr is not None and not GATE_PER_TOKEN:
        gate_start = modulation_start(zero, sample, stride_gate, False)
        gate_1, gate_2 = load_row(gate_ptr, gate_start, zero == 0, C, C1, C2)

    du_sum_1 = tl.zeros((BLOCK_ROWS, C1), tl.float32)
    du_sum_2 = tl.zeros((BLOCK_ROWS, C2), tl.float32)
    normed_sum_1, normed_sum_2 = du_sum_1, du_sum_2
    gate_sum_1, gate_sum_2 = du_sum_1, du_sum_2
    dout_sum_1, dout_sum_2 = du_sum_1, du_sum_2
    for block in tl.range(0, count, BLOCK_ROWS, num_stages=STAGES):
        token = block + tl.arange(0, BLOCK_ROWS)[:, None]
        valid = token < count
        row = first_row + token
        # Within the chunk in 32 bits: else the compiler keeps a 64-bit pointer into every tensor.
        start = first_row * C + token * C
        x_1, x_2 = load_row(residual_ptr, start, valid, C, C1, C2)
        dout_1, dout_2 = load_row(dout_ptr, start, valid, C, C1, C2)
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
        normed_1 = center_part(x_1, mean, 0, C1, C) * rstd
        normed_2 = center_part(x_2, mean, C1, C2, C) * rstd
        if dout_sum_ptr is not None:
            dout_sum_1 += dout_1
            dout_sum_2 += dout_2
        if dshift_ptr is not None:
            store_part(dshift_ptr, start, valid, dout_1, 0, C1, C)
            store_part(dshift_ptr, start, valid, dout_2, C1, C2, C)
        if dscale_ptr is not None:
            dscale_part(dscale_ptr, bias_ptr, start, valid, dout_1, normed_1 * slope_1, 0, C1, C)
            dscale_part(dscale_ptr, bias_ptr, start, valid, dout_2, normed_2 * slope_2, C1, C2, C)
        if SCALE_PER_TOKEN:
            dout_1 *= 1 + load_part(scale_ptr, start, valid, 0, C1, C)
            dout_2 *= 1 + load_part(scale_ptr, start, valid, C1, C2, C)
        if du_sum_ptr is not None:
            du_sum_1 += dout_1
            du_sum_2 += dout_2
        if normed_sum_ptr is not None:
            normed_sum_1 += dout_1 * normed_1
            normed_sum_2 += dout_2 * normed_2
        if dx_ptr is not None:
            dx_1, dx_2 = norm_backward(
                normed_1, normed_2, dout_1 * slope_1, dout_2 * slope_2, rstd, C, BLOCK_ROWS
            )
            if dresidual_ptr is not None:
                dx_1 += load_part(dresidual_ptr, start, valid, 0, C1, C)
                dx_2 += load_part(dresidual_ptr, start, valid, C1, C2, C)
            store_part(dx_ptr, start, valid, dx_1, 0, C1, C)
            store_part(dx_ptr, start, valid, dx_2, C1, C2, C)
        if dy_ptr is not None:
            if GATE_PER_TOKEN:
                gate_1, gate_2 = load_row(gate_ptr, start, valid, C, C1, C2)
            store_part(dy_ptr, start, valid, gate_1 * dx_1, 0, C1, C)
            store_part(dy_ptr, start, valid, gate_2 * dx_2, C1, C2, C)
            y_1, y_2 = load_row(y_ptr, start, valid, C, C1, C2)
            if GATE_PER_TOKEN:
                store_part(dgate_ptr, start, valid, y_1 * dx_1, 0, C1, C)
                store_part(dgate_ptr, start, valid, y_2 * dx_2, C1, C2, C)
            else:
                gate_sum_1 += y_1 * dx_1
                gate_sum_2 += y_2 * dx_2

    store_sums(du_sum_ptr, du_sum_1, du_sum_2, C, C1, C2)
    store_sums(normed_sum_ptr, normed_sum_1, normed_sum_2, C, C1, C2)
    store_sums(gate_sum_ptr, gate_sum_1, gate_sum_2, C, C1, C2)
    store_sums(dout_sum_ptr, dout_sum_1, dout_sum_2, C, C1, C2)


@triton.jit
def slope_part(
    scale_ptr,
    weight_ptr,
    scale_start,
    SCALE_PER_TOKEN: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    """What is the same for all tokens of dout's factor: weight, and 1 + scale if per sample."""
    slope = tl.full((1, 1), 1.0, tl.float32)
    everywhere = scale_start >= 0
    if weight_ptr is not None:
        slope = load_part(weight_ptr, scale_start * 0, everywhere, FIRST, WIDTH, C)
    if scale_ptr is not None and not SCALE_PER_TOKEN:
        slope *= 1 + load_part(scale_ptr, scale_start, everywhere, FIRST, WIDTH, C)
    return slope


@triton.jit
def dscale_part(
    dscale_ptr,
    bias_ptr,
    start,
    valid,
    dout,
    scaled,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    """Write the per-token dscale = dout (weight x̂ + bias), scaled = weight x̂."""
    if bias_ptr is not None:
        scaled += load_part(bias_ptr, start * 0, valid, FIRST, WIDTH, C)
    store_part(dscale_ptr, start, valid, dout * scaled, FIRST, WIDTH, C)


@triton.jit
def norm_backward(normed_1, normed_2, g_1, g_2, rstd, C: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """rstd (g - mean(g) - x̂ mean(g x̂))."""
    mean = sum_row(g_1, g_2, BLOCK_ROWS) / C
    projection = sum_row(g_1 * normed_1, g_2 * normed_2, BLOCK_ROWS) / C
    dx_1 = rstd * (g_1 - mean - normed_1 * projection)
    dx_2 = rstd * (g_2 - mean - normed_2 * projection)
    return dx_1, dx_2


@triton.jit
def store_sums(ptr, sum_1, sum_2, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """The program's row of a sum, if it is wanted."""
    if ptr is not None:
        start = tl.zeros((1, 1), tl.int64) + tl.program_id(0).to(tl.int64) * C
        store_part(ptr, start, start >= 0, tl.sum(sum_1, 0, keep_dims=True), 0, C1, C)
        store_part(ptr, start, start >= 0, tl.sum(sum_2, 0, keep_dims=True), C1, C2, C)


@triton.jit
def finish_kernel(
    du_sum_ptr,
    normed_sum_ptr,
    gate_sum_ptr,
    dout_sum_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    dweight_ptr,
    dbias_ptr,
    chunks,
    stride_scale,
    C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A sample's gradients from the rows of its chunks, for BLOCK_C channels::

        dshift = Σ dout    dscale = weight Σ du x̂ + bias Σ du    dgate = Σ dx y
        dweight = (1 + scale) Σ du x̂    dbias = (1 + scale) Σ du

    with scale_ptr None where scale is per token, and so in du. Each result is (B, C), or None.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample = tl.program_id(0) // BLOCKS
    offs_c = (tl.program_id(0) % BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < C
    at = sample.to(tl.int64) * C + offs_c
    first = sample * chunks
    du = tl.zeros((BLOCK_C,), tl.float32)
    du_normed = du
    if du_sum_ptr is not None:
        du = sum_rows(du_sum_ptr, first, chunks, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
    if normed_sum_ptr is not None:
        du_normed = sum_rows(normed_sum_ptr, first, chunks, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
    if dgate_ptr is not None:
        dgate = sum_rows(gate_sum_ptr, first, chunks, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if dshift_ptr is not None:
        dshift = du
        if dout_sum_ptr is not None:
            dshift = sum_rows(dout_sum_ptr, first, chunks, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
        tl.store(dshift_ptr + at, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
    if dscale_ptr is not None:
        dscale = du_normed
        if weight_ptr is not None:
            dscale *= tl.load(weight_ptr + offs_c, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            dscale += du * tl.load(bias_ptr + offs_c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
    factor = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample.to(tl.int64) * stride_scale + offs_c, mask=inside)
        factor += scale.to(tl.float32)
    if dweight_ptr is not None:
        dweight = factor * du_normed
        tl.store(dweight_ptr + at, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        dbias = factor * du
        tl.store(dbias_ptr + at, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
