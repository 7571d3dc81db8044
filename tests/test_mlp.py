"""mlp: values and every gradient, in both forms of GELU."""

import functools

import pytest
import torch

import reference
from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import mlp
from tests.parity import assert_close, assert_parity, assert_refused, refused_dtype

OPS = ("mlp",)
SIZES = [
    {},
    {"tokens": 1, "width": 7, "hidden": 13, "out": 3},
    {"batch": 3, "tokens": 47, "hidden": 300},  # many tiles, the last of each kind in part
]
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
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(sizes, approximate, dtype, backend, device):
    form = {"approximate": approximate}
    functions = functools.partial(mlp, **form), functools.partial(literal, **form)
    inputs = make(**sizes, device=device)
    if reason := refused_dtype(backend, dtype):
        assert_refused(functions[0], inputs, dtype, reason)
    else:
        assert_parity(*functions, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_float32_parameters_beside_half_activations(approximate, dtype, backend, device):
    """Rounded as the products take them; their gradients come in float32."""
    x, *parameters = make(device=device)
    x = x.to(dtype).requires_grad_()
    parameters = [p.to(dtype).float().requires_grad_() for p in parameters]
    out = mlp(x, *parameters, approximate=approximate)
    halves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    expected = mlp(*halves, approximate=approximate)
    assert out.dtype == dtype and torch.equal(out, expected)
    weights = torch.randn_like(out)
    torch.autograd.backward((out, expected), (weights, weights))
    for ours, half in zip((x, *parameters), halves, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_close(ours.grad, half.grad, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [2, 4])
def test_biases_are_optional(bias, backend, device):
    inputs = make(device=device)
    inputs[bias] = None
    assert_parity(mlp, literal, inputs, torch.float32)


def test_extreme_values(backend, device):
    """GELU's tails: 0 far below, the identity far above, and finite slopes there."""
    inputs = [(1000 * t).requires_grad_() for t in make(device=device)]
    out = mlp(*inputs)
    out.sum().backward()
    assert_close(out, literal(*(t.double() for t in inputs)), 1e-5)
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("track", [True, False], ids=["kept", "not kept"])
def test_gelu_itself(track, approximate, dtype, backend, device):
    """With identities for weights the output is GELU of x and the gradient its slope: from the
    middle to the tails, where they are 0 and x, 0 and 1 exactly."""
    points = [0.0, 0.01, 0.5, 0.75, 1, 2, 3, 4, 5, 6, 8, 10, 30, 1e4]
    values = torch.tensor([*points, *(-p for p in points)], device=device)
    x = values.to(dtype)[:, None].expand(1, -1, 2).clone().requires_grad_(track)
    identity = torch.eye(2, dtype=dtype, device=device)
    out = mlp(x, identity, None, identity, None, approximate=approximate)
    truth = x.detach().double().requires_grad_()
    expected = torch.nn.functional.gelu(truth, approximate=approximate)
    # Roundings of Φ, which is at most 1, times x.
    tolerance = 4 * torch.finfo(dtype).eps * truth.detach().abs().clamp(min=1)
    assert ((out - expected).abs() <= tolerance).all()
    if track:
        out.sum().backward()
        expected.sum().backward()
        assert ((x.grad - truth.grad).abs() <= tolerance).all()
        assert set(x.grad[0, values >= 30].flatten().tolist()) == {1}
        assert set(x.grad[0, values <= -30].abs().flatten().tolist()) == {0}


def test_results_repeat(backend, device):
    inputs = [t.requires_grad_() for t in make(batch=3, tokens=47, hidden=300, device=device)]
    first, second = (
        (out, *torch.autograd.grad(out.square().sum(), inputs))
        for out in (mlp(*inputs) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_pre_activation_is_kept_for_a_gradient_only(backend, device):
    """And a backward after a forward that kept nothing is still right."""
    inputs = [t.requires_grad_() for t in make(device=device)]
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
    x, *parameters = (t.requires_grad_() for t in make(device=device))
    out = mlp(x[:0], *parameters)
    assert out.shape == (0, 5, 24)
    out.sum().backward()
    assert not any(torch.count_nonzero(p.grad) for p in parameters)


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
