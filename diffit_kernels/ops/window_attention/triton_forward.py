"""The forward kernel of window_attention: one program per tile of queries, head and window."""

import triton
import triton.language as tl

from diffit_kernels.ops.window_attention.triton_tiles import (
    dot_heads,
    grid_rows,
    key_place,
    load_head,
    load_time,
    mask_scores,
    query_place,
    store_head,
    tile_tokens,
)


@triton.jit
def forward_kernel(
    qkv_ptr,
    temb_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    num_windows,
    num_heads,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    scale_log2,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(scale (q + q_t) kᵀ + B) v + v_t and lse, by online softmax in base 2.

    lse_ptr: a row's maximum and log2 of its sum, apart: their sum would round the digits of P away.

    table_ptr: (num_heads, (2h-1)(2w-1)) float32, times log2(e): neighbouring keys of a grid row
    lie side by side, so a warp's gather is a line or two of L1.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    ROWS: tl.constexpr = TOKENS if PACK == 1 else PACK * PADDED
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    EVEN_M: tl.constexpr = PACK == 1 and TOKENS % BLOCK_M == 0
    EVEN_N: tl.constexpr = PACK == 1 and TOKENS % BLOCK_N == 0
    # Where every tile begins a grid row, the next one's bias is as far on as the table's rows are.
    STEPPED: tl.constexpr = EVEN_N and BLOCK_N % WINDOW_W == 0
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % num_heads
    pack = pid // TILES // num_heads
    channels = num_heads * HEAD_DIM
    stride = 3 * channels
    column = head * HEAD_DIM

    token, window = tile_tokens(tile * BLOCK_M, pack, BLOCK_M, PACK, PADDED)
    valid = (token < TOKENS) & (window < num_windows)
    rows = grid_rows(
        window, token, windows_per_sample, windows_across, grid_width, grid_tokens,
        WINDOW_H, WINDOW_W,
    )  # fmt: skip
    q_1, q_2 = load_head(qkv_ptr, rows, valid, stride, column, HEAD_DIM, D1, D2, EVEN_M)
    if HAS_TIME:
        sample = window // windows_per_sample
        t_1, t_2 = load_time(temb_ptr, sample, valid, 2 * channels, column, HEAD_DIM, D1, D2, PACK)
        q_2 = (q_2.to(tl.float32) + t_2).to(q_1.dtype) if D2 > 0 else q_2
        q_1 = (q_1.to(tl.float32) + t_1).to(q_1.dtype)
    place = query_place(tl.where(valid, token, 0), WINDOW_H, WINDOW_W)
    if HAS_BIAS:
        table_ptr += head * ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1))
        if STEPPED:
            index = place[:, None] - key_place(tl.arange(0, BLOCK_N), WINDOW_W)[None, :]

    # Finite, so that a tile of keys whose bias is -inf leaves 0, not NaN.
    row_max = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc_1 = tl.zeros((BLOCK_M, D1), tl.float32)
    acc_2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else 16), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        key, key_window = tile_tokens(start, pack, BLOCK_N, PACK, PADDED)
        key_valid = (key < TOKENS) & (key_window < num_windows)
        key_rows = grid_rows(
            key_window, key, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        k_1, k_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        scores = dot_heads(q_1, q_2, k_1, k_2, D2, PRECISION) * scale_log2
        if HAS_BIAS:
            if not STEPPED:
                index = place[:, None] - key_place(tl.where(key_valid, key, 0), WINDOW_W)[None, :]
            scores += tl.load(table_ptr + index)
            if STEPPED:
                table_ptr -= BLOCK_N // WINDOW_W * (2 * WINDOW_W - 1)
        scores = mask_scores(scores, window, key_window, key, TOKENS, PACK, EVEN_N)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(probs, 1)
        row_max = new_max
        v_1, v_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, 2 * channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        probs = probs.to(v_1.dtype)
        acc_1 = tl.dot(probs, v_1, acc_1 * decay[:, None], input_precision=PRECISION)
        if D2 > 0:
            acc_2 = tl.dot(probs, v_2, acc_2 * decay[:, None], input_precision=PRECISION)

    acc_1 = acc_1 / row_sum[:, None]
    acc_2 = acc_2 / row_sum[:, None]
    if HAS_TIME:
        t_1, t_2 = load_time(
            temb_ptr, sample, valid, 2 * channels, channels + column, HEAD_DIM, D1, D2, PACK
        )
        acc_1 += t_1
        if D2 > 0:
            acc_2 += t_2
    store_head(out_ptr, rows, valid, channels, column, acc_1, acc_2, HEAD_DIM, D1, D2)
    stat = (window.to(tl.int64) * num_heads + head) * TOKENS + token
    tl.store(lse_ptr + 2 * stat, row_max, mask=valid)
    tl.store(lse_ptr + 2 * stat + 1, tl.log2(row_sum), mask=valid)
