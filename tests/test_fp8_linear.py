"""The layer with 8-bit weights: its numbers by plain arithmetic, and what a module must keep."""

import copy

import pytest
import torch
from torch import nn

from diffit_kernels import from_pretrained
from diffit_kernels.fp8_linear import Fp8Linear, quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_EPS = torch.finfo(torch.float32).eps


def layer_of(in_features=96, out_features=48, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    return linear, Fp8Linear(linear).to(dtype)


def rounded(numbers):
    """To e4m3, in float64: 3 bits of fraction, exponents from -6; ties to even."""
    exponent = torch.frexp(numbers).exponent - 1
    step = torch.exp2(exponent.clamp(min=-6).double() - 3)
    return (numbers / step).round() * step


def emulated(rows):
    """(R, K) -> float64 numbers and scales that an fp8 product multiplies."""
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True) / 448
    scale = torch.where(scale < 2**-126, 2**-126, scale)
    return rounded((rows / scale).double()), scale.double()


def assert_emulated(y, x, weight, bias, what=""):
    """Each number of ``y`` as by multiplying the rounded numbers without error, and b added.

    Their products are exact in float32. A sum of K of them errs by at most K roundings of the sum
    of magnitudes; the two scales' products and the bias add three more. The result is rounded to
    y's dtype, and once more where a backend adds the bias to what is rounded already.
    """
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    (numbers, x_scale), (weights, w_scale) = emulated(x), emulated(weight)
    bias = torch.zeros(len(weight)) if bias is None else bias
    scales = x_scale * w_scale.T
    expected = scales * (numbers @ weights.T) + bias.double()
    magnitude = scales * (numbers.abs() @ weights.abs().T) + bias.double().abs()
    allowed = (x.shape[1] + 3) * FLOAT32_EPS * magnitude
    if y.dtype != torch.float32:
        half_step = torch.finfo(y.dtype).eps / 2
        allowed += half_step * (2 * expected.abs() + bias.double().abs())
    difference = (y.double() - expected).abs()
    assert (difference <= allowed).all(), f"{what} {(difference / allowed).max()} of what may be"


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 3, 96)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_an_emulation(dtype, bias, shape):
    linear, layer = layer_of(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 48)
    assert_emulated(y, x, linear.weight, layer.bias)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e30])
def test_rows_have_scales_of_their_own(scale):
    """Of x and of W, over all of float32's range, and with one number far above its row."""
    linear, _ = layer_of()
    with torch.no_grad():
        linear.weight[3] /= scale**0.5
        linear.weight[5, 7] = 100
    layer = Fp8Linear(linear)
    x = torch.randn(6, 96)
    x[2] *= scale
    x[4, 11] = 1000
    assert_emulated(layer(x), x, linear.weight, layer.bias)


def test_rounding_is_that_of_the_format():
    """By at most 2^-4 of a number, or 2^-10 of the row's scale; the largest is kept."""
    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.logspace(-6, 0, 256)
    numbers, scale = quantized(x)
    assert numbers.dtype == torch.float8_e4m3fn and scale.shape == (64, 1)
    allowed = torch.maximum(2**-4 * x.abs(), 2**-10 * scale) * (1 + 4 * FLOAT32_EPS)
    difference = (numbers.float() * scale - x).abs()
    assert (difference <= allowed).all()
    assert (numbers.float().abs().amax(1) == 448).all()


