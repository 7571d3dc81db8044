"""window_attention in PyTorch, any device: SDPA with the expanded bias, gradients written out.

Nothing quadratic outlives a call: the backward recomputes the probabilities.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype


def forward(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    q, k, v = _windows(qkv, 3, num_heads, window_size).unbind(0)
    q_time, v_time = _time_parts(temb, q, num_heads)
    bias = _expand_bias(relative_position_bias_table, window_size)
    if bias is not None:
        bias = bias.to(q.dtype)[None]
    out = F.scaled_dot_product_attention(q + q_time, k, v, attn_mask=bias, scale=scale) + v_time
    return _grid(out[None], qkv.shape, window_size), qkv.new_empty(0)


def backward(
    grad_out, qkv, temb, relative_position_bias_table, out, lse, num_heads, window_size, scale
):
    """With P the probabilities and dO = grad_out; v_t falls out of dS, as its rows sum to zero::

    dv = Pᵀ dO    dP = dO vᵀ    dS = P ∘ (dP - rowsum(P ∘ dP))
    dq = scale · dS k    dk = scale · dSᵀ q
    dq_t = Σ_tokens dq    dv_t = Σ_tokens dO    dtable = dS summed over windows, by offset
    """
    dtype = accumulation_dtype(qkv.dtype)
    q, k, v = _windows(qkv, 3, num_heads, window_size).unbind(0)
    q = q + _time_parts(temb, q, num_heads)[0]
    bias = _expand_bias(relative_position_bias_table, window_size)
    scores = (q @ k.mT).to(dtype) * scale
    if bias is not None:
        scores += bias.to(dtype)
    probs = scores.softmax(-1)
    dout = _windows(grad_out, 1, num_heads, window_size)[0]
    dv = probs.to(q.dtype).mT @ dout
    dprobs = (dout @ v.mT).to(dtype)
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True))
    dscores_low = dscores.to(q.dtype)
    dq = scale * (dscores_low @ k)
    dk = scale * (dscores_low.mT @ q)
    dqkv = _grid(torch.stack((dq, dk, dv)), qkv.shape, window_size)

    dtemb = dtable = qkv.new_empty(0)
    if temb is not None:
        dq_time = dqkv.unflatten(-1, (3, -1))[..., 0, :].sum((1, 2), dtype=dtype)
        dv_time = grad_out.sum((1, 2), dtype=dtype)
        dtemb = torch.cat((dq_time, dv_time), 1).to(temb.dtype)
    if relative_position_bias_table is not None:
        dtable = _reduce_bias(dscores.sum(0), window_size).to(relative_position_bias_table.dtype)
    return dqkv, dtemb, dtable


def _windows(packed: Tensor, parts: int, num_heads: int, window_size: list[int]) -> Tensor:
    """(B, H, W, parts·C) -> (parts, B·windows, nH, L, d); a view where the window is the grid."""
    batch, height, width, channels = packed.shape
    h, w = window_size
    x = packed.reshape(
        batch, height // h, h, width // w, w, parts, num_heads, channels // (parts * num_heads)
    )
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(parts, -1, num_heads, h * w, x.shape[-1])


def _grid(windows: Tensor, shape: torch.Size, window_size: list[int]) -> Tensor:
    """(parts, B·windows, nH, L, d) -> (B, H, W, parts·C), the inverse of :func:`_windows`."""
    batch, height, width, _ = shape
    h, w = window_size
    parts, _, num_heads, _, head_dim = windows.shape
    x = windows.reshape(parts, batch, height // h, width // w, num_heads, h, w, head_dim)
    x = x.permute(1, 2, 5, 3, 6, 0, 4, 7)
    return x.reshape(batch, height, width, parts * num_heads * head_dim)


def _time_parts(temb: Tensor | None, q: Tensor, num_heads: int) -> tuple[Tensor | float, ...]:
    """The time token's q and v parts, (B·windows, nH, 1, d) each; zeros where there is no token."""
    if temb is None:
        return 0.0, 0.0
    batch, head_dim = temb.shape[0], q.shape[-1]
    parts = temb.to(q.dtype).reshape(batch, 2, num_heads, 1, head_dim).unbind(1)
    windows = q.shape[0] // max(batch, 1)
    return tuple(part.repeat_interleave(windows, 0) for part in parts)


def _expand_bias(table: Tensor | None, window_size: list[int]) -> Tensor | None:
    """Table ((2h-1)(2w-1), nH) -> bias (nH, L, L) without an index.

    The bias depends on (y_i - y_j, x_i - x_j) alone: row (y_i, x_i) of it is an h × w box of the
    flipped table, so the whole is the table's sliding windows in reverse order.
    """
    if table is None:
        return None
    h, w = window_size
    boxes = table.t().reshape(-1, 2 * h - 1, 2 * w - 1).flip(1, 2).unfold(1, h, 1).unfold(2, w, 1)
    return boxes.flip(1, 2).reshape(-1, h * w, h * w)


def _reduce_bias(dbias: Tensor, window_size: list[int]) -> Tensor:
    """The transpose of :func:`_expand_bias`: (nH, L, L) -> ((2h-1)(2w-1), nH), in a fixed order."""
    h, w = window_size
    by_row = dbias.reshape(-1, h, w, h, w).permute(0, 2, 4, 1, 3)
    by_column = _sum_diagonals(by_row).permute(0, 3, 1, 2)
    return _sum_diagonals(by_column).flatten(1).t()


def _sum_diagonals(x: Tensor) -> Tensor:
    """(..., n, n) -> (..., 2n-1): sums over i - j = -(n-1) .. n-1.

    Rows flipped, padded by n and read again with rows one shorter shift by one from row to row,
    which turns each diagonal into a column.
    """
    n = x.shape[-1]
    skewed = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., :-n].unflatten(-1, (n, 2 * n - 1))
    return skewed.sum(-2)
