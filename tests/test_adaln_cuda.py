"""adaln's CUDA C++ kernels: on the GPU if there is one, else emulated on the host."""

import pytest
import torch

from diffit_kernels.ops import adaln
from diffit_kernels.ops.adaln import native
from tests import test_adaln
from tests.parity import assert_close, assert_parity
from tests.test_adaln import NAMES, fused, literal, make

# What holds for every backend holds for these kernels.
test_parity = test_adaln.test_parity
test_every_part_is_optional = test_adaln.test_every_part_is_optional
test_either_result_alone_may_be_used = test_adaln.test_either_result_alone_may_be_used
test_modulations_may_be_mixed = test_adaln.test_modulations_per_sample_and_per_token_may_be_mixed
test_strided_inputs = test_adaln.test_strided_inputs
test_many_rows_and_wide_ones = test_adaln.test_many_rows_and_wide_ones
test_large_mean_keeps_its_digits = test_adaln.test_large_mean_keeps_its_digits
test_constant_rows = test_adaln.test_constant_rows
test_empty = test_adaln.test_empty
test_results_repeat_bitwise = test_adaln.test_results_repeat_bitwise
test_mixed_dtypes_as_under_autocast = test_adaln.test_mixed_dtypes_as_under_autocast
test_mixed_dtypes_without_a_gate = test_adaln.test_mixed_dtypes_without_a_gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# By the number of channels: each layout of a row over threads, and their edges.
CHANNELS = [1, 2, 3, 8, 24, 32, 40, 64, 65, 72, 128, 136, 256, 264, 320, 512, 520, 640, 1024, 1032]
WIDE = [1280, 1288, 1536, 2052, 2056, 2064, 2568, 3072, 4096, 4104, 4100, 4097, 8192, 16380, 16384]


@pytest.fixture
def device(cuda_device):
    return cuda_device


@pytest.fixture
def backend(device):
    return "native"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 131])
@pytest.mark.parametrize("channels", CHANNELS)
def test_any_number_of_channels(channels, tokens, dtype, device):
    """Blocks with a sample's rows to share what they read, and samples too short for it."""
    assert_parity(fused, literal, make((2, tokens, channels), device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("channels", WIDE)
def test_wide_rows(channels, per_token, dtype, device):
    """One row to several warps; in the backward several teams to a row."""
    inputs = make((2, 2, channels), per_token=per_token, device=device)
    assert_parity(fused, literal, inputs, dtype)


@pytest.mark.parametrize(
    "parts", [NAMES, ("x", "weight", "bias"), ("x", "y", "gate")], ids="+".join
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 67, 72), (2, 130, 8), (1, 700, 33), (5, 1, 1152), (1, 41, 1152), (70, 9, 40)],
    ids=str,
)
def test_many_rows(shape, dtype, parts, device):
    """Chunks that end within a round of a block's teams, and samples of one token."""
    assert_parity(fused, literal, make(shape, parts=parts, device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(len(NAMES)), ids=lambda i: NAMES[i])
def test_unaligned_inputs(which, dtype, device):
    """A row that begins one number too late for vectors is read number by number."""
    inputs = [t.to(dtype) for t in make((2, 5, 72), device=device)]
    moved = list(inputs)
    room = torch.zeros(inputs[which].numel() + 1, dtype=dtype, device=device)
    moved[which] = room[1:].view(inputs[which].shape).copy_(inputs[which])
    results = []
    for arguments in (inputs, moved):
        leaves = [t.detach().requires_grad_() for t in arguments]
        assert leaves[which].data_ptr() == arguments[which].data_ptr()
        out = fused(*leaves)
        results.append([*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tensor", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("channels", [72, 33])
def test_every_pair_of_dtypes(channels, per_token, dtype, tensor, device):
    """x of one dtype; y and the modulations of another, weight and bias of float32 or of x's."""
    inputs = make((2, 5, channels), per_token=per_token, device=device)
    inputs = [t.half().bfloat16().float() for t in inputs]
    leaves = [
        t.to(dtype if name in ("x", "weight") else tensor)
        for name, t in zip(NAMES, inputs, strict=True)
    ]
    leaves[6] = leaves[6].float()
    leaves = [t.requires_grad_() for t in leaves]
    out = fused(*leaves)
    torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    truth = [t.detach().double().requires_grad_() for t in leaves]
    expected = literal(*truth)
    torch.autograd.backward(expected, [torch.ones_like(o) for o in expected])
    half = dtype != torch.float32
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == dtype
        assert_close(o, e, 2e-2 if half else 1e-6)
    for leaf, true in zip(leaves, truth, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        exact = leaf.dtype == torch.float32 and not half
        assert_close(leaf.grad, true.grad, 2e-6 if exact else 2e-2)


@pytest.mark.parametrize("shape", [(1, 12000, 40), (2, 6000, 8), (600, 2, 36)], ids=str)
def test_many_chunks(shape, device):
    """So many rows of partial sums that a thread of the last kernel adds up several."""
    parts = ("x", "weight", "bias") if shape[0] == 1 else NAMES
    assert_parity(fused, literal, make(shape, parts=parts, device=device), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_branch_without_a_gate_in_the_backward_op(dtype, device):
    """The op's own callers leave y out then; others need not."""
    x, y, dout, dresidual = (torch.randn(2, 5, 72, device=device).to(dtype) for _ in range(4))
    arguments = (y, None, None, None, None, None, 1e-6)
    _, residual, mean, rstd = native.forward(x, *arguments)
    with_y, without = (
        native.backward(dout, dresidual, residual, t, *arguments[1:-1], mean, rstd, 1e-6)
        for t in (y, None)
    )
    assert torch.equal(with_y[0], without[0]) and torch.equal(with_y[1], without[0])


def test_infinite_and_nan_rows_stay_alone(device):
    x = torch.randn(1, 6, 72, device=device)
    x[0, 1, 3], x[0, 4, 70] = float("nan"), float("inf")
    out = adaln(x)
    assert out[0, [0, 2, 3, 5]].isfinite().all() and out[0, [1, 4]].isnan().any(-1).all()


def test_too_many_channels_are_refused(device):
    x = torch.empty(1, 1, native.MOST_CHANNELS + 1, device=device)
    with pytest.raises(NotImplementedError, match="C must be at most 16384, got 16385"):
        adaln(x)
