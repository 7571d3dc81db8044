"""The providers of a case timed in turns, so that what disturbs the machine disturbs all alike.

pytest-benchmark runs an entry to its end before the next. So a case's first entry runs the race,
each selected provider once a round, and every entry then replays its own durations on a clock that
otherwise stands still. Statistics and comparisons are pytest-benchmark's; rows are ours (rows.py).
"""

import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import DEVICE, DTYPES
from benchmarks.rows import Row, now, where
from diffit_kernels.dispatch import BACKENDS, REGISTRY
from tests.parity import relative_error

DIRECTIONS = ("forward", "forward+backward")
LEAST, MOST = 7, 51  # rounds
FEWEST, PATIENCE = 3, 20.0  # rounds of steps so slow that LEAST take longer, in seconds a provider
PEERS_MAY = 4  # times ours: compiled code and other libraries sum in another order
# To this whole models agree with recorded ones in float32, gradients too (tests/test_model.py). For
# these the rule of twice the literal's error is a lottery: a bias table's gradient in a deep model
# is rounding noise of all products before it, of which the literal's is one draw.
RECORDINGS = 2e-5

_now = [0.0]
_races: dict[str, dict[str, "Result"]] = {}


@dataclass
class Provider:
    """One implementation of a case.

    Attributes:
        results: what is verified: outputs, then gradients.
        expected: the same by the literal equations, in the dtype that it is given; float64 is the
            truth. None for what computes something else than the case asks for and has nothing to
            be verified by: a floor.
        role: "ours", "peer", or "floor" if it computes less than the case asks for.
        backend: of ours.
        step: what is timed, if that is more than ``results``: an optimiser's step, say.
    """

    results: Callable[[], Sequence[Tensor]]
    expected: Callable[[torch.dtype], Sequence[Tensor]] | None
    role: str = "peer"
    backend: str | None = None
    step: Callable[[], object] | None = None


@dataclass
class Case:
    """What a race is about; what of it a row says is in :func:`row`."""

    name: str  # unique
    benchmark: str
    parameters: Mapping[str, str]
    dtype: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    flops: float | None = None  # useful ones: what a provider computes twice does not count
    moved: float | None = None  # bytes: each input read once, each output written once
    floor: str | None = None  # the provider that is the floor, instead of the machine's ceilings
    queued: bool = False  # see measure.duration
    tolerance: float = 0.0  # what may err in any case: of whole models, RECORDINGS
    budget: float = 1.5  # seconds for each provider, unless LEAST rounds take longer


@dataclass
class Result:
    """A provider's part in a race: its durations in seconds, or why there are none."""

    role: str = "peer"
    backend: str | None = None
    error: float | None = None  # against float64, relative to the largest value
    allowed: float | None = None
    durations: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    status: str = "timed"  # or "verified", "missing", "refused", "failed"
    reason: str | None = None
    failure: Exception | None = None


class WrongError(AssertionError):
    """Results that err more than the rule allows."""


class DeviceLostError(RuntimeError):
    """A provider has left a GPU that answers no more; ``race`` has its result alone."""

    def __init__(self, name: str, result: Result):
        super().__init__(f"{name} has put the GPU out of this process's reach: {result.reason}")
        self.race = {name: result}


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
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Tensor | Sequence[Tensor] | None = None,
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, ...]:
    """The outputs; with their cotangents, also the gradients of the inputs and the parameters."""
    with torch.set_grad_enabled(cotangents is not None):
        out = function(*inputs)
        outputs = (out,) if isinstance(out, Tensor) else tuple(out)
        if cotangents is None:
            return outputs
        leaves = [leaf for leaf in (*inputs, *parameters) if leaf is not None]
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)


def provider(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Tensor | Sequence[Tensor] | None,
    expected: Callable[[torch.dtype], Sequence[Tensor]] | None,
    role: str = "peer",
    *,
    backend: str | None = None,
    parameters: Sequence[Tensor] = (),
) -> Provider:
    """A function as a provider: timed are its outputs, and gradients if cotangents are given."""
    run = functools.partial(results, function, inputs, cotangents, parameters)
    return Provider(run, expected, role, backend)


