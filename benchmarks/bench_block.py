"""One block of the released model (1152 wide, 16 heads): fused against the literal equations.

Before it is timed, an implementation's error against float64 must be at most twice that of the
literal equations in the same dtype; otherwise its entry fails.
"""

import copy

import pytest
import torch

from diffit_kernels import use_backend
from diffit_kernels.dispatch import BACKENDS, REGISTRY
from diffit_kernels.model import DiffiTBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"256px": (4, 16), "512px": (1, 32)}  # name: (batch, grid side)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = ["literal", "literal, torch.compile"] + [
    f"fused, {name}" for name in BACKENDS if all(op.is_built(name) for op in REGISTRY.values())
]


def make(shape, dtype):
    batch, side = SHAPES[shape]
    torch.manual_seed(0)
    block = DiffiTBlock(1152, 16, side, 4.0).to(DEVICE)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    tokens = torch.randn(batch, side * side, 1152, device=DEVICE)
    time_token = torch.randn(batch, 1152, device=DEVICE)
    return [value.to(DTYPES[dtype]) for value in (block, tokens, time_token)]


def provide(name, block):
    """The block as a function, and the context it runs in."""
    fused = name.startswith("fused")
    block.use_fused_tmsa = block.attn.use_fused_tmsa = fused
    function = torch.compile(block) if "compile" in name else block
    return function, use_backend(name.removeprefix("fused, ") if fused else None)


@torch.no_grad()
def verify(function, block, inputs):
    """Raise unless the error against float64 is within twice the literal block's."""
    literal = copy.deepcopy(block)
    literal.use_fused_tmsa = literal.attn.use_fused_tmsa = False
    ours, eager = function(*inputs).double(), literal(*inputs).double()
    truth = literal.double()(*(t.double() for t in inputs))
    rounding = 4 * torch.finfo(inputs[0].dtype).eps * truth.abs().max()
    allowed = 2 * (eager - truth).abs().max() + rounding
    error = (ours - truth).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}: not timed"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_block(benchmark, shape, direction, dtype, provider):
    block, *inputs = make(shape, dtype)
    function, context = provide(provider, block)
    train = direction != "forward"
    inputs = [t.requires_grad_(train) for t in inputs]
    benchmark.group = f"block {shape}, {direction}, {dtype}"
    benchmark.extra_info |= {"shape": shape, "direction": direction, "dtype": dtype}
    benchmark.extra_info |= {"provider": provider, "device": DEVICE}

    def step():
        with torch.set_grad_enabled(train):
            out = function(*inputs)
            if train:
                out.sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with context:
        verify(function, block, inputs)
        benchmark.pedantic(step, warmup_rounds=3, rounds=11)
