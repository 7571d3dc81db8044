"""Fixtures and reporting shared by all tests."""

import pytest
import torch

from diffit_kernels.dispatch import BACKENDS, REGISTRY, use_backend

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_report_header():
    built = {
        backend: [name for name, op in REGISTRY.items() if op.is_built(backend)]
        for backend in BACKENDS
    }
    lines = [f"diffit_kernels {name}: {', '.join(ops) or 'none'}" for name, ops in built.items()]
    return [f"torch {torch.__version__}, devices {DEVICES}", *lines]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def pytest_generate_tests(metafunc):
    """The ``backend`` fixture: every backend that all ops of the test's module (``OPS``) have."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OPS"):
        ops = [REGISTRY[name] for name in metafunc.module.OPS]
        built = [name for name in BACKENDS if all(op.is_built(name) for op in ops)]
        metafunc.parametrize("backend", built, indirect=True)


@pytest.fixture
def backend(request):
    """The test's fused calls run on this backend, or raise."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
