"""adaln in compiled kernels: C++ on a CPU (native_cpu.py), CUDA C++ on a GPU (native_cuda.py)."""

from diffit_kernels import native_library
from diffit_kernels.ops.adaln import native_cpu, native_cuda

DEVICES = ("cpu", "cuda")


def can_run(x, *arguments) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return _kernels(x).can_run(x, *arguments)


def fake(x, *arguments):
    return _kernels(x).fake(x, *arguments)


def forward(x, *arguments):
    return _kernels(x).forward(x, *arguments)


def backward(grad_out, *arguments):
    return _kernels(grad_out).backward(grad_out, *arguments)


def _kernels(tensor):
    return native_cuda if native_library.on_cuda(tensor) else native_cpu
