"""adaln in PyTorch, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype


def forward(x, y, gate, shift, scale, weight, bias, eps):
    if y is not None and gate is not None:
        y = _widened(gate, x) * y
    residual = x if y is None else (x + y).to(x.dtype)
    dtype = accumulation_dtype(x.dtype)
    wide = residual.to(dtype)
    mean = wide.mean(-1)
    variance = (wide - mean[..., None]).square().mean(-1)
    affine = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    out = F.layer_norm(residual, x.shape[-1:], *affine, eps)
    if scale is not None:
        out = out * (1 + _widened(scale, x))
    if shift is not None:
        out = out + shift
    saved = x.new_empty(0) if y is None else residual
    return out.to(x.dtype), saved, mean, torch.rsqrt(variance + eps)


def backward(grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd):
    """With x̂ the normalised row and g = grad_out · (1 + scale) · weight::

    dx = rstd (g - mean(g) - x̂ mean(g x̂)) + grad_residual    dy = gate · dx    dgate = Σ y · dx
    dshift = Σ grad_out    dscale = Σ grad_out · LN(x)    (Σ over the tokens that shared the value)
    """
    dtype = accumulation_dtype(residual.dtype)
    empty = residual.new_empty(0)
    dout = grad_out.to(dtype)
    normed = (residual.to(dtype) - mean[..., None]) * rstd[..., None]
    modulated = dout if scale is None else dout * (1 + scale.to(dtype))
    g = modulated if weight is None else modulated * weight.to(dtype)
    dx = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    dx = dx * rstd[..., None]
    if grad_residual is not None:
        dx = dx + grad_residual

    dy = dgate = dshift = dscale = dweight = dbias = empty
    if y is not None:
        dy = (dx if gate is None else gate * dx).to(y.dtype)
    if gate is not None:
        dgate = _sum_to(dx * y, gate)
    if shift is not None:
        dshift = _sum_to(dout, shift)
    if scale is not None:
        affine = normed if weight is None else normed * weight
        dscale = _sum_to(dout * (affine if bias is None else affine + bias), scale)
    if weight is not None:
        dweight = (modulated * normed).sum((0, 1)).to(weight.dtype)
    if bias is not None:
        dbias = modulated.sum((0, 1)).to(bias.dtype)
    return dx.to(residual.dtype), dy, dgate, dshift, dscale, dweight, dbias


def _widened(modulation: Tensor, x: Tensor) -> Tensor:
    """In the wider of the two dtypes, so that no half-precision factor rounds a float32 stream."""
    return modulation.to(torch.promote_types(modulation.dtype, x.dtype))


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a per-token gradient over the tokens that shared ``like``, in the wide dtype."""
    return grad.sum_to_size(like.shape).to(like.dtype)
