"""The Hopper family's backward where a block of threads walks over several windows.

How windows are shared out is fixed for a GPU of 132 multiprocessors, so that takes many heads.
"""

import pytest
import torch

from tests.test_window_attention_cuda import (  # noqa: F401 (fixtures)
    CUDA_CASES,
    assert_same,
    check,
    device,
    emulation_only,
    family,
    make_case,
    results,
)

# name: (B, H, W, heads, head_dim, window). Where sums of dS have no room in the query kernel, pairs
# of blocks of queries and keys walk over windows by themselves.
CASES = {
    "3, 3 and 1 windows a block": (7, 8, 16, 44, 32, (8, 16)),
    "all of 2 windows, d 72": (2, 16, 16, 67, 72, (16, 16)),
    "3 and 2 windows for a pair": (5, 16, 32, 8, 32, (16, 32)),
    "2 windows for a pair, d 96": (2, 16, 16, 40, 96, (16, 16)),
    "2 windows for a pair, d 128": (2, 8, 32, 17, 128, (8, 32)),
}
SHORT = ["3, 3 and 1 windows a block", "2 windows for a pair, d 128"]
WHEN = [("ascending", "early"), ("descending", "late"), ("random:1", "late")]


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    for name, case in CASES.items():
        monkeypatch.setitem(CUDA_CASES, name, case)


def some(cases):
    """The short ones in the gate; the others take 10 to 20 seconds each."""
    return [case if case in SHORT else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("family", ["hopper"], indirect=True)
@pytest.mark.parametrize("case", some(CASES))
def test_parity_over_many_windows(case, family, device):  # noqa: F811
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("family", ["hopper"], indirect=True)
@pytest.mark.parametrize(("order", "when"), WHEN)
@pytest.mark.parametrize("case", SHORT[:1])
def test_neither_threads_nor_products_change_a_bit(
    case,
    order,
    when,
    family,  # noqa: F811
    device,  # noqa: F811
    emulation_only,  # noqa: F811
    monkeypatch,
):
    """Products are done when they are waited for, or at once; see wgmma.cuh of the emulation."""
    inputs, shape = make_case(case, device)
    expected = results(inputs, shape)
    monkeypatch.setenv("DIFFIT_EMULATION_ORDER", order)
    monkeypatch.setenv("DIFFIT_EMULATION_WGMMA", when)
    assert_same(results(inputs, shape), expected)
