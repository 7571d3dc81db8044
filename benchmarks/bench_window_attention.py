"""The attention alone, with its bias, against what computes the same in PyTorch.

Peers get q, k and v as they like them: contiguous, by head, the time token's parts added. Ours get
the packed qkv, the time token's parts and the table. Forward, the bias of peers that take one is
expanded beforehand; in training its table is a parameter, so they gather the bias in every step.
FlexAttention looks it up in the table. Floors compute the same without a bias.
"""

import functools

import pytest
import torch

import reference
from benchmarks import peers
from benchmarks.race import (
    DEVICE,
    DIRECTIONS,
    DTYPES,
    REPLAYED,
    backends,
    literally,
    moved_bytes,
    provider,
)
from diffit_kernels.ops import window_attention
from diffit_kernels.positions import relative_position_index

pytestmark = REPLAYED
FULL = ("32x32", "4x4")
if DEVICE == "cuda":
    SHAPES = {  # window: (windows, heads, side, head_dim)
        "16x16": (64, 16, 16, 72),  # the released models at 256 pixels, and at 512
        "32x32": (16, 16, 32, 72),
        "8x8": (4096, 8, 8, 32),  # windows of image-space models
        "4x4": (16384, 8, 4, 32),
    }
else:
    SHAPES = {
        "16x16": (4, 16, 16, 72),
        "32x32": (2, 16, 32, 72),
        "8x8": (256, 4, 8, 64),
        "4x4": (512, 4, 4, 32),
    }
FUSED = {f"fused, {name}": name for name in backends("window_attention")}
SDPA_BY = {f"SDPA {name}": name for name in ("efficient", "cuDNN", "math")}
FLOORS_BY = {f"SDPA {name} without bias": name for name in ("flash", "cuDNN")}
FLASH = {f"{name} without bias": name for name in peers.FLASH_ATTENTION}
PROVIDERS = [
    *peers.with_compiled_names("literal"),
    *peers.with_compiled_names("SDPA"),
    *SDPA_BY,
    "FlexAttention",
    "SDPA without bias",
    *FLOORS_BY,
    *FLASH,
    *FUSED,
]


class Problem:
    """The inputs of a case, as ours take them and as the peers do, and the oracle for both."""

    def __init__(self, shape, direction, dtype):
        _, self.heads, self.side, self.head_dim = SHAPES[shape]
        self.train = direction != "forward"
        self.index = relative_position_index((self.side, self.side), torch.device(DEVICE))
        torch.manual_seed(0)
        new = functools.partial(torch.randn, dtype=DTYPES[dtype], device=DEVICE)
        qkv, temb, table, grad = (new(size) for size in packed_sizes(shape))
        self.packed = (qkv, temb, table)
        self.split = (*self.by_head(self.with_time(qkv, temb)), table)
        self.expanded = self.bias(table)
        self.grad, self.grad_by_head = (grad, *self.by_head(grad)) if self.train else (None, None)
        for leaf in (*self.packed, *self.split):
            leaf.requires_grad_(self.train)

    def with_time(self, qkv, temb):
        """No key part: it cancels in softmax, and ours are not given one."""
        query, value = temb.chunk(2, -1)
        return qkv + torch.cat((query, torch.zeros_like(query), value), -1)[:, None, None]

    def by_head(self, x):
        """(B, H, W, n C) -> n times (B, nH, L, d), contiguous."""
        x = x.flatten(1, 2).unflatten(-1, (-1, self.heads, self.head_dim))
        return [part.transpose(1, 2).contiguous() for part in x.unbind(2)]

    def bias(self, table):
        """(1, nH, L, L), contiguous: SDPA's kernel for a CPU takes no mask of three dimensions."""
        return table[self.index].permute(2, 0, 1).contiguous()[None]

    def oracle(self, qkv, temb, table):
        """What is asked of ours; without temb and in another layout, of the peers."""
        qkv = qkv if temb is None else self.with_time(qkv, temb)
        window = (self.side, self.side)
        return reference.window_attention(qkv, None, table, self.heads, window)

    def oracle_by_head(self, q, k, v, table=None):
        qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).flatten(2)  # (B, L, 3C)
        qkv = qkv.unflatten(1, (self.side, self.side))
        return self.by_head(self.oracle(qkv, None, table))[0]


