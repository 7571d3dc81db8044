"""window_attention's CUDA C++ kernels: on the GPU if there is one, else emulated on the host."""

import pytest
import torch

from diffit_kernels import native_library
from diffit_kernels.dispatch import REGISTRY
from diffit_kernels.ops import window_attention
from diffit_kernels.ops.window_attention import native_cuda
from tests import emulation
from tests.conftest import DEVICES
from tests.parity import assert_close, assert_parity, assert_refused, relative_error
from tests.test_window_attention import CASES, fused, literal, make

DTYPES = [torch.bfloat16, torch.float16]
FAMILIES = ["tensor cores", "hopper"]
# name: (B, H, W, heads, head_dim, window); beside those of tests/test_window_attention.py
CUDA_CASES = {name: case for name, case in CASES.items() if case[4] in native_cuda.HEAD_DIMS} | {
    "4x6, 24 of 32 rows, d 96": (2, 8, 6, 1, 96, (4, 6)),
    "windows 4x4, d 128": (1, 4, 8, 2, 128, (4, 4)),
    "windows 8x8, d 72": (2, 8, 16, 2, 72, (8, 8)),
    "a third of a row, d 64": (2, 1, 18, 1, 64, (1, 6)),
    "one token, d 32": (2, 3, 3, 2, 32, (1, 1)),
    "many windows 7x7, d 96": (3, 14, 14, 1, 96, (7, 7)),
    "many windows 9x9, d 128": (3, 18, 18, 1, 128, (9, 9)),
    "tall, d 32": (1, 32, 3, 1, 32, (32, 3)),
    "rows of 32, d 64": (2, 6, 32, 1, 64, (3, 32)),
    "9x9, d 72": (2, 9, 18, 1, 72, (9, 9)),
    "16x16, d 32": (2, 16, 32, 1, 32, (16, 16)),
    "16x16, d 64": (1, 16, 16, 3, 64, (16, 16)),
    "16x16, d 96": (1, 16, 16, 1, 96, (16, 16)),
    "16x16, d 128": (1, 16, 16, 1, 128, (16, 16)),
    "8x16, d 72": (2, 8, 16, 1, 72, (8, 16)),
    "16x8, d 72": (1, 16, 16, 2, 72, (16, 8)),
    "4x32, d 64": (2, 8, 32, 2, 64, (4, 32)),
    "8x32, d 72": (1, 8, 32, 1, 72, (8, 32)),
}
SERVED_BY_HOPPER = [name for name, case in CUDA_CASES.items() if "16x16" in name] + [
    name for name, case in CUDA_CASES.items() if case[5] in ((8, 16), (16, 8), (4, 32), (8, 32))
]


@pytest.fixture
def device(cuda_device):
    return cuda_device


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """Both families run the shapes that both serve, whatever the default."""
    hopper = request.param == "hopper"
    if hopper and DEVICES != ["cpu"] and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper family needs compute capability 9.0")
    monkeypatch.setattr(native_cuda, "_is_for_hopper", lambda *arguments: hopper)
    return request.param


def make_case(name, device, **options):
    return make(name, device=device, cases=CUDA_CASES, **options)


def check(case, dtype, device, **options):
    inputs, shape = make_case(case, device, **options)
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, dtype)


