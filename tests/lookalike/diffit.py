"""A latent DiffiT, as it was released: an index buffer in every attention, ``temb`` by keyword."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, side: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = heads
        self.window_size = (side, side)
        self.scale = (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
        offsets = grid.flatten(1)[:, :, None] - grid.flatten(1)[:, None] + side - 1
        self.register_buffer("relative_position_index", offsets[0] * (2 * side - 1) + offsets[1])
        self.qkv_temb = nn.Linear(width, 3 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, temb: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x)
        if temb is not None:
            qkv = qkv + self.qkv_temb(temb).unsqueeze(1)
        q, k, v = qkv.reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = self.scale * q @ k.mT + bias
        if mask is not None:
            scores = scores + mask
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, c)))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, side: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, side, dropout)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), temb=c)
        return x + self.mlp(self.norm2(x))


class GatedLayer(Layer):
    """Looks like :class:`Layer` and computes something else: only its attention may be patched."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + 0.5 * self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


class SineAttention(Attention):
    """Looks like :class:`Attention` and computes something else: may not be patched at all."""

    def forward(self, x: Tensor, temb: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.sin(), temb, mask)


class Transformer(nn.Module):
    """Layers between two linear maps: enough of a model for training and compiling."""

    def __init__(self, width=16, heads=2, side=4, depth=2, layer=Layer, **kwargs):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(layer(width, heads, side, **kwargs) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, c)
        return self.head(x)
