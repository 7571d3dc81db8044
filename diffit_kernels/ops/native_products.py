"""Products of matrices on a CPU, by the faster of the libraries that torch comes with.

In half precision torch calls oneDNN itself, but for float32 MKL, which on processors other than
Intel's leaves AVX-512 aside: (1024, 1152) times (1152, 4608) took it 56 ms on two cores of an AMD
EPYC, and oneDNN 25 ms. MKL adds up in shorter blocks, though: of a product of normal numbers with
1100 to 1500 terms oneDNN's largest error is up to 3.5 times MKL's, of an MLP of such products
within twice.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2**20  # multiplications of a product that oneDNN's overhead of about 10 µs is worth
LONGEST = 1024  # rows that a sum over rows has at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, the parameters rounded to the dtype of ``x``."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _by_onednn(x, weight.t()):
        # Which takes the bias for contiguous, whatever its strides.
        return _onednn(x, weight, None if bias is None else bias.contiguous())
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b"""
    return _onednn(a, b.t()) if _by_onednn(a, b) else a @ b


def sum_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b: a weight's gradient is one, with tokens for rows."""
    if not _by_onednn(a.t(), b):
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


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is to compute a b, and torch would not choose it. Rows with gaps between them
    would take its slowest path."""
    return (
        a.dtype == torch.float32
        and a.numel() * b.shape[1] >= LEAST
        and all(t.is_contiguous() or t.t().is_contiguous() for t in (a, b))
        and _mkl_is_slow()
    )


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
