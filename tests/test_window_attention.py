"""window_attention: values and every gradient, every odd shape, and what is refused."""

import pytest
import torch

import reference
from diffit_kernels.dispatch import use_backend
from diffit_kernels.ops import window_attention
from tests.conftest import places
from tests.parity import (
    assert_close,
    assert_parity,
    assert_refused,
    refused_dtype,
    relative_error,
)

OPS = ("window_attention",)
# name: (B, H, W, heads, head_dim, window)
CASES = {
    "global 16x16, head_dim 72": (2, 16, 16, 2, 72, (16, 16)),
    "global 4x4": (3, 4, 4, 3, 32, (4, 4)),
    "windows 4x4": (2, 8, 12, 2, 32, (4, 4)),
    "windows 7x7, d 32": (1, 14, 7, 3, 32, (7, 7)),
    "windows 8x8, d 64": (3, 16, 8, 1, 64, (8, 8)),
    "windows 12x12": (1, 12, 24, 2, 32, (12, 12)),
    "grid 20x20": (1, 20, 20, 1, 72, (20, 20)),
    "not square": (2, 6, 20, 2, 8, (3, 5)),
    "one row": (2, 1, 6, 1, 16, (1, 6)),
    "2x2, head_dim 8": (5, 2, 2, 1, 8, (2, 2)),
    "one token": (2, 3, 3, 2, 8, (1, 1)),
    "head_dim 128": (1, 4, 4, 1, 128, (4, 4)),
    "head_dim 40": (1, 6, 6, 2, 40, (6, 6)),
    "head_dim 96, several tiles": (1, 9, 9, 1, 96, (9, 9)),
    "head_dim 128, several tiles": (2, 8, 8, 1, 128, (8, 8)),
    "wide": (1, 6, 32, 1, 16, (3, 32)),
    "tall": (1, 32, 4, 1, 16, (32, 4)),
    "head_dim 4": (1, 4, 4, 2, 4, (2, 2)),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(case, *, time=True, bias=True, device="cpu", cases=CASES):
    batch, height, width, heads, head_dim, (h, w) = cases[case]
    channels = heads * head_dim
    qkv = torch.randn(batch, height, width, 3 * channels, device=device)
    table = torch.randn((2 * h - 1) * (2 * w - 1), heads, device=device) if bias else None
    temb = torch.randn(batch, 2 * channels, device=device) if time else None
    return (qkv, table, temb), {"num_heads": heads, "window_size": (h, w)}


def literal(qkv, table, temb, *, num_heads, window_size, scale=None):
    """The oracle, which wants the time token whole: any key part will do, so a random one."""
    if temb is not None:
        q, v = temb.chunk(2, -1)
        generator = torch.Generator().manual_seed(3)
        k = torch.randn(q.shape, generator=generator).to(q)
        temb = torch.cat((q, k, v), -1)
    return reference.window_attention(qkv, temb, table, num_heads, window_size, scale)


def fused(function_of):
    return lambda qkv, table, temb: window_attention(qkv, table, temb, **function_of)


# Float32 in small tiles takes Triton's interpreter up to a minute; half precision does them all.
LONG = ("global 16x16, head_dim 72", "windows 12x12", "grid 20x20")


def refused(backend, case, dtype):
    """Why a backend has no kernel for the case, or None."""
    if backend == "triton" and case == "head_dim 4":
        return "head_dim must be a multiple of 8 from 8 to 128, got 4"
    return refused_dtype(backend, dtype)


def check_parity(case, dtype, backend, device):
    inputs, shape = make(case, device=device)
    if reason := refused(backend, case, dtype):
        assert_refused(fused(shape), inputs, dtype, reason)
    else:
        assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in LONG])
def test_parity(case, dtype, backend, device):
    check_parity(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LONG)
def test_parity_of_large_windows(case, dtype, backend, device):
    check_parity(case, dtype, backend, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", LONG)
def test_parity_of_large_windows_in_full_precision(case, dtype, backend, device):
    check_parity(case, dtype, backend, device)


@pytest.mark.parametrize("window", [(4, 4), (6, 12)])
@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_every_head_dim(head_dim, window, backend, device):
    """Alone in a tile and over several: heads are cut in two parts of different widths."""
    check_one_window(window, head_dim, 2, backend, device)


@pytest.mark.slow
def test_the_largest_window(backend, device):
    """32 x 32 tokens, as at 512 pixels, with head_dim 72."""
    check_one_window((32, 32), 72, 1, backend, device)


def check_one_window(window, head_dim, heads, backend, device):
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    inputs = (
        torch.randn(1, *window, 3 * heads * head_dim, device=device),
        torch.randn(rows, heads, device=device),
        torch.randn(1, 2 * heads * head_dim, device=device),
    )
    shape = {"num_heads": heads, "window_size": window}
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.bfloat16)


