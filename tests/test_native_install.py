"""What the compiled kernels' libraries are made from, and how installations come by them."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from diffit_kernels import native_library
from tests.compiling import ROOT, Place


@pytest.mark.parametrize("name, allowed", [("portable", True), ("sse9", False)])
def test_the_instruction_set_can_be_lowered(name, allowed):
    """In a library of the true sources, which must compile where there is a compiler."""
    if (why := native_library.CPU.missing_tool()) is not None:
        pytest.skip(why)
    assert native_library.CPU.reason() is None
    code = "from diffit_kernels import native_library as n; print(n.CPU.ops().cpu_capability())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DIFFIT_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if allowed:
        assert result.stdout.strip() == name, result.stderr
    else:
        assert "ValueError: DIFFIT_CPU_CAPABILITY must be portable, avx2, " in result.stderr
        assert "got 'sse9'" in result.stderr


def test_the_keys_follow_everything_that_is_compiled(tmp_path, monkeypatch):
    """Each that of its own library alone: an edited kernel recompiles no other device's."""
    libraries = (native_library.CPU, native_library.CUDA)
    keys = [library.key() for library in libraries]
    shutil.copytree(native_library.CPU.sources, tmp_path / "csrc")
    for library in libraries:
        monkeypatch.setattr(library, "sources", tmp_path / "csrc")
    assert [library.key() for library in libraries] == keys
    seen = {*keys}

    def check(*expected):
        """Which of the keys have changed, to ones not seen before."""
        new = [library.key() for library in libraries]
        changed = [n != old for n, old in zip(new, keys, strict=True)]
        assert changed == [name in expected for name in ("cpu", "cuda")]
        assert not seen & {n for n, has in zip(new, changed, strict=True) if has}
        keys[:] = new
        seen.update(new)

    for path, *names in (
        ("README.md",),
        ("cpu/bindings.cpp", "cpu"),
        ("cpu/kernels.cpp", "cpu"),
        ("cpu/kernels.h", "cpu"),
        ("cuda/bindings.cpp", "cuda"),
        ("cuda/window_attention.cu", "cuda"),
        ("cuda/ptx/mma.cuh", "cuda"),
        ("number.h", "cpu", "cuda"),
    ):
        with open(tmp_path / "csrc" / path, "a") as file:
            file.write("\n")
        check(*names)
    (tmp_path / "csrc" / "cpu" / "kernels.h").rename(tmp_path / "csrc" / "cpu" / "other.h")
    check("cpu")
    monkeypatch.setattr(native_library.CPU, "flags", ("-O1",))
    check("cpu")
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    check("cuda")
    monkeypatch.setattr(torch, "__version__", "3.0")
    check("cpu", "cuda")


BUILD_WHEEL = "import setuptools.build_meta as meta; print(meta.build_wheel('wheels'))"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a wheel is made from, and the sources of the kernels in it."""
    place = Place(tmp_path)
    for name in ("diffit_kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, place.folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, place.folder)
    place.environment["PYTHONPATH"] = ""
    return place


@pytest.mark.parametrize("compiler", ["missing", "failing"])
def test_a_wheel_needs_no_compiler_and_has_the_sources(checkout, compiler):
    checkout.environment["CXX"] = "/nowhere/c++"
    if compiler == "failing":
        checkout.stand_in(None)
    printed, said = checkout.run(BUILD_WHEEL)
    wheel = checkout.folder / "wheels" / printed.splitlines()[-1]
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.[ch]*")}
    assert {f"diffit_kernels/{name}" for name in kernels} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".log", ".o"))]
    if compiler == "missing":
        assert wheel.name.endswith("-py3-none-any.whl")
        assert "no CPU kernels are built ahead of time: there is no C++ compiler" in said
        assert "no CUDA kernels are built ahead of time: " in said
    else:
        assert "it is Tuesday" in said and "the first use will compile the CPU kernels" in said


def test_a_wheel_built_with_torch_at_hand_has_the_library(checkout):
    if (why := native_library.CPU.reason()) is not None:
        pytest.skip(why)
    checkout.stand_in(native_library.CPU._loaded)
    printed, _ = checkout.run(BUILD_WHEEL)
    target = checkout.folder / "target"
    with zipfile.ZipFile(checkout.folder / "wheels" / printed.splitlines()[-1]) as wheel:
        wheel.extractall(target)
    check_ahead_of_time(checkout, target)


def test_a_wheel_built_with_cuda_has_both_libraries(checkout):
    """The CUDA one is for the listed architectures, and serves GPUs of each."""
    checkout.stand_in(checkout.empty_library())
    checkout.stand_in_for_cuda("8.0;9.0")
    with_cuda = "import torch; torch.version.cuda = '13.0'\n"
    printed, _ = checkout.run(with_cuda + BUILD_WHEEL)
    target = checkout.folder / "target"
    with zipfile.ZipFile(checkout.folder / "wheels" / printed.splitlines()[-1]) as wheel:
        wheel.extractall(target)
    made = sorted(path.name for path in (target / "diffit_kernels").glob("_native_*"))
    assert [name.split("_")[2] for name in made] == ["cpu", "cuda"] and "-80.90a-" in made[1]
    install(checkout, target)
    checkout.environment["TORCH_CUDA_ARCH_LIST"] = ""
    code = """
torch.cuda.device_count, torch.cuda.get_device_capability = lambda: 1, lambda index: (9, 0)
from diffit_kernels import native_library
print(native_library.CUDA.describe())
"""
    assert checkout.run(with_cuda + code) == ("built ahead of time; for sm_80, sm_90a", "")


@pytest.mark.slow
def test_an_installation_with_torch_at_hand_builds_ahead_of_time(checkout):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", "target", "."]
    command = [sys.executable, "-m", "pip", "install", *options]
    subprocess.run(command, cwd=checkout.folder, env=checkout.environment, check=True)
    check_ahead_of_time(checkout, checkout.folder / "target")


def install(place, target):
    """From here on, processes find this package, not the checkout's, and no compiler."""
    shutil.rmtree(place.folder / "diffit_kernels")
    shutil.rmtree(place.folder / "csrc")
    place.environment |= {"PYTHONPATH": str(target), "CXX": "/nowhere/c++"}


def check_ahead_of_time(place, target):
    """An installation serves without a compiler, and without a cache folder."""
    install(place, target)
    code = "from diffit_kernels import native_library as n; n.CPU.ops(); print(n.CPU.describe())"
    printed, said = place.run(code)
    assert printed.startswith("built ahead of time; instruction set") and said == ""
    assert not place.cache.exists()
