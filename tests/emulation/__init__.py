"""CUDA kernels on the host: the sources of ``csrc/cuda/`` compiled by a C++ compiler.

``emulation.h`` stands for what nvcc has built in; the headers in ``cuda/`` are twins of those of
the same names in ``csrc/cuda/`` and are found before them; ``device.h`` says what runs the kernels.

What is compiled lies in ``build/emulation/``, named by the content of all that it is made from, and
is used again while that does not change. What nobody has used for a week is removed.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulation"
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-psabi")
FLAGS = ("-std=c++20", "-fPIC", "-g1", *WARNINGS)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ORDERS = ("ascending", "descending", "random:1", "random:2")
# Compiled without them: arithmetic on what has been checked, too slow under them, and torch.
UNWATCHED = ("warp.cpp", "wgmma.cpp", "bindings.cpp")


class Statistics(NamedTuple):
    """What was seen of a kernel, in this process; see device.h."""

    launches: int
    shared_bytes: int
    bank_conflicts: int  # the most turns that one matrix took in ldmatrix or stmatrix
    where: str


def build(sanitize: bool = False) -> Path:
    """The CUDA kernels and their bindings as a library of torch ops on CPU tensors.

    With ``sanitize``, Python must run under ``LD_PRELOAD="$(g++ -print-file-name=libasan.so)"`` and
    ``ASAN_OPTIONS=detect_leaks=0``.

    Raises:
        RuntimeError: a compilation failed; the message is the compiler's output.
    """
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    bindings = ROOT / "csrc" / "cuda" / "bindings.cpp"
    (folder,) = cpp_extension.library_paths()
    flags = ("-shared", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch_cpu")
    return _link([*sources, bindings], "library.so", flags, sanitize)


def statistics(library: Path) -> dict[str, Statistics]:
    """By kernel and shapes, of a library that ``build`` made and this process has loaded."""
    report = ctypes.CDLL(str(library)).diffit_emulation_statistics
    report.restype = ctypes.c_char_p
    lines = (line.split("\t") for line in report().decode().splitlines())
    return {
        what: Statistics(int(launches), int(shared), int(ways), where)
        for what, launches, shared, ways, where in lines
    }


def run_program(
    sources: Path | list[Path], *arguments: str, sanitize: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Compile and run a program, with the sanitizers; ``sources`` may include kernels.

    Raises:
        RuntimeError: a compilation failed; the message is the compiler's output.
    """
    sources = sources if isinstance(sources, list) else [sources]
    program = _link(sources, "program", (), sanitize)
    return subprocess.run(
        [program, *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def _link(sources: list[Path], name: str, flags: tuple[str, ...], sanitize: bool) -> Path:
    own = _digest(*_headers(HERE))
    all_of_them = _digest(own, *_headers(ROOT / "csrc" / "cuda"))
    jobs = [(source, own) for source in sorted(HERE.glob("*.cpp"))]
    jobs += [(source, all_of_them) for source in sources]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda job: _compile(*job, sanitize), jobs))
    command = [*_compiler(), *(SANITIZERS if sanitize else ()), *map(str, objects), *flags]
    return _make(command, FOLDER / _digest(*command) / name)


def _headers(folder: Path) -> list[bytes]:
    found = [*folder.rglob("*.cuh"), *folder.rglob("*.h"), ROOT / "csrc" / "number.h"]
    return [path.read_bytes() for path in sorted(found)]


def _compile(source: Path, headers: str, sanitize: bool) -> Path:
    watched = sanitize and source.name not in UNWATCHED
    level = 2 if source.parent == HERE else 1
    # Sanitizers take long to compile what is optimised: kernels half a minute each.
    command = [*_compiler(), *FLAGS, f"-O{level - watched}", "-DDIFFIT_EMULATED"]
    if watched:
        command += SANITIZERS
    if source.name == "bindings.cpp":
        command += [f"-isystem{path}" for path in cpp_extension.include_paths()] + ["-O0"]
    else:
        command += [f"-I{HERE}", "-include", "emulation.h"]
    command += [f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", str(source)]
    name = _digest(headers, *command, source.read_bytes(), _version(), torch.__version__) + ".o"
    return _make(command, FOLDER / "objects" / name)


def _make(command: list[str], result: Path) -> Path:
    """The file that a command writes, unless it is there: complete or not at all."""
    if result.exists():
        os.utime(result)
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder) / result.name
        run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")
        sys.stderr.write(run.stderr)
        os.replace(made, result)
    _forget()
    return result


@functools.cache
def _forget() -> None:
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.stat().st_mtime < time.time() - 7 * 24 * 3600:
            path.unlink(missing_ok=True)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def _version() -> str:
    return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout


def _digest(*parts: str | bytes) -> str:
    data = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(data).hexdigest()[:16]
