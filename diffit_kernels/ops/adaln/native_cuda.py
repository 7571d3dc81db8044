"""adaln on NVIDIA GPUs, in CUDA C++: csrc/cuda/adaln*.

One read and one write of each activation in each direction, rows in registers. Sums over tokens are
rows of partial sums, by chunks of a sample's tokens, and one or two small launches that add them
up in a fixed order.
"""

import torch
from torch import Tensor

from diffit_kernels import native_library

MOST_CHANNELS = 16384
MOST_ROWS = 2**30
OLDEST = 80


def can_run(x, y, gate, shift, scale, weight, bias, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    batch, tokens, channels = x.shape
    if channels > MOST_CHANNELS:
        return (
            f"native CUDA kernels hold whole rows in registers: C must be at most {MOST_CHANNELS}, "
            f"got {channels}"
        )
    if batch * tokens > MOST_ROWS:
        return f"native CUDA kernels take at most {MOST_ROWS} rows, got {batch} x {tokens}"
    capability = native_library.capability(x.device)
    if capability is not None and capability < OLDEST:
        return f"native CUDA kernels need an sm_{OLDEST} GPU or newer, got sm_{capability}"
    return native_library.CUDA.refusal(x, y, gate, shift, scale, weight, bias)


def fake(x, y, gate, shift, scale, weight, bias, eps):
    residual = x.new_empty(0 if y is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), residual, mean, rstd


def forward(x, y, gate, shift, scale, weight, bias, eps):
    results = fake(x, y, gate, shift, scale, weight, bias, eps)
    if x.numel() > 0:
        x, y, weight, bias = _contiguous(x, y, weight, bias)
        modulations = (_rows(t, x.shape[1]) for t in (gate, shift, scale))
        native_library.CUDA.ops().adaln_forward(x, y, *modulations, weight, bias, eps, *results)
    return results


def backward(
    grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd, eps
):
    new = torch.zeros if residual.numel() == 0 else torch.empty  # sums over nothing are zero
    grads = tuple(
        residual.new_empty(0) if t is None else new(t.shape, dtype=t.dtype, device=t.device)
        for t in (residual, y, gate, shift, scale, weight, bias)
    )
    if residual.numel() > 0:
        grad_out, grad_residual, residual, y, weight, bias = _contiguous(
            grad_out, grad_residual, residual, y, weight, bias
        )
        modulations = (_rows(t, residual.shape[1]) for t in (gate, shift, scale))
        native_library.CUDA.ops().adaln_backward(
            *(grad_out, grad_residual, residual, y, *modulations, weight, bias, mean, rstd, *grads)
        )
    return grads


def _rows(modulation: Tensor | None, tokens: int) -> Tensor | None:
    """A row per sample may be a slice of a wider one, as chunks of a projection are."""
    if modulation is None or (modulation.shape[1] != tokens and modulation.stride(-1) == 1):
        return modulation
    return modulation.contiguous()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
