"""Every kernel's cases at real sizes, on any device: meta tensors to compile, a GPU to measure.

A case is a function of dtype and device that runs a stage's Triton forward and backward.
"""

import functools

import torch

from diffit_kernels.ops.window_attention import triton_kernels as window_attention

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,  # where PyTorch's own products may use it
}


def attention(batch, height, width, heads, head_dim, window, dtype, device="meta"):
    channels = heads * head_dim
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    qkv = torch.randn(batch, height, width, 3 * channels, dtype=dtype, device=device)
    temb = torch.randn(batch, 2 * channels, dtype=dtype, device=device)
    table = torch.randn(rows, heads, dtype=dtype, device=device)
    shape = (heads, window, head_dim**-0.5)
    out, lse = window_attention.forward(qkv, temb, table, *shape)
    return window_attention.backward(out, qkv, temb, table, out, lse, *shape)


CASES = {
    f"window_attention {name}": functools.partial(attention, *sizes)
    for name, sizes in {
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
    }.items()
}
