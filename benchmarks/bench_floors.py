"""What this machine can do at most: large products, a block's four products, and a copy."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from benchmarks.race import DEVICE, DTYPES, REPLAYED, Provider, literally

pytestmark = REPLAYED
SQUARE, TOKENS, WIDTH = 2048, 1024, 1152
PRODUCTS = {  # name: (rows, columns of the input, columns of the output)
    "qkv": (TOKENS, WIDTH, 3 * WIDTH),
    "projection": (TOKENS, WIDTH, WIDTH),
    "fc1": (TOKENS, WIDTH, 4 * WIDTH),
    "fc2": (TOKENS, 4 * WIDTH, WIDTH),
}
LINEAR = {"F.linear": F.linear}
if DEVICE == "cpu" and importlib.util.find_spec("diffit_kernels.ops.native_products"):
    from diffit_kernels.ops import native_products

    LINEAR["native_products.linear"] = native_products.linear


def random(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=DTYPES[dtype], device=DEVICE) for shape in shapes]


@pytest.mark.parametrize("provider", ["torch.mm"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_large_product(race, dtype, provider):
    def make():
        inputs = random(dtype, (SQUARE, SQUARE), (SQUARE, SQUARE))
        return {provider: Provider(torch.mm, inputs, None, literally(torch.mm, inputs), "floor")}

    race(make, flops=2 * SQUARE**3)


@pytest.mark.parametrize("provider", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def bench_products(race, product, dtype, provider):
    rows, inner, columns = PRODUCTS[product]

    def make():
        inputs = random(dtype, (rows, inner), (columns, inner), (columns,))
        expected = literally(F.linear, inputs)
        return {n: Provider(f, inputs, None, expected, "floor") for n, f in LINEAR.items()}

    race(make, flops=2 * rows * inner * columns)


@pytest.mark.parametrize("provider", ["Tensor.copy_"])
@pytest.mark.parametrize("size", ["64 MiB"])
def bench_copy(race, size, provider):
    """Into memory that is there: each byte is read once and written once."""
    count = int(size.split()[0]) * 2**20

    def make():
        (source,) = random("float32", (count // 4,))
        copy = torch.empty_like(source).copy_
        return {provider: Provider(copy, [source], None, literally(torch.clone, [source]), "floor")}

    race(make, moved=2 * count)
