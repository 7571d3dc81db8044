"""A masked diffusion transformer: the table in a part of its own, with rows that nobody reads."""

import torch
from torch import Tensor, nn

from tests.lookalike.diffit import Mlp


class Bias(nn.Module):
    def __init__(self, side: int, heads: int, more: int):
        super().__init__()
        self.window_size = [side, side]
        self.relative_position_bias_table = nn.Parameter(
            torch.randn((2 * side - 1) ** 2 + more, heads)
        )
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offsets = (places[:, None] - places + side - 1) * torch.tensor([2 * side - 1, 1])
        self.register_buffer("relative_position_index", offsets.sum(-1))

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(nn.Module):
    """``ids_keep`` (B, kept): the places of the tokens that are left, if some were left out."""

    def __init__(self, width: int, heads: int, side: int, *, more: int = 3, name="rel_pos_bias"):
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)
        self.add_module(name, Bias(side, heads, more))
        self.holder = name

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = getattr(self, self.holder)()[None]
        if ids_keep is not None:
            bias = torch.stack([bias[0][:, kept][:, :, kept] for kept in ids_keep])
        scores = self.scale * q @ k.mT + bias
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, width)))


class Block(nn.Module):
    """adaLN-Zero, after a linear layer that joins an earlier block's tokens, if it has one."""

    def __init__(self, width: int, heads: int, side: int, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, side)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(
        self, x: Tensor, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, x if skip is None else skip), -1))
        modulation = self.adaLN_modulation(c).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, ids_keep=ids_keep)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