def test_error_of_the_packaged_model_is_what_rounding_makes():
    """Root mean square, layer by layer, on the inputs that the float32 model has.

    A product errs by dx w + x dw. Roundings of different numbers are independent, so that the
    squares add up; each is taken at its largest, max(2^-4 |x|, 2^-10 s). The second-order term,
    dx dw, is at most 2^-4 of the first.
    """
    model, seen = from_pretrained("digits"), []
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.register_forward_hook(lambda layer, args, y: seen.append((layer, args[0], y)))
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randn(8, 4, 4, 4), torch.arange(8) * 140, torch.arange(8))
    assert len(seen) == 4 * len(model.blocks)
    for layer, x, y in seen:
        x, weight = (t.detach().reshape(-1, t.shape[-1]) for t in (x, layer.weight))
        dx, dw = (
            torch.maximum(2**-4 * t.abs(), 2**-10 * quantized(t)[1]).square() for t in (x, weight)
        )
        allowed = (dx @ weight.square().T + x.square() @ dw.T).mean().sqrt() * (1 + 2**-4)
        with torch.no_grad():
            error = (Fp8Linear(layer)(x) - y.reshape(len(x), -1)).square().mean().sqrt()
        assert 0 < error <= allowed, (error, allowed)


def test_no_rows_and_rows_of_zeros():
    _, layer = layer_of()
    for shape in ((0, 96), (2, 0, 96), (0, 5, 96)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 48)
    x = torch.randn(3, 96)
    x[1] = 0
    y = layer(x)
    assert torch.equal(y[1], layer.bias) and y.isfinite().all()
    linear, _ = layer_of()
    nn.init.zeros_(linear.weight)
    assert torch.equal(Fp8Linear(linear)(x), linear.bias.detach().expand(3, 48))


def test_numbers_that_are_none_stay_in_their_row():
    _, layer = layer_of()
    x = torch.randn(4, 96)
    expected = layer(x)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = layer(x)
    assert y[1].isnan().all() and y[2].isnan().all()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("sizes", [(90, 48), (96, 50), (8, 8)], ids=str)
def test_sizes_that_the_hardware_has_not(sizes):
    with pytest.raises(ValueError, match=r"must be multiples of 16, got \({}, {}\)".format(*sizes)):
        Fp8Linear(nn.Linear(*sizes))


def test_a_gradient_is_refused():
    _, layer = layer_of()
    x = torch.randn(3, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="is for inference and has no gradient"):
        layer(x)
    expected = layer(x.detach())
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(layer(x), expected)
    assert not expected.requires_grad and not list(layer.parameters())


CASTS = {
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "double and back": lambda layer: layer.double().float(),
    "to": lambda layer: layer.to("cpu", torch.bfloat16),
    "of a model around it": lambda layer: nn.Sequential(layer).to(torch.float16)[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_of_the_bias_alone(cast):
    _, layer = layer_of()
    before = copy.deepcopy(layer.state_dict())
    layer = CASTS[cast](layer)
    for name in ("weight_fp8", "weight_scale"):
        after = layer.get_buffer(name)
        assert after.dtype == before[name].dtype
        assert torch.equal(after.view(torch.uint8), before[name].view(torch.uint8))
    dtype = {"bfloat16": torch.bfloat16, "to": torch.bfloat16, "double and back": torch.float32}
    assert layer.bias.dtype == dtype.get(cast, torch.float16)


def test_moves_to_another_device():
    _, layer = layer_of()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}
    layer = layer.to("meta")
    assert all(t.is_meta for t in layer.buffers())
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == shapes


def test_copies_and_stored_states_give_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    _, layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    expected = layer(x)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = Fp8Linear(nn.Linear(96, 48)).bfloat16()
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    copied = copy.deepcopy(layer)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (fresh, copied, torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other(x), expected)
    copied.bias.zero_()
    assert torch.equal(layer(x), expected), "a copy must not share memory"


def test_what_is_replaced_may_go_on_by_itself():
    linear, layer = layer_of()
    expected = layer(torch.ones(1, 96))
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.zero_()
    assert torch.equal(layer(torch.ones(1, 96)), expected)


def test_weights_in_other_numbers_are_not_taken_for_these():
    linear, layer = layer_of()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({"weight": linear.weight, "bias": linear.bias})


def test_compiles_in_one_graph():
    linear, layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(7, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True)(x)
    assert_emulated(y, x, linear.weight, layer.bias)
