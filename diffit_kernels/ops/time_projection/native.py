"""time_projection and time_projections on a CPU: products by the libraries of torch.

No kernels of ours: beside the products there is nothing whose fusion would show.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels import native_library
from diffit_kernels.ops.time_projection import eager
from diffit_kernels.ops.time_projection.eager import backward, many_backward

__all__ = ["backward", "can_run", "forward", "many_backward", "many_can_run", "many_forward"]


def can_run(x, weight, bias, temb) -> str | None:
    """Why this backend cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(x, weight, bias, temb)


def forward(x, weight, bias, temb):
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias).add_(temb[:, None].to(x.dtype))


def many_can_run(temb, weights, biases) -> str | None:
    """Why this backend cannot take the arguments of the op, or None."""
    return native_library.CPU.refusal(temb, *weights, *biases)


def many_forward(temb, weights, biases):
    """By plain products in half precision, where batched ones over strided weights take up to ten
    times as long; in float32 it is these that are faster."""
    if temb.dtype == torch.float32:
        return eager.many_forward(temb, weights, biases)
    blocks = []
    for i, weight in enumerate(weights):
        parts = []
        for rows in _q_and_v(weight):
            bias = biases[i][rows].to(temb.dtype) if biases else None
            parts.append(F.linear(temb, weight[rows].to(temb.dtype), bias))
        blocks.append(torch.cat(parts, -1))
    return torch.stack(blocks)


def _q_and_v(weight: Tensor) -> tuple[slice, slice]:
    """The q and the v third of a weight's rows."""
    size = weight.shape[0] // 3
    return slice(size), slice(2 * size, None)
