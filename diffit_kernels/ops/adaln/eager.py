"""adaln in PyTorch, any device."""

import torch
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype


def forward(x, y, gate, shift, scale, weight, bias, eps):
    if y is not None and gate is not None:
        y = gate.to(torch.promote_types(gate.dtype, x.dtype)) * y
    residual = x if y is None else (x + y).to(x.dtype)
    wide, scale, weight, bias = _wide(residual, scale, weight, bias)
    out, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        out = out * (1 + scale)
    if shift is not None:
        out = out + shift
    saved = x.new_empty(0) if y is None else residual
    return out.to(x.dtype), saved, mean[..., 0], rstd[..., 0]


def backward(grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd):
    """With x̂ the normalised row, z = x̂ · weight + bias and g = grad_out · (1 + scale)::

    dx = LayerNorm's backward of g + grad_residual    dy = gate · dx    dgate = Σ y · dx
    dshift = Σ grad_out    dscale = Σ grad_out · z    dweight = Σ g · x̂    dbias = Σ g

    (Σ over the tokens that shared the value; reference/README.md, 12).
    """
    wide, dout, factor, wide_weight, wide_bias = _wide(residual, grad_out, scale, weight, bias)
    mean, rstd = mean[..., None], rstd[..., None]
    dy = dgate = dshift = dscale = residual.new_empty(0)
    if shift is not None:
        dshift = _sum_to(dout, shift)
    g = dout
    if scale is not None:
        z = (wide - mean) * rstd
        z = z if weight is None else z * wide_weight
        dscale = _sum_to(dout * (z if bias is None else z + wide_bias), scale)
        g = dout * (1 + factor)
    needed = [True, weight is not None, bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        g, wide, wide.shape[-1:], mean, rstd, wide_weight, wide_bias, needed
    )
    if grad_residual is not None:
        dx = dx + grad_residual
    if y is not None:
        dy = (gate * dx).to(y.dtype)
        dgate = _sum_to(dx * y, gate)
    dweight, dbias = (
        residual.new_empty(0) if parameter is None else grad.to(parameter.dtype)
        for parameter, grad in ((weight, dweight), (bias, dbias))
    )
    return dx.to(residual.dtype), dy, dgate, dshift, dscale, dweight, dbias


def _wide(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in the dtype of statistics and sums."""
    dtype = accumulation_dtype(x.dtype)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a per-token gradient over the tokens that shared ``like``, in the wide dtype."""
    return grad.sum_to_size(like.shape).to(like.dtype)