@pytest.mark.parametrize("case", ["windows 4x4", "wide"])
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_time_token_and_bias_are_optional(case, time, bias, backend, device):
    inputs, shape = make(case, time=time, bias=bias, device=device)
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.float32)


def test_scale(backend, device):
    inputs, shape = make("windows 4x4", device=device)
    shape["scale"] = 0.7
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.float32)


def test_one_number_is_a_square_window(backend, device):
    (qkv, table, temb), _ = make("windows 4x4", device=device)
    square = window_attention(qkv, table, temb, num_heads=2, window_size=4)
    assert torch.equal(square, window_attention(qkv, table, temb, num_heads=2, window_size=(4, 4)))


def test_extreme_values(backend, device):
    """Scores of ±1e4 and a bias of ±1e4: softmax must subtract the row's maximum."""
    inputs, shape = make("global 4x4", device=device)
    qkv, table, temb = (100 * t for t in inputs)
    table = 100 * table
    out = window_attention(qkv, table, temb, **shape)
    expected = literal(qkv.double(), table.double(), temb.double(), **shape)
    assert_close(out, expected, 1e-4)


def test_empty_batch(backend, device):
    (qkv, table, temb), shape = make("windows 4x4", device=device)
    qkv, temb = qkv[:0].requires_grad_(), temb[:0].requires_grad_()
    table.requires_grad_()
    out = window_attention(qkv, table, temb, **shape)
    assert out.shape == (0, 8, 12, 64)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape and temb.grad.shape == temb.shape
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_strided_inputs(backend, device):
    (qkv, table, temb), shape = make("windows 4x4", device=device)
    expected = window_attention(qkv, table, temb, **shape)
    strided = (
        qkv.transpose(1, 2).contiguous().transpose(1, 2),
        table.t().contiguous().t(),
        temb.repeat(1, 2)[:, : temb.shape[1]],
    )
    assert all(not t.is_contiguous() for t in strided)
    leaves = [t.requires_grad_() for t in strided]
    out = window_attention(*leaves, **shape)
    assert_close(out, expected, 1e-6)
    out.transpose(1, 2).contiguous().square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


