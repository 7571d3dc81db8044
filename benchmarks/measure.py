"""How long a step takes and how much memory, and what the machine can do at most.

On a GPU: by events, after the L2 cache has been overwritten. On a CPU: by the clock; steps of a
race follow each other in a random order, so that caches are nobody's advantage.
"""

import contextlib
import ctypes
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from diffit_kernels.ops import native_products
from diffit_kernels.precision import products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
if DEVICE == "cuda":
    DTYPES |= {"tf32": torch.float32}  # as the released model runs: float32 by TF32 products
L2_BYTES = 256 * 2**20  # more than any GPU's L2 cache
AHEAD = 2_000_000  # GPU clocks that a queued step's launches may take the host: about a millisecond

# glibc keeps freed memory up to a limit which it raises to these values as a process goes on. Fixed
# from the start, the first race is not timed with another allocator than the last.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LIMITS = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}


def with_dtype(dtype: str) -> contextlib.AbstractContextManager[None]:
    """Within the context float32 products are tf32 if ``dtype`` says so, and only then."""
    return products("tf32" if dtype == "tf32" else "float32")


def duration(step: Callable[[], object], queued: bool = False) -> float:
    """Seconds of one step.

    Args:
        queued: on a GPU, launch while it is kept busy, so that the host's time between launches is
            left out: for single ops, which a model launches ahead of their turn.
    """
    if DEVICE == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    _overwrite_l2()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(AHEAD)
    start.record()
    step()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def lost() -> bool:
    """Whether a kernel's fault has ended this process's use of the GPU."""
    if DEVICE == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _overwrite_l2() -> None:
    _l2_sized().zero_()


@functools.cache
def _l2_sized() -> torch.Tensor:
    return torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE)


def peak_memory(step: Callable[[], object]) -> float | None:
    """MiB that a step takes at most beyond what was there before; None where nobody counts it.

    On a GPU by PyTorch's allocator. On Linux by the process's resident memory, with freed memory
    given back at once: what the C library keeps differs from run to run.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if _glibc() is None or not Path("/proc/self/clear_refs").exists():
        return None
    with _giving_back():
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """A number of the kernel's about this process, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is one that can be asked to give memory back; its limits are fixed."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return None
    for limit, size in _LIMITS.items():
        library.mallopt(limit, size)
    return library


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
    """Within the context tensors of 1 MiB or more go back to the system when they are freed."""
    library = _glibc()
    for limit in _LIMITS:
        library.mallopt(limit, 2**20)
    library.malloc_trim(0)
    try:
        yield
    finally:
        for limit, size in _LIMITS.items():
            library.mallopt(limit, size)


@functools.cache
def arithmetic(dtype: str) -> float:
    """FLOP/s of the best library's large product in a dtype, the ceiling of arithmetic here."""
    side = 8192 if DEVICE == "cuda" else 2048
    with with_dtype(dtype):
        a, b = torch.randn(2, side, side, device=DEVICE).to(DTYPES[dtype])
        ways = [lambda: a @ b]
        if DEVICE == "cpu":
            ways.append(lambda: native_products.linear(a, b, None))
        return 2 * side**3 / min(_median(way) for way in ways)


@functools.cache
def bandwidth() -> float:
    """Bytes/s of a copy of more than the caches hold, each byte counted as read and as written."""
    count = 2**30 if DEVICE == "cuda" else 256 * 2**20
    source = torch.empty(count // 4, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * count / _median(lambda: target.copy_(source))


def _median(step: Callable[[], object]) -> float:
    for _ in range(2):
        step()
    return statistics.median(duration(step) for _ in range(9))


_glibc()
