"""How the adaln kernels are tiled: what follows from the shape, and what is chosen.

The heuristics are reasoned from registers and bytes in flight, and compile without spills; they
have not been measured on hardware yet. To run at its memory's speed a GPU needs 25 to 40 KB in
flight on every multiprocessor (H100: 3.35 TB/s · 1 µs / 132 = 25 KB; H200: 36 KB).
"""

import torch
import triton

from diffit_kernels.ops.split import multiprocessors
from diffit_kernels.ops.triton_launch import Config, Tunable

MAX_CHANNELS = 8192  # a row of the backward in the registers of 16 warps
LEAST = 4  # tokens of a program
ONE_LAUNCH = 4096  # up to here with the row of every sum beside it


def parts(channels: int) -> tuple[int, int]:
    """Two powers of two that cover a row with the least padding, 1152 -> 1024 + 128; or one, and 1.

    One up to 512 channels, where a program takes several rows.
    """
    whole = triton.next_power_of_2(channels)
    first = whole // 2
    rest = triton.next_power_of_2(channels - first)
    return (first, rest) if 512 < channels < whole and rest < first else (whole, 1)


def _forward(capability: int, *, dtype: torch.dtype, channels: int, rows: int) -> Config:
    """Whole rows to a warp: statistics by shuffles, without a barrier.

    1152 channels are 36 values a thread, in loads of 16 bytes, and 63 to 95 registers: 21 to 32
    programs keep 48 KB of bf16 or more in flight. Wider rows take more warps, with 16 values a
    thread; of narrower ones a program takes several.
    """
    c1, _ = parts(channels)
    warps = min(16, c1 // 512) if c1 > 1024 else 1
    return _forward_config(channels, _rows(c1, rows), warps)


def _forward_candidates(*, dtype: torch.dtype, channels: int, rows: int) -> list[Config]:
    c1, _ = parts(channels)
    some = {1, _rows(c1, rows), min(4 * _rows(c1, rows), triton.next_power_of_2(max(rows, 1)))}
    fitting = [(r, w) for r in sorted(some) for w in (1, 2, 4, 8, 16) if 256 <= r * c1 // w <= 2048]
    return [_forward_config(channels, *pair) for pair in fitting or [(1, 1)]]


def _forward_config(channels: int, block_rows: int, warps: int) -> Config:
    c1, c2 = parts(channels)
    return Config({"C1": c1, "C2": c2, "BLOCK_ROWS": block_rows}, num_warps=warps)


def _rows(c1: int, rows: int) -> int:
    """Rows per program, for about 512 values, and no more than there are."""
    return min(max(1, 512 // c1), triton.next_power_of_2(max(rows, 1)))


def _backward(
    capability: int, *, dtype: torch.dtype, channels: int, rows: int, streams: int
) -> Config:
    """Rows one after the other, with STAGES - 1 more on their way through shared memory.

    1152 channels on 4 warps are 9 values a thread of every tensor and every sum, at most 128
    registers: 4 programs on a multiprocessor, each with two rows of bf16, or one of float32, of
    ``streams`` = 2 to 4 tensors in flight (37 to 74 KB). Wider rows take 8 or 16 warps, and 2
    programs or 1; more stages would spill.

    PROGRAMS are what runs at once. Each leaves a row per sum, so there should be no more: 512 of
    them at (64, 256, 1152) write 5 % of what the pass itself reads and writes.
    """
    c1, _ = parts(channels)
    each = max(1, min(4, 4096 // c1))
    config = _backward_config(
        dtype, channels, _rows(c1, rows), min(16, max(4, c1 // 256)), 1, each, capability
    )
    row = (config.blocks["C1"] + config.blocks["C2"]) * dtype.itemsize * streams
    shared = 1024 * (200 if capability in (90, 100) else 150 if capability == 80 else 90)
    most = 4 // dtype.itemsize + (channels <= ONE_LAUNCH)
    stages = min(most, 1 + shared // each // row)
    return config._replace(blocks=dict(config.blocks) | {"STAGES": stages})


def _backward_candidates(
    *, dtype: torch.dtype, channels: int, rows: int, streams: int
) -> list[Config]:
    c1, _ = parts(channels)
    some = _rows(c1, rows)
    fitting = [warps for warps in (2, 4, 8, 16) if 128 <= some * c1 // warps <= 1024] or [4]
    return [
        _backward_config(dtype, channels, some, warps, stages, each)
        for warps in fitting
        for stages in (1, 2, 3, 4)
        for each in (1, 2, 4, 6, 8)
        if (stages - 1) * some * 2 * c1 * dtype.itemsize * streams <= 2**17 and each * warps <= 32
    ]


def _backward_config(
    dtype: torch.dtype,
    channels: int,
    block_rows: int,
    warps: int,
    stages: int,
    each: int,
    capability: int = 90,
) -> Config:
    c1, c2 = parts(channels)
    if c2 > 1:  # copies in flight are 4 bytes a thread or more
        c2 = max(c2, 32 * warps * 4 // dtype.itemsize)
    blocks = {"C1": c1, "C2": c2, "BLOCK_ROWS": block_rows, "STAGES": stages}
    return Config(blocks | {"PROGRAMS": each * multiprocessors(capability)}, num_warps=warps)


def _sums(capability: int, *, dtype: torch.dtype, channels: int) -> Config:
    """The second launch for rows wider than ONE_LAUNCH: two sums of 32 values a thread."""
    return _backward_config(dtype, channels, 1, 8, 2, 1, capability)


def _sums_candidates(*, dtype: torch.dtype, channels: int) -> list[Config]:
    sizes = [(warps, stages) for warps in (8, 16) for stages in (1, 2)]
    return [_backward_config(dtype, channels, 1, *pair, 1) for pair in sizes]


def _finish(capability: int, *, dtype: torch.dtype, channels: int, chunks: int) -> Config:
    """All chunks of a few channels: many rows at once, since nothing else hides their latency."""
    if chunks <= 32:
        return Config({"BLOCK_CHUNKS": max(8, triton.next_power_of_2(chunks)), "BLOCK_C": 64})
    return Config({"BLOCK_CHUNKS": 256, "BLOCK_C": 16}, num_warps=8)


def _finish_candidates(*, dtype: torch.dtype, channels: int, chunks: int) -> list[Config]:
    sizes = [(n, c) for n in (8, 32, 64, 128, 256) for c in (16, 32, 64, 128) if n * c <= 8192]
    return [Config({"BLOCK_CHUNKS": n, "BLOCK_C": c}, w) for n, c in sizes for w in (4, 8)]


MAX_ROWS = 32  # at once, of the narrowest; the keys tell numbers of tokens apart up to here
FORWARD = Tunable("adaln.forward", _forward, _forward_candidates)
BACKWARD = Tunable("adaln.backward", _backward, _backward_candidates)
SUMS = Tunable("adaln.sums", _sums, _sums_candidates)
FINISH = Tunable("adaln.finish", _finish, _finish_candidates)
