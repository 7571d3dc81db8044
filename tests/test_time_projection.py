"""time_projection and time_projections: values, gradients, and the key third that is not there."""

import pytest
import torch

from diffit_kernels.ops import time_projection, time_projections
from tests.parity import assert_parity

OPS = ("time_projection", "time_projections")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"(B, N, K, M)": (2, 5, 16, 24), "odd": (3, 7, 13, 9), "one": (1, 1, 8, 8)}


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
    assert_parity(time_projection, literal, (x, weight, bias, temb), dtype)


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
@pytest.mark.parametrize("blocks", [1, 3])
def test_time_projections(blocks, with_bias, dtype, backend, device):
    parameters = [torch.randn(24, 12) for _ in range(blocks)]
    parameters += [torch.randn(24) for _ in range(blocks)] if with_bias else []
    inputs = [t.to(device) for t in (torch.randn(5, 12), *parameters)]
    assert_parity(*many(blocks, with_bias), inputs, dtype)


def test_key_third_has_gradient_exactly_zero(backend, device):
    temb, weight, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12)
    weight.requires_grad_(), bias.requires_grad_()
    time_projections(temb, [weight], [bias]).square().sum().backward()
    for gradient in (weight.grad, bias.grad):
        q, k, v = gradient.chunk(3)
        assert torch.count_nonzero(k) == 0
        assert torch.count_nonzero(q) and torch.count_nonzero(v)


def test_empty_batch(backend, device):
    temb = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(12, 8, requires_grad=True)
    out = time_projections(temb, [weight])
    assert out.shape == (1, 0, 8)
    out.sum().backward()
    assert torch.count_nonzero(weight.grad) == 0


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
