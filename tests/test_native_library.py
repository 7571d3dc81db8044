"""The compiled kernels' library: found, compiled once, shared, repaired; or missing with a reason.

Each case runs in fresh processes with a cache folder of its own. One small library is really
compiled; a stand-in for the compiler then copies it, at once or when it is let go, or fails.
"""

import os
import signal
import time

import pytest

from diffit_kernels import native_library
from tests.compiling import ROOT, Place, digest

BINDINGS = """
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <mutex>
#include <set>
#include <thread>

std::string cpu_capability() { return "toy"; }

int64_t threads() {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, 8, 1, [&](int64_t, int64_t) {
    std::lock_guard<std::mutex> guard(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}

TORCH_LIBRARY(diffit_native, library) {
  library.def("cpu_capability() -> str", &cpu_capability);
  library.def("threads() -> int", &threads);
}
"""
TOY = """
import os
from pathlib import Path

import torch

from diffit_kernels import dispatch, native_library

if folder := os.environ.get("TOY_SOURCES"):
    native_library.CPU.sources = Path(folder)

first, second = (
    dispatch.FusedOp(
        name,
        "toy",
        schema="(Tensor x) -> Tensor",
        backward_schema="(Tensor grad) -> Tensor",
        fake=torch.empty_like,
        backward_fake=torch.empty_like,
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda op, ctx, grad: op(grad),
    )
    for name in ("first", "second")
)
x = torch.ones(3)


def call(x):
    return second(x.device, first(x.device, x))
"""
EAGER = "forward = backward = lambda x: x * 2"
NATIVE = """
from diffit_kernels import native_library

can_run = native_library.CPU.refusal


def forward(x):
    native_library.CPU.ops()
    return x * 3


backward = forward
"""


def toy_place(folder, modules, sources):
    """A place whose processes find the toy stage, and compile the toy sources."""
    place = Place(folder)
    place.environment["PYTHONPATH"] = os.pathsep.join([str(modules), str(ROOT)])
    place.environment["TOY_SOURCES"] = str(sources)
    return place


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """The folder of a stage with two ops, an eager and a native backend."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "toy").mkdir()
    for name, text in (("__init__", TOY), ("eager", EAGER), ("native", NATIVE)):
        (folder / "toy" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, modules):
    """A place with a library of toy sources, really compiled, and what the process said."""
    if (why := native_library.CPU.missing_tool()) is not None:
        pytest.skip(why)
    sources = tmp_path_factory.mktemp("sources")
    (sources / "cpu").mkdir()
    (sources / "cpu" / "bindings.cpp").write_text(BINDINGS)
    place = toy_place(tmp_path_factory.mktemp("compiled"), modules, sources)
    place.said = place.run("import toy; assert toy.first.choose(toy.x.device, toy.x) == 'native'")
    (place.library,) = place.cache.glob("*.so")
    return place


@pytest.fixture
def place(tmp_path, modules, compiled):
    """An empty place with the toy sources; ``stand_in`` copies what was compiled."""
    return toy_place(tmp_path, modules, compiled.environment["TOY_SOURCES"])


def test_the_first_use_compiles_and_says_so_and_the_second_is_silent(compiled):
    started, ended = compiled.said[1].splitlines()
    assert "compiling the CPU kernels, once, into" in started and str(compiled.cache) in started
    assert ended.startswith("diffit_kernels: compiled in ") and ended.endswith(" s")
    assert compiled.files() == [".so", "lock"]
    assert compiled.run("import toy; print(toy.call(toy.x).tolist())") == ("[9.0, 9.0, 9.0]", "")


def test_kernels_share_the_threads_of_torch(compiled):
    """One OpenMP library in the process, whose pool torch.set_num_threads rules."""
    code = """
import toy
threads = []
for number in (1, 2, 3, 1):
    toy.torch.set_num_threads(number)
    threads.append(toy.native_library.CPU.ops().threads())
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
print(threads, len(libraries))
"""
    assert compiled.run(code) == ("[1, 2, 3, 1] 1", "")


TRACED = """
import os, toy
from toy import torch, call, x, native_library
from torch._subclasses.fake_tensor import FakeTensorMode

def fake():
    with (mode := FakeTensorMode()):
        return str(call(mode.from_tensor(x)).shape)

def exported(strict):
    module = torch.nn.Module()
    module.forward = call
    graph = torch.export.export(module, (x,), strict=strict).graph
    return sorted(str(node.target) for node in graph.nodes if node.op == "call_function")

def compiled():
    return torch.compile(call, fullgraph=True, backend="aot_eager")(x).tolist()

