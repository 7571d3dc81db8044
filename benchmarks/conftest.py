"""What the entries share: options, the race, and what a row says about where it was measured."""

import math
import time
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.race import Case, enter, has_run, row

SMALL_BUDGET, FULL_BUDGET = 0.5, 1.0  # seconds of a race for each provider


def pytest_addoption(parser):
    group = parser.getgroup("diffit_kernels benchmarks")
    group.addoption("--full", action="store_true", help="real sizes too: an hour or two on a CPU")
    group.addoption("--rows", type=Path, help="append a row of each result to this file")
    group.addoption("--resume", action="store_true", help="leave out what --rows has of this code")
    budget = "seconds; no race is begun after them"
    group.addoption("--budget", type=float, default=math.inf, help=budget)


def pytest_configure(config):
    config.addinivalue_line("markers", "full: real sizes, run with --full")
    if config.getoption("--resume") and not config.getoption("--rows"):
        raise pytest.UsageError("--resume: needs --rows, the file to go on with")
    config.deadline = time.monotonic() + config.getoption("--budget")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    entries = [item for item in items if "race" in item.fixturenames]
    left_out = []
    if not config.getoption("--full"):
        left_out = [item for item in entries if item.get_closest_marker("full")]
    if config.getoption("--resume"):
        left_out += _measured(config.getoption("--rows"), entries)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _measured(path: Path, entries: list[pytest.Item]) -> list[pytest.Item]:
    """Entries of the races that a file has whole, run on this device by the code as it is.

    What has failed is left out of a race that is to be run: it may have ended a run before.
    """
    here = {"device": rows.device_name(), "sources": rows.sources()}
    found = [row for row in rows.read(path) if here.items() <= row.items()] if path.exists() else []
    known = {(row["case"], row["provider"]): row["status"] for row in found}
    cases: dict[str, dict[pytest.Item, str | None]] = {}
    for item in entries:
        status = known.get((_case(item), item.callspec.params["provider"]))
        cases.setdefault(_case(item), {})[item] = status
    return [
        item
        for rivals in cases.values()
        for item, status in rivals.items()
        if status == "failed" or None not in rivals.values()
    ]


def _case(item: pytest.Item) -> str:
    """What the entries of one race have in common: benchmark and parameters but the provider."""
    values = [value for name, value in item.callspec.params.items() if name != "provider"]
    return f"{_benchmark(item)} {', '.join(values)}"


def _benchmark(item: pytest.Item) -> str:
    return item.originalname.removeprefix("bench_")


@pytest.fixture
def race(request, benchmark):
    """``race(make, sizes, flops, moved)``: this entry's part in its case's race (see race.py).

    ``make()`` gives the case's providers by name, or the reason why one is missing. The others are
    :class:`benchmarks.race.Case`'s; the rivals are the entries selected.
    """
    config, params, case = request.config, request.node.callspec.params, _case(request.node)
    entries = [item for item in request.session.items if "race" in item.fixturenames]
    rivals = [item.callspec.params["provider"] for item in entries if _case(item) == case]
    path, budget = config.getoption("--rows"), config.getoption("--budget")
    benchmark.group = case

    def run(make, sizes, **facts):
        if time.monotonic() > config.deadline and not has_run(case):
            pytest.skip(f"the budget of {budget:.0f} s is spent")
        about = Case(
            name=case,
            benchmark=_benchmark(request.node),
            parameters={name: value for name, value in params.items() if name != "provider"},
            dtype=params["dtype"],
            sizes=sizes,
            budget=FULL_BUDGET if config.getoption("--full") else SMALL_BUDGET,
            **facts,
        )
        record = (lambda found: rows.append(path, found)) if path else (lambda found: None)
        result = enter(benchmark, about, params["provider"], make, rivals, record)
        said = row(about, params["provider"], result)
        benchmark.extra_info |= {name: said[name] for name in said.keys() - rows.where().keys()}

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a row says of where it was measured; no names of hosts."""
    machine_info.clear()
    machine_info.update(rows.where())
