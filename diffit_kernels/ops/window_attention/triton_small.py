"""The backward kernel of window_attention for windows that fit one tile, alone or in packs.

The equations are those of triton_backward.py, with delta = rowsum(P ∘ dP), for the tile has all of
a row. One kernel computes every gradient.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.window_attention.triton_table import sum_offsets
from diffit_kernels.ops.window_attention.triton_tiles import (
    dot_heads,
    grid_rows,
    key_place,
    load_head,
    load_time,
    mask_scores,
    query_place,
    store_head,
    sum_heads,
    tile_tokens,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def small_kernel(
    qkv_ptr,
    temb_ptr,
    table_ptr,
    dout_ptr,
    dqkv_ptr,
    dtemb_ptr,
    dtable_ptr,
    num_windows,
    num_heads,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    packs_per_program,
    scale,
    HAS_TIME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PACK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of some packs of small windows of one head: reads qkv and dO, writes dqkv.

    The whole softmax is in the tile, so neither out nor lse is read. q_t enters as in
    :func:`key_kernel`. dS is summed over the packs in
    registers and leaves by offset, once: dtable_ptr (programs of a head, num_heads, rows).
    dtemb_ptr: (windows, 2C) float32, summed by sample afterwards.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    EVEN: tl.constexpr = PACK == 1 and TOKENS == BLOCK
    # with a table a program has several packs, and the last may lie past the last window
    INSIDE: tl.constexpr = EVEN and not HAS_BIAS
    TABLE_ROWS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_DIM
    stride = 3 * channels
    column = head * HEAD_DIM
    if HAS_BIAS:
        table_ptr += head * TABLE_ROWS

    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    for index in range(0, packs_per_program):
        pack = chunk * packs_per_program + index
        token, window = tile_tokens(0, pack, BLOCK, PACK, PADDED)
        valid = (token < TOKENS) & (window < num_windows)
        rows = grid_rows(
            window, token, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        q_1, q_2 = load_head(qkv_ptr, rows, valid, stride, column, HEAD_DIM, D1, D2, INSIDE)
        k_1, k_2 = load_head(
            qkv_ptr, rows, valid, stride, channels + column, HEAD_DIM, D1, D2, INSIDE
        )
        v_1, v_2 = load_head(
            qkv_ptr, rows, valid, stride, 2 * channels + column, HEAD_DIM, D1, D2, INSIDE
        )
        dout_1, dout_2 = load_head(
            dout_ptr, rows, valid, channels, column, HEAD_DIM, D1, D2, INSIDE
        )
        scores = dot_heads(q_1, q_2, k_1, k_2, D2, PRECISION)
        if HAS_TIME:
            # past the last window the last token is read, for keys and gradients that are zero
            sample = tl.minimum(window, num_windows - 1) // windows_per_sample
            t_1, t_2 = load_time(
                temb_ptr, sample, valid, 2 * channels, column, HEAD_DIM, D1, D2, PACK
            )
            scores += sum_heads(k_1.to(tl.float32) * t_1, k_2.to(tl.float32) * t_2, D2)[None, :]
        scores *= scale * LOG2E
        if HAS_BIAS:
            safe = tl.where(token < TOKENS, token, 0)
            query = query_place(safe, WINDOW_H, WINDOW_W)
            scores += tl.load(table_ptr + (query[:, None] - key_place(safe, WINDOW_W)[None, :]))
        scores = mask_scores(scores, window, window, token, TOKENS, PACK, EVEN)
        probs = tl.exp2(scores - tl.max(scores, 1)[:, None])
        probs = probs / tl.sum(probs, 1)[:, None]
        rounded = tl.trans(probs.to(q_1.dtype))
        dv_1 = tl.dot(rounded, dout_1, input_precision=PRECISION)
        dv_2 = tl.dot(rounded, dout_2, input_precision=PRECISION) if D2 > 0 else dv_1
        store_head(
            dqkv_ptr, rows, valid, stride, 2 * channels + column, dv_1, dv_2, HEAD_DIM, D1, D2
        )
        if HAS_TIME:
            store_window_sums(
                dtemb_ptr + channels + column, pack, num_windows, channels, dv_1, dv_2,
                HEAD_DIM, D1, D2, PACK, BLOCK,
            )  # fmt: skip
        dprobs = dot_heads(dout_1, dout_2, v_1, v_2, D2, PRECISION)
        dscores = probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None])
        if HAS_BIAS:
            dbias += dscores
        dscores_sum = tl.sum(dscores, 0)
        dscores = dscores.to(q_1.dtype)
        dq_1 = tl.dot(dscores, k_1, input_precision=PRECISION) * scale
        dq_2 = tl.dot(dscores, k_2, input_precision=PRECISION) * scale if D2 > 0 else dq_1
        store_head(dqkv_ptr, rows, valid, stride, column, dq_1, dq_2, HEAD_DIM, D1, D2)
        dscores = tl.trans(dscores)
        dk_1 = tl.dot(dscores, q_1, input_precision=PRECISION)
        dk_2 = tl.dot(dscores, q_2, input_precision=PRECISION) if D2 > 0 else dk_1
        if HAS_TIME:
            dk_2 += dscores_sum[:, None] * t_2 if D2 > 0 else 0.0
            dk_1 += dscores_sum[:, None] * t_1
        dk_1 *= scale
        dk_2 *= scale
        store_head(dqkv_ptr, rows, valid, stride, channels + column, dk_1, dk_2, HEAD_DIM, D1, D2)
        if HAS_TIME:
            store_window_sums(
                dtemb_ptr + column, pack, num_windows, channels, dq_1, dq_2,
                HEAD_DIM, D1, D2, PACK, BLOCK,
            )  # fmt: skip

    if HAS_BIAS:
        sum_offsets(
            dbias, dtable_ptr + tl.program_id(0).to(tl.int64) * TABLE_ROWS, 0, 0,
            WINDOW_H, WINDOW_W, WINDOW_H, WINDOW_H, PADDED if PACK > 1 else BLOCK, BLOCK,
        )  # fmt: skip


@triton.jit
def store_window_sums(
    ptr,
    pack,
    num_windows,
    channels,
    first,
    second,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over each window of the pack, into its row of (windows, 2C)."""
    window = pack * PACK + tl.arange(0, PACK)
    rows = ptr + window[:, None].to(tl.int64) * (2 * channels)
    valid = (window < num_windows)[:, None]
    offs_1 = tl.arange(0, D1)[None, :]
    sums = tl.sum(tl.reshape(first, (PACK, BLOCK // PACK, D1)), 1)
    tl.store(rows + offs_1, sums, mask=valid & (offs_1 < HEAD_DIM))
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)[None, :]
        sums = tl.sum(tl.reshape(second, (PACK, BLOCK // PACK, D2)), 1)
        tl.store(rows + offs_2, sums, mask=valid & (offs_2 < HEAD_DIM))
