"""window_attention in PyTorch, any device, with its gradients written out.

A few heads at a time, so that what is quadratic stays about the size of a cache: on a CPU fresh
pages for all heads' scores would cost more than the arithmetic. Nothing quadratic outlives a call.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype

SCORES_AT_A_TIME = 1 << 20


def forward(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    windows_out = _windows(out, 1, num_heads, window_size)[0]
    windows = _windows(qkv, 3, num_heads, window_size)
    times = _time_parts(temb, qkv, num_heads)
    for heads in _head_groups(windows):
        q, k, v = _flat(windows[:, :, :, :, heads]).unbind(0)
        q_time, v_time = _of_heads(times, heads, q)
        bias = _expand_bias(relative_position_bias_table, heads, window_size)
        probs = _probabilities(q + q_time, k, bias, scale).to(v.dtype)
        target = windows_out[:, :, :, heads]
        target.copy_((probs @ v + v_time).view(target.shape))
    return out, qkv.new_empty(0)


def backward(
    grad_out, qkv, temb, relative_position_bias_table, out, lse, num_heads, window_size, scale
):
    """With P the probabilities and dO = grad_out; v_t falls out of dS, as its rows sum to zero::

    dv = Pᵀ dO    dP = dO vᵀ    dS = P ∘ (dP - rowsum(P ∘ dP))
    dq = scale · dS k    dk = scale · dSᵀ q
    dq_t = Σ_tokens dq    dv_t = Σ_tokens dO    dtable = dS summed over windows, by offset
    """
    dtype = accumulation_dtype(qkv.dtype)
    dqkv = qkv.new_empty(qkv.shape)
    windows_dqkv = _windows(dqkv, 3, num_heads, window_size)
    windows = _windows(qkv, 3, num_heads, window_size)
    windows_dout = _windows(grad_out, 1, num_heads, window_size)
    times = _time_parts(temb, qkv, num_heads)
    dtable = []
    for heads in _head_groups(windows):
        q, k, v = _flat(windows[:, :, :, :, heads]).unbind(0)
        dout = _flat(windows_dout[:, :, :, :, heads])[0]
        q = q + _of_heads(times, heads, q)[0]
        bias = _expand_bias(relative_position_bias_table, heads, window_size)
        probs = _probabilities(q, k, bias, scale)
        dprobs = (dout @ v.mT).to(probs.dtype)
        dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        if bias is not None:
            dtable.append(_reduce_bias(dscores.sum(0, dtype=dtype), window_size))
        dscores, probs = dscores.to(q.dtype), probs.to(q.dtype)
        grads = scale * (dscores @ k), scale * (dscores.mT @ q), probs.mT @ dout
        for target, grad in zip(windows_dqkv[:, :, :, :, heads], grads, strict=True):
            target.copy_(grad.view(target.shape))

    dtemb = qkv.new_empty(0)
    if temb is not None:
        dq = dqkv.unflatten(-1, (3, -1))[..., 0, :]
        dtemb = torch.cat([grad.sum((1, 2), dtype=temb.dtype) for grad in (dq, grad_out)], 1)
    if relative_position_bias_table is None:
        return dqkv, dtemb, qkv.new_empty(0)
    return dqkv, dtemb, torch.cat(dtable, 1).to(relative_position_bias_table.dtype)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + bias): (B·windows, heads, L, L), in the wider dtype of q and bias.

    In half precision the library's softmax takes its statistics in float32 all the same.
    """
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores = scores.add_(bias) if bias.dtype == scores.dtype else scores + bias
    return scores.softmax(-1)


def _windows(packed: Tensor, parts: int, num_heads: int, window_size: list[int]) -> Tensor:
    """(B, H, W, parts·C) -> the view (parts, B, windows down, windows across, nH, h, w, d)."""
    batch, height, width, channels = packed.shape
    h, w = window_size
    split = packed.view(
        batch, height // h, h, width // w, w, parts, num_heads, channels // (parts * num_heads)
    )
    return split.permute(5, 0, 1, 3, 6, 2, 4, 7)


def _flat(windows: Tensor) -> Tensor:
    """(parts, B, down, across, nH, h, w, d) -> (parts, B·windows, nH, L, d)."""
    return windows.flatten(5, 6).flatten(1, 3)


def _head_groups(windows: Tensor) -> Iterator[slice]:
    """Slices of the heads with about :data:`SCORES_AT_A_TIME` scores each, at least one head."""
    _, batch, down, across, num_heads, h, w, _ = windows.shape
    scores_of_a_head = batch * down * across * (h * w) ** 2
    size = max(1, SCORES_AT_A_TIME // max(scores_of_a_head, 1))
    return (slice(start, start + size) for start in range(0, num_heads, size))


def _time_parts(temb: Tensor | None, qkv: Tensor, num_heads: int) -> Tensor | None:
    """temb (B, 2C) -> (2, B, nH, 1, d) in the dtype of ``qkv``: the q part, then the v part."""
    if temb is None:
        return None
    batch, channels = qkv.shape[0], qkv.shape[-1] // 3
    parts = temb.to(qkv.dtype).reshape(batch, 2, num_heads, 1, channels // num_heads)
    return parts.transpose(0, 1)


def _of_heads(times: Tensor | None, heads: slice, q: Tensor) -> Tensor | tuple[float, float]:
    """(2, B·windows, heads, 1, d): every window has its sample's parts; zeros without a token."""
    if times is None:
        return 0.0, 0.0
    times = times[:, :, heads]
    return times.repeat_interleave(q.shape[0] // max(times.shape[1], 1), 1)


def _expand_bias(table: Tensor | None, heads: slice, window_size: list[int]) -> Tensor | None:
    """Table ((2h-1)(2w-1), nH) -> bias of some heads (heads, L, L), without an index.

    The bias depends on (y_i - y_j, x_i - x_j) alone: row (y_i, x_i) of it is an h × w box of the
    flipped table, so the whole is the table's sliding windows in reverse order.
    """
    if table is None:
        return None
    h, w = window_size
    flipped = table[:, heads].t().reshape(-1, 2 * h - 1, 2 * w - 1).flip(1, 2)
    boxes = flipped.unfold(1, h, 1).unfold(2, w, 1)
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