def literally(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Tensor | Sequence[Tensor] | None = None,
) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """``Provider.expected`` by a literal ``function`` of the same inputs, once for each dtype."""

    @functools.cache
    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        def cast(t):
            return None if t is None else t.detach().to(dtype)

        train = cotangents is not None
        leaves = [None if t is None else cast(t).requires_grad_(train) for t in inputs]
        wanted = cast(cotangents) if isinstance(cotangents, Tensor) else cotangents
        if train and not isinstance(cotangents, Tensor):
            wanted = [cast(cotangent) for cotangent in cotangents]
        return results(function, leaves, wanted)

    return expected


def moved_bytes(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], train: bool) -> int:
    """The fewest bytes: inputs read and outputs written once; in training the backward reads the
    inputs and the outputs' gradients, and writes the inputs' gradients."""
    read = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    written = sum(t.numel() * t.element_size() for t in outputs)
    return 3 * read + 2 * written if train else read + written


def has_run(name: str) -> bool:
    """Whether the race of a case has been run, so that its entries only replay it."""
    return name in _races


def enter(
    benchmark,
    case: Case,
    name: str,
    make: Callable[[], Mapping[str, Provider | str]],
    rivals: Sequence[str],
    record: Callable[[list[Row]], None] = lambda rows: None,
) -> Result:
    """Report the part of provider ``name`` in the case's race, which is run if it has not been.

    Args:
        make: all providers of the case by name, or the reason why one is missing; the race is
            between those in ``rivals``.
        record: is given the race's rows when it has been run.

    Raises:
        WrongError: the error of an output or gradient of ours against float64 is more than twice
            that of the literal equations and four roundings of the largest value, and more than the
            case's tolerance. What errs is not timed; of peers, to whom :data:`PEERS_MAY` times
            twice that is allowed, the row and a skip say it.
        Exception: what else a provider of ours raised.
    """
    if case.name not in _races:
        # A fresh start for every case: no limit of recompilations is hit, and all is specialised.
        torch._dynamo.reset()
        with measure.with_dtype(case.dtype):
            try:
                _races[case.name] = _run(case, make, rivals, timed=benchmark.enabled)
            except DeviceLostError as loss:
                record([row(case, rival, result) for rival, result in loss.race.items()])
                pytest.exit(str(loss), returncode=pytest.ExitCode.INTERNAL_ERROR)
            record([row(case, rival, result) for rival, result in _races[case.name].items()])
    result = _races[case.name][name]
    if result.status in ("missing", "refused", "failed"):
        if result.role == "ours" and result.failure is not None:
            raise result.failure
        pytest.skip(f"{result.status}: {result.reason}")
    replay(benchmark, result.durations)
    return result


def row(case: Case, name: str, result: Result) -> Row:
    """A provider's part in a race as a row."""
    found = {
        "benchmark": case.benchmark,
        "case": case.name,
        "provider": name,
        "role": result.role,
        "backend": result.backend,
        "parameters": dict(case.parameters),
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "status": result.status,
        "reason": result.reason,
        "max_error": result.error,
        "allowed_error": result.allowed,
        "peak_mib": result.peak_mib,
        "rounds": len(result.durations),
        **_speed(case, result),
        "time": now(),
    }
    return found | where()


SPEED = ("median_s", "p20_s", "p80_s", "tflop_per_s", "gb_per_s", "floor_s", "floor_by", "of_floor")


def _speed(case: Case, result: Result) -> Row:
    """Quantiles, rates and the share of the floor; all None where nothing was timed."""
    if not result.durations:
        return dict.fromkeys(SPEED)
    p20, *_, p80 = quintiles(result.durations)
    median = statistics.median(result.durations)
    floor_by, floor = _floor(case)
    rates = (n and n / scale / median for n, scale in ((case.flops, 1e12), (case.moved, 1e9)))
    values = (median, p20, p80, *rates, floor, floor_by, floor and floor / median)
    return dict(zip(SPEED, values, strict=True))


def quintiles(durations: Sequence[float]) -> list[float]:
    """The 20th, 40th, 60th and 80th percentile."""
    if len(durations) == 1:
        return list(durations) * 4
    return statistics.quantiles(durations, n=5, method="inclusive")