def test_results_repeat_bitwise(backend, device):
    def run():
        torch.manual_seed(0)
        inputs, shape = make("head_dim 96, several tiles", device=device)
        leaves = [t.requires_grad_() for t in inputs]
        out = window_attention(*leaves, **shape)
        out.square().sum().backward()
        return [out, *(t.grad for t in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_float32_table_beside_bfloat16_tokens(backend, device):
    (qkv, table, temb), shape = make("windows 4x4", device=device)
    qkv = qkv.bfloat16().requires_grad_()
    table.requires_grad_()
    out = window_attention(qkv, table, temb, **shape)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert table.grad.dtype == torch.float32 and qkv.grad.dtype == torch.bfloat16


def test_autocast(backend, device):
    inputs, shape = make("windows 4x4", device=device)
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autocast(device, torch.bfloat16):
        out = window_attention(*leaves, **shape)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    assert_close(out, literal(*inputs, **shape), 2e-2)


ERRORS = {
    "qkv must have 4 dimensions": (ValueError, {"qkv": torch.zeros(2, 16, 192)}),
    "qkv must be bfloat16 or float16 or float32 or float64, got torch.int64": (
        TypeError,
        {"qkv": torch.zeros(2, 8, 12, 192, dtype=torch.int64)},
    ),
    "qkv must be a tensor, got list": (TypeError, {"qkv": [1.0]}),
    r"window_size must divide the token grid: got window \(5, 4\) for the grid \(8, 12\)": (
        ValueError,
        {"window_size": (5, 4)},
    ),
    r"got window \(0, 4\)": (ValueError, {"window_size": (0, 4)}),
    r"3 · num_heads · head_dim, got 192 for num_heads=5": (ValueError, {"num_heads": 5}),
    r"relative_position_bias_table must have shape \(49, 2\), got \(48, 2\)": (
        ValueError,
        {"relative_position_bias_table": torch.zeros(48, 2)},
    ),
    r"temb must have shape \(2, 128\), got \(2, 192\)": (ValueError, {"temb": torch.zeros(2, 192)}),
    "temb must be bfloat16 or float16 or float32, got torch.float64": (
        TypeError,
        {"temb": torch.zeros(2, 128, dtype=torch.float64)},
    ),
    "temb must be on cpu, got meta": (ValueError, {"temb": torch.zeros(2, 128, device="meta")}),
    "backend must be one of": (ValueError, {"backend": "cuda"}),
    r"window_size must be an int or two ints, got 4\.0": (TypeError, {"window_size": 4.0}),
    r"num_heads must be an int, got 2\.0": (TypeError, {"num_heads": 2.0}),
    "scale must be a number, got 'a'": (TypeError, {"scale": "a"}),
    r"dropout_p must be a number in \[0, 1\), got 1": (ValueError, {"dropout_p": 1}),
    r"no backend drops .* got dropout_p=0\.1: .* The literal equations can": (
        NotImplementedError,
        {"dropout_p": 0.1},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_rule_and_value(message):
    (qkv, table, temb), shape = make("windows 4x4")
    kind, change = ERRORS[message]
    arguments = {"qkv": qkv, "relative_position_bias_table": table, "temb": temb} | shape | change
    with pytest.raises(kind, match=message):
        window_attention(**arguments)


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("case", ["windows 7x7, d 32", "windows 4x4", "several tiles"])
def test_programs_that_walk_over_windows(case, programs, monkeypatch):
    """Triton's sums over windows, with fewer programs than windows, and not a divisor of them; the
    time token's memory is followed by NaN, which nothing may read."""
    launch = pytest.importorskip("diffit_kernels.ops.window_attention.launch", reason="no triton")
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    device = places("triton")[-1]
    grid, window = {
        "windows 7x7, d 32": ((14, 7), (7, 7)),
        "windows 4x4": ((8, 12), (4, 4)),
        "several tiles": ((9, 18), (9, 9)),
    }[case]
    rows, channels = (2 * window[0] - 1) * (2 * window[1] - 1), 32
    padded = torch.full((3 * 2 * channels + 4096,), float("nan"), device=device)
    temb = padded[: 3 * 2 * channels].view(3, 2 * channels).copy_(torch.randn(3, 2 * channels))
    inputs = (
        torch.randn(3, *grid, 3 * channels, device=device),
        torch.randn(rows, 1, device=device),
        temb,
    )
    shape = {"num_heads": 1, "window_size": window}
    with use_backend("triton"):
        leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_(), temb.requires_grad_()]
        window_attention(*leaves, **shape).square().sum().backward()
    ours = [leaf.grad for leaf in leaves]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    literal(*truth, **shape).square().sum().backward()
    for name, grad, leaf in zip(("dqkv", "dtable", "dtemb"), ours, truth, strict=True):
        assert_close(grad, leaf.grad, 1e-5, name)


@pytest.mark.parametrize("bias_scale", [10, 1e3])
def test_gradients_at_extreme_biases(bias_scale, backend, device):
    """Where a tile has whole rows; over several tiles see CONTRIBUTING.md, known limits."""
    (qkv, table, temb), shape = make("global 4x4", device=device)
    inputs = qkv, bias_scale * table, temb
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.float32)


@pytest.mark.parametrize("bias_scale", [10, 1e3])
def test_values_at_extreme_biases(bias_scale, backend, device):
    (qkv, table, temb), shape = make("head_dim 96, several tiles", device=device)
    inputs = qkv, bias_scale * table, temb
    with torch.no_grad():
        out = window_attention(*inputs, **shape)
        expected = literal(*(t.double() for t in inputs), **shape)
        eager = literal(*inputs, **shape)
    assert_close(out, expected, 2 * relative_error(eager, expected) + 5e-7)


@pytest.mark.parametrize("case", ["head_dim 40", "head_dim 96, several tiles"])
def test_a_bias_of_minus_infinity_shuts_a_key_out(case, backend, device):
    (qkv, table, temb), shape = make(case, device=device)
    table[: len(table) // 3] = float("-inf")
    leaves = [t.requires_grad_() for t in (qkv, table, temb)]
    out = window_attention(*leaves, **shape)
    out.square().sum().backward()
    truth = [t.detach().double().requires_grad_() for t in leaves]
    expected = literal(*truth, **shape)
    expected.square().sum().backward()
    assert_close(out, expected, 1e-5)
    for leaf, true in zip(leaves, truth, strict=True):
        assert_close(leaf.grad, true.grad, 1e-5)


def test_a_key_that_is_minus_infinite_spoils_no_other_gradient(backend, device):
    """Its scores are -inf for every query: it is shut out. No lane that pads may make NaN of it."""
    if backend == "triton":
        pytest.skip("a tile's rows that pad make NaN of it: CONTRIBUTING.md, known limits")
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 5, 24, device=device)
    qkv[..., 0].abs_()
    qkv[0, 1, 1, 8] = float("-inf")
    qkv.requires_grad_()
    out = window_attention(qkv, num_heads=1, window_size=(3, 5))
    out.sum().backward()
    assert out.isfinite().all() and qkv.grad[..., 8:].isfinite().all()
