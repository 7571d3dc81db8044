"""The reference's image-space model agrees with the recording, and its joints with definitions."""

import pytest
import torch
import torch.nn.functional as F

import reference
from diffit_kernels.checkpoint_image import our_name
from reference import image
from tests.golden_files import recording
from tests.parity import assert_close
from tests.test_reference import EXACT, without_key_third

NAME = "image_unet_small"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 5e-6)])
def test_agrees_with_the_recording(dtype, tolerance):
    golden = recording(NAME)
    state = {
        name: value.to(dtype, copy=True).requires_grad_() if value.is_floating_point() else value
        for name, value in golden.renamed("state.", our_name).items()
    }
    x, c_noise = (
        golden[f"input.{name}"].to(dtype, copy=True).requires_grad_()
        for name in ("x", "temb_input")
    )
    out = reference.image_diffit(state, x, c_noise, num_groups=8, approximate="none", eps=1e-5)
    assert_close(out, golden["output"], tolerance)
    (out * golden["loss_weight"]).sum().backward()
    assert_close(x.grad, golden["grad.input.x"], tolerance, "gradient of x")
    recorded = golden.under("grad.param.")  # of the tokenizer, the decoder and the head
    assert len(recorded) > 50
    for key, expected in recorded.items():
        ours = our_name(key)
        assert_close(*without_key_third(ours, state[ours].grad, expected), tolerance, key)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_forms_of_gelu_differ(approximate):
    """By more than the tolerance above, or that test could not tell them apart."""
    golden = recording(NAME)
    state = golden.renamed("state.", our_name)
    out = reference.image_diffit(
        state, golden["input.x"], golden["input.temb_input"], approximate=approximate
    )
    error = (out - golden["output"]).abs().max() / golden["output"].abs().max()
    assert (error < 2e-5) == (approximate == "none")


def test_a_doubled_side_is_the_transpose_of_a_halved_one():
    """<up(x), z> = <x, down(z)>, where down is the 4 × 4 convolution of stride 2."""
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    x, z = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((4, 6, 5), (8, 12, 3)))
    up = image.double_the_side(x, {"weight": weight, "bias": torch.zeros(3, dtype=torch.float64)})
    down = F.conv2d(z.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)
    assert up.shape == z.shape
    assert_close((up * z).sum(), (x * down).sum(), EXACT)


def test_a_cell_is_its_equations():
    """Eqs. 9 and 10 from PyTorch's own modules, with a change of channels and one head a window."""
    torch.manual_seed(0)
    channels, width, window = 4, 6, 2
    parts = {
        "norm": torch.nn.GroupNorm(2, channels),
        "conv": torch.nn.Conv2d(channels, width, 3, padding=1),
        "shortcut": torch.nn.Conv2d(channels, width, 1, bias=False),
        "block.norm1": torch.nn.LayerNorm(width, 1e-5),
        "block.attn.qkv": torch.nn.Linear(width, 3 * width),
        "block.attn.qkv_temb": torch.nn.Linear(8, 3 * width, bias=False),
        "block.attn.proj": torch.nn.Linear(width, width),
        "block.norm2": torch.nn.LayerNorm(width, 1e-5),
        "block.mlp.fc1": torch.nn.Linear(width, 12),
        "block.mlp.fc2": torch.nn.Linear(12, width),
    }
    modules = {name: module.double() for name, module in parts.items()}
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    state = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    table = torch.randn((2 * window - 1) ** 2, 1, dtype=torch.float64)
    state["block.attn.relative_position_bias_table"] = table
    x, c = torch.randn(2, channels, 4, 6, dtype=torch.float64), torch.randn(2, 8).double()

    h = modules["conv"](F.silu(modules["norm"](x)))
    tokens = F.unfold(h, window, stride=window)  # (B, C · L, windows)
    tokens = tokens.unflatten(1, (width, window**2)).permute(0, 3, 2, 1)  # (B, windows, L, C)
    qkv = modules["block.attn.qkv"](modules["block.norm1"](tokens))
    q, k, v = (qkv + modules["block.attn.qkv_temb"](c)[:, None, None]).chunk(3, -1)
    bias = reference.position_bias(table, (window, window))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    tokens = tokens + modules["block.attn.proj"](attended)
    hidden = F.gelu(modules["block.mlp.fc1"](modules["block.norm2"](tokens)), approximate="tanh")
    tokens = tokens + modules["block.mlp.fc2"](hidden)
    h = F.fold(tokens.permute(0, 3, 2, 1).flatten(1, 2), h.shape[2:], window, stride=window)
    expected = h + modules["shortcut"](x)

    out = image.cell(x.permute(0, 2, 3, 1), c, state, "tanh", num_groups=2, eps=1e-5)
    assert_close(out.permute(0, 3, 1, 2), expected, EXACT)
