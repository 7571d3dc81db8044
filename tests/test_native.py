"""The CPU kernels as a whole: threads, instruction sets, sanitizers."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffit_kernels import native_library, use_backend
from diffit_kernels.ops import (
    adaln,
    group_norm_silu,
    linear,
    mlp,
    time_projection,
    window_attention,
)
from tests.parity import assert_close

ROOT = Path(__file__).parents[1]
SETS = ("portable", "avx2", "avx512", "avx512_bf16")


def attention(qkv, table, temb):
    return window_attention(qkv, table, temb, num_heads=3, window_size=(4, 6))


def cell(x, weight, bias):
    return group_norm_silu(x, weight, bias, num_groups=4)


class Gelu(torch.autograd.Function):
    """What the mlp op has between its products."""

    @staticmethod
    def forward(ctx, hidden, bias):
        ctx.save_for_backward(hidden, bias)
        out = torch.empty_like(hidden)
        native_library.CPU.ops().gelu_forward(hidden, out, False)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, bias = ctx.saved_tensors
        grad, dbias = grad.clone(), torch.empty_like(bias)
        out = torch.empty_like(hidden)
        native_library.CPU.ops().gelu_backward(hidden, out, grad, dbias, False)
        return grad, dbias


class Product(torch.autograd.Function):
    """What the linear op has of its own: the product, and its input's gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight, bias)
        out = torch.empty(len(x), len(weight))
        native_library.CPU.ops().linear(x.float(), weight.float(), True, bias.float(), out)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, bias = ctx.saved_tensors
        dx = torch.empty(len(grad), weight.shape[1])
        native_library.CPU.ops().linear(grad.float(), weight.float(), False, None, dx)
        return dx.to(grad.dtype), torch.zeros_like(weight), torch.zeros_like(bias)


# name: (function, shapes, whether every number comes from our own kernels)
CALLS = {
    "window_attention": (attention, [(5, 8, 12, 3 * 72), (77, 3), (5, 2 * 72)], True),
    "adaln": (
        lambda x, y, gate, shift, scale, weight, bias: adaln(
            x, shift, scale, y=y, gate=gate, weight=weight, bias=bias
        ),
        [(5, 140, 200), (5, 140, 200), (5, 200), (5, 200), (5, 200), (200,), (200,)],
        True,
    ),
    "product": (Product.apply, [(700, 200), (70, 200), (70,)], True),
    "gelu": (Gelu.apply, [(700, 200), (200,)], True),
    "group_norm_silu, by sample": (cell, [(4, 40, 40, 48), (48,), (48,)], True),
    "group_norm_silu, by chunk": (cell, [(1, 80, 80, 48), (48,), (48,)], True),
    "mlp": (mlp, [(3, 70, 48), (200, 48), (200,), (48, 200), (48,)], False),
    "linear": (linear, [(3, 70, 48), (200, 48), (200,)], False),
    "time_projection": (time_projection, [(3, 70, 48), (96, 48), (96,), (3, 96)], False),
}


def results(function, shapes, dtype, threads):
    """Outputs and gradients, computed by so many threads."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("native"):
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    finally:
        torch.set_num_threads(before)
    return [*outputs, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_results(name, dtype):
    """To the bit, also again with as many; products are the libraries', and agree to rounding."""
    function, shapes, exact = CALLS[name]
    expected = results(function, shapes, dtype, 1)
    for threads in (1, 2, 3):
        for ours, one in zip(results(function, shapes, dtype, threads), expected, strict=True):
            if exact or threads == 1:
                assert torch.equal(ours, one)
            else:
                torch.testing.assert_close(ours, one)


def test_long_rows_of_probabilities_sum_to_one():
    """Values of one give one: sums of 4096 exponentials keep their digits, forward and backward."""
    qkv, table = torch.randn(1, 64, 64, 3 * 16), torch.randn(127**2, 1)
    qkv[..., 32:] = 1
    with use_backend("native"):
        out = window_attention(qkv.requires_grad_(), table, num_heads=1, window_size=64)
        out.backward(torch.ones_like(out))
    eight_roundings = 8 * torch.finfo(torch.float32).eps
    assert_close(out, torch.ones_like(out), eight_roundings)
    sums = qkv.grad[..., 32:].double().sum((1, 2))
    assert_close(sums, torch.full_like(sums, 64 * 64), eight_roundings, "sum of dv")


def is_here(name):
    """Whether the processor has the instruction set: a limit lowers the choice, and no more."""
    code = "from diffit_kernels import native_library as n; print(n.CPU.ops().cpu_capability())"
    environment = os.environ | {"DIFFIT_CPU_CAPABILITY": name}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip() == name


@pytest.mark.parametrize("name", SETS)
def test_parity_on_every_instruction_set(name):
    """The native tests of all ops, in a process that may use no better one."""
    if not is_here(name):
        pytest.skip(f"this processor has no {name}")
    stages = ("window_attention", "adaln", "mlp", "group_norm", "linear", "time_projection")
    files = [f"tests/test_{stage}.py" for stage in stages]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "native", "-m", "not slow", *files]
    environment = os.environ | {"DIFFIT_CPU_CAPABILITY": name}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_sanitizers_find_nothing(tmp_path):
    """Addresses and undefined behaviour, on buffers of exactly the promised sizes."""
    if (why := native_library.CPU.missing_tool()) is not None:
        pytest.skip(why)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = "-std=c++20 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi"
    kernels = (p for p in sorted(ROOT.glob("csrc/cpu/*.cpp")) if p.name != "bindings.cpp")
    sources = [*kernels, ROOT / "tests" / "sanitizers" / "main.cpp"]
    compilations = [
        subprocess.Popen(
            [*compiler, *flags.split(), f"-I{ROOT / 'csrc'}", "-c", source, "-o", f"{index}.o"],
            cwd=tmp_path,
        )
        for index, source in enumerate(sources)
    ]
    assert [compilation.wait() for compilation in compilations] == [0] * len(sources)
    objects = [f"{index}.o" for index in range(len(sources))]
    link = [*compiler, *flags.split(), *objects, "-o", "sanitized"]
    subprocess.run(link, cwd=tmp_path, check=True)
    for name in SETS:
        if is_here(name):
            environment = os.environ | {"DIFFIT_CPU_CAPABILITY": name}
            program = tmp_path / "sanitized"
            run = subprocess.run([program], env=environment, capture_output=True, text=True)
            assert run.returncode == 0 and run.stdout == f"{name}\n", run.stderr[-3000:]
