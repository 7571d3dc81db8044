"""The block's MLP, (B, N, C) -> (B, N, 4C) -> (B, N, C) with the tanh form of GELU."""

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
from diffit_kernels.ops import mlp, native_products

pytestmark = REPLAYED
BATCH, TOKENS, CHANNELS = (64 if DEVICE == "cuda" else 4), 256, 1152
HIDDEN = 4 * CHANNELS
PARAMETERS = {
    "fc1.weight": (HIDDEN, CHANNELS),
    "fc1.bias": (HIDDEN,),
    "fc2.weight": (CHANNELS, HIDDEN),
    "fc2.bias": (CHANNELS,),
}
SIZES = [(BATCH, TOKENS, CHANNELS), *PARAMETERS.values()]
FUSED = {f"fused, {name}": name for name in backends("mlp")}
FLOOR = "products alone"
PROVIDERS = [*peers.with_compiled_names("literal"), FLOOR, *FUSED]


def literal(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def oracle(x, *parameters):
    return reference.mlp(x, dict(zip(PARAMETERS, parameters, strict=True)))


def products(linear, product, sum_over_rows):
    """The MLP's products alone, in training the backward's too.

    ``hidden`` (B · N, 4C) is given: it stands for GELU's results and for its gradient.
    """

    def run(x, hidden, weight1, bias1, weight2, bias2, grad=None):
        forward = linear(x, weight1, bias1), linear(hidden, weight2, bias2)
        if grad is None:
            return forward
        return (
            *forward,
            product(grad, weight2),
            sum_over_rows(grad, hidden),
            product(hidden, weight1),
            sum_over_rows(hidden, x),
        )

    return run


BY_TORCH = products(F.linear, torch.matmul, lambda a, b: a.t() @ b)
BY_FASTEST = BY_TORCH  # of the vendor's libraries
if DEVICE == "cpu":
    BY_FASTEST = products(
        native_products.linear, native_products.product, native_products.sum_over_rows
    )


def make(direction, dtype):
    """All providers of a case by name."""
    train = direction != "forward"
    torch.manual_seed(0)
    x, *parameters = (torch.randn(size, dtype=DTYPES[dtype], device=DEVICE) for size in SIZES)
    for parameter in parameters:
        parameter *= parameter.shape[-1] ** -0.5
    cotangent = torch.randn_like(x) if train else None
    hidden = torch.randn(BATCH * TOKENS, HIDDEN, dtype=x.dtype, device=DEVICE)
    given = [x.flatten(0, 1), hidden, *parameters]
    given += [cotangent.flatten(0, 1)] if train else []
    inputs = [t.detach().requires_grad_(train) for t in (x, *parameters)]
    expected = literally(oracle, inputs, cotangent)

    def fused(backend):
        def function(*inputs):
            return mlp(*inputs, backend=backend)

        return provider(function, inputs, cotangent, expected, "ours", backend=backend)

    return {
        **peers.with_compiled(
            "literal", literal, lambda function: provider(function, inputs, cotangent, expected)
        ),
        FLOOR: provider(BY_FASTEST, given, None, literally(BY_TORCH, given), "floor"),
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", peers.parameters(DTYPES, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
def bench_mlp(race, direction, dtype, provider):
    train = direction != "forward"
    inputs = [torch.empty(size, dtype=DTYPES[dtype], device="meta") for size in SIZES]
    race(
        lambda: make(direction, dtype),
        sizes={"batch": BATCH, "tokens": TOKENS, "channels": CHANNELS},
        flops=(3 if train else 1) * 2 * BATCH * TOKENS * 2 * CHANNELS * HIDDEN,
        moved=moved_bytes(inputs, inputs[:1], train),
        floor=FLOOR,
        queued=True,
    )
