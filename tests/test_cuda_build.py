"""The CUDA kernels by nvcc, without a GPU: all compile and link, nothing spills, and the
instructions that they are written for are in the machine code.

The library is compiled once, for four architectures, as a first use does, into a cache folder in
``build/``, and is used again while its sources do not change. No kernel runs here.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from diffit_kernels import native_library
from diffit_kernels.native_library import cuda

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"sm_80": "8.0", "sm_90a": "9.0", "sm_100a": "10.0", "sm_120": "12.0"}
SPILLS = """
__global__ void __launch_bounds__(1024) planted_kernel(float* numbers) {
  float held[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) held[i] = numbers[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 200; ++i) numbers[i * 1024 + threadIdx.x] = held[i * 7 % 200] * held[i];
}
"""
STACK = """
__global__ void planted_kernel(float* numbers, int at) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = numbers[i];
  for (int i = 0; i < 64; ++i) held[(at + i) % 64] += held[(at * i) % 64];
  numbers[threadIdx.x] = held[at];
}
"""

pytestmark = pytest.mark.skipif(cuda.find_nvcc() is None, reason="there is no nvcc")


class Kernel(NamedTuple):
    """What ptxas said of one kernel on one architecture."""

    name: str
    architecture: str
    stack: int
    stores: int
    loads: int
    registers: int

    def fault(self):
        """Which numbers should be zero, or None."""
        if not (self.stack or self.stores or self.loads):
            return None
        return (
            f"{demangled(self.name)} on {self.architecture}: {self.stack} bytes of stack, spills "
            f"of {self.stores} bytes stored and {self.loads} loaded, {self.registers} registers"
        )


def kernels_of(report):
    """The kernels of nvcc's output, in order."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*Function properties for \1\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    found = [
        Kernel(name, architecture, *map(int, numbers))
        for name, architecture, *numbers in re.findall(pattern, report)
    ]
    assert len(found) == report.count("Compiling entry function")  # none is overlooked
    return found


def demangled(name):
    filter_ = shutil.which("c++filt")
    command = [filter_, "-p", name]
    return subprocess.check_output(command, text=True).strip() if filter_ else name


class Built(NamedTuple):
    library: Path
    report: str
    kernels: list[Kernel]


def folder():
    return ROOT / "build" / f"cuda-{cuda.nvcc_release(cuda.find_nvcc())}"


def run(code):
    """A process that sees no GPU, and compiles for all architectures."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DIFFIT_CACHE_DIR": str(folder()),
        "MAX_JOBS": "2",
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES.values()),
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


OBTAIN = """
import torch
from diffit_kernels import native_library
why = native_library.CUDA.obtain()
assert why is None, why
"""


@pytest.fixture(scope="module")
def built():
    if (why := native_library.CUDA.missing_tool()) is not None and "GPU" not in why:
        pytest.skip(why)
    process = run(OBTAIN + "print(native_library.CUDA._loaded)")
    assert process.returncode == 0, process.stderr
    library = Path(process.stdout.strip())
    log = library.with_name(library.stem.rpartition("-")[0] + ".log")
    for old in folder().glob("_native_*"):
        if old not in (library, log):
            old.unlink()
    return Built(library, log.read_text(), kernels_of(log.read_text()))


def test_every_source_is_compiled_for_every_architecture(built):
    for source in ROOT.glob("csrc/cuda/*.cu"):
        assert f"] {source.name}\n" in built.report
    counts = Counter(kernel.architecture for kernel in built.kernels)
    assert set(counts) == set(ARCHITECTURES) and len(set(counts.values())) == 1


def test_no_kernel_spills_or_has_a_stack_frame(built):
    faults = [fault for kernel in built.kernels if (fault := kernel.fault())]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("planted", [SPILLS, STACK], ids=["spills", "stack"])
def test_a_planted_kernel_that_spills_is_found(tmp_path, planted):
    (tmp_path / "planted.cu").write_text(planted)
    report = cuda.compile_objects([tmp_path / "planted.cu"], tmp_path, ["80", "90a"])
    faults = [kernel.fault() for kernel in kernels_of(report)]
    assert len(faults) == 2 and None not in faults
    assert re.match(r"planted_kernel.* on sm_80: [1-9]\d* bytes of stack, ", faults[0])


USE = """
def attempt(name, *arguments):
    try:
        getattr(torch.ops.diffit_cuda, name)(*arguments)
    except RuntimeError as error:
        print(error)

qkv = torch.zeros(1, 4, 4, 96, dtype=torch.bfloat16)
geometry = (1, [4, 4], 1.0, False)
attempt("window_attention_forward", qkv, None, None, *geometry, qkv, qkv)
attempt("window_attention_backward", qkv, qkv, None, None, qkv, qkv, *geometry, qkv, qkv, qkv)
"""


def test_the_library_loads_without_a_gpu_and_refuses_tensors_on_a_cpu(built):
    process = run(OBTAIN + USE)
    assert process.stderr == ""  # nothing is compiled again
    refusal = "CUDA kernels take tensors on a GPU, got shape [1, 4, 4, 96] on cpu"
    assert [line for line in process.stdout.splitlines() if line == refusal] == [refusal] * 2


def machine_code(library, architecture):
    """(name of a kernel, its instructions) of a library."""
    disassembler = shutil.which("cuobjdump")
    if disassembler is None and (triton := importlib.util.find_spec("triton")) is not None:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        disassembler = shutil.which("cuobjdump", path=str(folder))
    if disassembler is None:
        pytest.skip("there is no cuobjdump")
    command = [disassembler, "-sass", "-arch", architecture, library]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", code, re.DOTALL)


@pytest.mark.parametrize(
    "kernel, architecture, instructions",
    [
        ("window_attention_forward_kernel", "sm_80", ("HMMA.16816", "LDGSTS", "LDSM")),
        ("window_attention_forward_hopper_kernel", "sm_90a", ("HGMMA", "UTMALDG", "SYNCS")),
    ],
)
def test_kernels_have_the_instructions_they_are_written_for(
    built, kernel, architecture, instructions
):
    found = [code for name, code in machine_code(built.library, architecture) if kernel in name]
    assert found
    for code in found:
        for instruction in instructions:
            assert instruction in code