def _floor(case: Case) -> tuple[str | None, float | None]:
    """What bounds the case, and its seconds: a provider of the race, arithmetic or bandwidth."""
    if case.floor is not None:
        durations = _races.get(case.name, {}).get(case.floor, Result()).durations
        return case.floor, statistics.median(durations) if durations else None
    bounds = []
    if case.flops:
        bounds.append((case.flops / measure.arithmetic(case.dtype), "arithmetic"))
    if case.moved:
        bounds.append((case.moved / measure.bandwidth(), "bandwidth"))
    return max(bounds)[::-1] if bounds else (None, None)


def replay(benchmark, durations: Sequence[float]) -> None:
    """Let pytest-benchmark measure rounds of these durations."""
    left = iter(durations)

    def tick():
        _now[0] += next(left, 0.0)

    benchmark.pedantic(tick, rounds=max(1, len(durations)))


def _run(case: Case, make: Callable, rivals: Sequence[str], timed: bool) -> dict[str, Result]:
    providers = {name: value for name, value in make().items() if name in rivals}
    race = {name: _enlist(name, value, case.tolerance) for name, value in providers.items()}
    if not timed:
        return race
    for entry in providers.values():
        if isinstance(entry, Provider):
            entry.expected = None  # gigabytes, in float64
    verified = [name for name, result in race.items() if result.status == "verified"]
    steps = {name: providers[name].step or providers[name].results for name in verified}
    for name in verified:  # all are verified before one moves the parameters
        with _reporting(name, race[name]):
            measure.duration(steps[name])  # a last warm-up
            race[name].status = "timed"
    runners = [name for name in verified if race[name].status == "timed"]
    shuffle = random.Random(0).shuffle  # nobody always runs in the caches of the same predecessor
    start = time.perf_counter()
    for count in range(MOST):
        spent = (time.perf_counter() - start) / max(1, len(runners))
        if spent > (case.budget if count >= LEAST else PATIENCE) and count >= FEWEST:
            break
        shuffle(runners)
        for name in runners:
            race[name].durations.append(measure.duration(steps[name], case.queued))
    for name in runners:
        race[name].peak_mib = measure.peak_memory(steps[name])
    return race


def _enlist(name: str, entry: Provider | str, tolerance: float = 0.0) -> Result:
    """A provider verified, or why it does not take part."""
    if isinstance(entry, str):
        return Result(status="missing", reason=entry)
    result = Result(entry.role, entry.backend, status="verified")
    with _reporting(name, result):
        result.error, result.allowed = _verify(entry, tolerance)
    return result


@contextlib.contextmanager
def _reporting(name: str, result: Result) -> Iterator[None]:
    """What a provider raises within the context, its entry reports; the others go on."""
    try:
        yield
    except NotImplementedError as failure:
        result.status, result.reason = "missing", f"cannot run this: {_first_line(failure)}"
    except WrongError as failure:
        result.status, result.reason, result.failure = "refused", str(failure), failure
    except Exception as failure:
        reason = f"{type(failure).__name__}: {_first_line(failure)}"
        result.status, result.reason, result.failure = "failed", reason, failure
        if measure.lost():
            raise DeviceLostError(name, result) from failure


def _verify(entry: Provider, tolerance: float) -> tuple[float | None, float | None]:
    """The largest error of a provider's results, and what it may be; :func:`enter` has the rule."""
    actual = [result.detach() for result in entry.results()]
    if entry.expected is None:
        return None, None
    dtype = actual[0].dtype
    literal, truth = entry.expected(dtype), entry.expected(torch.float64)
    worst = (0.0, 0.0)
    for i, (ours, same, exact) in enumerate(zip(actual, literal, truth, strict=True)):
        error = relative_error(ours, exact)
        allowed = 2 * relative_error(same, exact) * (1 if entry.role == "ours" else PEERS_MAY)
        allowed = max(allowed + 4 * torch.finfo(dtype).eps, tolerance)
        if not error <= allowed:
            raise WrongError(f"result {i}: error {error:.1e}, allowed {allowed:.1e}: not timed")
        worst = max(worst, (error, allowed))
    return worst


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).splitlines()), "")


__all__ = [
    "DEVICE",
    "DIRECTIONS",
    "DTYPES",
    "REPLAYED",
    "Case",
    "Provider",
    "backends",
    "literally",
    "moved_bytes",
    "provider",
    "results",
]
