"""Kernels of time_projection: the product with its epilogue, and the sums over tokens."""

import triton
import triton.language as tl

from diffit_kernels.ops.triton_math import sum_rows


@triton.jit
def projection_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    temb_ptr,
    out_ptr,
    rows,
    tokens,
    features,
    channels,
    ONE_SAMPLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, m] = Σₖ x[n, k] weight[m, k] + bias[m] + temb[n // tokens, m], added in float32.

    One program per tile of BLOCK_N rows of all samples' tokens by BLOCK_M features.
    ONE_SAMPLE: no tile holds tokens of two samples. EVEN_K: channels are a multiple of BLOCK_K.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    in_group = GROUP * tl.cdiv(features, BLOCK_M)
    pid = tl.program_id(0)
    first = pid // in_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    first_n = (first + pid % in_group % size) * BLOCK_N
    first_m = pid % in_group // size * BLOCK_M
    # Past the last row the last is read again, and not written. Only a tile's place needs 64 bits.
    offs_n = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_n)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), features - 1 - first_m)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptr += first_n.to(tl.int64) * channels
    weight_ptr += first_m.to(tl.int64) * channels
    x_offs = offs_n[:, None] * channels + offs_k[None, :]
    weight_offs = offs_m[:, None] * channels + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, channels, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + x_offs)
            weight = tl.load(weight_ptr + weight_offs)
        else:
            mask = (start + offs_k < channels)[None, :]
            x = tl.load(x_ptr + x_offs, mask=mask, other=0.0)
            weight = tl.load(weight_ptr + weight_offs, mask=mask, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K

    offs_n += first_n
    offs_m += first_m
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_m).to(tl.float32)[None, :]
    if ONE_SAMPLE:
        temb_ptr += (first_n // tokens).to(tl.int64) * features
        acc += tl.load(temb_ptr + offs_m).to(tl.float32)[None, :]
    else:
        sample = (offs_n // tokens)[:, None].to(tl.int64)
        acc += tl.load(temb_ptr + sample * features + offs_m[None, :]).to(tl.float32)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    out_ptrs = out_ptr + offs_n[:, None].to(tl.int64) * features + offs_m[None, :]
    mask = (offs_n < rows)[:, None] & (offs_m < features)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_sums_kernel(
    grad_ptr,
    partial_ptr,
    tokens,
    groups,
    tokens_each,
    features,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """partial[b, g] = the sum of dO over the g-th tokens_each tokens of sample b, float32."""
    column_blocks = tl.cdiv(features, BLOCK_M)
    out_row = tl.program_id(0) // column_blocks
    sample, group = out_row // groups, out_row % groups
    offs_m = (tl.program_id(0) % column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.minimum(tokens_each, tokens - group * tokens_each)
    first = sample * tokens + group * tokens_each
    total = sum_rows(grad_ptr, first, count, features, offs_m, BLOCK_N, BLOCK_M)
    out = partial_ptr + out_row.to(tl.int64) * features
    tl.store(out + offs_m, total, mask=offs_m < features)


@triton.jit
def finish_sums_kernel(
    partial_ptr,
    dtemb_ptr,
    dbias_ptr,
    batch,
    groups,
    features,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dtemb[b] = Σ_g partial[b, g]; and in programs past those, dbias = the sum over both."""
    column_blocks = tl.cdiv(features, BLOCK_M)
    sample = tl.program_id(0) // column_blocks
    offs_m = (tl.program_id(0) % column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = offs_m < features
    if sample < batch:
        total = sum_rows(partial_ptr, sample * groups, groups, features, offs_m, BLOCK_N, BLOCK_M)
        out = dtemb_ptr + sample.to(tl.int64) * features
        tl.store(out + offs_m, total.to(dtemb_ptr.dtype.element_ty), mask=valid)
    elif dbias_ptr is not None:
        total = sum_rows(partial_ptr, 0, batch * groups, features, offs_m, BLOCK_N, BLOCK_M)
        tl.store(dbias_ptr + offs_m, total.to(dbias_ptr.dtype.element_ty), mask=valid)