def packed_sizes(shape):
    """qkv, temb, table and out."""
    windows, heads, side, head_dim = SHAPES[shape]
    channels, grid = heads * head_dim, (windows, side, side)
    return (
        (*grid, 3 * channels),
        (windows, 2 * channels),
        ((2 * side - 1) ** 2, heads),
        (*grid, channels),
    )


def make(shape, direction, dtype):
    """All providers of a case by name."""
    problem = Problem(shape, direction, dtype)
    expected = literally(problem.oracle_by_head, problem.split, problem.grad_by_head)
    expected_packed = literally(problem.oracle, problem.packed, problem.grad)

    def peer(attention):
        """Of a function of q, k, v and the bias, or what it stands for instead."""
        if isinstance(attention, str):
            return attention
        if problem.train:
            return provider(gathering(attention), problem.split, problem.grad_by_head, expected)
        return provider(attention, (*problem.split[:3], problem.expanded), None, expected)

    def gathering(attention):
        return lambda q, k, v, table: attention(q, k, v, problem.bias(table))

    def fused(backend):
        options = {"num_heads": problem.heads, "window_size": problem.side, "backend": backend}

        def attention(qkv, temb, table):
            return window_attention(qkv, table, temb, **options)

        inputs = (problem.packed, problem.grad, expected_packed)
        return provider(attention, *inputs, "ours", backend=backend)

    flex = peers.flex(problem.side, problem.train)
    if not isinstance(flex, str):
        flex = provider(flex, problem.split, problem.grad_by_head, expected)
    return {
        **peers.with_compiled("literal", peers.literal, peer),
        **peers.with_compiled("SDPA", peers.sdpa, peer),
        **{name: peer(peers.sdpa_by(backend)) for name, backend in SDPA_BY.items()},
        "FlexAttention": flex,
        **floors(problem, DTYPES[dtype]),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


def floors(problem, dtype):
    """What computes the attention without a bias, by name."""
    qkv, grad = problem.split[:3], problem.grad_by_head
    expected = literally(problem.oracle_by_head, qkv, grad)

    def by_head(attention):
        if isinstance(attention, str):
            return attention
        return provider(attention, qkv, grad, expected, "floor")

    def by_token(attention):
        """(B, L, nH, d), contiguous: as FlashAttention likes them."""
        if isinstance(attention, str):
            return attention
        swapped = [t.detach().transpose(1, 2).contiguous() for t in qkv]
        inputs = [t.requires_grad_(problem.train) for t in swapped]
        cotangent = None if grad is None else grad.transpose(1, 2).contiguous()

        def oracle(*inputs):
            return problem.oracle_by_head(*(t.transpose(1, 2) for t in inputs)).transpose(1, 2)

        truth = literally(oracle, inputs, cotangent)
        return provider(attention, inputs, cotangent, truth, "floor")

    return {
        "SDPA without bias": by_head(peers.sdpa),
        **{name: by_head(peers.sdpa_by(backend)) for name, backend in FLOORS_BY.items()},
        **{name: by_token(peers.flash_attention(which, dtype)) for name, which in FLASH.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", peers.parameters(SHAPES, full=FULL))
def bench_window_attention(race, shape, direction, dtype, provider):
    windows, heads, side, head_dim = SHAPES[shape]
    train = direction != "forward"
    products = 6 if train else 2  # the backward's second q kᵀ does not count
    *inputs, out = (
        torch.empty(size, dtype=DTYPES[dtype], device="meta") for size in packed_sizes(shape)
    )
    sizes = {"windows": windows, "tokens": side**2, "heads": heads, "head_dim": head_dim}
    race(
        lambda: make(shape, direction, dtype),
        sizes=sizes | {"window": side},
        flops=products * 2 * windows * heads * side**4 * head_dim,
        moved=moved_bytes(inputs, [out], train),
        queued=True,
    )
