"""time_projection and time_projections: values, gradients, and the key third that is not there."""

import pytest
import torch

from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import time_projection, time_projections
from tests.parity import (
    assert_close,
    assert_parity,
    assert_refused,
    refused_dtype,
    values_and_gradients,
)

OPS = ("time_projection", "time_projections")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # (B, N, K, M)
    "even": (2, 5, 16, 24),
    "odd": (3, 7, 13, 9),
    "one": (1, 1, 8, 8),
    "a token each": (5, 1, 64, 24),
    "tiles of several samples": (3, 47, 136, 150),
    "many tiles": (2, 640, 72, 300),
    "many odd tiles": (3, 47, 70, 130),
}
MANY = {  # (blocks, B, C, K)
    "one": (1, 5, 8, 12),
    "some": (3, 5, 8, 12),
    "odd": (5, 7, 21, 70),
    "whole tiles": (2, 16, 128, 128),
    "a large batch": (1, 70, 64, 33),
}


def literal(x, weight, bias, temb):
    out = x @ weight.T + temb[:, None]
    return out if bias is None else out + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_time_projection(shape, with_bias, dtype, backend, device):
    batch, tokens, k, m = SHAPES[shape]
    bias = torch.randn(m, device=device) if with_bias else None
    sizes = (batch, tokens, k), (m, k), (batch, m)
    x, weight, temb = (torch.randn(size, device=device) for size in sizes)
    inputs = (x, weight, bias, temb)
    if reason := refused_dtype(backend, dtype):
        assert_refused(time_projection, inputs, dtype, reason)
    else:
        assert_parity(time_projection, literal, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_half_activations(dtype, backend, device):
    """Rounded as the product takes them; their gradients come in float32."""
    x, weight, temb = (torch.randn(size, device=device) for size in ((2, 5, 16), (24, 16), (2, 24)))
    inputs = [t.to(dtype).float() for t in (x, weight, torch.randn(24, device=device), temb)]
    inputs = [inputs[0].to(dtype), *inputs[1:]]
    halves = [t.to(dtype).requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    out, expected = time_projection(*inputs), time_projection(*halves)
    assert out.dtype == dtype and torch.equal(out, expected)
    weights = torch.randn_like(out)
    torch.autograd.backward((out, expected), (weights, weights))
    for ours, half in zip(inputs, halves, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_close(ours.grad, half.grad, 4 * torch.finfo(dtype).eps)


def test_large_values(backend, device):
    """A temb and a bias a thousand times the products, beside bfloat16's whole range."""
    sizes = (2, 5, 16), (24, 16), (24,), (2, 24)
    scales = 1e8, 1e8, 1e19, 1e19
    inputs = [scale * torch.randn(n, device=device) for n, scale in zip(sizes, scales, strict=True)]
    assert_parity(time_projection, literal, inputs, torch.bfloat16)


def many(blocks, with_bias):
    """time_projections as a function of flat tensors, and what it should compute."""

    def fused(temb, *parameters):
        return time_projections(temb, parameters[:blocks], parameters[blocks:])

    def literal(temb, *parameters):
        rows = []
        for i in range(blocks):
            bias = parameters[blocks + i] if with_bias else 0
            q, _, v = (temb @ parameters[i].T + bias).chunk(3, -1)
            rows.append(torch.cat((q, v), -1))
        return torch.stack(rows)

    return fused, literal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", MANY)
def test_time_projections(shape, with_bias, dtype, backend, device):
    blocks, batch, width, k = MANY[shape]
    parameters = [torch.randn(3 * width, k) for _ in range(blocks)]
    parameters += [torch.randn(3 * width) for _ in range(blocks)] if with_bias else []
    inputs = [t.to(device) for t in (torch.randn(batch, k), *parameters)]
    functions = many(blocks, with_bias)
    if reason := refused_dtype(backend, dtype):
        assert_refused(functions[0], inputs, dtype, reason)
    else:
        assert_parity(*functions, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_time_projections_of_several_dtypes(dtype, backend, device):
    """float32 parameters, all or some, count as rounded; gradients come in each one's dtype."""
    temb = torch.randn(5, 12, device=device).to(dtype)
    halves = [torch.randn(24, 12, device=device).to(dtype) for _ in range(3)]
    halves += [torch.randn(24, device=device).to(dtype) for _ in range(3)]
    fused, _ = many(3, True)
    expected = values_and_gradients(fused, [temb, *halves], dtype)
    for wide in (range(6), (1, 5)):
        leaves = [t.float() if i in wide else t for i, t in enumerate(halves)]
        leaves = [t.detach().clone().requires_grad_() for t in (temb, *leaves)]
        out = fused(*leaves)
        assert out.dtype == dtype and torch.equal(out, expected[0])
        generator = torch.Generator().manual_seed(7)
        out.backward(torch.randn(out.shape, generator=generator).to(out))
        for leaf, half in zip(leaves, expected[1:], strict=True):
            assert leaf.grad.dtype == leaf.dtype
            assert_close(leaf.grad, half, 4 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, the interpreter's
@pytest.mark.parametrize("largest", [1.0, float("inf")])
def test_key_third_has_gradient_exactly_zero(largest, backend, device):
    temb, weight, bias = (torch.randn(n, device=device) for n in ((3, 8), (12, 8), (12,)))
    temb[0, 0] = largest
    weight.requires_grad_(), bias.requires_grad_()
    out = time_projections(temb, [weight], [bias])
    out.backward(torch.randn_like(out))
    for gradient in (weight.grad, bias.grad):
        q, k, v = gradient.chunk(3)
        assert torch.count_nonzero(k) == 0
        assert torch.count_nonzero(q) and torch.count_nonzero(v)


def test_empty_batch(backend, device):
    temb = torch.randn(0, 8, device=device, requires_grad=True)
    weight = torch.randn(12, 8, device=device, requires_grad=True)
    bias = torch.randn(12, device=device, requires_grad=True)
    out = time_projections(temb, [weight], [bias])
    assert out.shape == (1, 0, 8)
    out.sum().backward()
    assert torch.count_nonzero(weight.grad) == torch.count_nonzero(bias.grad) == 0


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_no_tokens(batch, tokens, backend, device):
    sizes = (batch, tokens, 8), (12, 8), (12,), (batch, 12)
    inputs = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    out = time_projection(*inputs)
    assert out.shape == (batch, tokens, 12)
    out.sum().backward()
    assert not any(torch.count_nonzero(t.grad) for t in inputs)


def test_results_repeat(backend, device):
    sizes = (2, 150, 72), (150, 72), (150,), (2, 150)
    one = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    sizes = (40, 33), (150, 33), (150, 33), (150,), (150,)
    some = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    for function, leaves in ((time_projection, one), (many(2, True)[0], some)):
        first, second = (
            (out, *torch.autograd.grad(out.square().sum(), leaves))
            for out in (function(*leaves) for _ in range(2))
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_takes_so_many_blocks():
    if not REGISTRY["time_projections"].is_built("triton"):
        pytest.skip("no Triton in this installation")
    temb, weight = torch.zeros(1, 2), torch.zeros(3, 2)
    with pytest.raises(NotImplementedError, match="at most 128 blocks a call, got 129"):
        time_projections(temb, [weight] * 129, backend="triton")


def test_errors_name_rule_and_value():
    temb, weight, bias = torch.zeros(3, 8), torch.zeros(12, 8), torch.zeros(12)
    with pytest.raises(ValueError, match="as many biases or none, got 2 weights and 1 biases"):
        time_projections(temb, [weight, weight], [bias])
    with pytest.raises(ValueError, match="got 0 weights"):
        time_projections(temb, [])
    with pytest.raises(TypeError, match=r"weights\[0\] must be a tensor, got NoneType"):
        time_projections(temb, [None])
    with pytest.raises(ValueError, match="weights must have 3C rows, got 13"):
        time_projections(temb, [torch.zeros(13, 8)])
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape \(12, 8\), got \(12, 9\)"):
        time_projections(temb, [weight, torch.zeros(12, 9)])
    with pytest.raises(TypeError, match=r"biases\[0\] must be float32, got torch.float64"):
        time_projections(temb, [weight], [bias.double()])
    with pytest.raises(ValueError, match=r"temb must have shape \(3, 12\), got \(2, 12\)"):
        time_projection(torch.zeros(3, 4, 8), weight, bias, torch.zeros(2, 12))
    with pytest.raises(ValueError, match="x must have 3 dimensions"):
        time_projection(torch.zeros(3, 8), weight, bias, torch.zeros(3, 12))
