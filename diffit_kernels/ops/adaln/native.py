"""adaln in compiled kernels: csrc/cpu/adaln*.h on a CPU, csrc/cuda/adaln* on an NVIDIA GPU.

One read and one write of each activation in each direction. Sums over tokens are rows of partial
sums, by chunks of a sample's tokens, which are then added up in a fixed order.
"""

import torch
from torch import Tensor

from diffit_kernels import native_library

DEVICES = ("cpu", "cuda")
# Of the CUDA kernels, which hold whole rows in registers.
MOST_CHANNELS = 16384
MOST_ROWS = 2**30


def can_run(x, y, gate, shift, scale, weight, bias, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    if native_library.on_cuda(x):
        batch, tokens, channels = x.shape
        if channels > MOST_CHANNELS:
            return (
                "native CUDA kernels hold whole rows in registers: C must be at most "
                f"{MOST_CHANNELS}, got {channels}"
            )
        if batch * tokens > MOST_ROWS:
            return f"native CUDA kernels take at most {MOST_ROWS} rows, got {batch} x {tokens}"
        if (reason := native_library.too_old(x.device)) is not None:
            return reason
    return native_library.of(x).refusal(x, y, gate, shift, scale, weight, bias)


def fake(x, y, gate, shift, scale, weight, bias, eps):
    residual = x.new_empty(0 if y is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), residual, mean, rstd


def forward(x, y, gate, shift, scale, weight, bias, eps):
    results = fake(x, y, gate, shift, scale, weight, bias, eps)
    if x.numel() > 0:
        x, y, weight, bias = (_contiguous(t) for t in (x, y, weight, bias))
        modulations = (_rows(t, x.shape[1]) for t in (gate, shift, scale))
        ops = native_library.of(x).ops()
        ops.adaln_forward(x, y, *modulations, weight, bias, eps, *results)
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
        grad_out, grad_residual, residual, y, weight, bias = (
            _contiguous(t) for t in (grad_out, grad_residual, residual, y, weight, bias)
        )
        modulations = (_rows(t, residual.shape[1]) for t in (gate, shift, scale))
        native_library.of(residual).ops().adaln_backward(
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
