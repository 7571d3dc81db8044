"""A third party's image-space DiffiT, by the names of the recording ``image_unet_small``.

Windows are cut by the cell, outside of the block, and each comes with its copy of the time token.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bias(nn.Module):
    def __init__(self, side: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
        offsets = (rows[:, None] - rows + side - 1, columns[:, None] - columns + side - 1)
        self.register_buffer("index", offsets[0] * (2 * side - 1) + offsets[1])

    def forward(self) -> Tensor:
        return self.table[self.index].permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, side: int, temb_width: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.window_size = side
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_t = nn.Linear(temb_width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.rpb = Bias(side, heads)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        windows, tokens, width = x.shape
        qkv = self.qkv(x) + self.qkv_t(temb).unsqueeze(1)
        q, k, v = qkv.view(windows, tokens, 3, self.num_heads, self.head_dim).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q * self.scale, k) + self.rpb()
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.proj(out.reshape(windows, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int, temb_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tmsa = Attention(width, heads, side, temb_width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = x + self.tmsa(self.norm1(x), temb)
        return x + self.mlp(self.norm2(x))


class Cell(nn.Module):
    def __init__(self, inner: int, width: int, heads: int, side: int, temb_width: int):
        super().__init__()
        self.side = side
        self.gn = nn.GroupNorm(8, inner)
        self.conv = nn.Conv2d(inner, width, 3, padding=1)
        self.transformer = Block(width, heads, side, temb_width)
        self.skip = nn.Conv2d(inner, width, 1, bias=False) if inner != width else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv(F.silu(self.gn(x)))
        batch, width, height, _ = h.shape
        count = height // self.side
        h = h.view(batch, width, count, self.side, count, self.side)
        h = h.permute(0, 2, 4, 3, 5, 1).reshape(-1, self.side**2, width)
        h = self.transformer(h, temb.repeat_interleave(count**2, 0))
        h = h.view(batch, count, count, self.side, self.side, width)
        h = h.permute(0, 5, 1, 3, 2, 4).reshape(batch, width, height, height)
        return h + self.skip(x)


class Frequencies(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 10000 ** (-torch.arange(width // 2) / (width // 2)))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.freqs
        return torch.cat((angles.sin(), angles.cos()), 1)


class Embedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)


class UNet(nn.Module):
    def __init__(self, base_channels, channel_mult, num_blocks, num_heads, window_size, temb_dim):
        super().__init__()
        widths = [base_channels * factor for factor in channel_mult]
        self.temb_proj = nn.Sequential(Frequencies(temb_dim), Embedding(temb_dim))
        self.tokenizer = nn.Conv2d(3, widths[0], 3, padding=1)

        def stage(inner: int, width: int, cells: int) -> nn.ModuleList:
            inputs = [inner] + (cells - 1) * [width]
            return nn.ModuleList(Cell(i, width, num_heads, window_size, temb_dim) for i in inputs)

        self.enc_blocks = nn.ModuleList(map(stage, widths, widths, num_blocks))
        self.enc_downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        up = widths[::-1]
        joined = [up[0], *(2 * width for width in up[1:])]
        self.dec_blocks = nn.ModuleList(map(stage, joined, up, num_blocks[::-1]))
        self.dec_ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in pairwise(up))
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb, h, skips = self.temb_proj(t), self.tokenizer(x), []
        for depth, cells in enumerate(self.enc_blocks):
            h = self.enc_downs[depth - 1](h) if depth else h
            for cell in cells:
                h = cell(h, temb)
            skips.append(h)
        skips.pop()
        for depth, cells in enumerate(self.dec_blocks):
            h = torch.cat((self.dec_ups[depth - 1](h), skips.pop()), 1) if depth else h
            for cell in cells:
                h = cell(h, temb)
        return self.head(h)
