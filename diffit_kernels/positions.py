"""Where tokens lie: the bias table's index, and the model's position embedding."""

import torch
from torch import Tensor


def relative_position_index(window_size: tuple[int, int], device: torch.device) -> Tensor:
    """(L, L) int64: the bias table's row for each pair (i, j) of an h × w window, row-major::

    index[i, j] = (y_i - y_j + h - 1) · (2w - 1) + (x_i - x_j + w - 1)
    """
    h, w = window_size
    y = torch.arange(h, device=device).repeat_interleave(w)
    x = torch.arange(w, device=device).repeat(h)
    dy = y[:, None] - y[None, :] + h - 1
    dx = x[:, None] - x[None, :] + w - 1
    return dy * (2 * w - 1) + dx


def sincos_position_embedding(channels: int, side: int) -> Tensor:
    """(side², C) float64: half the channels encode the column, half the row, each [sin | cos]."""
    quarter = channels // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), 1)  # (side, C / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat((columns, rows), 1)


def partition_windows(x: Tensor, grid: tuple[int, int], window_size: tuple[int, int]) -> Tensor:
    """(B, H · W, C) -> (B · windows, h · w, C), windows and their tokens row by row: a copy."""
    (height, width), (h, w) = grid, window_size
    batch, _, channels = x.shape
    rows, columns = height // h, width // w
    x = x.reshape(batch, rows, h, columns, w, channels)
    return x.transpose(2, 3).reshape(batch * rows * columns, h * w, channels)


def reverse_windows(x: Tensor, grid: tuple[int, int], window_size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition_windows`."""
    (height, width), (h, w) = grid, window_size
    rows, columns, channels = height // h, width // w, x.shape[-1]
    batch = x.shape[0] // (rows * columns)
    x = x.reshape(batch, rows, columns, h, w, channels)
    return x.transpose(2, 3).reshape(batch, height * width, channels)
