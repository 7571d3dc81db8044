"""group_norm_silu on a CPU, in C++: csrc/cpu/group_norm.h and group_norm_backward.h."""

import torch

from diffit_kernels import native_library


def can_run(x, weight, bias, num_groups, eps) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(x, weight, bias)


def forward(x, weight, bias, num_groups, eps):
    """Two passes, statistics and result; the second finds in the caches what fits there."""
    x, weight, bias = (None if t is None else t.contiguous() for t in (x, weight, bias))
    new = torch.zeros if x.numel() == 0 else torch.empty
    mean, rstd = (new(x.shape[0], num_groups) for _ in range(2))
    out = torch.empty_like(x)
    if x.numel() > 0:
        native_library.CPU.ops().group_norm_forward(x, weight, bias, eps, out, mean, rstd)
    return out, mean, rstd


def backward(grad_out, x, weight, bias, mean, rstd, num_groups):
    """Two passes, sums by channel and dx, like the forward's; dweight and dbias are those sums."""
    grad_out, x, weight, bias = (
        None if t is None else t.contiguous() for t in (grad_out, x, weight, bias)
    )
    new = torch.zeros_like if x.numel() == 0 else torch.empty_like  # sums over nothing are zero
    grads = tuple(x.new_empty(0) if t is None else new(t) for t in (x, weight, bias))
    if x.numel() > 0:
        native_library.CPU.ops().group_norm_backward(grad_out, x, weight, bias, mean, rstd, *grads)
    return grads
