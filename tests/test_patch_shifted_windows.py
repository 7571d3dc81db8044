"""patch: windows of a shifted image, whose mask is served by rectangles that need none."""

import copy
import gc

import pytest
import torch

from diffit_kernels import patch, shifted_windows
from diffit_kernels.patch import patched
from tests.lookalike import swin
from tests.parity import assert_close
from tests.test_backends import PLACES
from tests.test_patch import fused_calls
from tests.test_patch_structures import outputs_and_gradients

IMAGES = {  # grid, window, shift, and how many shapes of rectangles there are
    "four windows of 7": ((14, 14), (7, 7), (3, 3), 9),
    "many windows of 7": ((28, 21), (7, 7), (3, 3), 9),
    "halves alike": ((24, 16), (8, 8), (4, 4), 4),
    "oblong windows": ((9, 16), (3, 4), (1, 2), 6),
    "along the columns": ((7, 21), (7, 7), (0, 2), 3),
    "along the rows": ((8, 4), (4, 4), (1, 0), 3),
    "one window": ((5, 5), (5, 5), (2, 2), 4),
    "windows of 1": ((1, 6), (1, 3), (0, 1), 3),
}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(patched, "_warned", set())


def attention_and_inputs(case, dtype=torch.float64, images=2):
    grid, window, shift, _ = IMAGES[case]
    attention = swin.Attention(16, 2, window).to(dtype)
    mask = swin.shift_mask(grid, window, shift).to(dtype)
    return attention, torch.randn(images * len(mask), window[0] * window[1], 16).to(dtype), mask


@pytest.mark.parametrize("case", IMAGES)
def test_exact_in_float64(case):
    """Outputs and every gradient, the table's above all, with the mask and without."""
    attention, x, mask = attention_and_inputs(case)
    own = copy.deepcopy(attention)
    assert fused_calls(patch(attention), x, mask) == IMAGES[case][3] * ["window_attention"]
    for given in (mask, None):
        expected = outputs_and_gradients(own, [x], given)
        for name, value in outputs_and_gradients(attention, [x], given).items():
            assert_close(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("backend, place", PLACES)
@pytest.mark.parametrize("case", ["four windows of 7", "oblong windows"])
def test_in_float32_on_every_backend(case, backend, place):
    attention, x, mask = attention_and_inputs(case, torch.float32, images=1)
    own = copy.deepcopy(attention).double()
    expected = outputs_and_gradients(own, [x.double()], mask.double())
    patch(attention.to(place), backend=backend)
    for name, value in outputs_and_gradients(attention, [x.to(place)], mask.to(place)).items():
        assert_close(value.cpu(), expected[name], 2e-5, name)


def test_autocast():
    attention, x, mask = attention_and_inputs("four windows of 7", torch.float32)
    expected = attention(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = patch(attention)(x, mask)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 2e-2)


@pytest.mark.parametrize("suppressed", [-float("inf"), torch.finfo(torch.float64).min, -1000.0])
def test_other_numbers_that_leave_no_weight(suppressed):
    attention, x, mask = attention_and_inputs("oblong windows")
    expected = attention(x, mask)
    mask = mask.masked_fill(mask != 0, suppressed)
    assert fused_calls(patch(attention), x, mask) == 6 * ["window_attention"]
    assert_close(attention(x, mask), expected, 1e-12)


def test_by_keyword_an_int_window_and_an_empty_batch():
    attention = swin.Attention(16, 2, (4, 4), as_int=True)
    mask = swin.shift_mask((8, 8), (4, 4), (1, 1))
    x = torch.randn(8, 16, 16)
    expected = attention(x, mask=mask)
    assert_close(patch(attention)(x, mask=mask), expected, 2e-5)
    assert attention(x[:0], mask=mask).shape == (0, 16, 16)


def other_mask(kind, mask):
    if kind == "learned":
        return mask.clone().requires_grad_()
    if kind == "weak":
        return mask / 10
    if kind == "biased":
        return mask + torch.randn_like(mask) * (mask == 0)
    if kind == "one more":
        mask = mask.clone()
        mask[-1, 0, -1] = 0
        return mask
    if kind == "hidden from itself":
        return torch.full_like(mask, -100)
    if kind == "scattered":
        order = torch.randperm(mask.shape[1])
        return mask[:, order][:, :, order].contiguous()
    return torch.randn(mask.shape[1:]).to(mask)[None]


@pytest.mark.parametrize(
    "kind", ["learned", "weak", "biased", "one more", "hidden from itself", "scattered", "any"]
)
def test_other_masks_take_the_own_forward(kind):
    attention, x, mask = attention_and_inputs("four windows of 7")
    mask = other_mask(kind, mask)
    expected = attention(x, mask)
    assert patch(attention)._diffit.findings.masks
    with pytest.warns(RuntimeWarning, match="its mask is not that of the shifted windows of whole"):
        assert torch.equal(attention(x, mask), expected)


def test_a_mask_is_read_once_and_again_when_it_changed(monkeypatch):
    reads, read = [], shifted_windows._find
    monkeypatch.setattr(shifted_windows, "_find", lambda *args: reads.append(1) or read(*args))
    attention, x, mask = attention_and_inputs("oblong windows")
    own = copy.deepcopy(attention)
    patch(attention)
    reads.clear()
    gc.collect()
    kept = len(shifted_windows._found)
    for images in (2, 1, 2):
        rows = x[: images * len(mask)]
        assert_close(attention(rows, mask), own(rows, mask), 1e-12)
    assert len(reads) == 1
    mask.copy_(swin.shift_mask((9, 16), (3, 4), (2, 1)))
    assert_close(attention(x, mask), own(x, mask), 1e-12)
    assert len(reads) == 2
    mask.data = swin.shift_mask((9, 16), (3, 4), (1, 3)).double()
    assert_close(attention(x, mask), own(x, mask), 1e-12)
    assert len(reads) == 3
    assert len(shifted_windows._found) == kept + 1
    del mask
    gc.collect()
    assert len(shifted_windows._found) == kept, "nobody's mask lives longer for it"


def test_inference_mode_and_then_training():
    attention, x, mask = attention_and_inputs("oblong windows")
    own = copy.deepcopy(attention)
    patch(attention)
    with torch.inference_mode():
        for given in (mask, mask.clone()):
            assert_close(attention(x, given), own(x, given), 1e-12)
    expected = outputs_and_gradients(own, [x], mask)
    for name, value in outputs_and_gradients(attention, [x], mask).items():
        assert_close(value, expected[name], 1e-12, name)


def test_gradients_of_the_permutation():
    order = torch.randperm(6)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    permute = shifted_windows._Permute.apply
    assert torch.autograd.gradcheck(lambda x: permute(x, order, order.argsort()), x)
    assert torch.autograd.gradgradcheck(lambda x: permute(x, order, order.argsort()), x)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_training_with_dropout_keeps_the_mask(dropout):
    attention, x, mask = attention_and_inputs("four windows of 7")
    attention.attn_drop.p = dropout
    torch.manual_seed(1)
    expected = attention.train()(x, mask)
    patch(attention)
    torch.manual_seed(1)
    if dropout:
        with pytest.warns(RuntimeWarning, match=r"attention dropout 0\.25 is on"):
            assert torch.equal(attention(x, mask), expected)
    else:
        assert_close(attention(x, mask), expected, 1e-12)
