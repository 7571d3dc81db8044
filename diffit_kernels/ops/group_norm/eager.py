"""group_norm_silu in PyTorch, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype


def forward(x, weight, bias, num_groups, eps):
    groups = _groups(x, num_groups)
    variance, mean = torch.var_mean(groups, (1, 3), correction=0)
    rstd = torch.rsqrt(variance + eps)
    z = _affine(_normed(groups, mean, rstd), weight, bias)
    return F.silu(z).reshape(x.shape).to(x.dtype), mean, rstd


def backward(grad_out, x, weight, bias, mean, rstd, num_groups):
    """With x̂ = (x - mean) rstd, z = x̂ · weight + bias, s = σ(z) and g = dz · weight::

    dz = grad_out · s (1 + z (1 - s))    dx = rstd (g - mean(g) - x̂ mean(g x̂))
    dweight = Σ dz x̂    dbias = Σ dz

    (means over a group, sums over all pixels of all samples; reference/README.md, 14).
    """
    normed = _normed(_groups(x, num_groups), mean, rstd)
    z = _affine(normed, weight, bias)
    s = torch.sigmoid(z)
    dz = _groups(grad_out, num_groups) * s * (1 + z * (1 - s))
    g = dz if weight is None else dz * weight.view(dz.shape[2:])
    mean_g, mean_gx = (t.mean((1, 3), keepdim=True) for t in (g, g * normed))
    dx = rstd[:, None, :, None] * (g - mean_g - normed * mean_gx)
    return (
        dx.reshape(x.shape).to(x.dtype),
        x.new_empty(0) if weight is None else (dz * normed).sum((0, 1)).view(-1).to(weight.dtype),
        x.new_empty(0) if bias is None else dz.sum((0, 1)).view(-1).to(bias.dtype),
    )


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """(B, pixels, groups, channels of a group), in the dtype of sums."""
    wide = x.to(accumulation_dtype(x.dtype))
    batch, height, width, channels = x.shape
    return wide.reshape(batch, height * width, num_groups, channels // num_groups)


def _normed(groups: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (groups - mean[:, None, :, None]) * rstd[:, None, :, None]


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * weight.view(normed.shape[2:])
    return normed if bias is None else normed + bias.view(normed.shape[2:])
