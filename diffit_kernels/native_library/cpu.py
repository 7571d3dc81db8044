"""The CPU kernels' library: ``csrc/cpu``, by the C++ compiler, through PyTorch's extension builder.

``DIFFIT_CPU_CAPABILITY`` (portable, avx2, avx512 or avx512_bf16) lowers the instruction set, which
is otherwise the best that the processor has; the first kernel raises ValueError for another name.
"""

import torch

from .library import Library


class CpuLibrary(Library):
    """One library for all processors of a kind: kernels choose an instruction set at run time."""

    name = "cpu"
    title = "CPU kernels"
    namespace = "diffit_native"
    duration = "about half a minute"
    # No OpenMP library is linked: its symbols are found in the one that torch brings, so that there
    # is one pool of threads, which torch.set_num_threads rules. No -march: see above.
    flags = ("-O3", "-fopenmp", "-g0", "-Wall", "-Wno-psabi")

    def made_for(self) -> str:
        return f"instruction set {torch.ops.diffit_native.cpu_capability()}"
