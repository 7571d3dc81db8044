"""Group normalisation, and with SiLU in front of the convolution of an image-space cell."""

import torch
from torch import Tensor


def group_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias; x (B, H, W, C).

    Mean and (biased) variance are over the pixels of a sample and the C / num_groups channels of a
    group, which are neighbours.
    """
    groups = x.reshape(*x.shape[:3], num_groups, x.shape[3] // num_groups)
    mean = groups.mean((1, 2, 4), keepdim=True)
    variance = ((groups - mean) ** 2).mean((1, 2, 4), keepdim=True)
    z = ((groups - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        z = z * weight
    return z if bias is None else z + bias


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """z σ(z), z = GroupNorm(x); x (B, H, W, C)."""
    z = group_norm(x, weight, bias, num_groups=num_groups, eps=eps)
    return z * torch.sigmoid(z)
