"""A DiT: the attention of vision transformers in blocks with adaLN-Zero, and its final layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalike.diffit import Mlp


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, fused: bool = True, dropout: float = 0.0):
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(dropout)
        self.norm = nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            rate = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, rate, causal)
        else:
            scores = self.scale * q @ k.mT
            scores = scores if attn_mask is None else scores + attn_mask
            out = self.attn_drop(scores.softmax(-1)) @ v
        out = self.norm(out.transpose(1, 2).reshape(rows, tokens, width))
        return self.proj_drop(self.proj(out))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, **kwargs):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, **kwargs)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            part.unsqueeze(1) for part in self.adaLN_modulation(c).chunk(6, 1)
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, causal=False)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class OtherOrder(Block):
    """Looks like :class:`Block`, with the gates first: only its attention may be patched."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate1, shift1, scale1, gate2, shift2, scale2 = (
            part.unsqueeze(1) for part in self.adaLN_modulation(c).chunk(6, 1)
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(self.norm_final(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


class DiT(nn.Module):
    """One block and the final layer, by the names of the recording."""

    def __init__(self, width: int, heads: int, out: int, **kwargs):
        super().__init__()
        self.block = Block(width, heads, **kwargs)
        self.final_layer = FinalLayer(width, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(self.block(x, c), c)


class PlainBlock(nn.Module):
    """The block of a vision transformer, without a time token."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), attn_mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NearAttention(Attention):
    """Looks like :class:`Attention`, and each token sees 64 others at most."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        places = torch.arange(x.shape[1])
        near = (places[:, None] - places).abs() <= 32
        return super().forward(x, near if attn_mask is None else attn_mask, causal)
