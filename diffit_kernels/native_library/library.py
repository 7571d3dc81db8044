"""A compiled library: found, or compiled once, and loaded; or missing, with the reason in words."""

import contextlib
import hashlib
import os
import platform
import re
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

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = next(
    (path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()),
    PACKAGE / "csrc",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_state = threading.local()


class Library:
    """The library of one device's kernels, at most once in a process.

    Its sources are those of the folder of its name in ``csrc``, and the headers beside the folders.
    The file's name carries a key of all that it is made from, so that one of other sources or for
    another torch is never loaded, and a digest of its content, so that a damaged one is not either:
    mapping a truncated library kills the process. The compiler is no part of the key: a library
    runs where there is none.
    """

    name: str  # of the folder in csrc, and in the names of files
    title: str  # in messages
    namespace: str  # of its ops in torch.ops
    duration: str  # of the compilation
    flags: tuple[str, ...]  # of the C++ compiler

    def __init__(self):
        self.sources = SOURCES
        self.ahead_of_time = False  # whether an installation compiles, for others' processes
        self.report = ""  # what the compiler said of the kernels, if it is worth keeping
        self._lock = threading.Lock()
        self._outcome: str | None = None  # of this process's one attempt: "" or why it failed
        self._loaded: Path | None = None

    @torch.compiler.assume_constant_result  # traced code takes the answer, found outside the trace
    def reason(self) -> str | None:
        """Why the library cannot be had, or None: then it is loaded. The first call may compile it,
        unless it is made in :func:`without_compiling`.

        It calls no op of the library: a graph that is being captured would keep it.
        """
        if getattr(_state, "without_compiling", False):
            return self.obstacle()
        if self._outcome is None:
            with self._lock:
                if self._outcome is None:
                    self._outcome = self.unusable() or self.obtain() or ""
        return self._outcome or None

    def refusal(self, *tensors: Tensor | None) -> str | None:
        """Why native kernels cannot take these tensors, or None: dtype, then the library."""
        for tensor in tensors:
            if tensor is not None and tensor.dtype not in DTYPES:
                return f"native kernels take float32, bfloat16 and float16, got {tensor.dtype}"
        return self.reason()

    def ops(self) -> ModuleType:
        """The library's ``torch.ops``, loaded: exported programs call kernels that nobody chose.

        Raises:
            NotImplementedError: the library cannot be had.
        """
        if self._outcome != "" and (why := self.reason()) is not None:
            raise NotImplementedError(f"the native backend cannot run: {why}")
        return getattr(torch.ops, self.namespace)

    def obstacle(self) -> str | None:
        """Why the library cannot be had, as far as can be told without compiling it, or None."""
        with self._lock:
            if self._outcome is not None:
                return self._outcome or None
            if (why := self.unusable()) is not None or self._load_existing():
                return why
            try:
                self._open_lock().close()
            except OSError as error:
                return str(error)
            return self.missing_tool()

    def describe(self) -> str:
        """How the library was or would be had, and what it is for; compiles nothing."""
        if (why := self.obstacle()) is not None:
            return f"cannot be had: {why}"
        if self._loaded is None:
            return f"will be compiled on first use, into {cache_folder()}"
        built_in = self._loaded.parent == PACKAGE
        origin = "built ahead of time" if built_in else f"compiled, {self._loaded}"
        return f"{origin}; {self.made_for()}"

    def obtain(self) -> str | None:
        """Load the library, compiled if need be; or why that cannot be done."""
        if self._load_existing():
            return None
        if (why := self.missing_tool()) is not None:
            return why
        try:
            lock = self._open_lock()
        except OSError as error:
            return str(error)
        with lock:
            self._acquire(lock)
            return None if self._load_existing() else self._compile(cache_folder())

    def build(self, folder: Path) -> Path:
        """Compile the library, load it, and put it into ``folder``, complete or not at all.

        Raises:
            RuntimeError: the compilation failed; the message is the compiler's output.
        """
        from torch.utils import cpp_extension

        made_from = self.key()
        with (
            tempfile.TemporaryDirectory(
                prefix=f"build-{self.name}-", dir=folder, ignore_cleanup_errors=True
            ) as temporary,
            ninja_on_path(),
        ):
            linked = self.compile_kernels(Path(temporary))
            cpp_extension.load(
                self.namespace,
                [str(path) for path in sorted((self.sources / self.name).glob("*.cpp"))],
                extra_cflags=list(self.flags),
                extra_ldflags=linked,
                extra_include_paths=[str(self.sources)],
                build_directory=temporary,
                with_cuda=False,
                is_python_module=False,
            )
            (made,) = Path(temporary).glob("*.so")
            library = folder / f"{self._name()}-{_digest(made)}.so"
            if self.key() == made_from:  # else a source was edited meanwhile: not this key's
                os.replace(made, library)
        return library

    def key(self) -> str:
        """A digest of all that the library is made from, except the compiler."""
        parts = [
            torch.__version__,
            sys.platform,
            platform.machine(),
            *self.flags,
            *self.made_with(),
        ]
        paths = [*self.sources.glob("*"), *(self.sources / self.name).rglob("*")]
        for path in sorted(p for p in paths if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
            parts += [path.relative_to(self.sources).as_posix(), _digest(path)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def unusable(self) -> str | None:
        """Why this process does not use the library even if it can be had, or None."""
        return switched_off()

    def missing_tool(self) -> str | None:
        """What the compilation lacks, and how to get it, or None."""
        if not (self.sources / self.name / "bindings.cpp").is_file():
            return f"the sources are not in {self.sources / self.name}"
        compiler = os.environ.get("CXX", "c++")
        if shutil.which((shlex.split(compiler) or [""])[0]) is None:
            return f"there is no C++ compiler {compiler!r}; install g++ or clang++, or set CXX"
        with ninja_on_path():
            return None if shutil.which("ninja") else "there is no ninja; pip install ninja"

    # What a device's library has of its own.

    def made_for(self) -> str:
        """What of the device the loaded library is for, in words."""
        raise NotImplementedError

    def made_with(self) -> tuple[str, ...]:
        """What else the library depends on."""
        return ()

    def variant(self) -> str:
        """Which of several libraries of the same key: a part of the file's name, without dashes."""
        return ""

    def serves(self, variant: str) -> bool:
        """Whether a library of this variant serves this process."""
        return True

    def compile_kernels(self, folder: Path) -> list[str]:
        """Compile what no C++ compiler does, into a folder, and return the linker's flags."""
        return []

    def _compile(self, folder: Path) -> str | None:
        """Compile into the cache folder, whose lock is held, and say so; or why that failed."""
        for left in folder.glob(f"build-{self.name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        say(f"compiling the {self.title}, once, into {folder} ({self.duration})")
        start = time.monotonic()
        try:
            self._loaded = self.build(folder)
        except (RuntimeError, OSError, ImportError) as error:
            lines = str(error).splitlines() or [repr(error)]
            log = self._keep(folder, "\n".join(lines))
            faults = (line for line in lines if re.search(r"(error|fatal)\s*:", line))
            first = next(faults, lines[-1]).strip()
            say(why := f"compiling the {self.title} failed: {first} (all of it: {log})")
            return why
        if self.report:
            self._keep(folder, self.report)
        say(f"compiled in {time.monotonic() - start:.0f} s")
        return None

    def _keep(self, folder: Path, text: str) -> Path:
        """Write what the compiler said into the folder."""
        log = folder / f"{self._name()}.log"
        with contextlib.suppress(OSError):
            log.write_text(text)
        return log

    def _name(self) -> str:
        """Of a library of these sources, without the digest of its content."""
        return "-".join(filter(None, (f"_native_{self.name}_{self.key()}", self.variant())))

    def _libraries(self) -> Iterator[Path]:
        """Libraries of these sources: in the package, then in the cache folder."""
        folders = [PACKAGE]
        with contextlib.suppress(RuntimeError):  # there is no home folder
            folders.append(cache_folder())
        for folder in folders:
            for path in folder.glob(f"_native_{self.name}_{self.key()}-*.so"):
                if self.serves(variant_of(path)):
                    yield path

    def _load_existing(self) -> bool:
        """Load a library that has been made, if there is one; remove those that are damaged."""
        for path in self._libraries():
            try:
                if _digest(path) != path.stem.rpartition("-")[2]:
                    raise OSError("its content has changed")
                torch.ops.load_library(path)
                self._loaded = path
                return True
            except OSError as error:
                say(f"{path} cannot be loaded and will be made again: {error.__cause__ or error}")
                with contextlib.suppress(OSError):
                    path.unlink()
        return False

    def _open_lock(self) -> IO[str]:
        """The library's lock file in the cache folder, which is made if need be."""
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            return open(folder / f"lock-{self.name}", "a")
        except (OSError, RuntimeError) as error:
            text = f"the cache folder cannot be written: {error}; set DIFFIT_CACHE_DIR to another"
            raise OSError(text) from error

    def _acquire(self, lock: IO[str]) -> None:
        """Become the one builder; the kernel frees the lock of a process that is killed."""
        import fcntl  # which Windows lacks

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is compiling the {self.title}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)


def switched_off() -> str | None:
    """Why the native backend is not wanted, or not meant to be, in this process, or None."""
    if os.environ.get("DIFFIT_NATIVE") == "0":
        return "switched off by DIFFIT_NATIVE=0"
    if sys.platform != "linux":
        return f"native kernels are built on Linux, this is {sys.platform}"
    return None


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Within the context, this thread's calls of :meth:`Library.reason` only ask."""
    before = getattr(_state, "without_compiling", False)
    _state.without_compiling = True
    try:
        yield
    finally:
        _state.without_compiling = before


def cache_folder() -> Path:
    """Where libraries compiled on first use are kept."""
    if folder := os.environ.get("DIFFIT_CACHE_DIR"):
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffit_kernels"


@contextlib.contextmanager
def ninja_on_path() -> Iterator[None]:
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


def say(text: str) -> None:
    print(f"diffit_kernels: {text}", file=sys.stderr, flush=True)


def variant_of(path: Path) -> str:
    """The variant in the name of a library's file."""
    parts = path.stem.split("-")
    return parts[1] if len(parts) == 3 else ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
