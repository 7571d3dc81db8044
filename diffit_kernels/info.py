"""What this installation can run: versions, devices, and for each op which backend and why."""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

import diffit_kernels
from diffit_kernels import native_library
from diffit_kernels.dispatch import BACKENDS, PREFERENCE, REGISTRY, UNPROVEN

TUNED = Path(__file__).parent / "tuned"
PACKAGES = ("triton", "diffusers", "safetensors", "huggingface_hub", "numpy")


def info() -> str:
    """The text of ``diffit-kernels info``."""
    return "\n".join([*_versions(), "", *_devices(), "", *_backends(), "", *_ops()])


def _versions() -> list[str]:
    lines = [
        f"diffit-kernels {diffit_kernels.__version__}",
        f"python {platform.python_version()} on {sys.platform}, torch {torch.__version__}"
        f" (CUDA {torch.version.cuda or 'none'})",
    ]
    return lines + [f"{name} {_version(name)}" for name in PACKAGES]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu: {capability}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{memory:.0f} GiB"
        )
    return lines if len(lines) > 1 else [*lines, "cuda: no device"]


def _backends() -> list[str]:
    lines = []
    for backend in BACKENDS:
        built = [name for name, op in REGISTRY.items() if op.is_built(backend)]
        lines.append(f"backend {backend:<6} built for: {', '.join(built) or 'nothing'}")
    tables = sorted(path.stem for path in TUNED.glob("*.json"))
    return [
        *lines,
        f"native CPU kernels: {native_library.CPU.describe()}",
        f"native CUDA kernels: {UNPROVEN}; {native_library.CUDA.describe()}",
        "triton kernels are tested in Triton's interpreter and compiled for sm_80 to sm_120; they "
        "have not run on a GPU yet",
        f"tile sizes tuned for: {', '.join(tables) or 'no GPU yet, heuristics serve'}",
    ]


def _ops() -> list[str]:
    """One line per op and device: the backend that runs by default; below, why the others do not.

    Reasons that depend on shape or dtype are given when a call meets them.
    """
    lines = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        order = PREFERENCE[device]
        lines.append(f"on {device}, in order of preference: {', '.join(order)}")
        for name, op in REGISTRY.items():
            obstacles = {backend: _obstacle(op, backend, device) for backend in BACKENDS}
            runs = next(backend for backend in order if obstacles[backend] is None)
            lines.append(f"  {name:<18} runs on {runs}")
            lines += [
                f"  {'':<18}   not {backend}: {obstacle or 'built; a slower choice here'}"
                for backend, obstacle in obstacles.items()
                if backend != runs
            ]
    return lines


def _obstacle(op, backend: str, device: str) -> str | None:
    """Why a backend serves no case of an op on a device by default, or None."""
    if not op.is_built(backend):
        return op.refusal(backend)
    if not op.is_built(backend, device):
        return f"this release has no {backend} kernels for {device}"
    if backend not in PREFERENCE[device]:
        return UNPROVEN if backend == "native" else f"not for {device}"
    return native_library.CPU.obstacle() if backend == "native" else None