def results(inputs, shape, dtype=torch.bfloat16):
    """out and all gradients of one call, for comparisons to the bit."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    out = window_attention(*leaves, **shape)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def assert_same(ours, others):
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def of_both_families(cases):
    """Each case with the family of tensor cores, and with Hopper's where that serves it."""
    pairs = [(case, family) for case in cases for family in FAMILIES]
    served = [p for p in pairs if p[1] == "tensor cores" or p[0] in SERVED_BY_HOPPER]
    return pytest.mark.parametrize("case, family", served, indirect=["family"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_both_families(CUDA_CASES)
def test_parity(case, family, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("time, bias", [(False, True), (True, False), (False, False)])
@of_both_families(["windows 4x4", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"])
def test_time_token_and_bias_are_optional(case, family, time, bias, device):
    check(case, torch.bfloat16, device, time=time, bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_the_largest_window(family, device, monkeypatch):
    """32 x 32 tokens, as at 512 pixels."""
    monkeypatch.setitem(CUDA_CASES, "32x32", (1, 32, 32, 1, 72, (32, 32)))
    check("32x32", torch.bfloat16, device)


@of_both_families(CUDA_CASES)
def test_which_family_serves(case, family, device):
    (qkv, table, temb), shape = make_case(case, device)
    serves = native_library.CUDA.ops().window_attention_hopper_serves(
        qkv.bfloat16(), temb, table, shape["num_heads"], shape["window_size"], 0.1
    )
    assert serves == (case in SERVED_BY_HOPPER)


@of_both_families(["windows 4x4", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"])
def test_table_and_time_token_of_any_number(case, family, device):
    inputs, shape = make_case(case, device)
    qkv, table, temb = (t.bfloat16() for t in inputs)
    expected = results((qkv, table, temb), shape)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [qkv.clone().requires_grad_()]
        leaves += [t.to(dtype).requires_grad_() for t in (table, temb)]
        out = window_attention(*leaves, **shape)
        out.float().square().sum().backward()
        assert_same([out, leaves[0].grad], expected[:2])
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        for leaf, grad in zip(leaves[1:], expected[2:], strict=True):
            assert_same([leaf.grad.bfloat16()], [grad])


@pytest.mark.parametrize("scale", [0.7, 1e-9, 0.0, -0.3])
@pytest.mark.parametrize("case", ["windows 4x4", "9x9, d 72", "8x16, d 72"])
def test_any_scale(case, scale, device):
    """By the family that is chosen: Hopper's divides by the scale, and leaves some to the other."""
    inputs, shape = make_case(case, device)
    shape["scale"] = scale
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.bfloat16)


@pytest.mark.parametrize("scale", [10, 100])
@of_both_families(["windows 4x4", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"])
def test_values_at_extreme_scores(case, family, scale, device):
    """Scores and biases far beyond what exponentials hold: a row's maximum must come off."""
    inputs, shape = make_case(case, device)
    inputs = [(scale * t).bfloat16() for t in inputs]
    with torch.no_grad():
        out = window_attention(*inputs, **shape)
        expected = literal(*(t.double() for t in inputs), **shape)
        eager = literal(*inputs, **shape)
    assert_close(out, expected, 2 * relative_error(eager, expected) + 4 * 2**-8)


@of_both_families(["windows 4x4", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"])
def test_a_bias_of_minus_infinity_shuts_a_key_out(case, family, device):
    (qkv, table, temb), shape = make_case(case, device)
    table[: len(table) // 3] = float("-inf")
    inputs = qkv, table, temb
    assert_parity(fused(shape), lambda *args: literal(*args, **shape), inputs, torch.bfloat16)


@of_both_families(["windows 4x4", "windows 7x7, d 32", "windows 8x8, d 72", "9x9, d 72"])
def test_a_nan_stays_in_its_window_and_head(case, family, device):
    """Also where windows share a tile, and where a tile is wider than a head."""
    (qkv, table, temb), shape = make_case(case, device)
    check_isolation(qkv, table, temb, shape)


@of_both_families([name for name in SERVED_BY_HOPPER if "16x16" not in name])
def test_a_nan_stays_in_its_window_and_head_on_hopper(case, family, device):
    (qkv, table, temb), shape = make_case(case, device)
    check_isolation(qkv, table, temb, shape)


def check_isolation(qkv, table, temb, shape):
    heads, (h, w) = shape["num_heads"], shape["window_size"]
    head_dim = qkv.shape[-1] // 3 // heads
    clean = results((qkv, None, temb), shape)
    for part in range(3):
        spoilt = qkv.clone()
        spoilt[0, 0, 0, part * heads * head_dim + head_dim - 1] = float("nan")
        spoilt[-1, -1, -1, part * heads * head_dim] = float("inf")
        out, dqkv, _ = results((spoilt, None, temb), shape)
        mine = torch.ones_like(out, dtype=torch.bool)  # what the two windows' heads may spoil
        mine[0, :h, :w, :head_dim] = False
        mine[-1, -h:, -w:, :head_dim] = False
        if len(qkv) * qkv.shape[1] * qkv.shape[2] == h * w:
            mine[..., :head_dim] = False
        assert torch.equal(out[mine], clean[0][mine])
        assert torch.equal(dqkv[mine.repeat(1, 1, 1, 3)], clean[1][mine.repeat(1, 1, 1, 3)])


@of_both_families(["windows 4x4", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"])
def test_results_repeat_bitwise(case, family, device):
    inputs, shape = make_case(case, device)
    assert_same(results(inputs, shape), results(inputs, shape))


def test_an_empty_batch(device):
    (qkv, table, temb), shape = make_case("windows 4x4", device)
    out, dqkv, dtable, dtemb = results((qkv[:0], table, temb[:0]), shape)
    assert out.shape == (0, 8, 12, 64) and dqkv.shape == qkv[:0].shape
    assert dtemb.shape == temb[:0].shape and torch.equal(dtable, torch.zeros_like(dtable))


def test_memory_that_does_not_begin_at_a_chunk(device):
    """Tensors are read by 16 bytes: one that begins elsewhere is copied first."""
    inputs, shape = make_case("windows 4x4", device)
    expected = results(inputs, shape)
    moved = []
    for tensor in inputs:
        room = torch.empty(tensor.numel() + 1, dtype=torch.bfloat16, device=device)
        moved.append(room[1:].view(tensor.shape).copy_(tensor))
        assert moved[-1].data_ptr() % 16
    assert_same(results(moved, shape), expected)


@of_both_families(["windows 4x4", "8x16, d 72"])
def test_as_compilers_see_it(case, family, device):
    """Schema, fake results and gradients of the op; and a whole graph, traced."""
    inputs, shape = make_case(case, device)
    qkv, table, temb = (t.bfloat16().requires_grad_() for t in inputs)
    op = REGISTRY["window_attention"].overload("native")
    arguments = (qkv, temb, table, shape["num_heads"], list(shape["window_size"]), 0.2)
    torch.library.opcheck(op, arguments)
    call = torch.compile(fused(shape), backend="aot_eager", fullgraph=True)
    assert_same([call(qkv, table, temb)], [fused(shape)(qkv, table, temb)])


REFUSED = {
    "head_dim must be one of .* got 40": ((1, 4, 4, 2, 40, (4, 4)), torch.bfloat16),
    "a window's sides must be at most 32, got .33, 1.": (
        (1, 33, 1, 1, 32, (33, 1)),
        torch.bfloat16,
    ),
    "native CUDA kernels take bfloat16 and float16, got torch.float32": (
        (1, 4, 4, 2, 32, (4, 4)),
        torch.float32,
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason, device, monkeypatch):
    case, dtype = REFUSED[reason]
    monkeypatch.setitem(CUDA_CASES, "refused", case)
    inputs, shape = make_case("refused", device)
    assert_refused(fused(shape), inputs, dtype, reason)


def test_an_old_gpu_is_refused(device, monkeypatch):
    monkeypatch.setattr(native_library, "capability", lambda device: 75)
    inputs, shape = make_case("windows 4x4", device)
    reason = "native CUDA kernels need an sm_80 GPU or newer, got sm_75"
    assert_refused(fused(shape), inputs, torch.bfloat16, reason)


# ---- What only the emulation can show ----

WALKS = ["windows 4x4", "windows 7x7, d 32", "windows 8x8, d 72", "9x9, d 72", "8x16, d 72"]
WALKS += ["many windows 7x7, d 96", "many windows 9x9, d 128"]


@pytest.fixture
def emulation_only(emulated):
    if emulated is None:
        pytest.skip("there is a GPU, which has one order and its own sizes")


@pytest.mark.parametrize("order", emulation.ORDERS[1:])
@of_both_families(WALKS)
def test_no_order_of_threads_changes_a_bit(
    case, family, order, device, emulation_only, monkeypatch
):
    """A missing barrier, or a copy that is not waited for, shows in one of them."""
    inputs, shape = make_case(case, device)
    expected = results(inputs, shape)
    monkeypatch.setenv("DIFFIT_EMULATION_ORDER", order)
    assert_same(results(inputs, shape), expected)


@pytest.mark.parametrize(
    "name, value",
    [("MULTIPROCESSORS", "1"), ("MULTIPROCESSORS", "50"), ("SHARED_MEMORY", "101376")],
)
@of_both_families(WALKS)
def test_no_size_of_the_device_changes_a_bit(
    case, family, name, value, device, emulation_only, monkeypatch
):
    """One multiprocessor walks over everything, fifty have less than a tile each; 99 KiB of shared
    memory have room for one tile at a time of the widest heads."""
    if family == "hopper" and name == "SHARED_MEMORY":
        pytest.skip("no GPU of this family has so little shared memory")
    inputs, shape = make_case(case, device)
    expected = results(inputs, shape)
    monkeypatch.setenv(f"DIFFIT_EMULATION_{name}", value)
    assert_same(results(inputs, shape), expected)


def test_one_tile_at_a_time(device, emulation_only, monkeypatch):
    """Where shared memory has no room for the next tile."""
    monkeypatch.setattr(native_cuda, "_is_for_hopper", lambda *arguments: False)
    monkeypatch.setenv("DIFFIT_EMULATION_SHARED_MEMORY", "101376")
    for case in ("16x16, d 128", "windows 4x4, d 128", "head_dim 128, several tiles"):
        check(case, torch.bfloat16, device)


@of_both_families(["16x16, d 64", "global 16x16, head_dim 72", "16x16, d 96"])
def test_matrices_are_read_without_bank_conflicts(case, family, device, emulation_only, emulated):
    inputs, shape = make_case(case, device)
    results(inputs, shape)
    seen = emulation.statistics(emulated)
    assert seen and all(kernel.bank_conflicts == 1 for kernel in seen.values()), seen
