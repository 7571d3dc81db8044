"""adaln: values and every gradient, with every combination of its optional parts."""

import itertools

import pytest
import torch

import reference
from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import adaln
from tests.parity import assert_close, assert_parity, assert_refused, refused_dtype

OPS = ("adaln",)
# name: (B, N, C)
SHAPES = {
    "1152 channels": (2, 5, 1152),
    "odd": (3, 7, 33),
    "one token": (2, 1, 8),
    "one channel short of a power of two": (1, 4, 127),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "shift", "scale", "y", "gate", "weight", "bias")


def make(shape, *, parts=NAMES, per_token=False, device="cpu"):
    batch, _, channels = shape
    sizes = {name: shape if per_token else (batch, channels) for name in ("shift", "scale", "gate")}
    sizes |= {"x": shape, "y": shape, "weight": (channels,), "bias": (channels,)}
    return [torch.randn(sizes[name], device=device) if name in parts else None for name in NAMES]


def fused(*inputs):
    given = dict(zip(NAMES, inputs, strict=True))
    return adaln(given.pop("x"), **given)


def literal(*inputs):
    given = dict(zip(NAMES, inputs, strict=True))
    pair = reference.adaln(given.pop("x"), **given)
    return pair if given["y"] is not None else pair[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, per_token, dtype, backend, device):
    inputs = make(SHAPES[shape], per_token=per_token, device=device)
    if reason := refused_dtype(backend, dtype):
        assert_refused(fused, inputs, dtype, reason)
    else:
        assert_parity(fused, literal, inputs, dtype)


