"""Products of matrices on a CPU: our own where it is the best, or by torch's libraries.

In half precision torch calls oneDNN itself, but for float32 MKL, which on processors other than
Intel's leaves AVX-512 aside: (1024, 1152) times (1152, 4608) took it 56 ms on two cores of an AMD
EPYC, and oneDNN 25 ms. oneDNN sums in one chain, and errs up to 3.5 times as much as MKL where sums
have 1100 to 1500 terms. Our own, ``csrc/cpu/linear.h``, is as fast as oneDNN for large matrices, a
fifth faster for small ones, and errs less than MKL. Sums over rows, of which a weight's gradient
is, are still oneDNN's.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels import native_library

LEAST = 2**20  # multiplications of a product that an overhead of about 10 µs is worth
LONGEST = 1024  # rows that a sum over rows has at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, the parameters rounded to the dtype of ``x``."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _is_by_others(x, weight.t()):
        return F.linear(x, weight, bias)
    # Both take the bias for contiguous, whatever its strides.
    bias = None if bias is None else bias.contiguous()
    return _own(x, weight.t(), bias) if _is_own(x) else _onednn(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b"""
    if _is_by_others(a, b):
        return a @ b
    return _own(a, b, None) if _is_own(a) else _onednn(a, b.t())


def sum_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b: a weight's gradient is one, with tokens for rows."""
    if _is_by_others(a.t(), b):
        return a.t() @ b
    blocks = -(-a.shape[0] // LONGEST)
    first, *others = (
        _onednn(left.t(), right.t())
        for left, right in zip(a.tensor_split(blocks), b.tensor_split(blocks), strict=True)
    )
    for other in others:
        first += other
    return first


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _own(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b + bias of float32; ``a`` contiguous, ``b`` or its transpose as well."""
    out = a.new_empty(a.shape[0], b.shape[1])
    transposed = not b.is_contiguous()
    native_library.CPU.ops().linear(a, b.t() if transposed else b, transposed, bias, out)
    return out


def _is_by_others(a: Tensor, b: Tensor) -> bool:
    """Whether a b is left to what torch chooses.

    Small ones are, and rows with gaps between them, which would take oneDNN's slowest path.
    """
    return not (
        a.dtype == torch.float32
        and a.numel() * b.shape[1] >= LEAST
        and all(t.is_contiguous() or t.t().is_contiguous() for t in (a, b))
        and _mkl_is_slow()
    )


def _is_own(a: Tensor) -> bool:
    """Of the others, whether a b is our own kernel's: it reads the rows of ``a``, with AVX-512."""
    return a.is_contiguous() and _has_avx512_kernels()


@functools.cache
def _has_avx512_kernels() -> bool:
    library = native_library.CPU
    return library.reason() is None and library.ops().cpu_capability().startswith("avx512")


@functools.cache
def _mkl_is_slow() -> bool:
    libraries = torch.backends.mkl, torch.backends.mkldnn
    if not all(library.is_available() for library in libraries):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512f" in processor and "GenuineIntel" not in processor
