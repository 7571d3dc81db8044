"""One block of the released model (1152 wide, 16 heads): fused against the literal equations.

``pytest benchmarks`` times it; an implementation whose error is more than twice that of the literal
float32 equations against float64 fails instead of being timed.
"""

import copy

import pytest
import torch

from diffit_kernels import use_backend
from diffit_kernels.dispatch import BACKENDS, REGISTRY
from diffit_kernels.model import DiffiTBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"256px": (4, 16), "512px": (1, 32)}  # name: (batch, grid side)
PROVIDERS = ["literal", "literal, torch.compile"] + [
    f"fused, {name}" for name in BACKENDS if all(op.is_built(name) for op in REGISTRY.values())
]


def make(shape):
    batch, side = SHAPES[shape]
    torch.manual_seed(0)
    block = DiffiTBlock(1152, 16, side, 4.0).to(DEVICE)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    tokens = torch.randn(batch, side * side, 1152, device=DEVICE)
    return block, tokens, torch.randn(batch, 1152, device=DEVICE)


def provide(name, block):
    """The block as a function, and the context it runs in."""
    fused = name.startswith("fused")
    block.use_fused_tmsa = block.attn.use_fused_tmsa = fused
    function = torch.compile(block) if "compile" in name else block
    return function, use_backend(name.removeprefix("fused, ") if fused else None)


def verify(function, block, inputs):
    """Raise unless the error against float64 is within twice the literal float32 block's."""
    literal = copy.deepcopy(block)
    literal.use_fused_tmsa = literal.attn.use_fused_tmsa = False
    with torch.no_grad():
        ours, eager = function(*inputs).double(), literal(*inputs).double()
        truth = literal.double()(*(t.double() for t in inputs))
    largest = truth.abs().max()
    allowed = 2 * (eager - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * largest
    error = (ours - truth).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}: not timed"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_block(benchmark, shape, direction, provider):
    block, *inputs = make(shape)
    function, context = provide(provider, block)
    inputs = [t.requires_grad_(direction != "forward") for t in inputs]
    benchmark.group = f"block {shape} {direction} float32 {DEVICE}"

    def step():
        with torch.set_grad_enabled(direction != "forward"):
            out = function(*inputs)
            if direction != "forward":
                out.sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with context:
        verify(function, block, inputs)
        benchmark.pedantic(step, warmup_rounds=2, rounds=7)
