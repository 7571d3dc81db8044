"""Device functions of the window_attention kernels: where a tile's rows lie, and what they hold.

A tile's rows are tokens of one window (PACK == 1), or of PACK whole windows of PADDED rows each,
where windows are too small to fill a tile: the tokens of a window, then rows that count for
nothing. A row is looked up by (window, token) in the token grid, so windows are never copied.

A head of HEAD_DIM channels is a pair of tiles D1 and D2 wide, 72 = 64 + 8 of 16, since the widths
of Triton's tiles are powers of two and padding 72 to 128 would cost 1.78 times the products. With
D2 == 0 the second of a pair stands for nothing.
"""

import triton
import triton.language as tl


@triton.jit
def tile_tokens(start, pack, BLOCK: tl.constexpr, PACK: tl.constexpr, PADDED: tl.constexpr):
    """(token in its window, window) of the tile's rows; the window is one number if PACK == 1."""
    offs = start + tl.arange(0, BLOCK)
    if PACK == 1:
        token = offs
        window = pack
    else:
        token = offs % PADDED
        window = pack * PACK + offs // PADDED
    return token, window


@triton.jit
def grid_rows(
    window,
    token,
    windows_per_sample,
    windows_across,
    grid_width,
    grid_tokens,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """Row of (B·H·W) that holds a window's token, int64."""
    sample = window // windows_per_sample
    in_sample = window % windows_per_sample
    y = (in_sample // windows_across) * WINDOW_H + token // WINDOW_W
    x = (in_sample % windows_across) * WINDOW_W + token % WINDOW_W
    return sample.to(tl.int64) * grid_tokens + (y * grid_width + x)


@triton.jit
def load_head(
    ptr,
    rows,
    valid,
    stride,
    column,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The head's channels of some rows, (rows, D1) and (rows, D2); zeros where invalid."""
    offs_1 = tl.arange(0, D1)[None, :]
    base = ptr + rows[:, None] * stride + column
    if EVEN and D1 <= HEAD_DIM:
        first = tl.load(base + offs_1)
    elif EVEN:
        first = tl.load(base + offs_1, mask=offs_1 < HEAD_DIM, other=0.0)
    else:
        first = tl.load(base + offs_1, mask=valid[:, None] & (offs_1 < HEAD_DIM), other=0.0)
    second = first
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)[None, :]
        mask = offs_2 < HEAD_DIM
        if not EVEN:
            mask = mask & valid[:, None]
        second = tl.load(base + offs_2, mask=mask, other=0.0)
    return first, second


@triton.jit
def store_head(
    ptr,
    rows,
    valid,
    stride,
    column,
    first,
    second,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """Write what :func:`load_head` would read, in the dtype of the memory."""
    offs_1 = tl.arange(0, D1)[None, :]
    base = ptr + rows[:, None] * stride + column
    mask = valid[:, None] & (offs_1 < HEAD_DIM)
    tl.store(base + offs_1, first.to(ptr.dtype.element_ty), mask=mask)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)[None, :]
        mask = valid[:, None] & (offs_2 < HEAD_DIM)
        tl.store(base + offs_2, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_time(
    ptr,
    sample,
    valid,
    stride,
    column,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PACK: tl.constexpr,
):
    """A time token's part of the head, float32: (1, D) pairs for one window, else one per row."""
    offs_1 = tl.arange(0, D1)[None, :]
    mask = offs_1 < HEAD_DIM
    if PACK == 1:
        base = ptr + sample.to(tl.int64) * stride + column
    else:
        base = ptr + sample[:, None].to(tl.int64) * stride + column
        mask = mask & valid[:, None]
    first = tl.load(base + offs_1, mask=mask, other=0.0).to(tl.float32)
    second = first
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)[None, :]
        mask = offs_2 < HEAD_DIM
        if PACK > 1:
            mask = mask & valid[:, None]
        second = tl.load(base + offs_2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def dot_heads(a_1, a_2, b_1, b_2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over the head's channels, float32."""
    result = tl.dot(a_1, tl.trans(b_1), input_precision=PRECISION)
    if D2 > 0:
        result = tl.dot(a_2, tl.trans(b_2), result, input_precision=PRECISION)
    return result


@triton.jit
def sum_heads(a_1, a_2, D2: tl.constexpr):
    """Sum over the head's channels of a pair of (rows, D) products: (rows,)."""
    result = tl.sum(a_1, 1)
    if D2 > 0:
        result += tl.sum(a_2, 1)
    return result


@triton.jit
def query_place(token, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """a(i), such that a(i) - b(j) is the table's row for query i and key j."""
    y = token // WINDOW_W + (WINDOW_H - 1)
    x = token % WINDOW_W + (WINDOW_W - 1)
    return y * (2 * WINDOW_W - 1) + x


@triton.jit
def key_place(token, WINDOW_W: tl.constexpr):
    """b(j); see :func:`query_place`."""
    return (token // WINDOW_W) * (2 * WINDOW_W - 1) + token % WINDOW_W


@triton.jit
def mask_scores(
    scores,
    query_window,
    key_window,
    key_token,
    TOKENS: tl.constexpr,
    PACK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """-inf where the key is none of the query's window; (queries, keys).

    Keys of windows past the last stay in: all zeros, they keep their rows finite.
    """
    if PACK > 1:
        same = query_window[:, None] == key_window[None, :]
        scores = tl.where(same & (key_token < TOKENS)[None, :], scores, float("-inf"))
    elif not EVEN:
        scores = tl.where((key_token < TOKENS)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def probabilities(scores, row_max, log_sum, DTYPE: tl.constexpr):
    """P from scores in base 2 and its rows' statistics, as :func:`forward_kernel` left them.

    In half precision the statistics may be one number, which costs digits that P has not.
    """
    if tl.float32 == DTYPE:
        probs = tl.exp2((scores - row_max) - log_sum)
    else:
        probs = tl.exp2(scores - (row_max + log_sum))
    return probs
