"""Time-dependent multi-head self-attention over windows: eqs. 3 to 6 of arXiv 2312.02139."""

import torch
from torch import Tensor


def tmsa(
    x: Tensor,
    c: Tensor,
    parameters: dict[str, Tensor],
    num_heads: int,
    window_size: tuple[int, int],
) -> Tensor:
    """Eqs. 3 to 6 and the output projection; x (B, H, W, C), c (B, C), the released names.

    q = x Wq + c Wqt    k = x Wk + c Wkt    v = x Wv + c Wvt    out = softmax(q kᵀ / √d + B) v

    Without a projection of c, or without a table, their terms are absent.
    """
    tokens = x @ parameters["qkv.weight"].T + parameters["qkv.bias"]
    time = None
    if "qkv_temb.weight" in parameters:
        time = c @ parameters["qkv_temb.weight"].T + parameters.get("qkv_temb.bias", 0)
    table = parameters.get("relative_position_bias_table")
    out = window_attention(tokens, time, table, num_heads, window_size)
    return out @ parameters["proj.weight"].T + parameters["proj.bias"]


def window_attention(
    qkv: Tensor,
    time: Tensor | None,
    table: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """softmax((q + q_t)(k + k_t)ᵀ · scale + B)(v + v_t) in every window; the time token whole.

    qkv: (B, H, W, 3C), channels ordered (3, heads, d); time: (B, 3C); table: ((2h-1)(2w-1), heads).
    """
    batch, height, width, channels = qkv.shape
    if time is not None:
        qkv = qkv + time[:, None, None, :]
    windows = partition_windows(qkv, window_size)  # (B · windows, L, 3C)
    head_dim = channels // (3 * num_heads)
    q, k, v = windows.reshape(*windows.shape[:2], 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * (head_dim**-0.5 if scale is None else scale)
    if table is not None:
        scores = scores + position_bias(table, window_size)
    out = torch.softmax(scores, -1) @ v  # (B · windows, heads, L, d)
    out = out.transpose(1, 2).reshape(windows.shape[0], windows.shape[1], channels // 3)
    return reverse_windows(out, (batch, height, width), window_size)


def position_bias(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """B[head, i, j] = table[index[i, j], head]: (heads, L, L)."""
    return table[relative_position_index(window_size)].permute(2, 0, 1)


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """index[i, j] = (y_i - y_j + h - 1) · (2w - 1) + (x_i - x_j + w - 1), pair by pair."""
    h, w = window_size
    positions = [(y, x) for y in range(h) for x in range(w)]
    return torch.tensor(
        [
            [(yi - yj + h - 1) * (2 * w - 1) + (xi - xj + w - 1) for yj, xj in positions]
            for yi, xi in positions
        ]
    )


def partition_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B · windows, L, C), windows and tokens in row-major order, one at a time."""
    h, w = window_size
    _, height, width, channels = x.shape
    return torch.stack(
        [
            sample[top : top + h, left : left + w].reshape(h * w, channels)
            for sample in x
            for top in range(0, height, h)
            for left in range(0, width, w)
        ]
    )


def reverse_windows(
    windows: Tensor, grid: tuple[int, int, int], window_size: tuple[int, int]
) -> Tensor:
    """The inverse of :func:`partition_windows`; grid is (B, H, W)."""
    batch, height, width = grid
    h, w = window_size
    per_sample = windows.reshape(batch, height // h, width // w, h, w, -1)
    rows = [
        torch.cat([torch.cat(list(row), 1) for row in sample], 0) for sample in per_sample
    ]  # windows of a row side by side, rows below each other
    return torch.stack(rows)
