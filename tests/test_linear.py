"""linear: values and every gradient, and when which library does the product."""

import pytest
import torch
import torch.nn.functional as F

from diffit_kernels import native_library
from diffit_kernels.ops import linear, native_products
from tests.parity import (
    assert_close,
    assert_parity,
    assert_refused,
    refused_dtype,
    relative_error,
)

OPS = ("linear",)
SIZES = {"small": (2, 5, 24, 36), "odd": (3, 7, 33, 13), "large": (2, 64, 96, 128)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(batch, tokens, width, out, device="cpu"):
    sizes = (batch, tokens, width), (out, width), (out,)
    return [torch.randn(size, device=device) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_parity(size, dtype, backend, device):
    inputs = make(*SIZES[size], device=device)
    if reason := refused_dtype(backend, dtype):
        assert_refused(linear, inputs, dtype, reason)
    else:
        assert_parity(linear, F.linear, inputs, dtype)


def test_bias_is_optional(backend, device):
    assert_parity(linear, F.linear, [*make(2, 64, 96, 128, device)[:2], None], torch.float32)


def test_inputs_need_not_be_contiguous(backend, device):
    x, weight, bias = (torch.randn(s, device=device) for s in ((96, 64, 2), (96, 128), (128,)))
    inputs = x.transpose(0, 2), weight.t(), bias
    assert_parity(linear, F.linear, inputs, torch.float32)


@pytest.mark.skipif(not native_products._mkl_is_slow(), reason="torch's own library does it here")
def test_a_weights_gradient_is_summed_over_so_many_rows_at_a_time():
    """A sum of 4096 terms in one go errs three times as much as torch's."""
    x, weight, _ = make(1, 4096, 64, 64)
    grad = torch.randn(1, 4096, 64)

    def dweight(rows):
        leaf = weight.clone().requires_grad_()
        out = linear(x[:, rows], leaf, None, backend="native")
        return torch.autograd.grad(out, leaf, grad[:, rows])[0]

    expected, *others = (dweight(slice(first, first + 1024)) for first in range(0, 4096, 1024))
    for other in others:
        expected += other
    assert torch.equal(dweight(slice(None)), expected)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_empty(shape, backend, device):
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in (shape, (6, 8), (6,))]
    out = linear(*leaves)
    assert out.shape == (*shape[:2], 6)
    out.sum().backward()
    assert all(leaf.grad.eq(0).all() for leaf in leaves)


def test_under_autocast(backend, device):
    x, weight, bias = make(*SIZES["small"], device)
    with torch.autocast(device, torch.bfloat16):
        out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize("slow", [True, False])
def test_the_library_is_chosen_by_size_dtype_and_processor(slow, monkeypatch):
    """Ours or oneDNN where torch would call MKL for a large float32 product and MKL is slow."""
    monkeypatch.setattr(native_products, "_mkl_is_slow", lambda: slow)
    by_others = native_products._is_by_others
    large, small, square = torch.randn(64, 512), torch.randn(4, 512), torch.randn(512, 512)
    assert by_others(large, square) != slow
    assert by_others(small, torch.randn(512, 8))
    assert by_others(large.bfloat16(), square.bfloat16())
    assert by_others(torch.randn(64, 1024)[:, ::2], square)


@pytest.mark.skipif(not native_products._mkl_is_slow(), reason="torch's own library does it here")
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_our_product_serves_rows_with_avx512(capability, monkeypatch):
    """The others are oneDNN's: less wide vectors, and a left side that lies by columns."""
    has = capability.startswith("avx512")
    monkeypatch.setattr(native_products, "_has_avx512_kernels", lambda: has)
    ours, onednn = [], native_products._onednn
    monkeypatch.setattr(native_products, "_own", lambda *_: ours.append(None))
    monkeypatch.setattr(native_products, "_onednn", onednn)
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    for function, served in (
        (lambda: native_products.linear(x, weight, None), has),
        (lambda: native_products.product(x, weight.t()), has),
        (lambda: native_products.product(x, weight.t().contiguous()), has),
        (lambda: native_products.product(x.t().contiguous().t(), weight.t()), False),
        (lambda: native_products.sum_over_rows(x, torch.randn(64, 96)), False),
    ):
        ours.clear()
        function()
        assert bool(ours) == served


NATIVE = pytest.mark.skipif(
    native_library.CPU.obstacle() is not None, reason=str(native_library.CPU.obstacle())
)


@NATIVE
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "rows, columns, terms",
    [(1, 1, 1), (7, 33, 17), (8, 32, 96), (9, 65, 97), (70, 31, 200), (130, 5, 1), (3, 48, 1152)],
)
def test_native_products_of_every_shape(rows, columns, terms, transposed):
    """By the rule of every op, over the edges of tiles, panels and chains; nothing else is read."""
    left, bias = torch.randn(rows, terms), torch.randn(columns)
    right = torch.randn(columns, terms) if transposed else torch.randn(terms, columns)
    matrix = right.t() if transposed else right
    for given in (bias, None):
        out = torch.full((rows + 1, columns), torch.nan)
        native_library.CPU.ops().linear(left, right, transposed, given, out[:rows])
        exact, plain = left.double() @ matrix.double(), left @ matrix
        if given is not None:
            exact, plain = exact + given.double(), plain + given
        floor = 4 * torch.finfo(torch.float32).eps
        assert relative_error(out[:rows], exact) <= 2 * relative_error(plain, exact) + floor
        assert out[rows].isnan().all()


@NATIVE
@pytest.mark.skipif(not native_products._mkl_is_slow(), reason="torch's own library does it here")
@pytest.mark.parametrize("terms", [1152, 4608])
def test_native_long_sums_are_more_exact_than_one_chain(terms):
    left, right = torch.randn(64, terms), torch.randn(96, terms)
    out = torch.empty(64, 96)
    native_library.CPU.ops().linear(left, right, True, None, out)
    exact = left.double() @ right.double().t()
    chain = native_products._onednn(left, right)
    assert relative_error(out, exact) < relative_error(chain, exact) / 2


@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_a_bias_need_not_be_contiguous(kind, backend, device):
    """Of a large product: our kernel and oneDNN look at no strides of a bias."""
    x, weight, _ = make(2, 64, 64, 256, device)
    bias = torch.randn(256, 2, device=device)[:, 0]
    if kind == "expanded":
        bias = torch.randn(1, device=device).expand(256)
    assert_close(
        linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()), 1e-6
    )


ERRORS = {
    "x must have 3 dimensions": (ValueError, {"x": torch.zeros(5, 8)}),
    r"weight must have shape \(\*, 8\), got \(6, 7\)": (ValueError, {"weight": torch.zeros(6, 7)}),
    r"bias must have shape \(6\), got \(7,\)": (ValueError, {"bias": torch.zeros(7)}),
    "weight must be float32, got torch.bfloat16": (
        TypeError,
        {"weight": torch.zeros(6, 8, dtype=torch.bfloat16)},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_rule_and_value(message):
    kind, change = ERRORS[message]
    inputs = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)}
    with pytest.raises(kind, match=message):
        linear(**(inputs | change))
