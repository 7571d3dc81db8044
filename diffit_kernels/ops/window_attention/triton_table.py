"""The gradient of the relative position bias table, without atomics and without (B, nH, L, L).

dtable[dy, dx] is the sum of dS over samples, windows and all pairs (i, j) of that offset. A program
keeps one tile of pairs and walks over windows, summing dS in registers; at the end it sums the tile
by offset and writes those few numbers; :func:`reduce_kernel` adds the programs' parts. All in a
fixed order. A tile is whole grid rows, ROWS_M of the queries' and ROWS_N of the keys', so that it
has (ROWS_M + ROWS_N - 1) row differences and 2w - 1 column differences.
"""

import triton
import triton.language as tl

from diffit_kernels.ops.window_attention.triton_tiles import (
    dot_heads,
    grid_rows,
    key_place,
    load_head,
    probabilities,
    query_place,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sum_offsets(
    tile,
    out_ptr,
    first_row_m,
    first_row_n,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ROWS_M: tl.constexpr,
    ROWS_N: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a tile of (queries, keys) by offset: out[(dy + ROWS_N - 1)(2w - 1) + dx + w - 1].

    dy counts from the tile's own first rows. A row of the tile looks up, for each offset, the one
    key that lies there. PADDED rows of the tile belong to one window; pairs across are left out.
    """
    WIDTH: tl.constexpr = 2 * WINDOW_W - 1
    OFFSETS: tl.constexpr = (ROWS_M + ROWS_N - 1) * WIDTH
    CHUNK: tl.constexpr = 32
    row = tl.arange(0, BLOCK)
    token = row % PADDED
    y = token // WINDOW_W
    x = token % WINDOW_W
    valid = (y < ROWS_M) & (first_row_m + y < WINDOW_H)
    for start in range(0, OFFSETS, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        key_y = y[:, None] - (offset // WIDTH - (ROWS_N - 1))[None, :]
        key_x = x[:, None] - (offset % WIDTH - (WINDOW_W - 1))[None, :]
        inside = (key_y >= 0) & (key_y < ROWS_N) & (first_row_n + key_y < WINDOW_H)
        inside = inside & (key_x >= 0) & (key_x < WINDOW_W) & valid[:, None]
        key = (row - token)[:, None] + key_y * WINDOW_W + key_x
        found = tl.gather(tile, tl.where(inside, key, 0), 1)
        sums = tl.sum(tl.where(inside, found, 0.0), 0)
        tl.store(out_ptr + offset, sums, mask=offset < OFFSETS)


@triton.jit
def table_kernel(
    qkv_ptr,
    table_ptr,
    lse_ptr,
    delta_ptr,
    time_score_ptr,
    dout_ptr,
    dtable_ptr,
    num_windows,
    num_heads,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    windows_per_program,
    scale,
    HAS_TIME: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dS of one tile of pairs of one head, summed over some windows, by offset.

    dtable_ptr: (splits, num_heads, tiles of queries, tiles of keys, offsets) float32.
    """
    ROWS_M: tl.constexpr = BLOCK_M // WINDOW_W
    ROWS_N: tl.constexpr = BLOCK_N // WINDOW_W
    TILES_M: tl.constexpr = (WINDOW_H + ROWS_M - 1) // ROWS_M
    TILES_N: tl.constexpr = (WINDOW_H + ROWS_N - 1) // ROWS_N
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    OFFSETS: tl.constexpr = (ROWS_M + ROWS_N - 1) * (2 * WINDOW_W - 1)
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    tile_m = (pid // TILES_N) % TILES_M
    head = (pid // (TILES_N * TILES_M)) % num_heads
    split = pid // (TILES_N * TILES_M) // num_heads
    channels = num_heads * HEAD_DIM
    stride = 3 * channels
    column = head * HEAD_DIM

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    query = tile_m * (ROWS_M * WINDOW_W) + offs_m
    key = tile_n * (ROWS_N * WINDOW_W) + offs_n
    valid = (offs_m < ROWS_M * WINDOW_W) & (query < TOKENS)
    key_valid = (offs_n < ROWS_N * WINDOW_W) & (key < TOKENS)
    # where tiles are full: no masks, which vector loads and the copies in flight like
    EVEN_M: tl.constexpr = BLOCK_M % WINDOW_W == 0 and WINDOW_H % ROWS_M == 0
    EVEN_N: tl.constexpr = BLOCK_N % WINDOW_W == 0 and WINDOW_H % ROWS_N == 0
    place = query_place(tl.where(valid, query, 0), WINDOW_H, WINDOW_W)
    key_at = key_place(tl.where(key_valid, key, 0), WINDOW_W)
    bias_ptr = table_ptr + head * ((2 * WINDOW_H - 1) * (2 * WINDOW_W - 1))
    bias = tl.load(bias_ptr + (place[:, None] - key_at[None, :]))

    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * windows_per_program
    count = tl.minimum(windows_per_program, num_windows - first)
    for index in range(0, count):
        window = first + index
        rows = grid_rows(
            window, query, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        key_rows = grid_rows(
            window, key, windows_per_sample, windows_across, grid_width, grid_tokens,
            WINDOW_H, WINDOW_W,
        )  # fmt: skip
        q_1, q_2 = load_head(qkv_ptr, rows, valid, stride, column, HEAD_DIM, D1, D2, EVEN_M)
        k_1, k_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        scores = dot_heads(q_1, q_2, k_1, k_2, D2, PRECISION)
        stat = (window.to(tl.int64) * num_heads + head) * TOKENS
        if HAS_TIME:
            scores += tl.load(time_score_ptr + stat + key, mask=key_valid, other=0.0)[None, :]
        row_max = tl.load(lse_ptr + 2 * (stat + query), mask=valid, other=float("inf"))
        log_sum = tl.load(lse_ptr + 2 * (stat + query) + 1, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + stat + query, mask=valid, other=0.0)
        scores = scores * (scale * LOG2E) + bias
        probs = probabilities(scores, row_max[:, None], log_sum[:, None], q_1.dtype)
        dout_1, dout_2 = load_head(
            dout_ptr, rows, valid, channels, column, HEAD_DIM, D1, D2, EVEN_M
        )
        v_1, v_2 = load_head(
            qkv_ptr, key_rows, key_valid, stride, 2 * channels + column, HEAD_DIM, D1, D2, EVEN_N
        )
        dprobs = dot_heads(dout_1, dout_2, v_1, v_2, D2, PRECISION)
        dbias += probs * (dprobs - delta[:, None])

    sum_offsets(
        dbias, dtable_ptr + pid.to(tl.int64) * OFFSETS, tile_m * ROWS_M, tile_n * ROWS_N,
        WINDOW_H, WINDOW_W, ROWS_M, ROWS_N, BLOCK_M, BLOCK_M,
    )  # fmt: skip


@triton.jit
def reduce_kernel(
    parts_ptr,
    dtable_ptr,
    num_heads,
    splits,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    ROWS_M: tl.constexpr,
    ROWS_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the parts of all tiles and splits: some rows of dtable for one head.

    parts_ptr: (splits, num_heads, tiles of queries, tiles of keys, offsets) float32;
    dtable_ptr: (rows, num_heads).
    """
    WIDTH: tl.constexpr = 2 * WINDOW_W - 1
    TABLE_ROWS: tl.constexpr = (2 * WINDOW_H - 1) * WIDTH
    BLOCKS: tl.constexpr = (TABLE_ROWS + BLOCK - 1) // BLOCK
    TILES_M: tl.constexpr = (WINDOW_H + ROWS_M - 1) // ROWS_M
    TILES_N: tl.constexpr = (WINDOW_H + ROWS_N - 1) // ROWS_N
    OFFSETS: tl.constexpr = (ROWS_M + ROWS_N - 1) * WIDTH
    CHUNK: tl.constexpr = 32
    row = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // BLOCKS
    dy = row // WIDTH - (WINDOW_H - 1)
    acc = tl.zeros((BLOCK, CHUNK), tl.float32)
    parts = splits * TILES_M * TILES_N
    for start in range(0, parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        tile_n = part % TILES_N
        tile_m = (part // TILES_N) % TILES_M
        split = part // (TILES_N * TILES_M)
        tile = (split.to(tl.int64) * num_heads + head) * (TILES_M * TILES_N)
        tile += tile_m * TILES_N + tile_n
        in_tile = dy[:, None] - (tile_m * ROWS_M - tile_n * ROWS_N)[None, :] + (ROWS_N - 1)
        inside = (in_tile >= 0) & (in_tile < ROWS_M + ROWS_N - 1) & (part < parts)[None, :]
        inside = inside & (row < TABLE_ROWS)[:, None]
        offset = in_tile * WIDTH + (row % WIDTH)[:, None]
        acc += tl.load(parts_ptr + tile[None, :] * OFFSETS + offset, mask=inside, other=0.0)
    sums = tl.sum(acc, 1).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + row * num_heads + head, sums, mask=row < TABLE_ROWS)
