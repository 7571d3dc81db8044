"""Device functions of the adaln kernels: some rows of C channels, in registers.

A row is a pair of tiles C1 and C2 wide, 1152 = 1024 + 128, since the widths of Triton's tiles are
powers of two and padding 1152 to 2048 would cost 1.78 times the registers. Where C1 covers the row
the second of a pair is a single zero, which the compiler removes.
"""

import triton
import triton.language as tl


@triton.jit
def load_part(ptr, start, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Channels from FIRST on, float32 (rows, WIDTH); zeros past C and where a row is invalid.

    start, valid: (rows, 1), each row's first element and whether it exists.
    """
    if FIRST < C:
        offs_c = FIRST + tl.arange(0, WIDTH)[None, :]
        mask = valid if FIRST + WIDTH <= C else valid & (offs_c < C)
        part = tl.load(ptr + (start + offs_c), mask=mask, other=0.0).to(tl.float32)
    else:
        part = tl.zeros((1, 1), tl.float32)
    return part


@triton.jit
def store_part(ptr, start, valid, part, FIRST: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Write what :func:`load_part` would read, as the memory's dtype; returns it as rounded."""
    rounded = part.to(ptr.dtype.element_ty)
    if FIRST < C:
        offs_c = FIRST + tl.arange(0, WIDTH)[None, :]
        mask = valid if FIRST + WIDTH <= C else valid & (offs_c < C)
        tl.store(ptr + (start + offs_c), rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def load_row(ptr, start, valid, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """Both parts of some rows; see :func:`load_part`."""
    return load_part(ptr, start, valid, 0, C1, C), load_part(ptr, start, valid, C1, C2, C)


@triton.jit
def center_part(part, mean, FIRST: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """part - mean, and zero past C."""
    if FIRST < C:
        part -= mean
        if FIRST + WIDTH > C:
            offs_c = FIRST + tl.arange(0, WIDTH)[None, :]
            part = tl.where(offs_c < C, part, 0.0)
    return part


@triton.jit
def modulation_start(start, sample, stride, PER_TOKEN: tl.constexpr):
    """Where each row's modulation starts: at its own row, or at that of the whole sample.

    As many rows as the tile has, so that all its tensors come in one layout.
    """
    if not PER_TOKEN:
        start = start * 0 + sample.to(tl.int64) * stride
    return start


@triton.jit
def sum_row(part_1, part_2, BLOCK_ROWS: tl.constexpr):
    """Sum over the channels: (rows, 1), or a number for one row.

    A number has no layout over the threads; with (1, 1) the compiler takes the sum once in the
    layout of each part.
    """
    if BLOCK_ROWS == 1:
        return tl.sum(part_1) + tl.sum(part_2)
    else:
        return tl.sum(part_1, 1, keep_dims=True) + tl.sum(part_2, 1, keep_dims=True)
