"""The backward kernels of group_norm_silu: sums of chunks of pixels, then the gradients.

With x̂ = (x - mean) rstd, z = x̂ · weight + bias, s = σ(z) and dz = dout · s (1 + z (1 - s))::

    dbias = Σ dz    dweight = Σ dz x̂
    dx = rstd (dz weight - mean(dz weight) - x̂ mean(dz weight x̂))

Both means over a group follow from the sums of its channels, Σ weight Σ dz and Σ weight Σ dz x̂, so
the first pass takes these two sums by channel, and every gradient follows from its rows.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.group_norm.triton_tiles import (
    last_first,
    load_columns,
    load_tile,
    program_place,
    sigmoid,
    spread,
    store_tile,
    sum_group,
    tile_channels,
)
from diffit_kernels.ops.triton_math import sum_rows


@triton.jit
def load_affine(
    weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, group, inside, NUM_GROUPS
):
    """(weight, bias, mean, rstd) of a tile's columns, float32."""
    at = sample * NUM_GROUPS + group
    return (
        load_columns(weight_ptr, channel, inside, 1.0),
        load_columns(bias_ptr, channel, inside, 0.0),
        load_columns(mean_ptr, at, inside, 0.0),
        load_columns(rstd_ptr, at, inside, 0.0),
    )


@triton.jit
def normed_and_dz(x, dout, weight, bias, mean, rstd):
    """(x̂, dz) of a tile; dz is zero where dout is."""
    normed = (x - mean[None, :]) * rstd[None, :]
    z = normed * weight[None, :] + bias[None, :]
    s = sigmoid(z)
    return normed, dout * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def sums_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dz_sum_ptr,
    normed_sum_ptr,
    pixels,
    chunk,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Σ dz and Σ dz x̂ of each channel over the program's chunk of pixels: (B, chunks, C)."""
    chunks = tl.cdiv(pixels, chunk)
    program = tl.program_id(0)
    block, index, sample, count, first = program_place(program, pixels, chunk, C, GROUP_C, GROUPS)
    channel, group, inside = tile_channels(block, C, GROUP_C, GROUPS, WIDTH)
    weight, bias, mean, rstd = load_affine(
        weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, group, inside, C // GROUP_C
    )
    dz_sum = tl.zeros((BLOCK_S, GROUPS * WIDTH), tl.float32)
    normed_sum = tl.zeros((BLOCK_S, GROUPS * WIDTH), tl.float32)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        pixel = start + tl.arange(0, BLOCK_S)
        valid = pixel < count
        x = load_tile(x_ptr, first, pixel, valid, channel, inside, C)
        dout = load_tile(dout_ptr, first, pixel, valid, channel, inside, C)
        normed, dz = normed_and_dz(x, dout, weight, bias, mean, rstd)
        dz_sum += dz
        normed_sum += dz * normed
    at = (sample * chunks + index) * C + channel
    tl.store(dz_sum_ptr + at, tl.sum(dz_sum, 0), mask=inside)
    tl.store(normed_sum_ptr + at, tl.sum(normed_sum, 0), mask=inside)


@triton.jit
def input_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dz_sum_ptr,
    normed_sum_ptr,
    dx_ptr,
    pixels,
    chunk,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of the program's chunk of pixels and block of channels."""
    chunks = tl.cdiv(pixels, chunk)
    program = last_first()
    block, _, sample, count, first = program_place(program, pixels, chunk, C, GROUP_C, GROUPS)
    channel, group, inside = tile_channels(block, C, GROUP_C, GROUPS, WIDTH)
    weight, bias, mean, rstd = load_affine(
        weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, group, inside, C // GROUP_C
    )
    # Past C nothing is read; only padded groups have columns within C that stand for no channel.
    offs_c = channel if WIDTH == GROUP_C else tl.where(inside, channel, C)
    row = sample * chunks
    dz_sum = sum_rows(dz_sum_ptr, row, chunks, C, offs_c, BLOCK_CHUNKS, GROUPS * WIDTH)
    normed_sum = sum_rows(normed_sum_ptr, row, chunks, C, offs_c, BLOCK_CHUNKS, GROUPS * WIDTH)
    mean_g = sum_group(weight * dz_sum, GROUPS, WIDTH) / pixels / GROUP_C
    mean_gx = sum_group(weight * normed_sum, GROUPS, WIDTH) / pixels / GROUP_C
    mean_g = spread(mean_g, GROUPS, WIDTH)
    mean_gx = spread(mean_gx, GROUPS, WIDTH)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        pixel = start + tl.arange(0, BLOCK_S)
        valid = pixel < count
        x = load_tile(x_ptr, first, pixel, valid, channel, inside, C)
        dout = load_tile(dout_ptr, first, pixel, valid, channel, inside, C)
        normed, dz = normed_and_dz(x, dout, weight, bias, mean, rstd)
        dx = rstd[None, :] * (dz * weight[None, :] - mean_g[None, :] - normed * mean_gx[None, :])
        store_tile(dx_ptr, first, pixel, valid, channel, inside, dx, C)


@triton.jit
def parameters_kernel(
    dz_sum_ptr,
    normed_sum_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias of BLOCK_C channels: the sums' rows of all samples and chunks."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < C
    if dweight_ptr is not None:
        dweight = sum_rows(normed_sum_ptr, 0, rows, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
        tl.store(dweight_ptr + offs_c, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        dbias = sum_rows(dz_sum_ptr, 0, rows, C, offs_c, BLOCK_CHUNKS, BLOCK_C)
        tl.store(dbias_ptr + offs_c, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
