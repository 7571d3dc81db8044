"""What this machine can do at most: large products, a block's four products, and a copy."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.race import DEVICE, DTYPES, REPLAYED, literally, moved_bytes, provider
from diffit_kernels.ops import native_products

pytestmark = REPLAYED
ON_GPU = DEVICE == "cuda"
SQUARE, BATCH, TOKENS, WIDTH = (8192 if ON_GPU else 2048), (64 if ON_GPU else 4), 256, 1152
COPY_MIB = 1024 if ON_GPU else 256
PRODUCTS = {  # name: (columns of the input, columns of the output)
    "qkv": (WIDTH, 3 * WIDTH),
    "projection": (WIDTH, WIDTH),
    "fc1": (WIDTH, 4 * WIDTH),
    "fc2": (4 * WIDTH, WIDTH),
}
LINEAR = {"F.linear": F.linear}  # by the libraries at hand
if DEVICE == "cpu":
    LINEAR["native_products.linear"] = native_products.linear


def random(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=DTYPES[dtype], device=DEVICE) for shape in shapes]


@pytest.mark.parametrize("provider", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_large_product(race, dtype, provider):
    def make():
        inputs = random(dtype, (SQUARE, SQUARE), (SQUARE, SQUARE), (SQUARE,))
        return {name: floor(function, inputs, F.linear) for name, function in LINEAR.items()}

    race(make, sizes={"tokens": SQUARE, "channels": SQUARE}, flops=2 * SQUARE**3, queued=True)


@pytest.mark.parametrize("provider", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def bench_products(race, product, dtype, provider):
    inner, columns = PRODUCTS[product]
    shapes = (BATCH, TOKENS, inner), (columns, inner), (columns,), (BATCH, TOKENS, columns)

    def make():
        x, weight, bias = random(dtype, *shapes[:3])
        inputs = [x, weight * inner**-0.5, bias]
        return {name: floor(function, inputs, F.linear) for name, function in LINEAR.items()}

    *needed, out = (torch.empty(n, dtype=DTYPES[dtype], device="meta") for n in shapes)
    race(
        make,
        sizes={"batch": BATCH, "tokens": TOKENS, "channels": inner},
        flops=2 * BATCH * TOKENS * inner * columns,
        moved=moved_bytes(needed, [out], False),
        queued=True,
    )


@pytest.mark.parametrize("provider", ["Tensor.copy_"])
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("size", [f"{COPY_MIB} MiB"])
def bench_copy(race, size, dtype, provider):
    """Into memory that is there: each byte is read once and written once."""
    count = COPY_MIB * 2**20

    def make():
        (source,) = random(dtype, (count // 4,))
        return {"Tensor.copy_": floor(torch.empty_like(source).copy_, [source], torch.clone)}

    race(make, sizes={}, moved=2 * count, queued=True)


def floor(function, inputs, literal):
    return provider(function, inputs, None, literally(literal, inputs), "floor")
