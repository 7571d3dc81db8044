"""Every kernel's cases at real sizes, on any device: meta tensors to compile, a GPU to measure.

A case is a function of dtype and device that runs a stage's Triton forward and backward.
"""

from functools import partial

import torch

from diffit_kernels.ops.adaln import triton_kernels as adaln
from diffit_kernels.ops.group_norm import triton_kernels as group_norm
from diffit_kernels.ops.mlp import triton_kernels as mlp
from diffit_kernels.ops.time_projection import triton_kernels as time_projection
from diffit_kernels.ops.window_attention import triton_kernels as window_attention

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,  # where PyTorch's own products may use it
}


def attention(
    batch, height, width, heads, head_dim, window, dtype, device="meta", time=True, bias=True
):
    channels = heads * head_dim
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    qkv = torch.randn(batch, height, width, 3 * channels, dtype=dtype, device=device)
    temb = torch.randn(batch, 2 * channels, dtype=dtype, device=device) if time else None
    table = torch.randn(rows, heads, dtype=dtype, device=device) if bias else None
    shape = (heads, window, head_dim**-0.5)
    out, lse = window_attention.forward(qkv, temb, table, *shape)
    return out, *window_attention.backward(out / 1024, qkv, temb, table, out, lse, *shape)


def layer_norm(batch, tokens, channels, parts, dtype, device="meta", per_token=False):
    """The adaln op with some of y, gate, shift, scale, weight and bias; eps 1e-6."""
    shape = batch, tokens, channels
    sizes = dict.fromkeys(("gate", "shift", "scale"), shape if per_token else (batch, 1, channels))
    sizes |= {"y": shape, "weight": (channels,), "bias": (channels,)}
    x = torch.randn(shape, dtype=dtype, device=device)
    given = {
        name: torch.randn(size, dtype=dtype, device=device) if name in parts.split() else None
        for name, size in sizes.items()
    }
    y, gate, shift, scale = (given[name] for name in ("y", "gate", "shift", "scale"))
    rest = gate, shift, scale, given["weight"], given["bias"]
    out, residual, mean, rstd = adaln.forward(x, y, *rest, 1e-6)
    with_sum = (residual, residual) if y is not None else (None, x)
    y = y if gate is not None else None  # without a gate its gradient is that of x
    grads = adaln.backward(out / 1024, *with_sum, y, *rest, mean, rstd, 1e-6)
    return out, *grads


def cell_norm(batch, side, channels, num_groups, dtype, device="meta"):
    x = torch.randn(batch, side, side, channels, dtype=dtype, device=device)
    weight, bias = torch.randn(2, channels, dtype=dtype, device=device)
    out, mean, rstd = group_norm.forward(x, weight, bias, num_groups, 1e-5)
    return out, *group_norm.backward(out / 1024, x, weight, bias, mean, rstd, num_groups)


def projection(batch, tokens, channels, features, dtype, device="meta", with_bias=True):
    x = torch.randn(batch, tokens, channels, dtype=dtype, device=device)
    weight = torch.randn(features, channels, dtype=dtype, device=device) / channels**0.5
    bias = torch.randn(features, dtype=dtype, device=device) if with_bias else None
    temb = torch.randn(batch, features, dtype=dtype, device=device)
    out = time_projection.forward(x, weight, bias, temb)
    return out, *time_projection.backward(out / 1024, x, weight, bias, temb)


def projections(blocks, batch, channels, dtype, device="meta", with_bias=True):
    temb = torch.randn(batch, channels, dtype=dtype, device=device)
    weights = torch.randn(blocks, 3 * channels, channels, dtype=dtype, device=device)
    weights = list(weights / channels**0.5)
    biases = list(torch.randn(blocks if with_bias else 0, 3 * channels, dtype=dtype, device=device))
    out = time_projection.many_forward(temb, weights, biases)
    dtemb, dweights, dbiases = time_projection.many_backward(out / 1024, temb, weights, biases)
    return out, dtemb, *dweights, *dbiases


def feed_forward(batch, tokens, channels, hidden, approximate, dtype, device="meta"):
    x = torch.randn(batch, tokens, channels, dtype=dtype, device=device)
    parameters = (
        torch.randn(hidden, channels, dtype=dtype, device=device) / channels**0.5,
        torch.randn(hidden, dtype=dtype, device=device),
        torch.randn(channels, hidden, dtype=dtype, device=device) / hidden**0.5,
        torch.randn(channels, dtype=dtype, device=device),
    )
    out, kept = mlp.forward(x, *parameters, approximate, True)
    return out, *mlp.backward(out / 1024, x, kept, *parameters, approximate)


