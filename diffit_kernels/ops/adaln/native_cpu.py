"""adaln on a CPU, in C++: csrc/cpu/adaln.h and adaln_backward.h."""

import torch
from torch import Tensor

from diffit_kernels import native_library


def can_run(x, y, gate, shift, scale, weight, bias, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(x, y, gate, shift, scale, weight, bias)


def fake(x, y, gate, shift, scale, weight, bias, eps):
    residual = x.new_empty(0 if y is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), residual, mean, rstd


def forward(x, y, gate, shift, scale, weight, bias, eps):
    """One pass: x and y are read once, out and the new x are written once."""
    results = fake(x, y, None, None, None, None, None, eps)
    if x.numel() > 0:
        x, y, weight, bias = (_contiguous(t) for t in (x, y, weight, bias))
        modulations = (_rows(t, x.shape[1]) for t in (gate, shift, scale))
        native_library.CPU.ops().adaln_forward(x, y, *modulations, weight, bias, eps, *results)
    return results


def backward(
    grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd, eps
):
    """One pass, and another over its tasks' sums if any gradient is a sum over tokens."""
    new = torch.zeros if residual.numel() == 0 else torch.empty  # sums over nothing are zero
    grads = tuple(
        residual.new_empty(0) if t is None else new(t.shape, dtype=t.dtype)
        for t in (residual, y, gate, shift, scale, weight, bias)
    )
    if residual.numel() > 0:
        grad_out, grad_residual, residual, y, weight, bias = (
            _contiguous(t) for t in (grad_out, grad_residual, residual, y, weight, bias)
        )
        modulations = (_rows(t, residual.shape[1]) for t in (gate, shift, scale))
        native_library.CPU.ops().adaln_backward(
            *(grad_out, grad_residual, residual, y, *modulations, weight, bias, mean, rstd, *grads)
        )
    return grads


def _rows(modulation: Tensor | None, tokens: int) -> Tensor | None:
    """A row per sample may be a slice of a wider one, as chunks of a projection are."""
    if modulation is None or (modulation.shape[1] != tokens and modulation.stride(-1) == 1):
        return modulation
    return modulation.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
