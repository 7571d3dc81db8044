"""mlp in PyTorch, any device; the products are the vendor library's."""

import torch
import torch.nn.functional as F


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden):
    hidden = _linear(x, fc1_weight, fc1_bias)
    if keep_hidden:
        activation = F.gelu(hidden, approximate=approximate)
    else:
        activation = torch.ops.aten.gelu_(hidden, approximate=approximate)
        hidden = x.new_empty(0)
    return _linear(activation, fc2_weight, fc2_bias), hidden


def backward(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate):
    """da = dO W2    dh = da ∘ GELU'(h)    dx = dh W1    dW2 = dOᵀ GELU(h)    dW1 = dhᵀ x"""
    dout = grad_out.flatten(0, 1)
    if hidden.numel() == 0:  # the forward was told not to keep it
        hidden = _linear(x, fc1_weight, fc1_bias)
    h = hidden.flatten(0, 1)
    dfc2_weight = dout.t() @ F.gelu(h, approximate=approximate)
    dactivation = dout @ fc2_weight.to(x.dtype)
    dhidden = torch.ops.aten.gelu_backward(dactivation, h, approximate=approximate)
    dfc1_weight = dhidden.t() @ x.flatten(0, 1)
    dx = (dhidden @ fc1_weight.to(x.dtype)).view(x.shape)
    return (
        dx,
        dfc1_weight.to(fc1_weight.dtype),
        _sum_rows(dhidden, fc1_bias),
        dfc2_weight.to(fc2_weight.dtype),
        _sum_rows(dout, fc2_bias),
    )


def _linear(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _sum_rows(grad, bias):
    if bias is None:
        return grad.new_empty(0)
    return grad.sum(0, dtype=bias.dtype)
