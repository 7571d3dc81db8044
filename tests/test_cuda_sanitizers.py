"""All CUDA kernels, emulated, under the address and undefined-behaviour sanitizers."""

from tests import emulation
from tests.test_emulation import pytestmark  # noqa: F401, which skips where there is no compiler


def test_buffers_of_exactly_the_promised_sizes():
    """No kernel reads or writes beyond an end, nor computes with what nobody wrote."""
    sources = [emulation.HERE / "programs" / "kernels.cpp"]
    sources += sorted((emulation.ROOT / "csrc" / "cuda").glob("*.cu"))
    run = emulation.run_program(sources)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout == "no NaN\n"
