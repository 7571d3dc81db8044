"""The attention alone, with its bias, against what computes the same in PyTorch.

Peers get q, k and v as they like them: contiguous, by head, the time token's parts added. Ours get
the packed qkv, the time token's parts and the table. Forward, the peers' bias is expanded
beforehand; in training its table is a parameter, so they gather the bias in every step.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import reference
from benchmarks.race import (
    DEVICE,
    DIRECTIONS,
    DTYPES,
    REPLAYED,
    Provider,
    backends,
    literally,
)
from diffit_kernels.ops import window_attention
from diffit_kernels.positions import relative_position_index

pytestmark = REPLAYED
SHAPES = {  # window: (windows, heads, side, head_dim)
    "16x16": (4, 16, 16, 72),  # the released models at 256 pixels, and at 512
    "32x32": (2, 16, 32, 72),
    "4x4": (512, 4, 4, 32),  # windows of image-space models
    "8x8": (256, 4, 8, 64),
}
FUSED = {f"fused, {name}": name for name in backends("window_attention")}
PROVIDERS = [
    "literal",
    "literal, torch.compile",
    "SDPA",
    "SDPA, torch.compile",
    "SDPA without bias",
    *FUSED,
]


def literal(q, k, v, bias):
    return (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v


def sdpa(q, k, v, bias=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Problem:
    """The inputs of a case, as ours take them and as the peers do, and the oracle for both."""

    def __init__(self, shape, direction, dtype):
        batch, self.heads, self.side, self.head_dim = SHAPES[shape]
        channels, table_rows = self.heads * self.head_dim, (2 * self.side - 1) ** 2
        torch.manual_seed(0)
        new = functools.partial(torch.randn, dtype=DTYPES[dtype], device=DEVICE)
        qkv, temb = new(batch, self.side, self.side, 3 * channels), new(batch, 2 * channels)
        table, grad = new(table_rows, self.heads), new(batch, self.side, self.side, channels)
        self.train = direction != "forward"
        self.index = relative_position_index((self.side, self.side), qkv.device)
        self.packed = (qkv, temb, table)
        self.split = (*self.by_head(self.with_time(qkv, temb)), table)
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


def make(shape, direction, dtype):
    """All providers of a case by name."""
    problem = Problem(shape, direction, dtype)
    *qkv, table = problem.split
    expected = literally(problem.oracle_by_head, problem.split, problem.grad_by_head)
    expected_packed = literally(problem.oracle, problem.packed, problem.grad)
    expected_no_bias = literally(problem.oracle_by_head, qkv, problem.grad_by_head)

    def peer(attention, compiled=False):
        def with_table(q, k, v, table):
            return attention(q, k, v, problem.bias(table))

        function = with_table if problem.train else attention
        inputs = (*qkv, table if problem.train else problem.bias(table))
        function = torch.compile(function, dynamic=False) if compiled else function
        return Provider(function, inputs, problem.grad_by_head, expected)

    def fused(backend):
        def attention(qkv, temb, table):
            options = {"num_heads": problem.heads, "window_size": problem.side}
            return window_attention(qkv, table, temb, backend=backend, **options)

        return Provider(attention, problem.packed, problem.grad, expected_packed, "ours")

    return {
        "literal": peer(literal),
        "literal, torch.compile": peer(literal, compiled=True),
        "SDPA": peer(sdpa),
        "SDPA, torch.compile": peer(sdpa, compiled=True),
        "SDPA without bias": Provider(sdpa, qkv, problem.grad_by_head, expected_no_bias, "floor"),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_window_attention(race, shape, direction, dtype, provider):
    batch, heads, side, head_dim = SHAPES[shape]
    products = 2 if direction == "forward" else 6  # the backward's second q kᵀ does not count
    flops = products * 2 * batch * heads * side**4 * head_dim
    race(lambda: make(shape, direction, dtype), flops)
