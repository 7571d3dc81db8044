"""The compiled kernels' library: where it comes from, and why it may be missing.

Its sources are in ``csrc/``, of the checkout or inside the installed package. The library is, in
this order,

- the one that an installation with ``--no-build-isolation`` built into the package (setup.py);
- the one in the cache folder: ``$DIFFIT_CACHE_DIR``, else ``diffit_kernels`` in
  ``$XDG_CACHE_HOME`` or ``~/.cache``; it may be deleted at any time;
- compiled on first use into that folder, once, by ``$CXX`` or ``c++`` and ninja.

Its name carries a key of all that it is made from, so that one of other sources or for another
torch is never loaded, and a digest of its content, so that a damaged one is not either: mapping a
truncated library kills the process. The compiler is no part of the key: a library runs where there
is none.

``DIFFIT_NATIVE=0`` switches the native backend off, and is read when the package is imported.
``DIFFIT_CPU_CAPABILITY`` (portable, avx2, avx512 or avx512_bf16) lowers the instruction set, which
is otherwise the best that the processor has; the first kernel raises ValueError for another name.

setup.py loads this file by its path: it must not import from the package.
"""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent
SOURCES = next(
    (path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()),
    PACKAGE / "csrc",
)
# No OpenMP library is linked: its symbols are found in the one that torch brings, so that there is
# one pool of threads, which torch.set_num_threads rules. No -march: kernels choose at run time.
FLAGS = ("-O3", "-fopenmp", "-g0", "-Wall", "-Wno-psabi")
DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_lock = threading.Lock()
_outcome: str | None = None  # of this process's one attempt: "" or why it failed
_loaded: Path | None = None


@torch.compiler.assume_constant_result  # traced code takes the answer, found outside the trace
def reason() -> str | None:
    """Why the library cannot be had, or None: then it is loaded. The first call may compile it.

    It calls no op of the library: a graph that is being captured would keep it.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = switched_off() or _obtain() or ""
    return _outcome or None


def refusal(*tensors: Tensor | None) -> str | None:
    """Why native kernels cannot take these tensors, or None: dtype, then the library."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"native kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    return reason()


def ops() -> ModuleType:
    """``torch.ops.diffit_native``, loaded: exported programs call kernels that nobody chose.

    Raises:
        NotImplementedError: the library cannot be had.
    """
    if _outcome != "" and (why := reason()) is not None:
        raise NotImplementedError(f"the native backend cannot run: {why}")
    return torch.ops.diffit_native


def switched_off() -> str | None:
    """Why the native backend is not wanted, or not meant to be, in this process, or None."""
    if os.environ.get("DIFFIT_NATIVE") == "0":
        return "switched off by DIFFIT_NATIVE=0"
    if sys.platform != "linux":
        return f"native kernels are built on Linux, this is {sys.platform}"
    return None


def obstacle() -> str | None:
    """Why the library cannot be had, as far as can be told without compiling it, or None."""
    with _lock:
        if _outcome is not None:
            return _outcome or None
        if (why := switched_off()) is not None or _load_existing():
            return why
        try:
            _open_lock().close()
        except OSError as error:
            return str(error)
        return missing_tool()


def describe() -> str:
    """How the library was or would be had, and its instruction set; compiles nothing."""
    if (why := obstacle()) is not None:
        return f"cannot be had: {why}"
    if _loaded is None:
        return f"will be compiled on first use, into {cache_folder()}"
    origin = "built ahead of time" if _loaded.parent == PACKAGE else f"compiled, {_loaded}"
    return f"{origin}; instruction set {torch.ops.diffit_native.cpu_capability()}"


def cache_folder() -> Path:
    """Where libraries compiled on first use are kept."""
    if folder := os.environ.get("DIFFIT_CACHE_DIR"):
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffit_kernels"


