"""The CUDA kernels' library without CUDA: what it is compiled for, what it lacks, what is said.

A stand-in for nvcc makes empty objects or fails, and one for the C++ compiler "links" them to a
library that is there. tests/test_cuda_build.py has the true compiler.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffit_kernels import native_library
from diffit_kernels.dispatch import PREFERENCE, REGISTRY
from diffit_kernels.info import info
from diffit_kernels.ops import window_attention
from diffit_kernels.ops.window_attention import native
from tests.compiling import Place

ON_CUDA = """
from pathlib import Path

import torch
from diffit_kernels import native_library
from diffit_kernels.ops import window_attention

torch.version.cuda = "13.0"
native_library.CUDA.sources = Path("csrc").resolve()
native_library.on_cuda = lambda tensor: tensor.dtype == torch.bfloat16
qkv = torch.zeros(1, 4, 4, 96, dtype=torch.bfloat16)


def call(x=qkv, **options):
    return window_attention(x, num_heads=1, window_size=4, **options)
"""


@pytest.fixture
def place(tmp_path):
    """A place with stand-ins for both compilers, sources, and a torch for CUDA by name."""
    place = Place(tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("bindings.cpp", "a.cu", "b.cu"):
        (tmp_path / "csrc" / "cuda" / name).touch()
    place.stand_in_for_cuda("8.0;9.0")
    place.stand_in(None)
    return place


@pytest.fixture
def here(place, monkeypatch):
    """The same for this process; returns the function that changes a variable."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch.setenv


@pytest.fixture
def obtainable(place):
    """The place, where a compilation succeeds."""
    place.stand_in(place.empty_library())
    return place


def test_the_first_use_compiles_with_progress_and_the_second_is_silent(obtainable):
    code = ON_CUDA + "assert native_library.CUDA.reason() is None; print(native_library.CUDA"
    printed, said = obtainable.run(code + ".describe())")
    started, names, *files, ended = said.splitlines()
    assert "compiling the CUDA kernels, once, into" in started and "(minutes; MAX_JOBS" in started
    assert names == "diffit_kernels: architectures: sm_80, sm_90a"
    assert sorted(line[-4:] for line in files) == ["a.cu", "b.cu"]
    assert [line.split()[1] for line in files] == ["[1/2]", "[2/2]"]
    assert ended.startswith("diffit_kernels: compiled in ")
    assert obtainable.files() == [".log", ".so", "lock"]
    (library,) = obtainable.cache.glob("*.so")
    (log,) = obtainable.cache.glob("*.log")
    assert printed == f"compiled, {library}; for sm_80, sm_90a"
    assert log.read_text().count("Compiling entry function") == 2
    assert obtainable.run(code + "._loaded)") == (str(library), "")


def test_a_library_serves_the_architectures_in_its_name(obtainable):
    code = ON_CUDA + "print(native_library.CUDA.reason(), native_library.CUDA.made_for())"
    made = []
    for architectures, names in (
        ("8.0;9.0", "sm_80, sm_90a"),
        ("9.0", "sm_80, sm_90a"),
        ("8.0;12.0", "sm_80, sm_120"),
    ):
        obtainable.environment["TORCH_CUDA_ARCH_LIST"] = architectures
        printed, said = obtainable.run(code)
        assert printed == f"None for {names}"
        made.append("compiled in" in said)
    assert made == [True, False, True]


def test_a_failing_nvcc_costs_no_cpu_kernels_and_leaves_a_log(place):
    code = """
for _ in range(2):
    try:
        call(backend="native")
    except NotImplementedError as error:
        print(error)
print(native_library.CPU._outcome)
"""
    printed, said = place.run(ON_CUDA + code)
    (log,) = place.cache.glob("_native_cuda_*.log")
    why = f"compiling the CUDA kernels failed: a.cu(12): error: it is Tuesday (all of it: {log})"
    assert said.count("compiling the CUDA kernels, once") == 1 and said.count(why) == 1
    first, second, untouched = printed.splitlines()
    assert f"backend 'native' cannot run this on cpu: {why}. Backends that can: eager" in first
    assert first == second and untouched == "None"
    assert "FAILED" in log.read_text()


def test_an_order_without_nvcc_names_it_and_what_serves(here, monkeypatch):
    here("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(native_library, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(native_library.CUDA, "_outcome", None)
    qkv = torch.zeros(1, 4, 4, 96, dtype=torch.bfloat16)
    why = (
        "there is no nvcc in CUDA_HOME, /nowhere; install the CUDA toolkit, or set CUDA_HOME to it"
    )
    with pytest.raises(NotImplementedError, match=rf"{why}\. Backends that can: eager"):
        window_attention(qkv, num_heads=1, window_size=4, backend="native")


@pytest.mark.parametrize(
    "variable, value, why",
    [
        ("STANDIN_CUDA", "12.9", "nvcc is of CUDA 12.9, and this torch of CUDA 13.0; install the"),
        ("TORCH_CUDA_ARCH_LIST", "7.5;Ampere", "there is no GPU to compile for; set TORCH_CUDA_A"),
        ("CXX", "/nowhere/c++", "there is no C++ compiler '/nowhere/c++'"),
        ("STANDIN_CUDA", "13.2", None),
    ],
)
def test_what_is_missing_is_said(here, variable, value, why):
    here(variable, value)
    said = native_library.CUDA.missing_tool()
    assert said is None if why is None else why in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is for CUDA")
def test_a_torch_without_cuda_is_a_reason_and_info_gives_it():
    why = f"this torch, {torch.__version__}, is built without CUDA"
    assert native_library.CUDA.obstacle() == why
    (line,) = (line for line in info().splitlines() if line.startswith("native CUDA kernels"))
    assert "not yet proven on hardware; backend='native' runs them" in line
    assert line.endswith(f"cannot be had: {why}")


def test_architectures_are_those_at_hand_or_those_listed(here, monkeypatch):
    def names(listed, *present):
        here("TORCH_CUDA_ARCH_LIST", listed)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(present))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: present[index])
        return native_library.CUDA.architectures()

    assert names("", (9, 0), (8, 6), (9, 0), (7, 5)) == ["86", "90a"]
    assert names("", (10, 0), (12, 0), (8, 9)) == ["89", "100a", "120"]
    assert names("7.5 8.0,9.0a;10.0 12.0+PTX Ampere") == ["80", "90a", "100a", "120"]
    assert names("8.0", (9, 0)) == ["90a"]
    monkeypatch.setattr(native_library.CUDA, "ahead_of_time", True)
    assert names("8.0", (9, 0)) == ["80"] and names("", (9, 0)) == ["90a"]


