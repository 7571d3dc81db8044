"""window_attention on a CPU, in C++: csrc/cpu/window_attention.h, window_attention_backward.h."""

import torch
from torch import Tensor

from diffit_kernels import native_library


def can_run(qkv, temb, relative_position_bias_table, num_heads, window_size, scale) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(qkv, temb, relative_position_bias_table)


def fake(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    """out, and an empty lse: the backward needs nothing kept."""
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3), qkv.new_empty(0)


def forward(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    """qkv is read once, by blocks; scores live in the caches."""
    arguments = (num_heads, window_size, scale)
    out, lse = fake(qkv, temb, relative_position_bias_table, *arguments)
    if out.numel() > 0:
        inputs = _inputs(qkv, temb, relative_position_bias_table)
        native_library.CPU.ops().window_attention_forward(*inputs, *arguments, out)
    return out, lse


def backward(
    grad_out, qkv, temb, relative_position_bias_table, out, lse, num_heads, window_size, scale
):
    """Scores are computed again; nothing of the forward is needed."""
    batch, height, width, channels3 = qkv.shape
    windows = height * width // (window_size[0] * window_size[1])
    dqkv, dtemb, dtable = qkv.new_empty(qkv.shape), qkv.new_empty(0), qkv.new_empty(0)
    new = torch.empty if qkv.numel() > 0 else torch.zeros  # sums over nothing are zero
    if temb is not None:
        dtemb = new(batch, windows, channels3 // 3 * 2)
    if relative_position_bias_table is not None:
        dtable = new(num_heads, relative_position_bias_table.shape[0])
    if qkv.numel() > 0:
        inputs = _inputs(qkv, temb, relative_position_bias_table)
        native_library.CPU.ops().window_attention_backward(
            *(grad_out.contiguous(), *inputs, num_heads, window_size, scale, dqkv, dtemb, dtable)
        )
    if temb is not None:
        dtemb = dtemb.sum(1).to(temb.dtype)
    if relative_position_bias_table is not None:
        dtable = dtable.t().to(relative_position_bias_table.dtype)
    return dqkv, dtemb, dtable


def _inputs(qkv: Tensor, temb: Tensor | None, table: Tensor | None):
    """As the kernels take them: parameters in float32, the table with a row for each head."""
    return (
        qkv.contiguous(),
        None if temb is None else temb.float().contiguous(),
        None if table is None else table.t().float().contiguous(),
    )