WINDOWS = {  # name: (B, H, W, heads, head_dim, window)
    "256px": (64, 16, 16, 16, 72, (16, 16)),
    "512px": (16, 32, 32, 16, 72, (32, 32)),
    "8x8 d32": (64, 64, 64, 8, 32, (8, 8)),
    "4x4 d32": (64, 32, 32, 8, 32, (4, 4)),
    "7x7 d32": (64, 56, 56, 3, 32, (7, 7)),
    "12x12 d32": (16, 48, 48, 6, 32, (12, 12)),
    "18x18 d96": (4, 36, 36, 8, 96, (18, 18)),
    "20x20 d72": (4, 20, 20, 16, 72, (20, 20)),
    "2x32 d8": (4, 32, 32, 8, 8, (2, 32)),
    "8x8 d128": (64, 16, 16, 8, 128, (8, 8)),
    "16x16 d128": (16, 16, 16, 8, 128, (16, 16)),
    "16x16 d40": (16, 16, 16, 8, 40, (16, 16)),
    "8x8 d72": (64, 16, 16, 4, 72, (8, 8)),
    "7x7 d96": (64, 14, 14, 3, 96, (7, 7)),
    "4x4 d128": (64, 16, 16, 2, 128, (4, 4)),
}
CASES = {
    **{f"window_attention {name}": partial(attention, *sizes) for name, sizes in WINDOWS.items()},
    "window_attention small": partial(attention, 2, 4, 4, 2, 8, (4, 4)),
    "window_attention 1 window": partial(attention, 1, 16, 16, 1, 72, (16, 16)),
    "window_attention 1 small window": partial(attention, 1, 4, 4, 1, 32, (4, 4)),
    "window_attention 256px, no time": partial(attention, *WINDOWS["256px"], time=False),
    "window_attention 256px, no bias": partial(attention, *WINDOWS["256px"], bias=False),
    "window_attention of DiT": partial(attention, *WINDOWS["256px"], time=False, bias=False),
    "window_attention of Swin, 7x7": partial(attention, *WINDOWS["7x7 d32"], time=False),
    "window_attention of Swin, 12x12": partial(attention, *WINDOWS["12x12 d32"], time=False),
    "window_attention 4x4, neither": partial(
        attention, *WINDOWS["4x4 d32"], time=False, bias=False
    ),
    "adaln LN 256px": partial(layer_norm, 64, 256, 1152, ""),
    "adaln residual 512px": partial(layer_norm, 16, 1024, 1152, "y"),
    "adaln zero 256px": partial(layer_norm, 64, 256, 1152, "y gate shift scale"),
    "adaln all 512px": partial(layer_norm, 16, 1024, 1152, "y gate shift scale weight bias"),
    "adaln per token": partial(
        layer_norm, 4, 256, 1152, "y gate shift scale weight bias", per_token=True
    ),
    "adaln 8192 wide": partial(layer_norm, 2, 256, 8192, "y gate shift scale weight bias"),
    "adaln 1 token": partial(layer_norm, 1, 1, 1152, "y gate shift scale"),
    "adaln odd": partial(layer_norm, 3, 7, 33, "y gate shift scale weight bias"),
    "adaln 256 wide": partial(layer_norm, 16, 1024, 256, "y weight bias"),
    "group_norm 32x32x128": partial(cell_norm, 64, 32, 128, 32),
    "group_norm 64x64x256": partial(cell_norm, 16, 64, 256, 8),
    "group_norm odd": partial(cell_norm, 3, 5, 48, 3),
    "time_projection 256px": partial(projection, 64, 256, 1152, 3456),
    "time_projection 5 tokens": partial(projection, 3, 5, 1152, 3456),
    "time_projection odd": partial(projection, 3, 50, 45, 99),
    "time_projection, no bias": partial(projection, 64, 256, 1152, 3456, with_bias=False),
    "time_projections 1 block": partial(projections, 1, 64, 1152),
    "time_projections 1 sample": partial(projections, 1, 1, 1152, with_bias=False),
    "time_projections 28 blocks": partial(projections, 28, 64, 1152),
    "time_projections odd": partial(projections, 3, 5, 33),
    "mlp 256px": partial(feed_forward, 64, 256, 1152, 4608, "tanh"),
    "mlp exact": partial(feed_forward, 64, 256, 1152, 4608, "none"),
    "mlp odd": partial(feed_forward, 3, 5, 33, 131, "tanh"),
}
