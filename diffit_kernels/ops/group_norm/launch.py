"""How the group_norm kernels are tiled: what follows from the shape, and what is chosen.

The heuristics are reasoned from registers and bytes in flight, and compile without spills; they
have not been measured on hardware yet.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton

from diffit_kernels.ops.split import multiprocessors
from diffit_kernels.ops.triton_launch import Config, Tunable

MAX_GROUP = 4096  # channels of a group, which a tile holds whole
BLOCK_C = 64  # channels of a tile: lines of 128 bytes in half precision


class Tiling(NamedTuple):
    """What a shape fixes, as the kernels' constexpr arguments.

    A tile holds GROUPS whole groups of GROUP_C channels, each in WIDTH columns, a power of two.
    """

    C: int
    GROUP_C: int
    GROUPS: int
    WIDTH: int

    @classmethod
    def of(cls, channels: int, num_groups: int) -> "Tiling":
        group = channels // num_groups
        width = triton.next_power_of_2(group)
        groups = min(max(1, BLOCK_C // width), triton.next_power_of_2(num_groups))
        return cls(channels, group, groups, width)

    @property
    def columns(self) -> int:
        return self.GROUPS * self.WIDTH

    @property
    def values(self) -> int:
        """Of each tensor a thread holds at one time."""
        return 16 if self.WIDTH == self.GROUP_C else 8

    @property
    def blocks(self) -> int:
        """Tiles side by side that cover the channels."""
        return -(-(self.C // self.GROUP_C) // self.GROUPS)


def _first_pass(stages: int, each: int) -> Callable[..., Config]:
    """16 values a thread of each tensor, and stages - 1 times as many on their way.

    They come through shared memory; 8 where groups are padded, and loaded in smaller pieces.
    Six programs on a multiprocessor have 72 KB of bf16 in flight with x alone and 4 stages; five
    have 80 KB with x and grad_out and 3, at 96 registers. PROGRAMS are what runs at once, and no
    more: every program of a second pass reads what those of the first left of its sample.
    """

    def heuristic(capability: int, *, dtype: torch.dtype, channels: int, num_groups: int) -> Config:
        tiling = Tiling.of(channels, num_groups)
        warps = 4 if tiling.columns <= 1024 else 8
        programs = (each if warps == 4 else 2) * multiprocessors(capability)
        return _config(tiling.columns, warps, tiling.values, stages, PROGRAMS=programs)

    return heuristic


def _second_pass(stages: int) -> Callable[..., Config]:
    """As the first, once it has read what that left of the sample, up to 16 chunks at a time."""

    def heuristic(capability: int, *, dtype: torch.dtype, channels: int, num_groups: int) -> Config:
        tiling = Tiling.of(channels, num_groups)
        warps = 4 if tiling.columns <= 1024 else 8
        at_once = max(1, min(16, 2048 // tiling.columns))
        return _config(tiling.columns, warps, tiling.values, stages, BLOCK_CHUNKS=at_once)

    return heuristic


def _config(columns: int, warps: int, values: int, stages: int, **blocks: int) -> Config:
    block_s = max(1, values * 32 * warps // columns)
    return Config({"BLOCK_S": block_s, "STAGES": stages} | blocks, num_warps=warps)


def _candidates(name: str, numbers: Sequence[int]) -> Callable[..., list[Config]]:
    def candidates(*, dtype: torch.dtype, channels: int, num_groups: int) -> list[Config]:
        columns = Tiling.of(channels, num_groups).columns
        sizes = itertools.product((4, 8), (8, 16, 32), (1, 3, 4), numbers)
        return [_config(columns, *size, **{name: number}) for *size, number in sizes]

    return candidates


def _parameters(capability: int, *, dtype: torch.dtype, channels: int) -> Config:
    """Some hundred rows of sums: many at once, since nothing else hides their latency."""
    return Config({"BLOCK_CHUNKS": 256, "BLOCK_C": 16}, num_warps=8)


def _parameters_candidates(*, dtype: torch.dtype, channels: int) -> list[Config]:
    sizes = ((64, 16), (64, 32), (128, 16), (128, 32), (256, 8), (256, 16), (512, 8))
    return [Config({"BLOCK_CHUNKS": n, "BLOCK_C": c}, w) for n, c in sizes for w in (4, 8)]


LEAST = 32  # pixels of a program
AT_ONCE = [each * multiprocessors(90) for each in (2, 4, 5, 6, 8)]
STATISTICS = Tunable("group_norm.statistics", _first_pass(4, 6), _candidates("PROGRAMS", AT_ONCE))
NORMALISE = Tunable("group_norm.normalise", _second_pass(4), _candidates("BLOCK_CHUNKS", (4, 16)))
SUMS = Tunable("group_norm.sums", _first_pass(3, 5), _candidates("PROGRAMS", AT_ONCE))
INPUT = Tunable("group_norm.input", _second_pass(3), _candidates("BLOCK_CHUNKS", (4, 16)))
PARAMETERS = Tunable("group_norm.parameters", _parameters, _parameters_candidates)
