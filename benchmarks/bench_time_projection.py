"""The time token's projections: of one block or of all blocks, and added to the tokens' own.

A released block projects the time token by all rows of its qkv weight, (B, C) -> (B, 3C); ours
computes the q and v parts, which are all that the attention depends on, of all blocks in one call.
So the two return other things, and each is verified by its own. The key parts' gradients, zero in
the model, are given as zero.
"""

import pytest
import torch
import torch.nn.functional as F

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
from diffit_kernels.ops import time_projection, time_projections

pytestmark = REPLAYED
BATCH, TOKENS, CHANNELS = (64 if DEVICE == "cuda" else 4), 256, 1152
BLOCKS = {"1 block": 1, "28 blocks": 28}
FUSED = {f"fused, {name}": name for name in backends("time_projection", "time_projections")}
PROVIDERS = [*peers.with_compiled_names("literal"), *FUSED]


def new(dtype, *sizes):
    return [torch.randn(size, dtype=DTYPES[dtype], device=DEVICE) for size in sizes]


def literal(temb, *parameters):
    """(B, 3C) for each block; weights first, then as many biases."""
    blocks = len(parameters) // 2
    pairs = zip(parameters[:blocks], parameters[blocks:], strict=True)
    return tuple(F.linear(temb, weight, bias) for weight, bias in pairs)


def oracle(temb, *parameters):
    blocks = len(parameters) // 2
    pairs = zip(parameters[:blocks], parameters[blocks:], strict=True)
    return tuple(temb @ weight.t() + bias for weight, bias in pairs)


def query_and_value(projected):
    """(B, 3C) for each block -> (blocks, B, 2C)."""
    query, _, value = torch.stack(projected).chunk(3, -1)
    return torch.cat((query, value), -1)


def make_blocks(blocks, direction, dtype):
    """All providers of a case of :func:`bench_time_projections` by name."""
    train = direction != "forward"
    torch.manual_seed(0)
    (temb,) = new(dtype, (BATCH, CHANNELS))
    weights = new(dtype, *[(3 * CHANNELS, CHANNELS)] * blocks)
    inputs = [temb, *(weight.mul_(CHANNELS**-0.5) for weight in weights)]
    inputs += new(dtype, *[(3 * CHANNELS,)] * blocks)
    inputs = [t.requires_grad_(train) for t in inputs]
    cotangents = new(dtype, *[(BATCH, 3 * CHANNELS)] * blocks) if train else None
    for cotangent in cotangents or ():
        cotangent.chunk(3, -1)[1].zero_()
    cotangent = query_and_value(cotangents) if train else None
    expected = literally(oracle, inputs, cotangents)
    expected_parts = literally(lambda *t: query_and_value(oracle(*t)), inputs, cotangent)

    def fused(backend):
        def function(temb, *parameters):
            return time_projections(temb, parameters[:blocks], parameters[blocks:], backend=backend)

        return provider(function, inputs, cotangent, expected_parts, "ours", backend=backend)

    return {
        **peers.with_compiled(
            "literal", literal, lambda function: provider(function, inputs, cotangents, expected)
        ),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", peers.parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("depth", peers.parameters(BLOCKS, full=["28 blocks"]))
def bench_time_projections(race, depth, direction, dtype, provider):
    train, blocks = direction != "forward", BLOCKS[depth]
    parts = 2 * blocks * CHANNELS  # without the key's
    needed = [(BATCH, CHANNELS), (parts, CHANNELS), (parts,), (BATCH, parts)]
    *inputs, out = (torch.empty(size, dtype=DTYPES[dtype], device="meta") for size in needed)
    race(
        lambda: make_blocks(blocks, direction, dtype),
        sizes={"batch": BATCH, "depth": blocks, "channels": CHANNELS},
        flops=(3 if train else 1) * 2 * BATCH * CHANNELS * parts,
        moved=moved_bytes(inputs, [out], train),
        queued=True,
    )


def added(x, weight, bias, temb):
    return F.linear(x, weight, bias) + temb[:, None]


def oracle_added(x, weight, bias, temb):
    return x @ weight.t() + bias + temb[:, None]


TOKEN_SIZES = [  # x, weight, bias and the projected time token
    (BATCH, TOKENS, CHANNELS),
    (3 * CHANNELS, CHANNELS),
    (3 * CHANNELS,),
    (BATCH, 3 * CHANNELS),
]


def make_tokens(direction, dtype):
    """All providers of a case of :func:`bench_time_projection` by name."""
    train = direction != "forward"
    torch.manual_seed(0)
    inputs = new(dtype, *TOKEN_SIZES)
    inputs[1] *= CHANNELS**-0.5
    inputs = [t.requires_grad_(train) for t in inputs]
    cotangent = new(dtype, (BATCH, TOKENS, 3 * CHANNELS))[0] if train else None
    expected = literally(oracle_added, inputs, cotangent)

    def fused(backend):
        def function(*inputs):
            return time_projection(*inputs, backend=backend)

        return provider(function, inputs, cotangent, expected, "ours", backend=backend)

    return {
        **peers.with_compiled(
            "literal", added, lambda function: provider(function, inputs, cotangent, expected)
        ),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", peers.parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_time_projection(race, direction, dtype, provider):
    train = direction != "forward"
    sizes = [*TOKEN_SIZES, (BATCH, TOKENS, 3 * CHANNELS)]
    *inputs, out = (torch.empty(size, dtype=DTYPES[dtype], device="meta") for size in sizes)
    race(
        lambda: make_tokens(direction, dtype),
        sizes={"batch": BATCH, "tokens": TOKENS, "channels": CHANNELS},
        flops=(3 if train else 1) * 2 * BATCH * TOKENS * CHANNELS * 3 * CHANNELS,
        moved=moved_bytes(inputs, [out], train),
        queued=True,
    )
