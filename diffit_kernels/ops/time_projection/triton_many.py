"""Kernels of time_projections: the q and v parts of many blocks' projections in one launch.

The blocks' tensors come as a tuple of pointers, of which a program picks its block's: no table of
addresses has to reach the GPU first, and a captured graph keeps them like any other argument.
A weight's 3 width rows are (q, k, v), the 2 width output features (q, v): a tile is of one part.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.triton_math import sum_rows


@triton.jit
def pick(pointers, index):
    """pointers[index], for an index known at run time."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit
def load_tile(
    ptr,
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    EVEN: tl.constexpr = False,
):
    """The tile of (rows, columns) at (row, column), zeros past either size.

    EVEN: no tile reaches past the sizes.
    """
    # Only the tile's place needs 64 bits.
    ptr += tl.cast(row, tl.int64) * stride + column
    offs_0 = tl.arange(0, BLOCK_0)[:, None]
    offs_1 = tl.arange(0, BLOCK_1)[None, :]
    if EVEN:
        tile = tl.load(ptr + (offs_0 * stride + offs_1))
    else:
        mask = (row + offs_0 < rows) & (column + offs_1 < columns)
        tile = tl.load(ptr + (offs_0 * stride + offs_1), mask=mask, other=0.0)
    return tile


@triton.jit
def many_forward_kernel(
    temb_ptr,
    weights,
    biases,
    out_ptr,
    batch,
    width,
    channels,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[i, b, part] = W_part temb[b] + b_part, where W_q, W_k, W_v = weights[i].

    One program per block, part, BLOCK_M features and BLOCK_N samples; the samples are the
    innermost, so weights come from memory once and are shared through the L2 cache.
    EVEN: BLOCK_M divides the width and BLOCK_K the channels.
    """
    batch_blocks = tl.cdiv(batch, BLOCK_N)
    row_blocks = tl.cdiv(width, BLOCK_M)
    pid = tl.program_id(0)
    first_n = (pid % batch_blocks) * BLOCK_N
    first_m = (pid // batch_blocks % row_blocks) * BLOCK_M
    part = pid // (batch_blocks * row_blocks) % 2
    block = pid // (batch_blocks * row_blocks * 2)
    first_row = 2 * part * width
    weight_ptr = pick(weights, block) + first_row.to(tl.int64) * channels
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, channels, BLOCK_K):
        temb = load_tile(temb_ptr, first_n, k, batch, channels, channels, BLOCK_N, BLOCK_K)
        weight = load_tile(
            weight_ptr, first_m, k, width, channels, channels, BLOCK_M, BLOCK_K, EVEN
        )
        acc = tl.dot(temb, tl.trans(weight.to(temb.dtype)), acc, input_precision=PRECISION)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    valid_m = offs_m < width
    if biases is not None:
        bias = tl.load(pick(biases, block) + first_row + offs_m, mask=valid_m, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_row = block.to(tl.int64) * batch + offs_n
    out_ptrs = out_ptr + out_row[:, None] * (2 * width) + (part * width + offs_m)[None, :]
    mask = (offs_n < batch)[:, None] & valid_m[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def many_dtemb_kernel(
    grad_ptr,
    weights,
    partial_ptr,
    batch,
    width,
    channels,
    chunks,
    rows_each,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[i, part, c, b] = dO[i, b, part] W_part over the c-th rows_each of W_part's rows.

    One program per block, part, chunk, BLOCK_K channels and BLOCK_N samples, these innermost.
    EVEN: BLOCK_M divides the width and BLOCK_K the channels.
    """
    batch_blocks = tl.cdiv(batch, BLOCK_N)
    channel_blocks = tl.cdiv(channels, BLOCK_K)
    pid = tl.program_id(0)
    first_n = (pid % batch_blocks) * BLOCK_N
    first_k = (pid // batch_blocks % channel_blocks) * BLOCK_K
    index = pid // (batch_blocks * channel_blocks)
    chunk = index % chunks
    part = index // chunks % 2
    block = index // (chunks * 2)
    weight_ptr = pick(weights, block) + (2 * part * width).to(tl.int64) * channels
    grad_ptr += block.to(tl.int64) * batch * (2 * width) + part * width
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(chunk * rows_each, tl.minimum((chunk + 1) * rows_each, width), BLOCK_M):
        grad = load_tile(grad_ptr, first_n, m, batch, width, 2 * width, BLOCK_N, BLOCK_M)
        weight = load_tile(
            weight_ptr, m, first_k, width, channels, channels, BLOCK_M, BLOCK_K, EVEN
        )
        acc = tl.dot(grad, weight.to(grad.dtype), acc, input_precision=PRECISION)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    out_row = index.to(tl.int64) * batch + offs_n
    mask = (offs_n < batch)[:, None] & (offs_k < channels)[None, :]
    tl.store(partial_ptr + out_row[:, None] * channels + offs_k[None, :], acc, mask=mask)


@triton.jit
def many_dweight_kernel(
    grad_ptr,
    temb_ptr,
    dweights,
    dbiases,
    batch,
    width,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW_part = Σ_b dO[i, b, part]ᵀ temb[b] and db_part = Σ_b dO[i, b, part]; 0 for the key.

    One program per block, part (q, k, v), BLOCK_M of its rows and BLOCK_K channels; those of the
    first channels sum the bias as well.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_K)
    row_blocks = tl.cdiv(width, BLOCK_M)
    pid = tl.program_id(0)
    channel_block = pid % channel_blocks
    first_k = channel_block * BLOCK_K
    first_m = (pid // channel_blocks % row_blocks) * BLOCK_M
    part = pid // (channel_blocks * row_blocks) % 3
    block = pid // (channel_blocks * row_blocks * 3)
    samples = tl.where(part == 1, 0, batch)
    grad_ptr += block.to(tl.int64) * batch * (2 * width) + part // 2 * width
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(0, samples, BLOCK_N):
        grad = load_tile(grad_ptr, n, first_m, batch, width, 2 * width, BLOCK_N, BLOCK_M)
        temb = load_tile(temb_ptr, n, first_k, batch, channels, channels, BLOCK_N, BLOCK_K)
        acc = tl.dot(tl.trans(grad), temb, acc, input_precision=PRECISION)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    valid_m = offs_m < width
    dweight_ptr = pick(dweights, block) + (part * width).to(tl.int64) * channels
    at = offs_m[:, None].to(tl.int64) * channels + offs_k[None, :]
    mask = valid_m[:, None] & (offs_k < channels)[None, :]
    tl.store(dweight_ptr + at, acc.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbiases is not None:
        is_first = channel_block == 0
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for n in range(0, tl.where(is_first, samples, 0), BLOCK_N):
            grad = load_tile(grad_ptr, n, first_m, batch, width, 2 * width, BLOCK_N, BLOCK_M)
            total += grad.to(tl.float32)
        dbias_ptr = pick(dbiases, block) + part * width
        out = tl.sum(total, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + offs_m, out, mask=valid_m & is_first)


@triton.jit
def many_finish_kernel(
    partial_ptr, out_ptr, parts, size, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """out = the sum of partial (parts, size) over its parts."""
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = sum_rows(partial_ptr, 0, parts, size, offs, BLOCK_N, BLOCK_M)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)
