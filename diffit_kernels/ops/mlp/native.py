"""mlp on a CPU: products by the libraries of torch, what lies between them in csrc/cpu/mlp.h."""

import torch

from diffit_kernels import native_library
from diffit_kernels.ops.native_products import linear, product, sum_over_rows


def can_run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden):
    """Between the products one pass over the hidden layer, in place unless it is kept."""
    hidden = linear(x.flatten(0, 1), fc1_weight, fc1_bias)
    activation = torch.empty_like(hidden) if keep_hidden else hidden
    native_library.CPU.ops().gelu_forward(hidden, activation, approximate == "none")
    out = linear(activation, fc2_weight, fc2_bias).unflatten(0, x.shape[:2])
    return out, hidden.unflatten(0, x.shape[:2]) if keep_hidden else x.new_empty(0)


def backward(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate):
    """da = dO W2    dh = da ∘ GELU'(h)    dx = dh W1    dW2 = dOᵀ GELU(h)    dW1 = dhᵀ x

    Between the products one pass, which reads h and da and writes dh over da and GELU(h), and sums
    dh's columns on its way.
    """
    rows, dout = x.flatten(0, 1), grad_out.contiguous().flatten(0, 1)
    kept = hidden.numel() > 0
    h = hidden.contiguous().flatten(0, 1) if kept else linear(rows, fc1_weight, fc1_bias)
    grad = product(dout, fc2_weight.to(x.dtype))
    activation = torch.empty_like(h) if kept else h
    dfc1_bias = h.new_empty(0) if fc1_bias is None else torch.zeros_like(fc1_bias)
    native_library.CPU.ops().gelu_backward(h, activation, grad, dfc1_bias, approximate == "none")
    dfc2_weight = sum_over_rows(dout, activation).to(fc2_weight.dtype)
    del activation, h  # before the products that come need room
    dfc1_weight = sum_over_rows(grad, rows).to(fc1_weight.dtype)
    dx = product(grad, fc1_weight.to(x.dtype)).view(x.shape)
    dfc2_bias = x.new_empty(0) if fc2_bias is None else dout.sum(0, dtype=fc2_bias.dtype)
    return dx, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias
