"""Choose tile sizes on the GPU at hand, and write them for everyone who has the same one.

For each case and dtype the launches say which keys they ask for. Every candidate is compiled ahead
of time in parallel processes; one that spills or does not fit is dropped, the others are run: their
results must agree with the heuristic's, then each kernel's own time decides. The table is written
after every key, so a stop loses nothing, and keys already in it are not tuned again.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from benchmarks.cases import CASES, DTYPES
from benchmarks.measure import duration, with_dtype
from benchmarks.resources import compile_call, problems, record
from diffit_kernels.ops.triton_launch import (
    TUNABLES,
    TUNED,
    Config,
    forcing,
    key_text,
    keys_used,
    measuring,
    target_of,
)

REPEATS = 20
# Of the largest value: what another order of rounding may change, and a wrong tile exceeds.
TOLERANCE = {"bfloat16": 2**-5, "float16": 2**-8, "tf32": 2**-8, "float32": 1e-5}


def tune(only: str, budget: float, measure: Callable | None = None, device: str = "cuda") -> Path:
    """Tune all cases that match ``only`` within ``budget`` seconds; returns the table's path."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tune: needs a CUDA device, and this machine has none")
    gpu = torch.cuda.get_device_name().replace(" ", "_") if device == "cuda" else "interpreter"
    table = TunedTable(TUNED / f"{gpu}.json")
    deadline = time.monotonic() + budget
    work = [(case, dtype) for case in CASES if re.search(only, case) for dtype in DTYPES]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        for case, dtype in tqdm(work, desc="tuning"):
            for name, key in keys_of(case, dtype, device):
                if time.monotonic() > deadline:
                    print(f"the budget of {budget:.0f} s is spent; run again to go on")
                    return table.path
                if key_text(key) in table.kernels.get(name, {}):
                    continue
                candidates = candidates_of(name, key, case, dtype, device, pool)
                measured = fastest(name, key, candidates, case, dtype, measure or gpu_time, device)
                table.add(name, key, *measured)
    return table.path


class TunedTable:
    """``tuned/<GPU>.json``: by kernel and key the chosen configuration, and what it took."""

    def __init__(self, path: Path):
        self.path = path
        self.kernels = self._read()

    def _read(self) -> dict:
        if not self.path.exists():
            return {}
        try:
            return json.loads(self.path.read_text())["kernels"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"tune: {self.path} is not a table of tile sizes ({error}); delete it to begin anew"
            ) from error

    def add(self, name: str, key: dict, config: Config, milliseconds: float) -> None:
        """Add one entry to what the file has by now, and replace it as a whole."""
        entry = {
            "blocks": dict(config.blocks),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "milliseconds": round(milliseconds, 5),
        }
        self.kernels = self._read()  # another process may tune other cases
        self.kernels.setdefault(name, {})[key_text(key)] = entry
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        content = {"versions": versions, "kernels": self.kernels}
        self.path.parent.mkdir(exist_ok=True)
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(aside, self.path)


def keys_of(case: str, dtype: str, device: str) -> list[tuple[str, dict]]:
    """The (tunable, key) pairs that one case asks for."""
    with with_dtype(dtype), keys_used() as used:
        CASES[case](DTYPES[dtype], device=device)
    return [(name, key) for (name, _), key in used.items()]


def candidates_of(
    name: str, key: dict, case: str, dtype: str, device: str, pool: concurrent.futures.Executor
) -> list[Config]:
    """The heuristic's choice, then the candidates that compile without spills and fit.

    Compiled in parallel: the compiler's cache then has them when they are run.
    """
    tunable = TUNABLES[name]
    capability = target_of(torch.device(device))[0]
    default = tunable.heuristic(capability, **key)
    others = [config for config in tunable.candidates(**key) if config != default]
    if device == "cuda":
        jobs = [
            pool.submit(_compiles_well, name, key, config, case, dtype, capability)
            for config in others
        ]
        others = [config for config, job in zip(others, jobs, strict=True) if job.result()]
    return [default, *others]


def fastest(
    name: str,
    key: dict,
    candidates: list[Config],
    case: str,
    dtype: str,
    measure: Callable,
    device: str,
) -> tuple[Config, float]:
    """The fastest of the candidates that computes what the first does, and its milliseconds."""
    expected, times = None, {}
    for index, config in enumerate(candidates):
        with with_dtype(dtype), forcing(name, key, config), measuring(measure) as numbers:
            torch.manual_seed(0)
            results = CASES[case](DTYPES[dtype], device=device)
        if expected is None:
            expected = results
        if _agree(results, expected, TOLERANCE[dtype]):
            times[index] = sum(number for call, number in numbers if call.config is config)
    if not times:
        raise ValueError(f"{name}, {case}, {dtype}: the heuristic's results are not finite")
    best = min(times, key=times.get)
    return candidates[best], times[best]


def gpu_time(run: Callable[[], None]) -> float:
    """Median milliseconds of a launch with a cold L2 cache, by events."""
    run()
    return 1e3 * statistics.median(duration(run) for _ in range(REPEATS))


def _compiles_well(name, key, config, case, dtype, target) -> bool:
    with forcing(name, key, config):
        calls = record(case, dtype, target)
    mine = [call for call in calls if call.config is config]
    return not any(problems(compile_call(call, target)) for call in mine)


def _agree(results, expected, tolerance: float) -> bool:
    for result, other in zip(results, expected, strict=True):
        if other.numel() == 0:
            continue
        largest = other.float().abs().max()
        if not bool(((result - other).float().abs() <= tolerance * largest).all()):
            return False
    return True
