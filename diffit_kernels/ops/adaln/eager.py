"""adaln in PyTorch, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.ops.checks import accumulation_dtype


def forward(x, y, gate, shift, scale, weight, bias, eps):
    if y is not None and gate is not None:
        y = _widened(gate, x) * y
    residual = x if y is None else (x + y).to(x.dtype)
    affine = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    out = F.layer_norm(residual, x.shape[-1:], *affine, eps)
    if scale is not None:
        out = out * (1 + _widened(scale, x))
    if shift is not None:
        out = out + shift
    empty = x.new_empty(0)
    return out.to(x.dtype), empty if y is None else residual, empty.clone(), empty.clone()


def backward(
    grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd, eps
):
    """With z = LN(x) and g = grad_out · (1 + scale), the statistics taken again::

    dx = LayerNorm's backward of g + grad_residual    dy = gate · dx    dgate = Σ y · dx
    dshift = Σ grad_out    dscale = Σ grad_out · z    dweight = Σ g · x̂    dbias = Σ g

    (Σ over the tokens that shared the value, x̂ = z without affine; reference/README.md, 12).
    Its own sums for dweight and dbias PyTorch's LayerNorm adds up one token after the other on a
    CPU: over 16384 tokens they err 15 times as much as these.
    """
    dtype = accumulation_dtype(residual.dtype)
    x, dout, factor, wide_weight, wide_bias = (
        None if t is None else t.to(dtype) for t in (residual, grad_out, scale, weight, bias)
    )
    z, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], wide_weight, wide_bias, eps)
    grad = dout if scale is None else dout * (1 + factor)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, wide_weight, wide_bias, [True, False, False]
    )
    if grad_residual is not None:
        dx = dx + grad_residual
    empty = residual.new_empty(0)
    return (
        dx.to(residual.dtype),
        empty if y is None else (gate * dx).to(y.dtype),
        empty if gate is None else _sum_to(dx * y, gate),
        empty if shift is None else _sum_to(dout, shift),
        empty if scale is None else _sum_to(dout * z, scale),
        empty if weight is None else _sum_to(grad * ((x - mean) * rstd), weight),
        empty if bias is None else _sum_to(grad, bias),
    )


def _widened(modulation: Tensor, x: Tensor) -> Tensor:
    """In the wider of the two dtypes, so that no half-precision factor rounds a float32 stream."""
    return modulation.to(torch.promote_types(modulation.dtype, x.dtype))


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a per-token gradient over the tokens that shared ``like``, in its own dtype."""
    return grad.sum_to_size(like.shape).to(like.dtype)
