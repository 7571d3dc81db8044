"""Chunks of samples: enough to fill a GPU, and no more than pays."""

import pytest

from diffit_kernels.ops.adaln import launch
from diffit_kernels.ops.split import MULTIPROCESSORS, chunks, multiprocessors

# (programs at once, samples, rows, least): chunks per sample
CASES = {
    (528, 64, 256, 4): 8,  # one round of 512 programs
    (528, 1, 1024, 4): 256,  # as short as they may be
    (528, 200, 256, 4): 5,  # two rounds of 52 rows, where one would be of 128
    (528, 5000, 256, 4): 1,
    (528, 3, 2, 4): 1,
    (528, 0, 256, 4): 64,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks(case):
    assert chunks(*case) == CASES[case]


@pytest.mark.parametrize("programs", [58, 432, 528, 1020])
def test_chunks_are_never_shorter_than_asked_nor_far_more_than_run_at_once(programs):
    for samples in (1, 2, 7, 64, 100, 1000):
        for rows in (1, 5, 64, 256, 1024, 16384):
            number = chunks(programs, samples, rows, 4)
            assert number == 1 or rows // number >= 4
            assert number <= 4 * max(1, programs // samples)


def test_an_unknown_gpu_counts_as_the_last_known_one():
    assert multiprocessors(103) == MULTIPROCESSORS[100]


@pytest.mark.parametrize(
    "channels, pair",
    [
        (8, (8, 1)),
        (33, (64, 1)),
        (384, (512, 1)),
        (1152, (1024, 128)),
        (1153, (1024, 256)),
        (2047, (2048, 1)),
        (8192, (8192, 1)),
    ],
)
def test_parts_cover_a_row(channels, pair):
    assert launch.parts(channels) == pair
