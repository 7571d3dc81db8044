"""The emulation of what only Hopper has: TMA, mbarriers, wgmma; and that their misuse is caught."""

import re

import pytest

from tests import emulation
from tests.test_emulation import PROGRAMS, pytestmark  # noqa: F401

WHEN = ("late", "early")
PLACE = r"ring, block \(0, 0, 0\), thread \d+ \(warp \d+, lane \d+\), at product_hopper.cuh:\d+: "
OTHER_PLACE = r"\w+, block \(0, 0, 0\), thread \d+ \(warp \d+, lane \d+\), at .*:\d+: "
BARRIER = r"the barrier at byte \d+ of shared memory \(phase \d+, .*\)"
WRONG = "wrong product: .* at row .*, column .*; it is .*"

# What is said of a fault, by regular expression, with products done late or early.
FAULTS = {
    "no_wait": f"{WRONG}|.*: deadlock, .*(\n.*)*|{PLACE}.*: one arrival more than expected .*",
    "no_products_wait": WRONG,
    "early_release": WRONG,
    "consumer_parity": f"{WRONG}|.*: deadlock, .*(\n.*)*",
    "producer_parity": f"{PLACE}barrier_arrive_expecting: one arrival more than expected by "
    + BARRIER,
    "no_expect": f"{PLACE}{BARRIER} ends its phase while copies of 20480 bytes to it are under way "
    "that it was not told to expect"
    f"|{PLACE}more bytes have arrived than were expected by {BARRIER}",
    "few_bytes": f"{PLACE}more bytes have arrived than were expected by {BARRIER}",
    "many_bytes": ".*: deadlock, no thread can go on\n"
    "  threads 129-159 have returned\n"
    "  threads 0-127 wait for the phase of parity 0 of the barrier .*\n.*",
    "many_arrivals": WRONG,
    "no_barrier_fence": f"{PLACE}copy_box: no fence_barriers has made known {BARRIER}",
    "barrier_overwritten": f"{PLACE}barrier_.*: something was stored over {BARRIER}",
    "wrong_leading": WRONG,
    "large_offset": f"{PLACE}matrix: a leading offset of 262144 bytes is not a multiple of 16 .*",
    "unaligned_tile": f"{PLACE}copy_box: 4096 bytes at byte 64 .*, not aligned to 512",
    "unaligned_matrix": f"{PLACE}B at byte .* does not start in a first row of eight .*",
    "out_of_bounds": f"{PLACE}B has a number at byte .* of shared memory, which has 41024",
    "no_fence": f"{PLACE}wgmma without a wgmma_fence since .*",
    "part_of_warpgroup": f"{PLACE}lane 0 asks for another wgmma than the warpgroup's first warp .*",
    "written_d": f"{PLACE}D of a product was written while it was under way|{WRONG}",
    "written_a": WRONG,
    "no_proxy_fence": "NaN",
    "one_warp": ".*: deadlock, .*\n.*\n  threads 0-31 wait for all warps of the warpgroup .*",
    "two_inits": f"{OTHER_PLACE}barrier_init: byte 0 of shared memory holds a barrier already",
    "no_init": f"{OTHER_PLACE}barrier_wait: there is no barrier at byte 0 of shared memory; .*",
    "many_registers": f"{OTHER_PLACE}take_registers: from 248 to 240 registers",
    "odd_registers": f"{OTHER_PLACE}give_registers: from 248 to 100 registers; they are .*",
    "no_store_wait": r".*: ended before this was done: store_box at faults_hopper.cpp:\d+",
}
# What is wrong in either case but shows in one only.
LATE_ONLY = {"no_products_wait", "early_release", "many_arrivals", "written_a"}
EARLY_ONLY = {"consumer_parity"}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("order", emulation.ORDERS)
def test_against_plain_loops(order, when):
    """Products of all shapes and layouts through a ring of tiles, boxes, registers handed over."""
    run = emulation.run_program(
        PROGRAMS / "self_test_hopper.cpp",
        DIFFIT_EMULATION_ORDER=order,
        DIFFIT_EMULATION_WGMMA=when,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


@pytest.mark.parametrize("when", WHEN)
def test_faults_are_caught(when):
    names = ["no_fault", "with_proxy_fence", *FAULTS]
    run = emulation.run_program(PROGRAMS / "faults_hopper.cpp", *names, DIFFIT_EMULATION_WGMMA=when)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    said = dict(re.findall(r"^(\w+): (.*(?:\n  .*)*)$", run.stdout, re.MULTILINE))
    assert list(said) == names
    assert said.pop("no_fault") == said.pop("with_proxy_fence") == "nothing"
    hidden = EARLY_ONLY if when == "late" else LATE_ONLY
    for fault, text in said.items():
        pattern = f"{FAULTS[fault]}|nothing" if fault in hidden else FAULTS[fault]
        assert re.fullmatch(pattern, text), f"{fault}: {text}"
