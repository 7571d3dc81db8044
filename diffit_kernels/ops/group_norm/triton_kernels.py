"""group_norm_silu in Triton: launching the kernels of triton_forward.py and triton_backward.py."""

import torch

from diffit_kernels.ops import split, triton_launch
from diffit_kernels.ops.group_norm import launch
from diffit_kernels.ops.group_norm.triton_backward import (
    input_kernel,
    parameters_kernel,
    sums_kernel,
)
from diffit_kernels.ops.group_norm.triton_forward import normalise_kernel, statistics_kernel


def can_run(x, weight, bias, num_groups, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    group = x.shape[-1] // num_groups
    if group > launch.MAX_GROUP:
        return (
            f"Triton's group_norm_silu holds whole groups in a tile: C / num_groups must be at "
            f"most {launch.MAX_GROUP}, got {group}"
        )
    return triton_launch.refusal(x, weight, bias)


def forward(x, weight, bias, num_groups, eps):
    """Two passes: one for the statistics, and one that reads x again and writes out.

    Bytes per element in half precision: 6, of which 2 come from the L2 cache as far as x fits.
    """
    x, weight, bias = (None if t is None else t.contiguous() for t in (x, weight, bias))
    out = x.new_empty(x.shape)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    batch, height, width, channels = x.shape
    key = {"dtype": x.dtype, "channels": channels, "num_groups": num_groups}
    config = launch.STATISTICS.config(x.device, **key)
    tiling = launch.Tiling.of(channels, num_groups)
    pixels = height * width
    chunk = _chunk(batch, pixels, tiling, config)
    chunks = -(-pixels // chunk)
    parts = x.new_empty((2, batch, chunks, num_groups), dtype=torch.float32)
    grid = (batch * chunks * tiling.blocks,)
    triton_launch.launch(
        statistics_kernel,
        grid,
        *(x, *parts, pixels, chunk),
        config=config,
        **tiling._asdict(),
    )
    triton_launch.launch(
        normalise_kernel,
        grid,
        *(x, weight, bias, *parts, out, mean, rstd, pixels, chunk, eps),
        config=launch.NORMALISE.config(x.device, **key),
        **tiling._asdict(),
    )
    return out, mean, rstd


def backward(grad_out, x, weight, bias, mean, rstd, num_groups):
    """Two passes: one for sums by channel, and one that reads x and grad_out again and writes dx.

    Bytes per element in half precision: 10, of which 4 come from the L2 cache as far as they fit.
    A small launch adds up the sums for dweight and dbias.
    """
    grad_out, x, weight, bias, mean, rstd = (
        None if t is None else t.contiguous() for t in (grad_out, x, weight, bias, mean, rstd)
    )
    new = torch.zeros if x.numel() == 0 else torch.empty  # sums over nothing are zero
    grads = dx, dweight, dbias = tuple(
        x.new_empty(0) if t is None else new(t.shape, dtype=t.dtype, device=t.device)
        for t in (x, weight, bias)
    )
    if x.numel() == 0:
        return grads
    batch, height, width, channels = x.shape
    key = {"dtype": x.dtype, "channels": channels, "num_groups": num_groups}
    config = launch.SUMS.config(x.device, **key)
    tiling = launch.Tiling.of(channels, num_groups)
    pixels = height * width
    chunk = _chunk(batch, pixels, tiling, config)
    chunks = -(-pixels // chunk)
    sums = x.new_empty((2, batch * chunks, channels), dtype=torch.float32)
    grid = (batch * chunks * tiling.blocks,)
    inputs = (grad_out, x, weight, bias, mean, rstd, *sums)
    triton_launch.launch(
        sums_kernel,
        grid,
        *(*inputs, pixels, chunk),
        config=config,
        **tiling._asdict(),
    )
    triton_launch.launch(
        input_kernel,
        grid,
        *(*inputs, dx, pixels, chunk),
        config=launch.INPUT.config(x.device, **key),
        **tiling._asdict(),
    )
    if weight is not None or bias is not None:
        config = launch.PARAMETERS.config(x.device, dtype=torch.float32, channels=channels)
        triton_launch.launch(
            parameters_kernel,
            (-(-channels // config.blocks["BLOCK_C"]),),
            *(*sums, None if weight is None else dweight, None if bias is None else dbias),
            batch * chunks,
            config=config,
            C=channels,
        )
    return grads


def _chunk(batch: int, pixels: int, tiling: launch.Tiling, config: triton_launch.Config) -> int:
    """Pixels of one program."""
    samples = batch * tiling.blocks
    chunk = -(-pixels // split.chunks(config.blocks["PROGRAMS"], samples, pixels, launch.LEAST))
    return min(chunk, 2**30 // tiling.C)  # the kernels count a chunk's elements in 32 bits
