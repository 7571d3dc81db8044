"""window_attention on NVIDIA GPUs, in CUDA C++: csrc/cuda/window_attention*.

The forward reads qkv and writes out and lse, the backward reads qkv, dO, out and lse and writes
dqkv, each window's tiles in shared memory. Two families of kernels: tensor cores by warps, from
compute capability 8.0 on; warpgroups and the copy engine, on 9.0, for the shapes that they serve.
"""

import torch
from torch import Tensor

from diffit_kernels import native_library

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 72, 96, 128)
LARGEST_WINDOW = 32


def can_run(qkv, temb, relative_position_bias_table, num_heads, window_size, scale) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    if qkv.dtype not in DTYPES:
        return f"native CUDA kernels take bfloat16 and float16, got {qkv.dtype}"
    head_dim = qkv.shape[-1] // 3 // num_heads
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS} for native CUDA kernels, got {head_dim}"
    if max(window_size) > LARGEST_WINDOW:
        return f"a window's sides must be at most {LARGEST_WINDOW}, got {tuple(window_size)}"
    if (reason := native_library.too_old(qkv.device)) is not None:
        return reason
    return native_library.CUDA.refusal(temb, relative_position_bias_table)


def fake(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    """out, and lse: log2 of each row's sum of powers of two, float32, (windows, nH, L)."""
    batch, height, width, channels3 = qkv.shape
    tokens = window_size[0] * window_size[1]
    lse = (batch * height * width // tokens, num_heads, tokens)
    out = qkv.new_empty(batch, height, width, channels3 // 3)
    return out, qkv.new_empty(lse, dtype=torch.float32)


def forward(qkv, temb, relative_position_bias_table, num_heads, window_size, scale):
    inputs = _contiguous(qkv, temb, relative_position_bias_table)
    results = fake(qkv, temb, relative_position_bias_table, num_heads, window_size, scale)
    if qkv.numel() > 0:
        hopper = _is_for_hopper(*inputs, num_heads, window_size, scale)
        native_library.CUDA.ops().window_attention_forward(
            *(*inputs, num_heads, window_size, scale, hopper, *results)
        )
    return results


def backward(
    grad_out, qkv, temb, relative_position_bias_table, out, lse, num_heads, window_size, scale
):
    inputs = _contiguous(qkv, temb, relative_position_bias_table)
    new = torch.empty if qkv.numel() > 0 else torch.zeros  # sums over nothing are zero
    grads = tuple(
        qkv.new_empty(0) if t is None else new(t.shape, dtype=t.dtype, device=t.device)
        for t in inputs
    )
    if qkv.numel() > 0:
        grad_out, out, lse = _contiguous(grad_out, out, lse)
        hopper = _is_for_hopper(*inputs, num_heads, window_size, scale)
        native_library.CUDA.ops().window_attention_backward(
            *(grad_out, *inputs, out, lse, num_heads, window_size, scale, hopper, *grads)
        )
    return grads


def _is_for_hopper(qkv, temb, relative_position_bias_table, num_heads, window_size, scale) -> bool:
    """Which family runs: its instructions are those of 9.0 alone, neither older nor newer."""
    if native_library.capability(qkv.device) != 90:
        return False
    return native_library.CUDA.ops().window_attention_hopper_serves(
        qkv, temb, relative_position_bias_table, num_heads, window_size, scale
    )


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read them, by 16 bytes: contiguous, and at an address that 16 divides."""
    return tuple(None if t is None else _aligned(t.contiguous()) for t in tensors)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
