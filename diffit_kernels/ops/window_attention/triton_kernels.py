"""window_attention on NVIDIA GPUs, in Triton: the launchers. The kernels are in triton_*.py.

Passes over memory: the forward reads qkv and writes out and lse. The backward of windows that fit
one tile (of 64 tokens in half precision) reads qkv and dO and writes dqkv, all once, and 2C sums a
window for the time token, in float32. That of larger
ones reads q, k, v and dO in three kernels (dq; dk and dv; the table), out in the first, and writes
dqkv once. k and v, or q and dO, are read again by every tile of a window, from the L2 cache.
"""

import torch

from diffit_kernels.ops import triton_launch
from diffit_kernels.ops.triton_launch import dot_precision, launch
from diffit_kernels.ops.window_attention import launch as tiles
from diffit_kernels.ops.window_attention.triton_backward import key_kernel, query_kernel
from diffit_kernels.ops.window_attention.triton_forward import forward_kernel
from diffit_kernels.ops.window_attention.triton_small import small_kernel
from diffit_kernels.ops.window_attention.triton_table import reduce_kernel, table_kernel

LOG2E = 1.4426950408889634
LARGEST_WINDOW = 32


def can_run(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    head_dim = qkv.shape[-1] // 3 // num_heads
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"head_dim must be a multiple of 8 from 8 to 128, got {head_dim}"
    if max(window_size) > LARGEST_WINDOW:
        return f"a window's sides must be at most {LARGEST_WINDOW}, got {tuple(window_size)}"
    return triton_launch.refusal(qkv, temb, relative_position_bias_table)


def fake(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    batch, height, width, channels3 = qkv.shape
    lse = qkv.new_empty(batch, num_heads, height * width, 2, dtype=torch.float32)
    return qkv.new_empty(batch, height, width, channels3 // 3), lse


def forward(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    """out, and lse: a row's maximum and log2 of its sum, float32, in the order (windows, nH, L)."""
    qkv, temb = _contiguous(qkv, temb)
    out, lse = fake(qkv, temb, relative_position_bias_table, num_heads, window_size, scale)
    shape = _Shape(qkv, num_heads, window_size)
    config = tiles.FORWARD.config(qkv.device, **shape.key)
    packs, rows = shape.packs(config.blocks["BLOCK_M"])
    launch(
        forward_kernel,
        (-(-rows // config.blocks["BLOCK_M"]) * num_heads * packs,),
        qkv,
        temb,
        _by_head(relative_position_bias_table),
        out,
        lse,
        shape.windows,
        *shape.geometry,
        scale * LOG2E,
        config=config,
        HAS_TIME=temb is not None,
        HAS_BIAS=relative_position_bias_table is not None,
        **shape.constants,
        PACK=shape.tiling.PACK,
        PADDED=shape.tiling.PADDED,
    )
    return out, lse


def backward(
    grad_out, qkv, temb, relative_position_bias_table, out, lse, num_heads, window_size, scale
):
    """dqkv, dtemb, dtable; the equations are in triton_backward.py and triton_table.py."""
    qkv, temb, grad_out = _contiguous(qkv, temb, grad_out)
    shape = _Shape(qkv, num_heads, window_size)
    table = _by_head(relative_position_bias_table)
    constants = {"HAS_TIME": temb is not None, **shape.constants}
    gradients = (
        _small_backward
        if shape.tokens <= tiles.small_tile(shape.key["dtype"], shape.head_dim)
        else _large_backward
    )
    dqkv, dtemb, dtable = gradients(shape, grad_out, qkv, temb, table, out, lse, scale, constants)
    empty = qkv.new_empty(0)
    if temb is not None:
        dtemb = torch.cat([_by_sample(part, shape) for part in dtemb], 1).to(temb.dtype)
    if table is not None:
        parts, rows_m, rows_n = dtable
        dtable = torch.zeros_like(  # stays zero if the batch is empty
            relative_position_bias_table, memory_format=torch.contiguous_format
        )
        if shape.batch:
            _reduce(shape, parts, rows_m, rows_n, dtable)
    return dqkv, empty if temb is None else dtemb, empty.clone() if table is None else dtable


def _small_backward(shape, grad_out, qkv, temb, table, out, lse, scale, constants):
    """One kernel for everything: a window, or several, in one tile."""
    config = tiles.SMALL_BACKWARD.config(qkv.device, **shape.key)
    packs, _ = shape.packs(config.blocks["BLOCK"])
    splits, each = tiles.split(packs, shape.num_heads) if table is not None else (packs, 1)
    dqkv = torch.empty_like(qkv)
    dtemb = _float32(qkv, shape.windows, 2 * shape.channels) if temb is not None else None
    parts = _float32(qkv, splits, *table.shape) if table is not None else None
    launch(
        small_kernel,
        (splits * shape.num_heads,),
        qkv,
        temb,
        table,
        grad_out,
        dqkv,
        dtemb,
        parts,
        shape.windows,
        *shape.geometry,
        each,
        scale,
        config=config,
        HAS_BIAS=table is not None,
        **constants,
        PACK=shape.tiling.PACK,
        PADDED=shape.tiling.PADDED,
    )
    return dqkv, (dtemb,), (parts, shape.window[0], shape.window[0])


def _large_backward(shape, grad_out, qkv, temb, table, out, lse, scale, constants):
    """dq and delta; dk and dv; the table: windows of several tiles."""
    dqkv = torch.empty_like(qkv)
    delta = _float32(qkv, *lse.shape[:-1])
    has_bias = table is not None

    config = tiles.QUERY.config(qkv.device, **shape.key)
    count = -(-shape.tokens // config.blocks["BLOCK_M"])
    has_time = temb is not None
    dq_time = _float32(qkv, shape.windows * count, shape.channels) if has_time else None
    launch(
        query_kernel,
        (count * shape.num_heads * shape.windows,),
        *(qkv, temb, table, out.contiguous(), lse, grad_out, dqkv, delta, dq_time),
        *(*shape.geometry, scale),
        config=config,
        HAS_BIAS=has_bias,
        **constants,
    )
    config = tiles.KEY.config(qkv.device, **shape.key)
    count = -(-shape.tokens // config.blocks["BLOCK_N"])
    dv_time = _float32(qkv, shape.windows * count, shape.channels) if has_time else None
    time_score = torch.empty_like(delta) if has_time else None
    launch(
        key_kernel,
        (count * shape.num_heads * shape.windows,),
        *(qkv, temb, table, lse, delta, grad_out, dqkv, dv_time, time_score),
        *(*shape.geometry, scale),
        config=config,
        HAS_BIAS=has_bias,
        **constants,
    )
    if not has_bias:
        return dqkv, (dq_time, dv_time), None
    config = tiles.TABLE.config(qkv.device, **shape.key)
    h, w = shape.window
    rows_m, rows_n = (config.blocks[name] // w for name in ("BLOCK_M", "BLOCK_N"))
    programs = shape.num_heads * -(-h // rows_m) * -(-h // rows_n)
    splits, each = tiles.split(shape.windows, programs)
    parts = _float32(qkv, splits * programs, (rows_m + rows_n - 1) * (2 * w - 1))
    launch(
        table_kernel,
        (splits * programs,),
        *(qkv, table, lse, delta, time_score, grad_out, parts, shape.windows),
        *(*shape.geometry, each, scale),
        config=config,
        **constants,
    )
    return dqkv, (dq_time, dv_time), (parts, rows_m, rows_n)


def _reduce(shape, parts, rows_m, rows_n, dtable):
    h, w = shape.window
    tiles_m, tiles_n = -(-h // rows_m), -(-h // rows_n)
    each = shape.num_heads * tiles_m * tiles_n * (rows_m + rows_n - 1) * (2 * w - 1)
    blocks = -(-dtable.shape[0] // tiles.REDUCE.blocks["BLOCK"])
    launch(
        reduce_kernel,
        (blocks * shape.num_heads,),
        *(parts, dtable, shape.num_heads, parts.numel() // each),
        config=tiles.REDUCE,
        WINDOW_H=h,
        WINDOW_W=w,
        ROWS_M=rows_m,
        ROWS_N=rows_n,
    )


class _Shape:
    """The sizes of one call, and the kernels' arguments that follow from them."""

    def __init__(self, qkv: torch.Tensor, num_heads: int, window_size: list[int]):
        self.batch, height, width, channels3 = qkv.shape
        self.channels, self.num_heads = channels3 // 3, num_heads
        self.window = h, w = tuple(window_size)
        self.tokens, self.head_dim = h * w, self.channels // num_heads
        self.windows = self.batch * (height // h) * (width // w)
        self.key = {
            "dtype": triton_launch.dtype_name(qkv.dtype),
            "tokens": self.tokens,
            "head_dim": self.head_dim,
        }
        self.tiling = tiles.tiling(**self.key)
        in_sample = (height // h) * (width // w)
        self.geometry = (num_heads, in_sample, width // w, width, height * width)
        self.constants = {
            "WINDOW_H": h,
            "WINDOW_W": w,
            "HEAD_DIM": self.head_dim,
            "D1": self.tiling.D1,
            "D2": self.tiling.D2,
            "PRECISION": dot_precision(qkv.dtype),
        }

    def packs(self, block: int) -> tuple[int, int]:
        """(packs of windows, rows of a pack); a pack of small windows must fill its tile."""
        pack = self.tiling.PACK
        if pack == 1:
            return self.windows, self.tokens
        assert pack * self.tiling.PADDED == block
        return -(-self.windows // pack), block


def _by_head(table):
    """The table by head, float32 and in units of log2: (nH, (2h-1)(2w-1)), for base-2 softmax."""
    if table is None:
        return None
    out = torch.empty(*reversed(table.shape), dtype=torch.float32, device=table.device)
    return (
        torch.mul(table.t(), LOG2E, out=out)
        if table.dtype == out.dtype
        else out.copy_(table.t()).mul_(LOG2E)
    )


def _by_sample(parts, shape):
    """(B · n, channels) -> the sums (B, channels)."""
    each = parts.shape[0] // max(shape.batch, 1)
    return parts.view(shape.batch, each, parts.shape[1]).sum(1)


def _float32(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _contiguous(*tensors):
    return tuple(None if t is None else t.contiguous() for t in tensors)
