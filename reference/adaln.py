"""Adaptive layer normalisation, as in DiT (arXiv 2212.09748)."""

import torch
from torch import Tensor


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


def _per_token(value: Tensor) -> Tensor:
    return value[:, None] if value.dim() == 2 else value
