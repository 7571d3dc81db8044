"""Fixtures and reporting shared by all tests."""

import contextlib
import os

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffit_kernels import native_library
from diffit_kernels.dispatch import BACKENDS, REGISTRY, use_backend
from tests import emulation

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_report_header():
    built = {
        backend: [name for name, op in REGISTRY.items() if op.is_built(backend)]
        for backend in BACKENDS
    }
    lines = [f"diffit_kernels {name}: {', '.join(ops) or 'none'}" for name, ops in built.items()]
    triton = "interpreted on the CPU" if DEVICES == ["cpu"] else "on the GPU"
    return [f"torch {torch.__version__}, devices {DEVICES}, triton {triton}", *lines]


def places(backend: str) -> list[str]:
    """The devices on which the tests run a backend: Triton's on the CPU only without a GPU."""
    return {"triton": DEVICES[-1:], "native": ["cpu"]}.get(backend, DEVICES)


def pytest_generate_tests(metafunc):
    """``backend`` and ``device``: every backend that all ops of the test's module (``OPS``) have,
    wherever it runs."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OPS"):
        ops = [REGISTRY[name] for name in metafunc.module.OPS]
        built = [name for name in BACKENDS if all(op.is_built(name) for op in ops)]
        pairs = [(name, device) for name in built for device in places(name)]
        metafunc.parametrize("backend, device", pairs, indirect=["backend"])


@contextlib.contextmanager
def only(backend):
    """Fused calls run on this backend, or raise; what they leave unwritten is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        with use_backend(backend):
            yield backend
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def backend(request):
    """The test's fused calls run on this backend alone."""
    with only(request.param):
        yield request.param


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels compiled for the host, loaded; None where a GPU runs the real ones."""
    if DEVICES != ["cpu"]:
        return None
    library = emulation.build()
    torch.ops.load_library(library)
    return library


@pytest.fixture
def cuda_device(emulated, monkeypatch):
    """Where the native backend's CUDA kernels serve: the GPU, or, emulated, the CPU."""
    if emulated is not None:
        monkeypatch.setattr(native_library, "on_cuda", lambda tensor: True)
        monkeypatch.setattr(native_library, "capability", lambda device: 90)
        monkeypatch.setattr(native_library.CUDA, "reason", lambda: None)
        monkeypatch.setattr(native_library.CUDA, "ops", lambda: torch.ops.diffit_cuda)
    with only("native"):
        yield DEVICES[-1]


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def judge():
    """A support vector classifier that is right on at least 97 % of real digits it has not seen."""
    svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    seen, unseen, classes, answers = train_test_split(
        digits.data, digits.target, test_size=0.3, random_state=0
    )
    classifier = svm.SVC(gamma=0.001).fit(seen, classes)
    assert classifier.score(unseen, answers) >= 0.97
    return classifier


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
