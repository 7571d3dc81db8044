"""The providers of a case timed in turns, so that what disturbs the machine disturbs all alike.

pytest-benchmark runs an entry to its end before the next. So a case's first entry runs the race,
each selected provider once a round, and every entry then replays its own durations on a clock that
otherwise stands still. Rows, statistics and comparisons are pytest-benchmark's.
"""

import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from diffit_kernels.dispatch import BACKENDS, REGISTRY
from tests.parity import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS = ("forward", "forward+backward")
LEAST, MOST = 7, 51  # rounds
BUDGET = 1.5  # seconds for each provider, unless LEAST rounds take longer

_now = [0.0]
_races: dict[str, dict[str, "Result"]] = {}


@dataclass
class Provider:
    """One implementation of a case."""

    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    cotangent: Tensor | None  # of the output; None times the forward alone
    expected: Callable[[torch.dtype], Sequence[Tensor]] | None  # by the literal equations
    role: str = "peer"  # or "ours", or "floor" if it computes less than the case asks for
    parameters: Sequence[Tensor] = ()  # whose gradients are computed as well

    def step(self) -> tuple[Tensor, ...]:
        """What is verified, and timed: the output, and the gradients if there is a cotangent."""
        return results(self.function, self.inputs, self.cotangent, self.parameters)


@dataclass
class Result:
    """A provider's part in a race: its durations in seconds, or why there are none."""

    role: str
    error: float = 0.0  # against float64, relative to the largest value
    durations: list[float] = field(default_factory=list)
    failure: Exception | None = None


def replayed() -> float:
    """pytest-benchmark's timer in this folder: the durations recorded so far, in seconds."""
    return _now[0]


REPLAYED = pytest.mark.benchmark(timer=replayed)


def backends(*ops: str) -> list[str]:
    """Backends with these ops, or all, on the device; Triton's interpreter is nobody's peer."""
    asked = [REGISTRY[name] for name in ops or REGISTRY]
    on_device = [name for name in BACKENDS if name != "triton" or DEVICE == "cuda"]
    return [name for name in on_device if all(op.is_built(name, DEVICE) for op in asked)]


def results(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    cotangent: Tensor | None = None,
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, ...]:
    """The output; with its cotangent, also the gradients of the inputs and the parameters."""
    with torch.set_grad_enabled(cotangent is not None):
        out = function(*inputs)
        if cotangent is None:
            return (out,)
        return out, *torch.autograd.grad(out, (*inputs, *parameters), cotangent)


def literally(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor | None = None
) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """``Provider.expected`` by a literal ``function`` of the same inputs, once for each dtype."""

    @functools.cache
    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        train = cotangent is not None
        leaves = [t.detach().to(dtype).requires_grad_(train) for t in inputs]
        return results(function, leaves, cotangent.to(dtype) if train else None)

    return expected


def enter(
    benchmark, case: str, name: str, make: Callable[[], dict[str, Provider]], rivals: Sequence[str]
) -> Result:
    """Report the part of provider ``name`` in the case's race, which is run if it has not been.

    Args:
        make: all providers of the case by name; the race is between those in ``rivals``.

    Raises:
        AssertionError: the error of an output or gradient against float64 is more than twice that
            of the literal equations and four roundings of the largest value, so the provider was
            not timed. Peers may err four times as much: compiled code and other libraries sum in
            another order.
        Exception: what else the provider raised.
    """
    if case not in _races:
        # A fresh start for every case: no limit of recompilations is hit, and all is specialised.
        torch._dynamo.reset()
        providers = make()
        _races[case] = _run({n: providers[n] for n in rivals}, timed=benchmark.enabled)
    result = _races[case][name]
    if isinstance(result.failure, NotImplementedError):
        pytest.skip(f"cannot run here: {result.failure}")
    if result.failure is not None:
        raise result.failure
    replay(benchmark, result.durations)
    return result


def replay(benchmark, durations: Sequence[float]) -> None:
    """Let pytest-benchmark measure rounds of these durations."""
    left = iter(durations)

    def tick():
        _now[0] += next(left, 0.0)

    benchmark.pedantic(tick, rounds=max(1, len(durations)))


def _run(providers: dict[str, Provider], timed: bool) -> dict[str, Result]:
    race = {name: Result(provider.role) for name, provider in providers.items()}
    for name, provider in providers.items():
        try:
            race[name].error = _verify(provider)
        except Exception as failure:  # its entry raises it; the others go on
            race[name].failure = failure
    runners = [name for name, result in race.items() if result.failure is None]
    for provider in providers.values():
        provider.expected = None  # gigabytes, in float64
    for name in runners if timed else ():  # a last warm-up
        _duration(providers[name].step)
    shuffle = random.Random(0).shuffle  # nobody always runs in the caches of the same predecessor
    end = time.perf_counter() + BUDGET * len(runners)
    for count in range(MOST if timed else 0):
        if count >= LEAST and time.perf_counter() > end:
            break
        shuffle(runners)
        for name in runners:
            race[name].durations.append(_duration(providers[name].step))
    return race


def _verify(provider: Provider) -> float:
    """The largest error of the provider's results; see :func:`enter` for what is allowed."""
    largest, actual = 0.0, [result.detach() for result in provider.step()]
    dtype = actual[0].dtype
    literal, truth = provider.expected(dtype), provider.expected(torch.float64)
    for i, (ours, same, exact) in enumerate(zip(actual, literal, truth, strict=True)):
        error = relative_error(ours, exact)
        allowed = 2 * relative_error(same, exact) + 4 * torch.finfo(dtype).eps
        allowed *= 1 if provider.role == "ours" else 4
        assert error <= allowed, f"result {i}: error {error:.1e}, allowed {allowed:.1e}: not timed"
        largest = max(largest, error)
    return largest


def _duration(step: Callable) -> float:
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
