"""group_norm_silu: values and every gradient, with and without its parameters."""

import functools

import pytest
import torch

import reference
from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import group_norm_silu
from tests.parity import assert_close, assert_parity, assert_refused, refused_dtype

OPS = ("group_norm_silu",)
# name: (B, H, W, C), num_groups
SHAPES = {
    "groups of 4": ((2, 8, 8, 32), 8),
    "groups of 16": ((2, 6, 6, 128), 8),
    "groups of 8, several blocks": ((2, 5, 7, 256), 32),
    "three groups": ((3, 5, 7, 48), 3),
    "groups of 12": ((1, 9, 7, 96), 8),
    "instance": ((2, 4, 4, 5), 5),
    "layer": ((2, 3, 5, 33), 1),
    "one pixel": ((3, 1, 1, 24), 4),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(shape, *, affine=True, device="cpu"):
    x = torch.randn(shape, device=device)
    weight, bias = (torch.randn(shape[-1], device=device) for _ in range(2))
    return [x, weight, bias] if affine else [x, None, None]


def functions(num_groups, eps=1e-5):
    form = {"num_groups": num_groups, "eps": eps}
    return functools.partial(group_norm_silu, **form), functools.partial(
        reference.group_norm_silu, **form
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, dtype, backend, device):
    size, num_groups = SHAPES[shape]
    fused, literal = functions(num_groups)
    inputs = make(size, device=device)
    if reason := refused_dtype(backend, dtype):
        assert_refused(fused, inputs, dtype, reason)
    else:
        assert_parity(fused, literal, inputs, dtype)


@pytest.mark.parametrize("parts", [(), (1,), (2,)], ids=["none", "weight", "bias"])
def test_parameters_are_optional(parts, backend, device):
    inputs = make((2, 3, 4, 24), device=device)
    given = [t if i in (0, *parts) else None for i, t in enumerate(inputs)]
    assert_parity(*functions(3), given, torch.float32)


def test_many_chunks(backend, device):
    """Chunks of a sample, the last one shorter, are put together as if they were one."""
    assert_parity(*functions(2), make((1, 37, 29, 8), device=device), torch.float32)


def test_large_mean_keeps_its_digits(backend, device):
    """Mean 1000, deviation 1: the variance must not be a difference of squares."""
    x = torch.randn(2, 17, 16, 32, device=device) + 1000
    expected = reference.group_norm_silu(x.double(), num_groups=8)
    assert_close(group_norm_silu(x, num_groups=8), expected, 1e-4)


def test_constant_groups(backend, device):
    x = torch.full((1, 4, 4, 16), 3.0, device=device, requires_grad=True)
    out = group_norm_silu(x, num_groups=4)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and x.grad.isfinite().all()


def test_extreme_values(backend, device):
    """SiLU's tails: 0 far below, the identity far above, and finite slopes there."""
    inputs = [t.requires_grad_() for t in make((1, 4, 4, 16), device=device)]
    x, weight, bias = inputs
    out = group_norm_silu(x, 1000 * weight, 1000 * bias, num_groups=4)
    out.sum().backward()
    literal = reference.group_norm_silu(
        x.double(), 1000 * weight.double(), 1000 * bias.double(), num_groups=4
    )
    assert_close(out, literal, 1e-5)
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's, of the mean of no pixels
def test_empty(backend, device):
    """Of no samples, and of no pixels: gradients that are sums are zero."""
    for shape in (0, 3, 5, 8), (2, 0, 5, 8):
        inputs = [t.requires_grad_() for t in make(shape, device=device)]
        out = group_norm_silu(*inputs, num_groups=2)
        assert out.shape == shape
        out.backward(out)
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


def test_results_repeat_bitwise(backend, device):
    def run():
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in make((2, 9, 8, 128), device=device)]
        out = group_norm_silu(*leaves, num_groups=32)
        out.square().sum().backward()
        return [out, *(t.grad for t in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


LAYOUTS = {
    "channels first": lambda t: t.mT.contiguous().mT,
    "every other": lambda t: torch.stack((t, t), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, backend, device):
    fused, literal = functions(4)
    inputs = [t.requires_grad_() for t in make((2, 5, 7, 24), device=device)]
    x, *parameters = inputs
    results = []
    for function, view in ((fused, LAYOUTS[layout](x)), (literal, x)):
        out = function(view, *parameters)
        weights = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        results.append([out, *torch.autograd.grad(out, inputs, LAYOUTS[layout](weights))])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-5)


def test_parameters_in_float32_beside_half(backend, device):
    x, *parameters = (t.requires_grad_() for t in make((2, 5, 7, 24), device=device))
    half = x.detach().bfloat16().requires_grad_()
    out = group_norm_silu(half, *parameters, num_groups=4)
    out.float().square().sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (half, *parameters)]
    expected = reference.group_norm_silu(*truth, num_groups=4)
    expected.square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 1e-2)
    for leaf, true in zip((half, *parameters), truth, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, true.grad, 2e-2)


def test_autocast_leaves_the_dtype(backend, device):
    """A norm takes what it gets."""
    x, *parameters = make((1, 4, 4, 16), device=device)
    with torch.autocast(device, torch.bfloat16):
        out = group_norm_silu(x, *parameters, num_groups=4)
        assert group_norm_silu(x.bfloat16(), num_groups=4).dtype == torch.bfloat16
    assert torch.equal(out, group_norm_silu(x, *parameters, num_groups=4))


def test_the_widest_group_of_triton():
    refuse = REGISTRY["group_norm_silu"].refusal
    for channels, refused in ((4096, False), (4097, True)):
        reason = refuse("triton", torch.empty(1, 1, 1, 2 * channels), None, None, 2, 1e-5)
        assert ("C / num_groups must be at most 4096, got 4097" in (reason or "")) == refused


ERRORS = {
    "x must have 4 dimensions": (ValueError, {"x": torch.zeros(2, 8)}),
    "x must be .*, got torch.int64": (TypeError, {"x": torch.zeros(2, 3, 3, 8).long()}),
    "num_groups must divide the channels, got num_groups=3 for 8": (ValueError, {"num_groups": 3}),
    "num_groups must divide the channels, got num_groups=0 for 8": (ValueError, {"num_groups": 0}),
    "num_groups must be an int, got 2.0": (TypeError, {"num_groups": 2.0}),
    r"weight must have shape \(8\), got \(9,\)": (ValueError, {"weight": torch.zeros(9)}),
    r"bias must be float32, got torch\.float16": (TypeError, {"bias": torch.zeros(8).half()}),
    "eps must be >= 0, got -1": (ValueError, {"eps": -1}),
    "eps must be >= 0, got nan": (ValueError, {"eps": float("nan")}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_rule_and_value(message):
    kind, change = ERRORS[message]
    given = {"x": torch.zeros(2, 3, 3, 8), "num_groups": 2} | change
    with pytest.raises(kind, match=message):
        group_norm_silu(given.pop("x"), **given)
