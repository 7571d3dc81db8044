"""GroupNorm and SiLU of channels-last feature maps, as in front of an image-space convolution."""

import pytest
import torch
import torch.nn.functional as F

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
from diffit_kernels.ops import group_norm_silu

pytestmark = REPLAYED
BATCH, SIDE, CHANNELS, GROUPS = (64 if DEVICE == "cuda" else 4), 32, 128, 32
INPUTS = [(BATCH, SIDE, SIDE, CHANNELS), (CHANNELS,), (CHANNELS,)]  # x, weight, bias
EPS = 1e-5
FUSED = {f"fused, {name}": name for name in backends("group_norm_silu")}
PROVIDERS = [*peers.with_compiled_names("literal"), *FUSED]
WITHOUT_PRODUCTS = [name for name in DTYPES if name != "tf32"]


def literal(x, weight, bias):
    by_channel = x.permute(0, 3, 1, 2)  # a view: (B, C, H, W) in channels-last memory
    return F.silu(F.group_norm(by_channel, GROUPS, weight, bias, EPS)).permute(0, 2, 3, 1)


def make(direction, dtype):
    """All providers of a case by name."""
    train = direction != "forward"
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(n, dtype=DTYPES[dtype], device=DEVICE) for n in INPUTS)
    cotangent = torch.randn_like(x) if train else None
    inputs = [t.requires_grad_(train) for t in (x, weight, bias)]

    def oracle(*inputs):
        return reference.group_norm_silu(*inputs, num_groups=GROUPS, eps=EPS)

    def fused(backend):
        def function(*inputs):
            return group_norm_silu(*inputs, num_groups=GROUPS, eps=EPS, backend=backend)

        return provider(function, inputs, cotangent, expected, "ours", backend=backend)

    expected = literally(oracle, inputs, cotangent)
    return {
        **peers.with_compiled(
            "literal", literal, lambda function: provider(function, inputs, cotangent, expected)
        ),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", peers.parameters(WITHOUT_PRODUCTS, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_group_norm(race, direction, dtype, provider):
    inputs = [torch.empty(size, dtype=DTYPES[dtype], device="meta") for size in INPUTS]
    race(
        lambda: make(direction, dtype),
        sizes={"batch": BATCH, "tokens": SIDE**2, "channels": CHANNELS},
        moved=moved_bytes(inputs, inputs[:1], direction != "forward"),
        queued=True,
    )
