"""Peak memory of one block's forward and backward on a CPU, each in a process of its own.

What a step takes beyond what was there before it: gradients and what the backward keeps count,
inputs and parameters do not. Before it a small block runs, for the libraries' code and threads.
Values are not looked at: benchmarks/bench_block.py does that. A row's time is of one cold step.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.bench_block import FUSED, make_block
from benchmarks.race import DEVICE, DTYPES, REPLAYED, replay, results

ON_LINUX = DEVICE == "cpu" and Path("/proc/self/clear_refs").exists()
pytestmark = [REPLAYED, pytest.mark.skipif(not ON_LINUX, reason="reads /proc of a CPU's process")]
SIZES = {"256px": (2, 16), "512px": (1, 32)}  # name: (batch, grid side)
# Fixed, malloc maps a tensor of 1 MiB or more by itself and gives it back when it is freed; left to
# itself it keeps some, more in one run than in the next: 84 MiB of a step were 147 to 156.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
PROGRAM = "import sys; from benchmarks.bench_memory import measure; measure(*sys.argv[1:])"


def measure(shape: str, dtype: str, provider: str) -> None:
    """Print one row; the process must have done nothing else."""
    _step(*make_block((1, 4), dtype, FUSED.get(provider)))
    block, inputs = make_block(SIZES[shape], dtype, FUSED.get(provider))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    start = time.perf_counter()
    gradients = _step(block, inputs)
    seconds = time.perf_counter() - start
    size = sum(t.numel() * t.element_size() for t in gradients) / 2**20
    peak = _status("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "gradients_mib": size}))


def _step(block, inputs):
    leaves = [t.requires_grad_() for t in inputs]
    grad = torch.ones_like(inputs[0])
    return results(block, leaves, grad, block.parameters())[1:]


def _status(name: str) -> float:
    """A number of the kernel's about this process, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


@pytest.mark.parametrize("provider", ["literal", *FUSED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def bench_memory(benchmark, case, shape, dtype, provider):
    command = [sys.executable, "-c", PROGRAM, shape, dtype, provider]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(ran.stdout)
    replay(benchmark, [row.pop("seconds")])
    benchmark.extra_info |= row | {"role": "ours" if provider in FUSED else "peer"}
