"""The one place where an implementation is chosen.

A fused op has one schema and several backends:

- ``eager``: PyTorch, any device; always there.
- ``triton``: Triton kernels for NVIDIA GPUs (``ops/<stage>/triton_kernels.py``).
- ``native``: C++ and CUDA C++ kernels (``ops/<stage>/native.py`` over ``csrc/``).

Each backend is an overload of the op, ``diffit::<op>.<backend>``, with a twin
``diffit::<op>_backward.<backend>``. So a graph captured by ``torch.compile`` or ``torch.export``
names the implementation it runs, and autograd stays inside the backend that ran the forward.

Order of choice: the ``backend=`` argument, then :func:`use_backend`, then the first backend in
the device's order of preference that serves the case. An explicit request runs or raises. A default
that has to pass over a faster backend says so in one warning, once for each reason; not where that
backend has no kernels for the op or the device, nor in float64, which is for checking.

A backend plugs in as a module beside ``eager.py`` with functions of the schema's arguments:
``forward``, ``backward``, ``can_run`` (None, or the reason why it cannot), and ``fake`` where the
results it saves for its backward differ from the eager backend's. ``DEVICES``, if the module has
it, names the device types that its kernels are for, instead of those below. The native kernels'
libraries may have to be compiled before they are loaded (:mod:`diffit_kernels.native_library`),
which ``can_run`` sees to; with ``DIFFIT_NATIVE=0`` in the environment it is as if they were not
there.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from diffit_kernels import native_library

MODULES = {"eager": "eager", "triton": "triton_kernels", "native": "native"}
BACKENDS = tuple(MODULES)
# Not native on cuda: no default is a kernel that has not run, and agreed, on a GPU. It becomes the
# first there when the tests have passed on one.
PREFERENCE = {"cuda": ("triton", "eager"), "cpu": ("native", "eager")}
UNPROVEN = "not yet proven on hardware; backend='native' runs them"  # the native kernels on cuda
DEVICES = {"native": ("cpu",)}  # that a backend has kernels for; the others: any

_library = torch.library.Library("diffit", "DEF")
_state = threading.local()
_warned: set[tuple[str, str]] = set()
REGISTRY: dict[str, "FusedOp"] = {}


def check_backend(backend: str | None) -> str | None:
    """Return ``backend`` if it names one (or is None), else raise ValueError with the names."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within the context, every fused op of this thread runs on ``backend``, or raises.

    None restores the default choice. A ``backend=`` argument still has the last word.
    """
    check_backend(backend)
    previous = getattr(_state, "backend", None)
    _state.backend = backend
    try:
        yield
    finally:
        _state.backend = previous


def _load(package: str, backend: str) -> tuple[ModuleType | None, str | None, bool]:
    """The implementation module of one backend; or why not, and if that is worth a warning."""
    if backend == "native" and (reason := native_library.switched_off()) is not None:
        return None, reason, False
    name = f"{package}.{MODULES[backend]}"
    if importlib.util.find_spec(name) is None:
        return None, f"this release has no {backend} kernels for this op", False
    try:
        return importlib.import_module(name), None, False
    except ImportError as error:
        return None, f"{backend} kernels could not be imported: {error}", True


def _is_transformed() -> bool:
    """Whether grad, vmap or the like of torch.func is active; functionalize alone is harmless."""
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():  # Dynamo traces none but the transforms refused
        return True
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() != torch._C._functorch.TransformType.Functionalize for level in levels)


def _as_op(function: Callable) -> Callable:
    """An implementation as the op runs it: no autocast inside, contiguous results as promised."""

    @functools.wraps(function)
    def run(*args):
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(*args)
        return _contiguous(function(*args))

    return run


def _contiguous(results: Any) -> Any:
    if isinstance(results, torch.Tensor):
        return results.contiguous()
    return type(results)(_contiguous(result) for result in results)


class FusedOp:
    """A fused op: schema, shape inference and autograd, once, for all of its backends.

    Args:
        name: the op's name in the ``diffit`` namespace.
        package: the package of the stage, in which ``eager.py`` and its siblings are looked up.
        schema: arguments and results of the forward, in the syntax of ``torch.library``. The
            results are the outputs, then whatever the backward needs.
        backward_schema: the same for the backward.
        fake: shape inference of the forward: empty tensors from the schema's arguments. A result
            that a backend leaves out is a tensor of zero elements.
        backward_fake: the same for the backward.
        setup_context, backward: as in :func:`torch.library.register_autograd`; ``backward`` gets
            the backend's backward op before ``ctx``.
        prefix: of the functions of a backend module that serve the op, for a second op of the same
            stage: ``many_`` for ``many_forward``.
    """

    def __init__(
        self,
        name: str,
        package: str,
        *,
        schema: str,
        backward_schema: str,
        fake: Callable,
        backward_fake: Callable,
        setup_context: Callable,
        backward: Callable,
        prefix: str = "",
    ):
        self.name = name
        self._implementations: dict[str, ModuleType] = {}
        self._missing: dict[str, tuple[str, bool]] = {}
        self._overloads: dict[str, Any] = {}
        self._prefix = prefix
        for backend in BACKENDS:
            module, reason, worth_a_warning = _load(package, backend)
            if module is None or not hasattr(module, f"{prefix}forward"):
                reason = reason or f"this release has no {backend} kernels for this op"
                self._missing[backend] = (reason, worth_a_warning)
                continue
            own_fake = getattr(module, f"{prefix}fake", fake)
            forward_op = self._define(name, backend, schema, module, "forward", own_fake)
            backward_op = self._define(
                f"{name}_backward", backend, backward_schema, module, "backward", backward_fake
            )
            torch.library.register_autograd(
                f"diffit::{name}.{backend}",
                functools.partial(backward, backward_op),
                setup_context=setup_context,
                lib=_library,
            )
            torch.library.register_autograd(
                f"diffit::{name}_backward.{backend}", self._no_second_derivative, lib=_library
            )
            self._implementations[backend] = module
            self._overloads[backend] = forward_op
        REGISTRY[name] = self

    def _define(
        self,
        name: str,
        backend: str,
        schema: str,
        module: ModuleType,
        direction: str,
        fake: Callable,
    ) -> Any:
        _library.define(f"{name}.{backend}{schema}")
        implementation = getattr(module, f"{self._prefix}{direction}")
        _library.impl(f"{name}.{backend}", _as_op(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffit::{name}.{backend}", fake, lib=_library)
        return getattr(getattr(torch.ops.diffit, name), backend)

    def refusal(self, backend: str, *args) -> str | None:
        """Why ``backend`` cannot serve these arguments, or None if it can."""
        if backend in self._missing:
            return self._missing[backend][0]
        if not self.is_built(backend, device := args[0].device.type):
            return f"this release has no {backend} kernels for {device}"
        can_run = getattr(self._implementations[backend], f"{self._prefix}can_run", None)
        return can_run(*args) if can_run else None

    def is_built(self, backend: str, device: str | None = None) -> bool:
        """Whether the backend's kernels for this op, and this type of device if one is given, are
        part of this installation."""
        if backend in self._missing:
            return False
        devices = getattr(self._implementations[backend], "DEVICES", DEVICES.get(backend))
        return device is None or devices is None or device in devices

    def overload(self, backend: str) -> Any:
        """The ``torch.ops.diffit.<name>.<backend>`` overload itself, for tests and tools."""
        return self._overloads[backend]

    def choose(self, device: torch.device, *args, backend: str | None = None) -> str:
        """The backend that serves these arguments; the rule is in the module's docstring.

        Raises:
            ValueError: ``backend`` names no backend.
            NotImplementedError: an explicitly requested backend cannot serve the case.
        """
        requested = check_backend(backend) or getattr(_state, "backend", None)
        if requested is not None:
            reason = self.refusal(requested, *args)
            if reason is None:
                return requested
            with native_library.without_compiling():
                others = [name for name in BACKENDS if self.refusal(name, *args) is None]
            raise NotImplementedError(
                f"{self.name}: backend {requested!r} cannot run this on {device}: {reason}. "
                f"Backends that can: {', '.join(others)}."
            )
        for candidate in PREFERENCE.get(device.type, ("eager",)):
            reason = self.refusal(candidate, *args)
            if reason is None:
                return candidate
            if self._is_worth_a_warning(candidate, *args):
                self._warn_once(candidate, reason)
        raise AssertionError("the eager backend serves every case")

    def _is_worth_a_warning(self, backend: str, *args) -> bool:
        x = args[0]
        if x.dtype == torch.float64:
            return False
        if backend in self._missing:
            return self._missing[backend][1]
        return self.is_built(backend, x.device.type)

    def _warn_once(self, backend: str, reason: str) -> None:
        if torch.compiler.is_compiling() or (backend, reason) in _warned:
            return
        _warned.add((backend, reason))
        warnings.warn(
            f"{self.name}: the faster backend {backend!r} is passed over: {reason}. "
            "See `diffit-kernels info`.",
            RuntimeWarning,
            stacklevel=5,
        )

    def _no_second_derivative(self, ctx, *grads):
        raise NotImplementedError(
            f"{self.name} is differentiable once; for second derivatives use the literal equations "
            "(use_fused_tmsa=False, or unpatch)"
        )

    def __call__(self, device: torch.device, *args, backend: str | None = None) -> Any:
        if forward_ad._current_level >= 0:  # its tangents would silently be lost
            raise NotImplementedError(
                f"{self.name} has no forward-mode derivative; use the literal equations "
                "(use_fused_tmsa=False, or unpatch)"
            )
        if _is_transformed():
            raise NotImplementedError(
                f"{self.name} has no rule for torch.func's grad and vmap; use backward() or "
                "torch.autograd.grad on a batch, or the literal equations (use_fused_tmsa=False, "
                "or unpatch)"
            )
        return self._overloads[self.choose(device, *args, backend=backend)](*args)
