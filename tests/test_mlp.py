"""mlp: values and every gradient, in both forms of GELU."""

import functools

import pytest
import torch

import reference
from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import mlp
from tests.parity import assert_close, assert_parity

OPS = ("mlp",)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def make(batch=2, tokens=5, width=24, hidden=96, out=24, device="cpu"):
    sizes = (batch, tokens, width), (hidden, width), (hidden,), (out, hidden), (out,)
    x, *parameters = (torch.randn(size, device=device) for size in sizes)
    return [x, *(parameter * 0.2 for parameter in parameters)]


def literal(x, *parameters, approximate="tanh"):
    parameters = [x.new_zeros(()) if p is None else p for p in parameters]
    return reference.mlp(x, dict(zip(NAMES, parameters, strict=True)), approximate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("sizes", [{}, {"tokens": 1, "width": 7, "hidden": 13, "out": 3}], ids=str)
def test_parity(sizes, approximate, dtype, backend, device):
    form = {"approximate": approximate}
    functions = functools.partial(mlp, **form), functools.partial(literal, **form)
    assert_parity(*functions, make(**sizes, device=device), dtype)


@pytest.mark.parametrize("bias", [2, 4])
def test_biases_are_optional(bias, backend, device):
    inputs = make()
    inputs[bias] = None
    assert_parity(mlp, literal, inputs, torch.float32)


def test_extreme_values(backend, device):
    """GELU's tails: 0 far below, the identity far above, and finite slopes there."""
    inputs = [(1000 * t).requires_grad_() for t in make()]
    out = mlp(*inputs)
    out.sum().backward()
    assert_close(out, literal(*(t.double() for t in inputs)), 1e-5)
    assert all(t.grad.isfinite().all() for t in inputs)


def test_the_pre_activation_is_kept_for_a_gradient_only(backend, device):
    """And a backward after a forward that kept nothing is still right."""
    inputs = [t.requires_grad_() for t in make()]
    op = REGISTRY["mlp"].overload(backend)
    kept, dropped = (op(*inputs, "tanh", keep) for keep in (True, False))
    assert kept[1].shape == (2, 5, 96) and dropped[1].numel() == 0
    assert_close(dropped[0], kept[0], 1e-6)
    for ours, expected in zip(
        torch.autograd.grad(dropped[0].sum(), inputs),
        torch.autograd.grad(kept[0].sum(), inputs),
        strict=True,
    ):
        assert_close(ours, expected, 1e-6)


def test_empty(backend, device):
    x, *parameters = make()
    assert mlp(x[:0], *parameters).shape == (0, 5, 24)


def test_autocast(backend, device):
    inputs = [t.requires_grad_() for t in make(device=device)]
    with torch.autocast(device, torch.bfloat16):
        out = mlp(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    assert_close(out, literal(*inputs), 2e-2)


def test_errors_name_rule_and_value():
    x, w1, b1, w2, b2 = make()
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'erf'"):
        mlp(x, w1, b1, w2, b2, approximate="erf")
    with pytest.raises(ValueError, match=r"fc2_weight must have shape \(\*, 96\), got \(96, 24\)"):
        mlp(x, w1, b1, w2.T, b2)
    with pytest.raises(ValueError, match=r"fc1_bias must have shape \(96\), got \(24,\)"):
        mlp(x, w1, b2, w2, b2)
    with pytest.raises(TypeError, match=r"fc1_weight must be float32, got torch\.float16"):
        mlp(x, w1.half(), b1, w2, b2)
