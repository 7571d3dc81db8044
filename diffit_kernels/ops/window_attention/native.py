"""window_attention in compiled kernels: C++ on a CPU (native_cpu.py), CUDA C++ on a GPU
(native_cuda.py)."""

from diffit_kernels import native_library
from diffit_kernels.ops.window_attention import native_cpu, native_cuda

DEVICES = ("cpu", "cuda")


def can_run(qkv, *arguments) -> str | None:
    """Why these kernels cannot take the arguments of the op, or None."""
    return _kernels(qkv).can_run(qkv, *arguments)


def fake(qkv, *arguments):
    return _kernels(qkv).fake(qkv, *arguments)


def forward(qkv, *arguments):
    return _kernels(qkv).forward(qkv, *arguments)


def backward(grad_out, *arguments):
    return _kernels(grad_out).backward(grad_out, *arguments)


def _kernels(tensor):
    return native_cuda if native_library.on_cuda(tensor) else native_cpu
