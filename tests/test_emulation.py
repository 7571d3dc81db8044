"""The emulated CUDA device: what it computes, and that faults which kernels may have are caught."""

import os
import re
import shlex
import shutil
import sys

import pytest

from tests import emulation

COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER) is None,
    reason="the emulation needs Linux and a C++ compiler",
)
PROGRAMS = emulation.HERE / "programs"
THREAD = r"block \(0, 0, 0\), thread 37 \(warp 1, lane 5\), at product.cuh:\d+: "

# What is said of a fault, by regular expression, in some order of threads.
FAULTS = {
    "no_first_barrier": "NaN|wrong sums",
    "no_second_barrier": "wrong sums",
    "swapped_fragments": "wrong product: .* at row 0, column 0; it is .*",
    "no_sync": "wrong product: -?nan .*",
    "no_wait": "wrong product: -?nan .*",
    "uninitialised": "NaN",
    "unaligned": f"product, {THREAD}load_matrices: 16 bytes at byte .*, not aligned to 16",
    "out_of_bounds": f"product, {THREAD}load_matrices: 16 bytes at .*, which has 7680",
    "unaligned_copy": ".*: copy_async: 16 bytes at byte .* of shared memory, not aligned to 16",
    "wrong_pointer": ".*: a pointer that does not point into shared memory .*",
    "diverged": ".*: deadlock, no thread can go on\n"
    "  threads 16-31, 48-63, 80-95, 112-127 have returned\n"
    r"  threads 0-15, 32-47, 64-79, 96-111 wait for __shfl_sync at faults.cpp:\d+",
    "mismatched": ".*: __shfl_(xor_)?sync must be met by all 32 threads .* waits for __shfl_.*",
    "partial_mask": ".*: __shfl_sync of a part of the warp",
    "deadlock": ".*: deadlock, no thread can go on\n"
    "  threads 0-31 have returned\n"
    r"  threads 32-95 wait for __syncthreads at faults.cpp:\d+" + "\n"
    r"  threads 96-127 wait for barrier 2 at faults.cpp:\d+",
    "two_barriers": r".*: thread \d+ waits for another __syncthreads at faults.cpp:\d+",
    "barrier_counts": ".*: deadlock, no thread can go on\n.*\n.*wait for barrier 1 .*"
    r"|.*: barrier 1 of \d+ threads; but thread \d+ waits for \d+ of them, .*",
    "never": ".*: deadlock, .*\n.*\n  threads 40-127 wait for phase 1 of a barrier at .*",
    "old_device": ".*: store_matrices needs compute capability 9.0",
    "too_much_memory": r"a kernel of \(2, 3\): 102400 bytes of shared memory; a block has 101376",
    "too_many_threads": r"a kernel of \(2, 3\): 1056 threads in a block; .*",
    "empty_grid": r"a kernel of \(2, 3\): a grid of 0 x 1 x 1 blocks; .*",
}


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_against_plain_loops(order):
    """Products, ldmatrix, copies, shuffles, barriers, roundings; nothing for the sanitizers."""
    run = emulation.run_program(PROGRAMS / "self_test.cpp", DIFFIT_EMULATION_ORDER=order)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_faults_are_caught(order):
    """In every order; each fault is planted in a launch of its own, of one process."""
    run = emulation.run_program(
        PROGRAMS / "faults.cpp",
        *FAULTS,
        DIFFIT_EMULATION_ORDER=order,
        DIFFIT_EMULATION_CAPABILITY="86",
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    said = dict(re.findall(r"^(\w+): (.*(?:\n  .*)*)$", run.stdout, re.MULTILINE))
    assert list(said) == list(FAULTS)
    for fault, pattern in FAULTS.items():
        assert re.fullmatch(pattern, said[fault]), f"{fault}: {said[fault]}"


def test_some_faults_need_an_order():
    """What is still under way when a block ends has happened at once in descending order."""
    said = {
        order: emulation.run_program(
            PROGRAMS / "faults.cpp", "left_behind", DIFFIT_EMULATION_ORDER=order
        ).stdout
        for order in ("ascending", "descending")
    }
    assert re.search(r"ended before this was done: the last copy at .*:\d+$", said["ascending"])
    assert said["descending"] == "left_behind: nothing\n"


@pytest.mark.parametrize(
    ("fault", "sanitize", "error"),
    [
        ("past_the_end", True, "AddressSanitizer: use-after-poison .*"),
        ("overflow", True, "AddressSanitizer: stack-overflow .*"),
        ("overflow", False, "crash in .*"),
    ],
)
def test_crashes_say_who_ran(fault, sanitize, error):
    """The end of shared memory is known to AddressSanitizer; stacks end at pages of no access."""
    run = emulation.run_program(PROGRAMS / "faults.cpp", fault, sanitize=sanitize)
    assert run.returncode != 0 and run.stdout == ""
    assert re.search(rf"crash in {fault}, block \(0, 0, 0\), thread \d+ \(warp ", run.stderr)
    assert re.search(error, run.stderr)


def test_unknown_order():
    run = emulation.run_program(PROGRAMS / "self_test.cpp", DIFFIT_EMULATION_ORDER="sideways")
    assert run.returncode == 1
    assert run.stdout == (
        "DIFFIT_EMULATION_ORDER is ascending, descending or random:<seed>, not sideways\n"
    )
