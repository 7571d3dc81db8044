"""One block of the released model (1152 wide, 16 heads): fused against the literal equations."""

import functools

import pytest
import torch

from benchmarks.race import DEVICE, DIRECTIONS, DTYPES, REPLAYED, Provider, backends, results
from diffit_kernels.model import DiffiTBlock

pytestmark = REPLAYED
WIDTH, HEADS = 1152, 16
SHAPES = {"256px": (4, 16), "512px": (1, 32)}  # name: (batch, grid side)
FUSED = {f"fused, {name}": name for name in backends()}
PROVIDERS = ["literal", "literal, torch.compile", *FUSED]


def make_block(size, dtype, backend=None):
    """A block, literal without a backend and else fused, and its inputs: (B, N, C) and (B, C).

    Every call makes a block of its own, of the same values: none warms another's caches.
    """
    batch, side = size
    torch.manual_seed(0)
    block = DiffiTBlock(WIDTH, HEADS, side, 4.0).to(DEVICE)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    tokens = torch.randn(batch, side * side, WIDTH, device=DEVICE)
    time_token = torch.randn(batch, WIDTH, device=DEVICE)
    block.use_fused_tmsa = block.attn.use_fused_tmsa = backend is not None
    block.backend = block.attn.backend = backend
    block, *inputs = (value.to(DTYPES[dtype]) for value in (block, tokens, time_token))
    return block, inputs


def make(shape, direction, dtype):
    """All providers of a case by name."""
    train = direction != "forward"
    grad = torch.randn_like(make_block(SHAPES[shape], dtype)[1][0]) if train else None

    def provider(backend=None, compiled=False):
        block, inputs = make_block(SHAPES[shape], dtype, backend)
        function = torch.compile(block, dynamic=False) if compiled else block
        inputs = [t.requires_grad_(train) for t in inputs]
        role, parameters = "ours" if backend else "peer", list(block.parameters())
        return Provider(function, inputs, grad, expected, role, parameters)

    @functools.cache
    def expected(computed_in):
        block, inputs = make_block(SHAPES[shape], dtype)
        block, *inputs = (value.to(computed_in) for value in (block, *inputs))
        inputs = [t.requires_grad_(train) for t in inputs]
        cotangent = grad.to(computed_in) if train else None
        return results(block, inputs, cotangent, block.parameters())

    return {
        "literal": provider(),
        "literal, torch.compile": provider(compiled=True),
        **{name: provider(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_block(race, shape, direction, dtype, provider):
    batch, side = SHAPES[shape]
    tokens = side**2
    products = 2 * batch * tokens * 12 * WIDTH**2  # qkv 3, projection 1, MLP 8
    attention = 4 * batch * tokens**2 * WIDTH
    flops = (products + attention) * (1 if direction == "forward" else 3)
    race(lambda: make(shape, direction, dtype), flops)
