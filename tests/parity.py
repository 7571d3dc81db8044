"""Closeness, by one rule everywhere."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def refused_dtype(backend: str, dtype: torch.dtype) -> str | None:
    """What a backend says of a dtype that it has no kernels for, or None if it has."""
    if backend == "eager" or dtype != torch.float64:
        return None
    name = {"triton": "Triton"}.get(backend, backend)
    return f"{name} kernels take float32, bfloat16 and float16, got {dtype}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    return difference / largest if largest else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    """Every element within ``tolerance`` of the largest value expected; NaN never is."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: error {error:.2e} > {tolerance:.0e} of the largest value"


def values_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The outputs of ``function`` and the gradients of all inputs, evaluated in ``dtype``.

    The loss weighs every output element by its own random number, the same in every dtype.
    """
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    torch.autograd.backward(outputs, weights)
    return [*(o.detach() for o in outputs), *(t.grad for t in leaves if t is not None)]


def assert_parity(
    fused: Callable[..., Tensor | tuple[Tensor, ...]],
    literal: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Error against the float64 truth at most twice that of the literal equations in ``dtype``.

    Plus four roundings of the largest value, for where the literal form happens to be exact. In
    float64 there is no finer truth: there, the two agree to a thousand roundings.
    """
    rounded = [None if t is None else t.to(dtype).double() for t in inputs]
    truth = values_and_gradients(literal, rounded, torch.float64)
    ours = values_and_gradients(fused, rounded, dtype)
    eager = values_and_gradients(literal, rounded, dtype)
    floor = (4 if dtype != torch.float64 else 1000) * torch.finfo(dtype).eps
    for i, (actual, peer, expected) in enumerate(zip(ours, eager, truth, strict=True)):
        assert_close(
            actual, expected, 2 * relative_error(peer, expected) + floor, f"result {i} in {dtype}"
        )


def assert_refused(
    function: Callable, inputs: Sequence[Tensor | None], dtype: torch.dtype, reason: str
) -> None:
    """The requested backend says ``reason`` and names one that serves the case."""
    with pytest.raises(NotImplementedError, match=reason) as caught:
        function(*(None if t is None else t.to(dtype) for t in inputs))
    assert "Backends that can: eager" in str(caught.value)
