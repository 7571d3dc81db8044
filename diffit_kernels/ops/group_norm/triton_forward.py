"""The forward kernels of group_norm_silu: statistics of chunks of pixels, then the result.

A program takes a chunk of one sample's pixels and a block of channels. The first pass leaves what
it found in its chunk; each program of the second puts its groups' chunks together by itself, in
order, from a few numbers in the caches. It reads x again, from the L2 cache as far as x fits there.
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


@triton.jit
def statistics_kernel(
    x_ptr,
    chunk_mean_ptr,
    chunk_m2_ptr,
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
    """Mean and sum of squared deviations (M2) of each group in the program's chunk of pixels.

    Every lane takes its own by Welford's recurrence; then lanes, then channels, are put together
    from deviations of means (Chan), so no variance is a difference of squares.
    chunk_mean_ptr, chunk_m2_ptr: (B, chunks, num_groups).
    """
    chunks = tl.cdiv(pixels, chunk)
    program = tl.program_id(0)
    block, index, sample, count, first = program_place(program, pixels, chunk, C, GROUP_C, GROUPS)
    channel, _, inside = tile_channels(block, C, GROUP_C, GROUPS, WIDTH)
    offs_s = tl.arange(0, BLOCK_S)

    mean = tl.zeros((BLOCK_S, GROUPS * WIDTH), tl.float32)
    m2 = tl.zeros((BLOCK_S, GROUPS * WIDTH), tl.float32)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        pixel = start + offs_s
        valid = pixel < count
        x = load_tile(x_ptr, first, pixel, valid, channel, inside, C)
        delta = tl.where(valid[:, None], x - mean, 0.0)
        mean += delta * (1.0 / (start // BLOCK_S + 1))
        m2 += delta * (x - mean)

    seen = ((count - offs_s + BLOCK_S - 1) // BLOCK_S).to(tl.float32)[:, None]  # pixels of a lane
    seen = tl.maximum(seen, 0.0)
    column_mean = tl.sum(mean * seen, 0) / count
    deviation = mean - column_mean[None, :]
    column_m2 = tl.sum(m2 + seen * deviation * deviation, 0)
    group_mean = sum_group(column_mean, GROUPS, WIDTH) / GROUP_C
    deviation = tl.where(inside, column_mean - spread(group_mean, GROUPS, WIDTH), 0.0)
    group_m2 = sum_group(column_m2 + count * deviation * deviation, GROUPS, WIDTH)
    NUM_GROUPS: tl.constexpr = C // GROUP_C
    group = block * GROUPS + tl.arange(0, GROUPS)
    at = (sample * chunks + index) * NUM_GROUPS + group
    tl.store(chunk_mean_ptr + at, group_mean, mask=group < NUM_GROUPS)
    tl.store(chunk_m2_ptr + at, group_m2, mask=group < NUM_GROUPS)


@triton.jit
def join_chunks(
    chunk_mean_ptr,
    chunk_m2_ptr,
    sample,
    pixels,
    chunk,
    group,
    NUM_GROUPS: tl.constexpr,
    GROUP_C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """(mean, biased variance) of some groups from their n pixels' chunks, by Chan's formula::

    mean = Σ n_k mean_k / n    var = Σ (M2_k + n_k (mean_k - mean)²) / n
    """
    chunks = tl.cdiv(pixels, chunk)
    first = sample * chunks * NUM_GROUPS + group[None, :]
    mean = tl.zeros(group.shape, tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        index = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        mask = (index < chunks) & (group < NUM_GROUPS)[None, :]
        part = tl.minimum(chunk, pixels - index * chunk).to(tl.float32) / pixels
        means = tl.load(chunk_mean_ptr + (first + index * NUM_GROUPS), mask=mask, other=0.0)
        mean += tl.sum(part * means, 0)
    variance = tl.zeros(group.shape, tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        index = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        mask = (index < chunks) & (group < NUM_GROUPS)[None, :]
        part = tl.minimum(chunk, pixels - index * chunk).to(tl.float32) / pixels
        at = first + index * NUM_GROUPS
        means = tl.load(chunk_mean_ptr + at, mask=mask, other=0.0)
        m2 = tl.load(chunk_m2_ptr + at, mask=mask, other=0.0)
        deviation = tl.where(mask, means - mean[None, :], 0.0)
        variance += tl.sum(m2 / pixels / GROUP_C + part * deviation * deviation, 0)
    return mean, variance


@triton.jit
def normalise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    chunk_mean_ptr,
    chunk_m2_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    chunk,
    eps,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = z σ(z), z = (x - mean) rstd · weight + bias, and (B, num_groups) of mean and rstd."""
    NUM_GROUPS: tl.constexpr = C // GROUP_C
    program = last_first()
    block, index, sample, count, first = program_place(program, pixels, chunk, C, GROUP_C, GROUPS)
    group = block * GROUPS + tl.arange(0, GROUPS)
    mean, variance = join_chunks(
        chunk_mean_ptr, chunk_m2_ptr, sample, pixels, chunk, group,
        NUM_GROUPS, GROUP_C, BLOCK_CHUNKS,
    )  # fmt: skip
    rstd = tl.rsqrt(variance + eps)
    once = (group < NUM_GROUPS) & (index == 0)
    tl.store(mean_ptr + sample * NUM_GROUPS + group, mean, mask=once)
    tl.store(rstd_ptr + sample * NUM_GROUPS + group, rstd, mask=once)

    channel, _, inside = tile_channels(block, C, GROUP_C, GROUPS, WIDTH)
    mean = spread(mean, GROUPS, WIDTH)
    slope = spread(rstd, GROUPS, WIDTH) * load_columns(weight_ptr, channel, inside, 1.0)
    bias = load_columns(bias_ptr, channel, inside, 0.0)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        pixel = start + tl.arange(0, BLOCK_S)
        valid = pixel < count
        x = load_tile(x_ptr, first, pixel, valid, channel, inside, C)
        z = (x - mean[None, :]) * slope[None, :] + bias[None, :]
        store_tile(out_ptr, first, pixel, valid, channel, inside, z * sigmoid(z), C)
