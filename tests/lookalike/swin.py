"""A Swin transformer: window attention with a mask where windows are shifted; two stages of it."""

import torch
from torch import Tensor, nn

from tests.lookalike.diffit import Mlp


class Attention(nn.Module):
    def __init__(self, width, heads, window, *, as_int=False, dropout=0.0):
        super().__init__()
        h, w = window
        self.num_heads = heads
        self.window_size = h if as_int else window
        self.scale = (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.randn((2 * h - 1) * (2 * w - 1), heads)
        )
        rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
        offsets = rows[:, None] - rows + h - 1, columns[:, None] - columns + w - 1
        self.register_buffer("relative_position_index", offsets[0] * (2 * w - 1) + offsets[1])
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = q @ k.mT * self.scale + bias.view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is not None:
            scores = scores + mask.repeat(rows // len(mask), 1, 1).unsqueeze(1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, width)))


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B · windows, L, C)."""
    (h, w), (batch, height, width, channels) = window, x.shape
    x = x.view(batch, height // h, h, width // w, w, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, channels)


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(windows, L, L), 0 or -100: which tokens were neighbours before the image was rolled."""
    place = torch.zeros(1, *grid, 1)
    for axis in (0, 1):
        position = torch.arange(grid[axis])
        after = (position >= grid[axis] - window[axis]).float()
        after = after + (position >= grid[axis] - shift[axis])
        place = 3 * place + (after[:, None] if axis == 0 else after)[None, ..., None]
    place = partition(place, window)[..., 0]
    return torch.where(place[:, :, None] == place[:, None], 0.0, -100.0)


class Block(nn.Module):
    """A square image of tokens (B, H, W, C), in windows, shifted or not."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int], window: int, shift: int):
        super().__init__()
        self.window, self.shift = (window, window), shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, self.window)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        mask = shift_mask(grid, self.window, (shift, shift)) if shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        h = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        h = self.attn(partition(h, self.window), mask=self.attn_mask)
        side = self.window[0]
        h = h.view(batch, height // side, width // side, side, side, channels)
        h = h.transpose(2, 3).reshape(x.shape).roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(h)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


class Swin(nn.Module):
    """Two stages of two blocks, whose second is shifted."""

    def __init__(self, width=16, heads=2, side=28, window=7, classes=10):
        super().__init__()
        self.stages = nn.ModuleList()
        for stage in range(2):
            grid, channels = (side >> stage, side >> stage), width << stage
            shifts = (0, window // 2)
            blocks = [Block(channels, heads << stage, grid, window, shift) for shift in shifts]
            merge = [] if stage else [Merge(width)]
            self.stages.append(nn.Sequential(*blocks, *merge))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((1, 2)))
