"""time_projection and time_projections on a CPU: products by the libraries of torch.

No kernels of ours: the products leave nothing to fuse that would show beside them. What counts is
that they are plain products of matrices: batched ones over strided weights take up to ten times as
long in half precision.
"""

import torch
from torch import Tensor

from diffit_kernels import native_library
from diffit_kernels.ops.native_products import linear, product


def can_run(x, weight, bias, temb) -> str | None:
    """Why this backend cannot take the arguments of the op, or None."""
    return native_library.refusal(x, weight, bias, temb)


def forward(x, weight, bias, temb):
    out = linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])
    return out.add_(temb[:, None].to(x.dtype))


def backward(grad_out, x, weight, bias, temb):
    """dx = dO W    dW = dOᵀ x    dtemb[b] = Σ_n dO[b, n]    dbias = Σ_b dtemb[b]"""
    dout = grad_out.flatten(0, 1)
    dx = product(dout, weight.to(x.dtype)).view(x.shape)
    dweight = product(dout.t(), x.flatten(0, 1)).to(weight.dtype)
    dtemb = grad_out.sum(1, dtype=torch.float32)
    dbias = x.new_empty(0) if bias is None else dtemb.sum(0).to(bias.dtype)
    return dx, dweight, dbias, dtemb.to(temb.dtype)


def many_can_run(temb, weights, biases) -> str | None:
    """Why this backend cannot take the arguments of the op, or None."""
    return native_library.refusal(temb, *weights, *biases)


def many_forward(temb, weights, biases):
    rows = []
    for i, weight in enumerate(weights):
        q, v = (
            linear(temb, weight[part], biases[i][part] if biases else None)
            for part in _q_and_v(weight)
        )
        rows.append(torch.cat((q, v), -1))
    return torch.stack(rows)


def many_backward(grad_out, temb, weights, biases):
    """Sums over blocks and samples in float32; the key thirds are zero."""
    dtemb = temb.new_zeros(temb.shape, dtype=torch.float32)
    dweights = [
        torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights
    ]
    dbiases = [torch.empty_like(bias, memory_format=torch.contiguous_format) for bias in biases]
    for i, weight in enumerate(weights):
        size = weight.shape[0] // 3
        for grad, part in zip(grad_out[i].split(size, -1), _q_and_v(weight), strict=True):
            dtemb += product(grad, weight[part].to(temb.dtype))
            dweights[i][part] = product(grad.t(), temb)
            if biases:
                dbiases[i][part] = grad.sum(0, dtype=torch.float32)
        for parameters in (dweights[i], *dbiases[i : i + 1]):
            parameters[size : 2 * size] = 0
    return dtemb.to(temb.dtype), dweights, dbiases


def _q_and_v(weight: Tensor) -> tuple[slice, slice]:
    """The q and the v third of a weight's rows."""
    size = weight.shape[0] // 3
    return slice(size), slice(2 * size, None)
