"""Device functions of the group_norm kernels: tiles of pixels by channels.

A tile's columns are GROUPS whole groups, each in WIDTH columns, a power of two: 12 channels take 16
columns, of which 4 count for nothing.
"""

import triton
import triton.language as tl


@triton.jit
def program_place(
    program, pixels, chunk, C: tl.constexpr, GROUP_C: tl.constexpr, GROUPS: tl.constexpr
):
    """(block of channels, chunk, sample, pixels of the chunk, its first element) of a program.

    Blocks of the same pixels are neighbours, so that whole rows of memory are read at one time.
    """
    BLOCKS: tl.constexpr = (C // GROUP_C + GROUPS - 1) // GROUPS
    chunks = tl.cdiv(pixels, chunk)
    block = program % BLOCKS
    index = (program // BLOCKS) % chunks
    sample = (program // BLOCKS // chunks).to(tl.int64)
    count = tl.minimum(chunk, pixels - index * chunk)
    first = (sample * pixels + index * chunk) * C
    return block, index, sample, count, first


@triton.jit
def last_first():
    """The program's number counted from the end.

    A second pass in this order begins with what the first one left in the L2 cache.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def tile_channels(
    block,
    C: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(channel, group, whether there is such a channel) of the columns of a block."""
    column = tl.arange(0, GROUPS * WIDTH)
    group = block * GROUPS + column // WIDTH
    if WIDTH == GROUP_C:  # so that the compiler sees that channels are neighbours
        channel = block * (GROUPS * WIDTH) + column
        inside = channel < C
    else:
        channel = group * GROUP_C + column % WIDTH
        inside = (column % WIDTH < GROUP_C) & (channel < C)
    return channel, group, inside


@triton.jit
def load_tile(ptr, first, pixel, valid, channel, inside, C: tl.constexpr):
    """Some pixels' channels, float32 (pixels, columns); zeros where there are none.

    first: the sample's and chunk's first element; pixel counts from there, in 32 bits: else the
    compiler keeps a 64-bit pointer into every tensor.
    """
    at = first + (pixel * C)[:, None] + channel[None, :]
    return tl.load(ptr + at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, first, pixel, valid, channel, inside, tile, C: tl.constexpr):
    """Write what :func:`load_tile` would read."""
    at = first + (pixel * C)[:, None] + channel[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def load_columns(ptr, at, inside, default: tl.constexpr):
    """A number per column, float32; the default if there is no such tensor."""
    if ptr is None:
        columns = tl.full(at.shape, default, tl.float32)
    else:
        columns = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return columns


@triton.jit
def sum_group(columns, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Each group's columns summed: (GROUPS,)."""
    return tl.sum(tl.reshape(columns, (GROUPS, WIDTH)), 1)


@triton.jit
def spread(groups, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A number per group, in all of the group's columns: (GROUPS · WIDTH,)."""
    return tl.reshape(tl.broadcast_to(groups[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), by an exponential of at most 1."""
    decay = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, decay) / (1.0 + decay)
