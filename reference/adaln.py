"""Adaptive layer normalisation, and the adaLN-Zero block of DiT (arXiv 2212.09748) built on it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.tmsa import window_attention


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dimension; var is biased."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    out = (x - mean) / torch.sqrt(variance + eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (1 + scale) + shift; modulations are (B, C) per sample or (B, N, C) per token."""
    if scale is not None:
        x = x * (1 + _per_token(scale))
    return x if shift is None else x + _per_token(shift)


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x <- x + gate · y;  out = LN(x)(1 + scale) + shift. Returns (x, out)."""
    if y is not None:
        x = x + (y if gate is None else _per_token(gate) * y)
    return x, modulate(layer_norm(x, weight, bias, eps), shift, scale)


def adaln_zero_block(x: Tensor, c: Tensor, parameters: dict[str, Tensor], num_heads: int) -> Tensor:
    """(shift, scale, gate) × 2 = Linear(SiLU(c));  x += gate · f(LN(x)(1 + scale) + shift).

    f is the attention (no bias), then the MLP. x (B, N, C), N a square; c (B, C); DiT's names.
    """
    names = ("adaLN_modulation.1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    modulation, qkv, proj, fc1, fc2 = (
        lambda value, name=name: F.linear(
            value, parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        )
        for name in names
    )
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(F.silu(c)).chunk(6, -1)
    _, h = adaln(x, shift1, scale1)
    side = math.isqrt(x.shape[1])
    grid = qkv(h).reshape(x.shape[0], side, side, -1)
    attended = window_attention(grid, None, None, num_heads, (side, side)).reshape(x.shape)
    x, h = adaln(x, shift2, scale2, y=proj(attended), gate=gate1)
    return x + gate2[:, None] * fc2(F.gelu(fc1(h), approximate="tanh"))


def _per_token(value: Tensor) -> Tensor:
    return value[:, None] if value.dim() == 2 else value
