"""Products of matrices on a CPU, by the faster of the libraries that torch comes with."""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2**20  # multiplications of a product that oneDNN's overhead of about 10 µs is worth


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, the parameters rounded to the dtype of ``x``."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _by_onednn(x, weight.shape[0]):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of matrices of one dtype."""
    if _by_onednn(a, b.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def _by_onednn(x: Tensor, columns: int) -> bool:
    """Whether oneDNN is to do a product with ``columns`` columns, and torch would not choose it.

    In half precision torch calls oneDNN itself, but for float32 MKL, which on processors other than
    Intel's leaves AVX-512 aside: 1024 x 1152 x 4608 took it 56 ms on two cores of an AMD EPYC, and
    oneDNN 25 ms.
    """
    return x.dtype == torch.float32 and x.numel() * columns >= LEAST and _mkl_is_slow()


@functools.cache
def _mkl_is_slow() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") and "GenuineIntel" not in _processor()


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel"