def test_an_error_lists_what_serves_without_compiling_it(here, monkeypatch, capfd):
    """The order for another backend fails; native could serve, once compiled."""
    monkeypatch.setattr(native_library, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(native_library.CUDA, "_outcome", None)
    monkeypatch.setitem(REGISTRY["window_attention"]._missing, "triton", ("it is Monday", False))
    qkv = torch.zeros(1, 4, 4, 96, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"Monday\. Backends that can: eager, native"):
        window_attention(qkv, num_heads=1, window_size=4, backend="triton")
    assert capfd.readouterr().err == ""


def test_no_default_on_cuda_is_native_until_it_is_proven():
    assert PREFERENCE["cuda"] == ("triton", "eager")


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors count as a GPU's, of the capability that the returned function is given."""
    monkeypatch.setattr(native_library, "on_cuda", lambda tensor: True)
    monkeypatch.setattr(native_library.CUDA, "_outcome", "")

    def of(capability):
        monkeypatch.setattr(native_library, "capability", lambda device: capability)

    of(90)
    return of


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    "why, case",
    [
        (None, {}),
        (None, {"temb": torch.zeros(2, 128)}),
        (r"take bfloat16 and float16, got torch\.float32", {"qkv": torch.zeros(2, 4, 4, 192)}),
        (r"head_dim must be one of \(32, 64, 72, 96, 128\) .* got 16", {"heads": 4}),
        (r"a window's sides must be at most 32, got \(33, 4\)", {"window": (33, 4)}),
        (r"got torch\.float64", {"temb": torch.zeros(2, 128).double()}),
        ("need an sm_80 GPU or newer, got sm_75", {"capability": 75}),
    ],
)
def test_refusals_say_the_rule_and_the_value(on_gpu, why, case):
    on_gpu(case.get("capability", 90))
    qkv, heads, window = half(2, 4, 4, 192), case.get("heads", 2), case.get("window", (4, 4))
    said = native.can_run(case.get("qkv", qkv), case.get("temb"), None, heads, window, 1.0)
    assert said is None if why is None else re.search(why, said)


@pytest.mark.parametrize(
    "capability, served, hopper",
    [(90, True, True), (90, False, False), (80, True, False), (100, True, False)],
)
def test_hopper_kernels_run_on_hopper_for_what_they_serve(
    on_gpu, monkeypatch, capability, served, hopper
):
    on_gpu(capability)
    calls = []
    ops = SimpleNamespace(
        window_attention_hopper_serves=lambda *inputs: served,
        window_attention_forward=lambda *arguments: calls.append(arguments[6]),
        window_attention_backward=lambda *arguments: calls.append(arguments[9]),
    )
    monkeypatch.setattr(native_library.CUDA, "ops", lambda: ops)
    qkv, table, geometry = half(2, 4, 4, 192), torch.zeros(49, 2), (2, (4, 4), 1.0)
    out, lse = native.forward(qkv, None, table, *geometry)
    grads = native.backward(out, qkv, None, table, out, lse, *geometry)
    assert calls == [hopper, hopper]
    assert [grad.shape for grad in grads] == [qkv.shape, (0,), table.shape]
    assert grads[2].dtype == torch.float32


def test_no_windows_run_no_kernels(on_gpu):
    """Sums over nothing are zero, and no library is asked."""
    qkv, temb, table, geometry = half(0, 4, 4, 192), half(0, 128), half(49, 2), (2, (4, 4), 1.0)
    out, lse = native.forward(qkv, temb, table, *geometry)
    dqkv, dtemb, dtable = native.backward(out, qkv, temb, table, out, lse, *geometry)
    assert out.shape == (0, 4, 4, 64) and lse.shape == (0, 2, 16)
    assert dqkv.shape == qkv.shape and dtemb.shape == temb.shape and torch.equal(dtable, table)


def test_fakes_promise_what_each_device_saves():
    with FakeTensorMode():
        for device, lse in (("cpu", (0,)), ("cuda", (12, 2, 16))):
            qkv = torch.empty(2, 8, 12, 192, device=device, dtype=torch.float16)
            out, saved = native.fake(qkv, None, None, 2, (4, 4), 1.0)
            assert out.shape == (2, 8, 12, 64) and out.dtype == torch.float16
            assert saved.shape == lse and (saved.dtype == torch.float32) == (device == "cuda")
