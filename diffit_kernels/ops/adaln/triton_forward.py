"""The forward kernel of adaln: residual, LayerNorm and modulation of a row in one pass."""

import triton
import triton.language as tl

from diffit_kernels.ops.adaln.triton_rows import (
    center_part,
    load_part,
    modulation_start,
    store_part,
    sum_row,
)


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    GATE_PER_TOKEN: tl.constexpr,
    SHIFT_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """BLOCK_ROWS tokens of one sample. The row is held while its statistics are taken: mean first,
    then the mean of (x - mean)², so a large mean costs no digits of the variance.
    """
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    sample = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    valid = token < tokens
    row = sample.to(tl.int64) * tokens + token
    start = row * C

    gate_start = modulation_start(start, sample, stride_gate, GATE_PER_TOKEN)
    x_1 = residual_part(x_ptr, y_ptr, gate_ptr, residual_ptr, start, valid, gate_start, 0, C1, C)
    x_2 = residual_part(x_ptr, y_ptr, gate_ptr, residual_ptr, start, valid, gate_start, C1, C2, C)
    mean = sum_row(x_1, x_2, BLOCK_ROWS) / C
    x_1 = center_part(x_1, mean, 0, C1, C)
    x_2 = center_part(x_2, mean, C1, C2, C)
    rstd = tl.rsqrt(sum_row(x_1 * x_1, x_2 * x_2, BLOCK_ROWS) / C + eps)
    tl.store(mean_ptr + row, mean, mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=valid)

    scale_start = modulation_start(start, sample, stride_scale, SCALE_PER_TOKEN)
    shift_start = modulation_start(start, sample, stride_shift, SHIFT_PER_TOKEN)
    out_1 = modulated_part(
        x_1 * rstd, weight_ptr, bias_ptr, scale_ptr, shift_ptr, valid, scale_start, shift_start,
        0, C1, C,
    )  # fmt: skip
    out_2 = modulated_part(
        x_2 * rstd, weight_ptr, bias_ptr, scale_ptr, shift_ptr, valid, scale_start, shift_start,
        C1, C2, C,
    )  # fmt: skip
    store_part(out_ptr, start, valid, out_1, 0, C1, C)
    store_part(out_ptr, start, valid, out_2, C1, C2, C)


@triton.jit
def residual_part(
    x_ptr,
    y_ptr,
    gate_ptr,
    residual_ptr,
    start,
    valid,
    gate_start,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    """x + gate · y, written and, as rounded there, returned: the backward normalises the same."""
    x = load_part(x_ptr, start, valid, FIRST, WIDTH, C)
    if y_ptr is not None:
        y = load_part(y_ptr, start, valid, FIRST, WIDTH, C)
        if gate_ptr is not None:
            y *= load_part(gate_ptr, gate_start, valid, FIRST, WIDTH, C)
        x = store_part(residual_ptr, start, valid, x + y, FIRST, WIDTH, C)
    return x


@triton.jit
def modulated_part(
    normed,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    valid,
    scale_start,
    shift_start,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    """(normed · weight + bias)(1 + scale) + shift."""
    if weight_ptr is not None:
        normed *= load_part(weight_ptr, scale_start * 0, valid, FIRST, WIDTH, C)
    if bias_ptr is not None:
        normed += load_part(bias_ptr, scale_start * 0, valid, FIRST, WIDTH, C)
    if scale_ptr is not None:
        normed *= 1 + load_part(scale_ptr, scale_start, valid, FIRST, WIDTH, C)
    if shift_ptr is not None:
        normed += load_part(shift_ptr, shift_start, valid, FIRST, WIDTH, C)
    return normed
