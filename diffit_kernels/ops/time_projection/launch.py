"""How the time_projection kernels are tiled: N token rows, M output features, K input channels.

Reasoned from registers, shared memory and bytes in flight, and not yet measured on hardware.
"""

import torch
import triton

from diffit_kernels.ops.triton_launch import Config, Tunable

SMALL_SHARED = (
    86,
    89,
    120,
    121,
)  # GPUs with 99 KiB of shared memory for a program; else 163 or 227
FLOAT32 = ("float32", "tf32")  # the dtype of a key is that of products
SUM_PROGRAMS = 2048  # of the pass over dO at least, where it has the tokens: two waves or more
SPLIT_PROGRAMS = 160  # of the pass for dtemb at least: every SM reads, and partial sums stay few


def token_groups(batch: int, tokens: int, column_blocks: int, block_n: int) -> tuple[int, int]:
    """(groups of a sample's tokens, tokens of a group, a multiple of a tile's rows)."""
    groups = max(1, -(-SUM_PROGRAMS // max(1, batch * column_blocks)))
    each = block_n * max(1, -(-tokens // (groups * block_n)))
    return -(-tokens // each), each


def row_chunks(rows: int, programs_each: int, block_m: int) -> tuple[int, int]:
    """(chunks of a part's rows, rows of a chunk, a multiple of a tile's)."""
    chunks = max(1, -(-SPLIT_PROGRAMS // max(1, programs_each)))
    each = block_m * max(1, -(-rows // (chunks * block_m)))
    return -(-rows // each), each


def batch_bucket(batch: int) -> int:
    """The batch size of a key: the power of two that covers it, 16 to 64."""
    return min(64, max(16, triton.next_power_of_2(batch)))


def _tiles(block_n: int, block_m: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return Config(blocks, num_warps, num_stages)


def _projection(capability: int, dtype: str, tokens: int, features: int, channels: int) -> Config:
    if dtype == "float32":
        # Products by the general-purpose units, whose operands come from shared memory one by one:
        # 32 accumulators a thread make 3.6 products a load, in the 128 registers of two programs
        # a SM; a tile of 128 × 128 makes 4.3 and leaves room for one.
        return _grouped(_tiles(128, 64, 16, 8, 2))
    if channels % 8:
        # Rows that begin off the 16-byte grid are loaded element by element, through registers.
        return _grouped(_tiles(64, 64, 32, 4, 2))
    # A tile with tokens of several samples looks temb up by element, which takes as many registers
    # as the accumulators: half as many of those then.
    straddles = tokens % 128 != 0
    old = capability < 90 or capability in SMALL_SHARED
    if dtype == "tf32":
        # 64 accumulators a thread; 24 KiB a stage, or 32.
        return _grouped(_tiles(128, 64, 32, 4, 3) if old else _tiles(128, 128, 32, 8, 4))
    if old:
        # 128 accumulators a thread at four warps; 16 KiB a stage.
        stages = 3 if capability in SMALL_SHARED else 4
        return _grouped(_tiles(64 if straddles else 128, 128, 32, 4, stages))
    # Two warp groups of 64 × 256: an operand byte read from shared memory serves the most
    # products. 48 KiB a stage, of which four fit.
    return _grouped(_tiles(128, 128 if straddles else 256, 64, 8, 4))


def _projection_candidates(dtype: str, tokens: int, features: int, channels: int) -> list[Config]:
    if dtype == "float32":
        sizes = ((128, 128, 16, 8, 2), (128, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 32, 4, 2))
    elif dtype == "tf32":
        sizes = (
            (128, 128, 32, 8, 4),
            (128, 128, 32, 8, 3),
            (128, 64, 32, 4, 3),
            (64, 64, 32, 4, 3),
        )
    else:
        sizes = (
            (128, 256, 64, 8, 3),
            (128, 256, 64, 8, 4),
            (256, 128, 64, 8, 3),
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 3),
            (128, 128, 32, 4, 4),
            (128, 64, 64, 4, 4),
        )
    return [_grouped(_tiles(*size)) for size in sizes]


def _grouped(config: Config) -> Config:
    """Eight rows of tiles are worked through column by column: both operands stay in the L2."""
    return config._replace(blocks={**config.blocks, "GROUP": 8})


def _sums(capability: int, dtype: torch.dtype, features: int) -> Config:
    # A warp covers 512 bytes of a row; 32 elements a thread, four 16-byte loads or eight.
    if dtype == torch.float32:
        return Config({"BLOCK_N": 32, "BLOCK_M": 128}, num_warps=4, num_stages=1)
    return Config({"BLOCK_N": 16, "BLOCK_M": 256}, num_warps=4, num_stages=1)


def _sums_candidates(dtype: torch.dtype, features: int) -> list[Config]:
    tiles = ((8, 256, 4), (16, 128, 4), (16, 256, 4), (32, 128, 4), (16, 512, 8), (32, 256, 8))
    return [Config({"BLOCK_N": n, "BLOCK_M": m}, warps, 1) for n, m, warps in tiles]


def _many(
    capability: int, dtype: str, blocks: int, batch: int, width: int, channels: int
) -> Config:
    # Bound by reading the weights: rows of W are cut fine enough that every SM has some, and a
    # tile is as long in K as four stages of shared memory allow, 20 to 32 KiB in flight a stage.
    block_m = 64
    while block_m > 16 and blocks * 2 * width < 264 * block_m:
        block_m //= 2
    if dtype in FLOAT32:
        return _tiles(min(batch, 32), min(block_m, 32), 32, 4, 3)
    return _tiles(batch, block_m, 128 if block_m < 64 else 64, 4, 4)


def _many_candidates(
    dtype: str, blocks: int, batch: int, width: int, channels: int
) -> list[Config]:
    sizes = [(m, k, stages) for m in (16, 32, 64) for k in (64, 128) for stages in (3, 4)]
    if dtype in FLOAT32:
        return [_tiles(min(batch, 32), m, 32, 4, stages) for m in (16, 32) for stages in (2, 3)]
    return [_tiles(batch, m, k, 4, stages) for m, k, stages in sizes]


def _many_input(
    capability: int, dtype: str, blocks: int, batch: int, width: int, channels: int
) -> Config:
    # dtemb: the batch by 64 channels, accumulated over W's rows. Eight warps: with four, ptxas
    # spills on some GPUs, though few registers are in use.
    if dtype in FLOAT32:
        return _tiles(min(batch, 32), 32, 32, 4, 3)
    return _tiles(batch, 64, 64, 8, 4)


def _many_weight(
    capability: int, dtype: str, blocks: int, batch: int, width: int, channels: int
) -> Config:
    # dW: one step over the batch, nothing to pipeline; bound by writing, in rows of 256 bytes. The
    # older matrix units take their operands from registers, which leaves fewer: 128 bytes there.
    if dtype in FLOAT32:
        return _tiles(16, 32, 64, 4, 2)
    old = capability < 90 or capability in SMALL_SHARED
    return _tiles(batch, 64, 64 if old else 128, 8, 1)


def _backward_candidates(
    dtype: str, blocks: int, batch: int, width: int, channels: int
) -> list[Config]:
    if dtype in FLOAT32:
        return [_tiles(min(batch, 32), m, k, 4, 2) for m in (16, 32) for k in (32, 64)]
    return [
        _tiles(batch, m, k, warps, stages)
        for m in (32, 64)
        for k in (64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 4)
    ]


PROJECTION = Tunable("time_projection.forward", _projection, _projection_candidates)
SUMS = Tunable("time_projection.sums", _sums, _sums_candidates)
MANY = Tunable("time_projections.forward", _many, _many_candidates)
MANY_INPUT = Tunable("time_projections.dtemb", _many_input, _backward_candidates)
MANY_WEIGHT = Tunable("time_projections.dweight", _many_weight, _backward_candidates)
# Few rows of partial sums: many narrow programs.
FINISH = Config({"BLOCK_N": 16, "BLOCK_M": 128}, num_warps=4, num_stages=1)
