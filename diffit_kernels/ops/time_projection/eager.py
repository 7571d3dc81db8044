"""time_projection and time_projections in PyTorch, any device."""

import torch
import torch.nn.functional as F

from diffit_kernels.ops.checks import accumulation_dtype


def forward(x, weight, bias, temb):
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias) + temb[:, None].to(x.dtype)


def backward(grad_out, x, weight, bias, temb):
    dx = grad_out @ weight.to(x.dtype)
    dweight = (grad_out.flatten(0, 1).t() @ x.flatten(0, 1)).to(weight.dtype)
    dtemb = grad_out.sum(1, dtype=accumulation_dtype(x.dtype))
    dbias = x.new_empty(0) if bias is None else dtemb.sum(0).to(bias.dtype)
    return dx, dweight, dbias, dtemb.to(temb.dtype)


def many_forward(temb, weights, biases):
    """Per block one batched product over the (q, v) pair, a strided view of the weight: no copy."""
    batch = temb.shape[0]
    out = temb.new_empty(len(weights), batch, weights[0].shape[0] // 3 * 2)
    for i, weight in enumerate(weights):
        parts = temb.expand(2, -1, -1) @ _qv(weight.to(temb.dtype)).mT
        if biases:
            parts = parts + _qv(biases[i].to(temb.dtype))[:, None]
        out[i].unflatten(-1, (2, -1)).copy_(parts.transpose(0, 1))
    return out


def many_backward(grad_out, temb, weights, biases):
    dtype = accumulation_dtype(temb.dtype)
    dtemb = torch.zeros_like(temb, dtype=dtype, memory_format=torch.contiguous_format)
    dweights = [weight.new_zeros(weight.shape) for weight in weights]
    dbiases = [bias.new_zeros(bias.shape) for bias in biases]
    for i, weight in enumerate(weights):
        grad = grad_out[i].unflatten(-1, (2, -1)).transpose(0, 1)
        dtemb += (grad @ _qv(weight.to(temb.dtype))).sum(0, dtype=dtype)
        _qv(dweights[i]).copy_(grad.mT @ temb)
        if biases:
            _qv(dbiases[i]).copy_(grad.sum(1, dtype=dtype))
    return dtemb.to(temb.dtype), dweights, dbiases


def _qv(parameter: torch.Tensor) -> torch.Tensor:
    """(3C, ...) -> the view (2, C, ...) of its q and v thirds."""
    return parameter.unflatten(0, (3, -1))[::2]
