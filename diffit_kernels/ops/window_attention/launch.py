"""How the window_attention kernels are tiled: what follows from the shape, and what is chosen.

A choice is a :class:`~diffit_kernels.ops.triton_launch.Config`; the heuristics are reasoned from
registers, shared memory and bytes in flight, and have not been measured on hardware yet.
"""

from typing import NamedTuple

import triton

from diffit_kernels.ops.triton_launch import Config, Tunable

PROGRAMS = 1024  # of the kernels that sum over windows: a few for each of 80 to 170 SMs
HOPPER_LIKE = (90, 100)  # products of 16-bit numbers straight from shared memory


class Tiling(NamedTuple):
    """What a shape fixes, as the kernels' constexpr arguments: see triton_tiles.py."""

    D1: int
    D2: int
    PACK: int
    PADDED: int


def small_tile(dtype: str, head_dim: int) -> int:
    """Rows of the tile that whole windows share; larger windows take several tiles.

    The backward holds five products of the tile in registers. Tensor cores have room for 64 rows of
    up to 80 channels; float32 without them multiplies in registers, and has room for a quarter.
    """
    if dtype == "float32":
        return 32 if head_dim <= 80 else 16
    return 64 if dtype != "tf32" and head_dim <= 80 else 32


def tiling(dtype: str, tokens: int, head_dim: int) -> Tiling:
    """The head's parts and the windows of a tile: 72 -> 64 + 16; 16 tokens -> 4 windows of 64."""
    d1, d2 = parts(head_dim, 64 if dtype in ("float32", "tf32") else 128)
    padded = triton.next_power_of_2(tokens)
    return Tiling(d1, d2, max(1, small_tile(dtype, head_dim) // padded), padded)


def parts(head_dim: int, widest: int = 128) -> tuple[int, int]:
    """Two powers of two, 16 to ``widest``, that cover ``head_dim`` with the least padding; or one.

    A product of 4-byte numbers keeps a row of both operands in registers: there 128 = 64 + 64.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    first = max(16, whole // 2)
    rest = max(16, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0
    return (first, rest) if first + rest < whole or whole > widest else (whole, 0)


def split(items: int, programs_each: int) -> tuple[int, int]:
    """(splits, items of a split) so that ``splits · programs_each`` is about :data:`PROGRAMS`."""
    splits = max(1, min(PROGRAMS // max(programs_each, 1), items))
    each = max(1, -(-items // splits))
    return -(-items // each), each


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages)


# Why these: each is the largest tile found, of those tried, that compiles without a spill at all of
# the cases of `python -m benchmarks resources`, with a second thread block per multiprocessor where
# registers allow. sm_90 and sm_100 multiply from shared memory, and have room for 128 rows with 8
# warps; the others keep operands in registers, and 86, 89 and 120 have 99 KiB of shared memory: 64
# rows with 4 warps. Without tensor cores rows of operands lie in registers: small tiles.


def _forward(capability: int, dtype: str, tokens: int, head_dim: int) -> Config:
    tile = small_tile(dtype, head_dim)
    if tokens <= tile:
        return _tiles(tile, tile, 4 if dtype != "float32" or tile == 16 else 8, 1)
    if dtype == "float32":
        return _tiles(32, 32, 4, 1) if head_dim <= 64 else _tiles(16, 16, 4, 1)
    if dtype == "tf32":
        return _tiles(64 if head_dim <= 64 else 32, 32, 4, 2)
    if capability in HOPPER_LIKE:
        return _tiles(128, 64 if head_dim <= 80 else 32, 8, 2)
    return _tiles(64, 32, 4, 2)


def _query(capability: int, dtype: str, tokens: int, head_dim: int) -> Config:
    if dtype == "float32":
        return _tiles(32, 32, 8, 1) if head_dim <= 80 else _tiles(16, 16, 4, 1)
    if dtype == "tf32":
        return _tiles(32, 16, 4 if head_dim <= 80 else 8, 2)
    if capability in HOPPER_LIKE:
        return _tiles(128, 64 if head_dim <= 80 else 32, 8, 2)
    return _tiles(64, 32, 4, 2)


def _key(capability: int, dtype: str, tokens: int, head_dim: int) -> Config:
    if dtype == "float32" and 64 < head_dim <= 80:
        return _tiles(32, 32, 8, 1)
    if dtype in ("float32", "tf32"):
        if head_dim <= 64:
            return _tiles(16, 32, 8 if dtype == "float32" else 4, 1 if dtype == "float32" else 2)
        return _tiles(16, 16, 4, 2 if dtype == "tf32" and head_dim <= 80 else 1)
    if capability in HOPPER_LIKE:
        return _tiles(32, 128, 8, 2) if head_dim <= 80 else _tiles(32, 64, 8, 2)
    return _tiles(32, 64, 4, 2) if head_dim <= 80 else _tiles(16, 32, 4, 1)


def _table(capability: int, dtype: str, tokens: int, head_dim: int) -> Config:
    if dtype == "float32":
        return _tiles(32, 32, 8, 2 if head_dim <= 64 else 1)
    if dtype == "tf32":
        return _tiles(32, 32, 4, 2)
    if capability in HOPPER_LIKE or head_dim <= 80:
        return _tiles(128, 32, 8, 2)
    return _tiles(64, 32, 4, 2)


def _small(capability: int, dtype: str, tokens: int, head_dim: int) -> Config:
    tile = small_tile(dtype, head_dim)
    narrow = capability == 90 or (80 <= capability < 90 and head_dim > 32)
    if tile == 16 or (tile == 64 and narrow):
        return Config({"BLOCK": tile}, 4, 1)
    return Config({"BLOCK": tile}, 8, 1)


def _candidates(dtype: str, tokens: int, head_dim: int) -> list[Config]:
    """Tiles for windows of several tiles; one that is shared must keep its size."""
    tile = small_tile(dtype, head_dim)
    if tokens <= tile:
        return [_tiles(tile, tile, warps, 1) for warps in (2, 4, 8)]
    sizes = (16, 32, 64) if dtype in ("float32", "tf32") else (32, 64, 128)
    return [
        _tiles(block_m, block_n, num_warps, num_stages)
        for block_m in sizes
        for block_n in sizes
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
        if block_m * block_n >= 512
    ]


def _table_candidates(dtype: str, tokens: int, head_dim: int) -> list[Config]:
    """A tile holds at least one grid row of the largest window."""
    candidates = _candidates(dtype, tokens, head_dim)
    return [c for c in candidates if min(c.blocks.values()) >= 32]


def _small_candidates(dtype: str, tokens: int, head_dim: int) -> list[Config]:
    block = {"BLOCK": small_tile(dtype, head_dim)}
    return [Config(block, num_warps, stages) for num_warps in (2, 4, 8) for stages in (1, 2)]


FORWARD = Tunable("window_attention.forward", _forward, _candidates)
QUERY = Tunable("window_attention.query", _query, _candidates)
KEY = Tunable("window_attention.key", _key, _candidates)
TABLE = Tunable("window_attention.table", _table, _table_candidates)
SMALL_BACKWARD = Tunable("window_attention.small", _small, _small_candidates)
REDUCE = Config({"BLOCK": 32}, num_warps=4, num_stages=1)
