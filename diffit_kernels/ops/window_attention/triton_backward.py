"""The backward kernels of window_attention for q, k, v and the time token.

With P the probabilities, dO the gradient of out and delta = rowsum(dO ∘ (out - v_t))::

    dS = P ∘ (dO vᵀ - delta)    dq = scale dS k    dk = scale dSᵀ (q + q_t)    dv = Pᵀ dO

One program per tile of queries for dq, which leaves delta behind, and one per tile of keys for dk
and dv: each result is written once, by one program, without atomics. Windows that fit one tile have
a kernel of their own, triton_small.py; the table's gradient is in triton_table.py.

For the time token dq_t = Σ dq, and dv_t = Σ dO, which is Σ dv since the rows of P sum to one: both
are sums of a kernel's own results.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.window_attention.triton_tiles import (
    dot_heads,
    grid_rows,
    key_place,
    load_head,
    load_time,
    mask_scores,
    probabilities,
    query_place,
    store_head,
    sum_heads,
    tile_tokens,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_kernel(
    qkv_ptr,
    temb_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dqkv_ptr,
    delta_ptr,
    dtemb_ptr,
    num_heads,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    scale,
    HAS_TIME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of queries, its rows of delta, and its sum of dq for the time token.

    dtemb_ptr: (windows · tiles, C) float32, summed by sample afterwards.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    EVEN_M: tl.constexpr = TOKENS % BLOCK_M == 0
    EVEN_N: tl.constexpr = TOKENS % BLOCK_N == 0
    STEPPED: tl.constexpr = EVEN_N and BLOCK_N % WINDOW_W == 0  # as in the forward
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % num_heads
    window = pid // TILES // num_heads
    channels = num_heads * HEAD_DIM
    stride = 3 * channels
    column = head * HEAD_DIM
    sample = window // windows_per_sample

    token, _ = tile_tokens(tile * BLOCK_M, window, BLOCK_M, 1, 1)
    valid = token < TOKENS
    rows = grid_rows(
        window, token, windows_per_sample, windows_across, grid_width, grid_tokens,
        WINDOW_H, WINDOW_W,
    )  # fmt: skip
    q_1, q_2 = load_head(qkv_ptr, rows, valid, stride, column, HEAD_DIM, D1, D2, EVEN_M)
    dout_1, dout_2 = load_head(dout_ptr, rows, valid, channels, column, HEAD_DIM, D1, D2, EVEN_M)
    out_1, out_2 = load_head(out_ptr, rows, valid, channels, column, HEAD_DIM, D1, D2, EVEN_M)
    out_1 = out_1.to(tl.float32)
    out_2 = out_2.to(tl.float32)
    if HAS_TIME:
        t_1, t_2 = load_time(temb_ptr, sample, valid, 2 * channels, column, HEAD_DIM, D1, D2, 1)
        q_2 = (q_2.to(tl.float32) + t_2).to(q_1.dtype) if D2 > 0 else q_2
        q_1 = (q_1.to(tl.float32) + t_1).to(q_1.dtype)
        t_1, t_2 = load_time(
            temb_ptr, sample, valid, 2 * channels, channels + column, HEAD_DIM, D1, D2, 1
        )
        out_1 -= t_1
        if D2 > 0:
            out_2 -= t_2
    delta = sum_heads(dout_1.to(tl.float32) * out_1, dout_2.to(tl.float32) * out_2, D2)
    stat = (window.to(tl.int64) * num_heads + head) * TOKENS + token
    tl.store(delta_ptr + stat, delta, mask=valid)
    row_max = tl.load(lse_ptr + 2 * stat, mask=valid, other=float("inf"))
    log_sum = tl.load(lse_ptr + 2 * stat + 1, mask=valid, other=0.0)
    place = query_place(tl.where(valid, token, 0), WINDOW_H, WINDOW_W)
    if HAS_BIAS:
        table_ptr += head * ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1))
        if STEPPED:
            index = place[:, None] - key_place(tl.arange(0, BLOCK_N), WINDOW_W)[None, :]

    acc_1 = tl.zeros((BLOCK_M, D1), tl.float32)
    acc_2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else 16), tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        key, _ = tile_tokens(start, window, BLOCK_N, 1, 1)
        key_valid = key < TOKENS
        key_rows = grid_rows(
            window, key, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        k_1, k_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        v_1, v_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, 2 * channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        scores = dot_heads(q_1, q_2, k_1, k_2, D2, PRECISION) * (scale * LOG2E)
        if HAS_BIAS:
            if not STEPPED:
                index = place[:, None] - key_place(tl.where(key_valid, key, 0), WINDOW_W)[None, :]
            scores += tl.load(table_ptr + index)
            if STEPPED:
                table_ptr -= BLOCK_N // WINDOW_W * (2 * WINDOW_W - 1)
        scores = mask_scores(scores, window, window, key, TOKENS, 1, EVEN_N)
        probs = probabilities(scores, row_max[:, None], log_sum[:, None], q_1.dtype)
        dprobs = dot_heads(dout_1, dout_2, v_1, v_2, D2, PRECISION)
        dscores = (probs * (dprobs - delta[:, None])).to(k_1.dtype)
        acc_1 = tl.dot(dscores, k_1, acc_1, input_precision=PRECISION)
        if D2 > 0:
            acc_2 = tl.dot(dscores, k_2, acc_2, input_precision=PRECISION)

    acc_1 *= scale
    acc_2 *= scale
    store_head(dqkv_ptr, rows, valid, stride, column, acc_1, acc_2, HEAD_DIM, D1, D2)
    if HAS_TIME:
        part = (window.to(tl.int64) * TILES + tile) * channels + column
        store_sums(dtemb_ptr + part, acc_1, acc_2, HEAD_DIM, D1, D2)


@triton.jit
def key_kernel(
    qkv_ptr,
    temb_ptr,
    table_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dqkv_ptr,
    dtemb_ptr,
    time_score_ptr,
    num_heads,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    scale,
    HAS_TIME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of keys, and its sum of dv; scores are transposed, (keys, queries).

    q_t is added neither to q's tiles nor before a rounding: in the scores it is one number per key,
    q_t · k, and in dk the outer product of dS's sums over the queries with q_t.
    time_score_ptr: as lse, gets that number for the table's kernel.
    dtemb_ptr: (windows · tiles, C) float32, summed by sample afterwards.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    EVEN_M: tl.constexpr = TOKENS % BLOCK_M == 0
    EVEN_N: tl.constexpr = TOKENS % BLOCK_N == 0
    STEPPED: tl.constexpr = EVEN_M and BLOCK_M % WINDOW_W == 0  # as in the forward
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % num_heads
    window = pid // TILES // num_heads
    channels = num_heads * HEAD_DIM
    stride = 3 * channels
    column = head * HEAD_DIM

    key, _ = tile_tokens(tile * BLOCK_N, window, BLOCK_N, 1, 1)
    key_valid = key < TOKENS
    key_rows = grid_rows(
        window, key, windows_per_sample, windows_across, grid_width, grid_tokens,
        WINDOW_H, WINDOW_W,
    )  # fmt: skip
    k_1, k_2 = load_head(
        qkv_ptr, key_rows, key_valid, stride, channels + column, HEAD_DIM, D1, D2, EVEN_N
    )
    v_1, v_2 = load_head(
        qkv_ptr, key_rows, key_valid, stride, 2 * channels + column, HEAD_DIM, D1, D2, EVEN_N
    )
    if HAS_TIME:
        sample = window // windows_per_sample
        t_1, t_2 = load_time(temb_ptr, sample, key_valid, 2 * channels, column, HEAD_DIM, D1, D2, 1)
        time_score = sum_heads(k_1.to(tl.float32) * t_1, k_2.to(tl.float32) * t_2, D2)
        at_key = (window.to(tl.int64) * num_heads + head) * TOKENS + key
        tl.store(time_score_ptr + at_key, time_score, mask=key_valid)
    place = key_place(tl.where(key_valid, key, 0), WINDOW_W)
    if HAS_BIAS:
        table_ptr += head * ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1))
        if STEPPED:
            query = query_place(tl.arange(0, BLOCK_M), WINDOW_H, WINDOW_W)
            index = query[None, :] - place[:, None]

    dk_1 = tl.zeros((BLOCK_N, D1), tl.float32)
    dk_2 = tl.zeros((BLOCK_N, D2 if D2 > 0 else 16), tl.float32)
    dv_1 = tl.zeros((BLOCK_N, D1), tl.float32)
    dv_2 = tl.zeros((BLOCK_N, D2 if D2 > 0 else 16), tl.float32)
    dscores_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, TOKENS, BLOCK_M):
        token, _ = tile_tokens(start, window, BLOCK_M, 1, 1)
        valid = token < TOKENS
        rows = grid_rows(
            window, token, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        q_1, q_2 = load_head(qkv_ptr, rows, valid, stride, column, HEAD_DIM, D1, D2, EVEN_M)
        dout_1, dout_2 = load_head(
            dout_ptr, rows, valid, channels, column, HEAD_DIM, D1, D2, EVEN_M
        )
        stat = (window.to(tl.int64) * num_heads + head) * TOKENS + token
        row_max = tl.load(lse_ptr + 2 * stat, mask=valid, other=float("inf"))
        log_sum = tl.load(lse_ptr + 2 * stat + 1, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + stat, mask=valid, other=0.0)
        scores = dot_heads(k_1, k_2, q_1, q_2, D2, PRECISION)
        if HAS_TIME:
            scores += time_score[:, None]
        scores *= scale * LOG2E
        if HAS_BIAS:
            if not STEPPED:
                query = query_place(tl.where(valid, token, 0), WINDOW_H, WINDOW_W)
                index = query[None, :] - place[:, None]
            scores += tl.load(table_ptr + index)
            if STEPPED:
                table_ptr += BLOCK_M // WINDOW_W * (2 * WINDOW_W - 1)
        probs = probabilities(scores, row_max[None, :], log_sum[None, :], q_1.dtype)
        rounded = probs.to(q_1.dtype)
        dv_1 = tl.dot(rounded, dout_1, dv_1, input_precision=PRECISION)
        dprobs = dot_heads(v_1, v_2, dout_1, dout_2, D2, PRECISION)
        dscores = probs * (dprobs - delta[None, :])
        if HAS_TIME:
            dscores_sum += tl.sum(dscores, 1)
        dscores = dscores.to(q_1.dtype)
        dk_1 = tl.dot(dscores, q_1, dk_1, input_precision=PRECISION)
        if D2 > 0:
            dv_2 = tl.dot(rounded, dout_2, dv_2, input_precision=PRECISION)
            dk_2 = tl.dot(dscores, q_2, dk_2, input_precision=PRECISION)

    if HAS_TIME:
        dk_1 += dscores_sum[:, None] * t_1
        if D2 > 0:
            dk_2 += dscores_sum[:, None] * t_2
    dk_1 *= scale
    dk_2 *= scale
    column += channels
    store_head(dqkv_ptr, key_rows, key_valid, stride, column, dk_1, dk_2, HEAD_DIM, D1, D2)
    column += channels
    store_head(dqkv_ptr, key_rows, key_valid, stride, column, dv_1, dv_2, HEAD_DIM, D1, D2)
    if HAS_TIME:
        if not EVEN_N:
            dv_1 = tl.where(key_valid[:, None], dv_1, 0.0)
            dv_2 = tl.where(key_valid[:, None], dv_2, 0.0) if D2 > 0 else dv_2
        part = (window.to(tl.int64) * TILES + tile) * channels + head * HEAD_DIM
        store_sums(dtemb_ptr + part, dv_1, dv_2, HEAD_DIM, D1, D2)


@triton.jit
def store_sums(ptr, first, second, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Sums over the tile's rows; rows past the last token must be zero."""
    offs_1 = tl.arange(0, D1)
    tl.store(ptr + offs_1, tl.sum(first, 0), mask=offs_1 < HEAD_DIM)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        tl.store(ptr + offs_2, tl.sum(second, 0), mask=offs_2 < HEAD_DIM)