for trace in (fake, compiled, lambda: exported(True), lambda: exported(False)):
    if os.fork() == 0:  # a process in which nothing is loaded yet
        assert native_library.CPU._loaded is None
        result = trace()
        assert native_library.CPU._loaded is not None
        print(result, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_traced_code_loads_the_library(compiled):
    """Each way to capture a graph, in a process in which nothing is loaded yet."""
    names = "['diffit.first.native', 'diffit.second.native']"
    assert compiled.run(TRACED)[0].splitlines() == [
        "torch.Size([3])",
        "[9.0, 9.0, 9.0]",
        names,
        names,
    ]


def test_an_exported_program_loads_the_library(compiled):
    """It names the native op, so that nothing asks which backend to take."""
    compiled.run("""
import toy
module = toy.torch.nn.Module()
module.forward = toy.call
toy.torch.export.save(toy.torch.export.export(module, (toy.x,)), "program.pt2")
""")
    code = "import toy; print(toy.torch.export.load('program.pt2').module()(toy.x).tolist())"
    assert compiled.run(code)[0] == "[9.0, 9.0, 9.0]"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_and_threads_that_start_together_compile_once(place, compiled):
    held_by = place.folder / "held"
    held_by.touch()
    place.stand_in(compiled.library, held_by)
    code = """
import threading, toy
threads = [threading.Thread(target=toy.native_library.CPU.reason) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert toy.native_library.CPU.reason() is None
"""
    first = place.start(code)
    try:
        wait_for(place.links)
        second = place.start(code)
        said = second.stderr.readline()
    finally:
        held_by.unlink()
    assert "another process is compiling the CPU kernels; waiting for it" in said
    assert second.communicate(timeout=120) == ("", "") and second.returncode == 0
    assert "compiled in" in first.communicate(timeout=120)[1] and first.returncode == 0
    assert place.links() == 1


def test_a_killed_compilation_is_cleared_away(place, compiled):
    held_by = place.folder / "held"
    held_by.touch()
    place.stand_in(compiled.library, held_by)
    process = place.start("import toy; toy.native_library.CPU.reason()", start_new_session=True)
    try:
        wait_for(place.links)
        process.kill()
        process.wait()
        assert place.files() == ["build", "lock"]
        place.stand_in(compiled.library)
        said = place.run("import toy; assert toy.native_library.CPU.reason() is None")[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # ninja; the compiler is in a group of its own,
        held_by.unlink()  # and goes on
        process.communicate()
    assert "another process" not in said and "compiled in" in said
    assert place.files() == [".so", "lock"]


@pytest.mark.parametrize("kind", ["truncated", "not a library"])
def test_a_damaged_library_is_made_again(place, compiled, kind):
    place.cache.mkdir()
    content = compiled.library.read_bytes()[:-5000] if kind == "truncated" else b"no library"
    damaged = place.cache / compiled.library.name
    damaged.write_bytes(content)
    if kind == "not a library":
        key = compiled.library.stem.rpartition("-")[0]
        damaged = damaged.rename(place.cache / f"{key}-{digest(damaged)}.so")
    place.stand_in(compiled.library)
    code = "import toy; assert toy.native_library.CPU.reason() is None"
    said = place.run(code)[1]
    assert f"{damaged} cannot be loaded and will be made again" in said and "compiled in" in said
    assert place.run(code)[1] == "" and place.links() == 1
    assert damaged.exists() == (kind == "truncated")


EAGER_SERVES = """
import warnings, toy
from diffit_kernels.info import info
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert toy.call(toy.x).tolist() == [4.0] * 3 == toy.call(toy.x).tolist()
try:
    toy.first(toy.x.device, toy.x, backend="native")
except NotImplementedError as error:
    print(error)
assert "first              runs on eager" in info()
print(*(line for line in info().splitlines() if "native" in line), sep="\\n")
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.mark.parametrize("variable, name", [("CXX", "/nowhere/c++"), ("PATH", "c++")])
def test_without_a_compiler_eager_serves_and_one_warning_says_why(place, variable, name):
    place.environment.pop("CXX", None)
    place.environment[variable] = "/nowhere/c++" if variable == "CXX" else ""
    why = f"there is no C++ compiler '{name}'; install g++ or clang++, or set CXX"
    printed, said = place.run(EAGER_SERVES)
    assert said == ""
    assert f"first: backend 'native' cannot run this on cpu: {why}. Backends that can" in printed
    assert f"native CPU kernels: cannot be had: {why}" in printed
    assert f"not native: {why}" in printed
    assert printed.count("is passed over") == 1
    assert f"first: the faster backend 'native' is passed over: {why}. See" in printed


def test_a_failed_compilation_is_tried_once_and_leaves_a_log(place):
    place.stand_in(None)
    printed, said = place.run(EAGER_SERVES)
    (log,) = place.cache.glob("_native_*.log")
    why = f"compiling the CPU kernels failed: a.cpp:1:2: error: it is Tuesday (all of it: {log})"
    assert said.count("(about half a minute)") == 1 and why in said
    assert printed.count("is passed over") == 1 and why in printed
    assert "FAILED" in log.read_text()


def test_an_unwritable_cache_folder_is_a_reason(place, compiled):
    place.stand_in(compiled.library)
    place.cache.write_text("a file")
    printed, said = place.run(EAGER_SERVES)
    assert "the cache folder cannot be written: " in printed and str(place.cache) in printed
    assert "set DIFFIT_CACHE_DIR to another" in printed and said == ""


def test_switched_off_by_the_user_is_no_warning(place):
    place.environment["DIFFIT_NATIVE"] = "0"
    printed, said = place.run(EAGER_SERVES)
    assert "cannot run this on cpu: switched off by DIFFIT_NATIVE=0. Backends" in printed
    assert "not native: switched off by DIFFIT_NATIVE=0" in printed
    assert "passed over" not in printed and said == ""


def test_info_says_what_will_be_done_and_does_not_do_it(place, compiled):
    place.stand_in(compiled.library)
    code = "import toy; from diffit_kernels.info import info; print(info())"
    text, said = place.run(code)
    assert f"native CPU kernels: will be compiled on first use, into {place.cache}" in text
    assert "first              runs on native" in text
    assert place.links() == 0 and said == ""
    text, said = place.run(code.replace("print", "toy.native_library.CPU.ops(); print"))
    assert f"native CPU kernels: compiled, {place.cache}" in text and "instruction set toy" in text
    assert place.links() == 1 and "compiled in" in said
