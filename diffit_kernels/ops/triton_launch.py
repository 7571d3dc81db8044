"""Launching Triton kernels: on which devices, with which tile sizes, or only on paper.

Every launch of every stage goes through :func:`launch`, so that one context,
:func:`recording`, yields the kernels of any call exactly as they would be compiled, on meta tensors
and without a GPU: what ``python -m benchmarks resources`` and the tests compile ahead of time.

Tile sizes come from a :class:`Tunable`: the table written by ``python -m benchmarks tune`` for the
GPU at hand (``diffit_kernels/tuned/<GPU>.json``), else the stage's heuristic. Nothing is tuned at
run time, so results are repeatable.
"""

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from diffit_kernels.ops import triton_interpreter

TUNED = Path(__file__).parent.parent / "tuned"
OLDEST = 80
INTERPRETED_AS = 90  # the interpreter takes this GPU's configurations, in small
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1).
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    triton_interpreter.repair()

_state = threading.local()


class Config(NamedTuple):
    """How one kernel is launched: constexpr tile sizes by name, warps, and pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


class Call(NamedTuple):
    """One recorded launch: everything that decides what is compiled, and the grid."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    config: Config


class Tunable:
    """A kernel's choice of :class:`Config`: tuned table first, heuristic behind it.

    Args:
        name: "<op>.<kernel>", as in the tuned tables.
        heuristic: ``(capability, **key) -> Config``, with capability 80, 90, ...
        candidates: ``(**key) -> configs`` worth measuring, for the tuning command.
    """

    def __init__(
        self,
        name: str,
        heuristic: Callable[..., Config],
        candidates: Callable[..., Sequence[Config]],
    ):
        self.name = name
        self.heuristic = heuristic
        self.candidates = candidates
        self._known: dict[tuple, Config] = {}
        TUNABLES[name] = self

    def config(self, device: torch.device, **key: Any) -> Config:
        """The configuration for ``key`` (dtype, sizes) on ``device``."""
        target = target_of(device)
        if getattr(_state, "used", None) is not None:
            _state.used[self.name, key_text(key)] = key
        forced = getattr(_state, "forced", None)
        if forced and (config := forced.get((self.name, key_text(key)))):
            return config
        short = (target, *key.values())
        if short not in self._known:
            self._known[short] = self._choose(*target, key)
        return self._known[short]

    def _choose(self, capability: int, gpu: str | None, key: dict[str, Any]) -> Config:
        tuned = _tuned_table(gpu).get(self.name, {}).get(key_text(key))
        return tuned or self.heuristic(capability, **key)


TUNABLES: dict[str, Tunable] = {}


def key_text(key: Mapping[str, Any]) -> str:
    """A key as the tuned tables write it: ``"bfloat16 head_dim=72 tokens=256"``."""
    rest = (f"{name}={key[name]}" for name in sorted(key) if name != "dtype")
    return " ".join([str(key["dtype"]).removeprefix("torch."), *rest])


def refusal(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot take these tensors, or None: device and dtype, the common rules."""
    device = tensors[0].device
    if torch.version.hip:
        return "Triton kernels run on NVIDIA GPUs, and this torch is built for AMD's"
    if device.type == "cuda":
        capability = _capability(device)
        if capability < OLDEST:
            return f"Triton kernels need an sm_{OLDEST} GPU or newer, got sm_{capability}"
    elif not (device.type == "cpu" and INTERPRETED):
        return f"Triton kernels run on NVIDIA GPUs, got tensors on {device.type}"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"Triton kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    return None


def launch(kernel, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first argument, unless recording."""
    if 0 in grid:
        return
    call = Call(kernel, grid, args, constants, config)
    intercept = getattr(_state, "intercept", None)
    if intercept is None:
        _run(call)
    else:
        intercept(call)


def _run(call: Call) -> None:
    device = next(arg.device for arg in call.args if isinstance(arg, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        call.kernel[call.grid](
            *call.args,
            **call.constants,
            **call.config.blocks,
            num_warps=call.config.num_warps,
            num_stages=call.config.num_stages,
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype of products, for keys: "tf32" for float32 where PyTorch's own may use it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: tf32 where PyTorch's own products may use it."""
    return "tf32" if dtype_name(dtype) == "tf32" else "ieee"


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Call]]:
    """Within the context launches are listed, not run, as for a GPU of ``capability``."""
    calls: list[Call] = []
    _state.intercept, _state.paper = calls.append, capability
    try:
        yield calls
    finally:
        _state.intercept = _state.paper = None


@contextlib.contextmanager
def measuring(
    measure: Callable[[Callable[[], None]], float],
) -> Iterator[list[tuple[Call, float]]]:
    """Within the context every launch runs through ``measure``; yields launches and numbers."""
    numbers: list[tuple[Call, float]] = []

    def intercept(call: Call) -> None:
        numbers.append((call, measure(functools.partial(_run, call))))

    _state.intercept = intercept
    try:
        yield numbers
    finally:
        _state.intercept = None


@contextlib.contextmanager
def keys_used() -> Iterator[dict[tuple[str, str], dict]]:
    """Within the context, the (tunable, key) pairs that launches asked a configuration for."""
    _state.used = {}
    try:
        yield _state.used
    finally:
        _state.used = None


@contextlib.contextmanager
def forcing(name: str, key: Mapping[str, Any], config: Config) -> Iterator[None]:
    """Within the context, tunable ``name`` answers ``key`` with ``config``."""
    previous = getattr(_state, "forced", {})
    _state.forced = {**previous, (name, key_text(key)): config}
    try:
        yield
    finally:
        _state.forced = previous


def target_of(device: torch.device) -> tuple[int, str | None]:
    """(capability, GPU name); no name, hence no tuned table, on paper and in the interpreter."""
    paper = getattr(_state, "paper", None)
    if paper is not None:
        return paper, None
    return _gpu(device) if device.type == "cuda" else (INTERPRETED_AS, None)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> int:
    return _gpu(device)[0]


@functools.cache
def _gpu(device: torch.device) -> tuple[int, str]:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_name(device).replace(" ", "_")


@functools.cache
def _tuned_table(gpu: str | None) -> dict[str, dict[str, Config]]:
    path = TUNED / f"{gpu}.json"
    if gpu is None or not path.exists():
        return {}
    try:
        kernels = json.loads(path.read_text())["kernels"]
        return {
            name: {
                key: Config(entry["blocks"], entry["num_warps"], entry["num_stages"])
                for key, entry in entries.items()
            }
            for name, entries in kernels.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of tile sizes ({type(error).__name__}: {error}); delete it: "
            "heuristics serve until `python -m benchmarks tune` writes another one"
        ) from error
