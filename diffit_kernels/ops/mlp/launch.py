"""How the mlp kernels are tiled.

Both passes are bound by memory on every GPU from sm_80 to sm_120: what counts is that each thread
has several 16-byte loads under way and that a row's part of a tile is a few hundred bytes long. So
one choice serves all of them. It is reasoned, not yet measured on hardware.
"""

import torch

from diffit_kernels.ops.triton_launch import Config, Tunable

PROGRAMS = 4096  # of the backward at most: some five waves, and partial sums under 2 % of its bytes


def rows_each(rows: int, columns: int, block_n: int, block_m: int) -> int:
    """Rows that one program of the backward sums, a multiple of its tile's."""
    groups = max(1, PROGRAMS // -(-columns // block_m))
    return block_n * max(1, -(-rows // (groups * block_n)))


def _gelu(capability: int, dtype: torch.dtype) -> Config:
    # 16 elements a thread: two 16-byte loads in half precision, four in float32.
    return Config({"BLOCK": 2048}, num_warps=4, num_stages=1)


def _gelu_candidates(dtype: torch.dtype) -> list[Config]:
    sizes = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
    return [Config({"BLOCK": block}, warps, 1) for block, warps in sizes]


def _backward(capability: int, dtype: torch.dtype, hidden: int) -> Config:
    # A warp covers 512 bytes of a row. 16 elements a thread of each input keep four 16-byte loads
    # under way (eight in float32) and take 16 registers for the column sums.
    if dtype == torch.float32:
        return Config({"BLOCK_N": 16, "BLOCK_M": 128}, num_warps=4, num_stages=1)
    return Config({"BLOCK_N": 8, "BLOCK_M": 256}, num_warps=4, num_stages=1)


def _backward_candidates(dtype: torch.dtype, hidden: int) -> list[Config]:
    tiles = ((4, 256, 4), (8, 128, 4), (8, 256, 4), (16, 128, 4), (8, 512, 8), (16, 256, 8))
    return [Config({"BLOCK_N": n, "BLOCK_M": m}, warps, 1) for n, m, warps in tiles]


GELU = Tunable("mlp.gelu", _gelu, _gelu_candidates)
BACKWARD = Tunable("mlp.backward", _backward, _backward_candidates)
# Some hundred rows of partial sums: many narrow programs, each with a tile of 8 KiB under way.
SUM = Config({"BLOCK_N": 32, "BLOCK_M": 64}, num_warps=4, num_stages=1)