COMBINATIONS = [
    ("x", *itertools.chain.from_iterable(chosen))
    for size in range(4)
    for chosen in itertools.combinations(
        [("shift", "scale"), ("y",), ("gate", "y"), ("weight", "bias")], size
    )
] + [("x", "scale"), ("x", "shift"), ("x", "weight")]


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_every_part_is_optional(parts, backend, device):
    assert_parity(fused, literal, make((2, 3, 24), parts=parts, device=device), torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_alone_may_be_used(used, backend, device):
    """Of the pair (x, out), the loss may see only one."""
    pick = (lambda *args: fused(*args)[used]), (lambda *args: literal(*args)[used])
    parts = ("x", "y", "gate") if used == 0 else NAMES
    assert_parity(*pick, make((2, 3, 24), parts=parts, device=device), torch.float32)


MIXED = {
    "scale per token": ("scale",),
    "shift per token": ("shift",),
    "gate per token": ("gate",),
    "gate per sample": ("shift", "scale"),
}


@pytest.mark.parametrize("per_token", MIXED)
def test_modulations_per_sample_and_per_token_may_be_mixed(per_token, backend, device):
    """Every gradient that is a sum then follows from sums of its own."""
    given = dict(zip(NAMES, make((2, 5, 24), device=device), strict=True))
    given |= {name: torch.randn(2, 5, 24, device=device) for name in MIXED[per_token]}
    assert_parity(fused, literal, list(given.values()), torch.float32)


LAYOUTS = {
    "chunks of one projection": lambda t: torch.stack((t, t), -2)[..., 0, :],
    "channels apart": lambda t: torch.stack((t, t), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, backend, device):
    inputs = [t.requires_grad_() for t in make((2, 5, 24), device=device)]
    views = [LAYOUTS[layout](t) for t in inputs]
    assert not any(view.is_contiguous() for view in views[:5])
    results = []
    for function, arguments in ((fused, views), (literal, inputs)):
        out = function(*arguments)
        results.append([*out, *torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("parts", [NAMES, ("x", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("shape", [(2, 70, 40), (1, 300, 8), (12, 128, 8), (1, 9, 4100)], ids=str)
def test_many_rows_and_wide_ones(shape, parts, backend, device):
    """Several rows at once, several chunks of a sample, and sums that take a second launch."""
    assert_parity(fused, literal, make(shape, parts=parts, device=device), torch.float32)


def test_the_widest_row_of_triton():
    refuse = REGISTRY["adaln"].refusal
    for channels, refused in ((8192, False), (8193, True)):
        reason = refuse("triton", torch.empty(1, 1, channels), *[None] * 6, 1e-6)
        assert ("C must be 1 to 8192, got 8193" in (reason or "")) == refused


def test_large_mean_keeps_its_digits(backend, device):
    """Mean 1000, deviation 1: the variance must not be a difference of squares."""
    x = torch.randn(2, 3, 256, device=device) + 1000
    assert_close(adaln(x), reference.adaln(x.double())[1], 1e-4)


def test_constant_rows(backend, device):
    x = torch.full((1, 2, 16), 3.0, device=device, requires_grad=True)
    out = adaln(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and x.grad.isfinite().all()


def test_empty(backend, device):
    """Of no samples, and of no tokens: gradients that are sums are zero."""
    for shape in (0, 3, 8), (2, 0, 8):
        inputs = [t.requires_grad_() for t in make(shape, device=device)]
        out = fused(*inputs)
        assert out[0].shape == out[1].shape == shape
        torch.autograd.backward(out, out)
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


def test_results_repeat_bitwise(backend, device):
    def run():
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in make((2, 10, 1152), device=device)]
        x, out = fused(*leaves)
        (x + out).square().sum().backward()
        return [x, out, *(t.grad for t in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("wide, narrow", [(0, 1), (1, 0)])
def test_mixed_dtypes_as_under_autocast(wide, narrow, backend, device):
    """Residual in float32 with branch and modulations in bfloat16, and the other way round."""
    dtypes = torch.float32, torch.bfloat16
    inputs = make((2, 3, 24), device=device)
    inputs = [t.bfloat16().to(dtypes[wide]).requires_grad_() for t in inputs]
    for i in (1, 2, 3, 4):
        inputs[i] = inputs[i].detach().to(dtypes[narrow]).requires_grad_()
    if wide:
        inputs[5:] = (t.detach().float().requires_grad_() for t in inputs[5:])
    outputs = fused(*inputs)
    assert all(out.dtype == inputs[0].dtype for out in outputs)
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected = literal(*truth)
    torch.autograd.backward(expected, [torch.ones_like(out) for out in expected])
    for out, true in zip(outputs, expected, strict=True):
        assert_close(out, true, 2e-2 if wide else 1e-6)
    for leaf, true in zip(inputs, truth, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(
            leaf.grad, true.grad, 1e-6 if leaf.dtype == torch.float32 and not wide else 2e-2
        )


def test_mixed_dtypes_without_a_gate(backend, device):
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    y = torch.randn(2, 3, 8, device=device).bfloat16().requires_grad_()
    adaln(x, y=y)[0].sum().backward()
    assert y.grad.dtype == torch.bfloat16 and torch.equal(y.grad, torch.ones_like(y))


ERRORS = {
    "x must have 3 dimensions": (ValueError, {"x": torch.zeros(2, 8)}),
    "gate scales y, but y is None": (ValueError, {"y": None}),
    "eps must be >= 0, got -1": (ValueError, {"eps": -1}),
    r"shift must have shape \(2, 8\), got \(2, 9\)": (ValueError, {"shift": torch.zeros(2, 9)}),
    r"scale must have shape \(2, 3, 8\), got \(2, 4, 8\)": (
        ValueError,
        {"scale": torch.zeros(2, 4, 8)},
    ),
    r"weight must have shape \(8\), got \(9\,\)": (ValueError, {"weight": torch.zeros(9)}),
    "y must be bfloat16 or float16 or float32, got torch.float64": (
        TypeError,
        {"y": torch.zeros(2, 3, 8, dtype=torch.float64)},
    ),
    "eps must be >= 0, got nan": (ValueError, {"eps": float("nan")}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_rule_and_value(message):
    given = dict(zip(NAMES, make((2, 3, 8)), strict=True))
    kind, change = ERRORS[message]
    with pytest.raises(kind, match=message):
        adaln(**given | change)