def key() -> str:
    """A digest of all that the library is made from, except the compiler."""
    parts = [torch.__version__, sys.platform, platform.machine(), *FLAGS]
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h")):
        parts += [path.relative_to(SOURCES).as_posix(), _digest(path)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def missing_tool() -> str | None:
    """What the compilation lacks, and how to get it, or None."""
    if not (SOURCES / "bindings.cpp").is_file():
        return f"the sources are not in {SOURCES}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which((shlex.split(compiler) or [""])[0]) is None:
        return f"there is no C++ compiler {compiler!r}; install g++ or clang++, or set CXX"
    with _ninja_on_path():
        return None if shutil.which("ninja") else "there is no ninja; pip install ninja"


def build(folder: Path) -> Path:
    """Compile the library, load it, and put it into ``folder``, complete or not at all.

    Raises:
        RuntimeError: the compilation failed; the message is the compiler's output.
    """
    from torch.utils import cpp_extension

    made_from = key()
    sources = [SOURCES / "bindings.cpp", *sorted(SOURCES.glob("cpu/*.cpp"))]
    with (
        tempfile.TemporaryDirectory(
            prefix="build-", dir=folder, ignore_cleanup_errors=True
        ) as temporary,
        _ninja_on_path(),
    ):
        cpp_extension.load(
            "diffit_native",
            [str(source) for source in sources],
            extra_cflags=list(FLAGS),
            extra_include_paths=[str(SOURCES)],
            build_directory=temporary,
            is_python_module=False,
        )
        (made,) = Path(temporary).glob("*.so")
        library = folder / f"_native_{made_from}-{_digest(made)}.so"
        if key() == made_from:  # else a source was edited meanwhile, and the name would be wrong
            os.replace(made, library)
    return library


def _obtain() -> str | None:
    """Load the library, compiled if need be; or why that cannot be done."""
    if _load_existing():
        return None
    if (why := missing_tool()) is not None:
        return why
    try:
        lock = _open_lock()
    except OSError as error:
        return str(error)
    with lock:
        _acquire(lock)
        return None if _load_existing() else _compile(cache_folder())


def _compile(folder: Path) -> str | None:
    """Compile into the cache folder, whose lock is held, and say so; or why that failed."""
    global _loaded
    for left in folder.glob("build-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    _say(f"compiling the CPU kernels, once, into {folder} (about half a minute)")
    start = time.monotonic()
    try:
        _loaded = build(folder)
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).splitlines() or [repr(error)]
        log = folder / f"_native_{key()}.log"
        with contextlib.suppress(OSError):
            log.write_text("\n".join(lines))
        first = next((line for line in lines if "error:" in line), lines[-1])
        _say(why := f"compiling the CPU kernels failed: {first.strip()} (all of it: {log})")
        return why
    _say(f"compiled in {time.monotonic() - start:.0f} s")
    return None


def _libraries() -> Iterator[Path]:
    """Libraries of these sources: in the package, then in the cache folder."""
    pattern = f"_native_{key()}-*.so"
    yield from PACKAGE.glob(pattern)
    with contextlib.suppress(RuntimeError):  # there is no home folder
        yield from cache_folder().glob(pattern)


def _load_existing() -> bool:
    """Load a library that has been made, if there is one; remove those that are damaged."""
    global _loaded
    for path in _libraries():
        try:
            if _digest(path) != path.stem.rpartition("-")[2]:
                raise OSError("its content has changed")
            torch.ops.load_library(path)
            _loaded = path
            return True
        except OSError as error:
            _say(f"{path} cannot be loaded and will be made again: {error.__cause__ or error}")
            with contextlib.suppress(OSError):
                path.unlink()
    return False


def _open_lock() -> IO[str]:
    """The lock file of the cache folder, which is made if need be."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "lock", "a")
    except (OSError, RuntimeError) as error:
        text = f"the cache folder cannot be written: {error}; set DIFFIT_CACHE_DIR to another"
        raise OSError(text) from error


def _acquire(lock: IO[str]) -> None:
    """Become the folder's one builder; the kernel frees the lock of a process that is killed."""
    import fcntl  # which Windows lacks

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("another process is compiling the CPU kernels; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Within the context, PATH has the ninja package's program, which it need not have outside."""
    before = os.environ.get("PATH")
    with contextlib.suppress(ImportError):
        import ninja

        path = os.defpath if before is None else before
        os.environ["PATH"] = os.pathsep.join(filter(None, (path, ninja.BIN_DIR)))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PATH", None)
        else:
            os.environ["PATH"] = before


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _say(text: str) -> None:
    print(f"diffit_kernels: {text}", file=sys.stderr, flush=True)
