"""The compiled kernels' libraries, one per device: where they come from, why one may be missing.

Their sources are in ``csrc/``, of the checkout or inside the installed package. A library is, in
this order,

- the one that an installation with ``--no-build-isolation`` built into the package (setup.py);
- the one in the cache folder: ``$DIFFIT_CACHE_DIR``, else ``diffit_kernels`` in
  ``$XDG_CACHE_HOME`` or ``~/.cache``; it may be deleted at any time;
- compiled on first use into that folder, once, by ``$CXX`` or ``c++`` and ninja, and by nvcc for
  CUDA.

They are two because a missing or failing nvcc must not cost anybody the CPU kernels, nor the other
way round. ``DIFFIT_NATIVE=0`` switches the native backend off, and is read when the package is
imported.

setup.py loads this package by its path: it must not import from the one around it.
"""

import torch
from torch import Tensor

from .cpu import CpuLibrary
from .cuda import OLDEST, CudaLibrary
from .library import Library, cache_folder, switched_off, without_compiling

__all__ = [
    "CPU",
    "CUDA",
    "cache_folder",
    "capability",
    "of",
    "on_cuda",
    "switched_off",
    "too_old",
    "without_compiling",
]

CPU = CpuLibrary()
CUDA = CudaLibrary()


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are the ones to serve a tensor; tests on a host replace this."""
    return tensor.is_cuda


def of(tensor: Tensor) -> Library:
    """The library whose kernels serve a tensor."""
    return CUDA if on_cuda(tensor) else CPU


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int | None:
    """90 for a GPU of compute capability 9.0, None without a GPU (tensors that have no data may
    still claim one); tests on a host replace this."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run the CUDA kernels, whatever they are given, or None."""
    found = capability(device)
    if found is not None and found < OLDEST:
        return f"native CUDA kernels need an sm_{OLDEST} GPU or newer, got sm_{found}"
    return None
