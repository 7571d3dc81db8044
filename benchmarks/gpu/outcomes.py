"""A pytest plugin: how each test ended, a line as it ends, so that no stop loses what was found.

BENCHMARK_OUTCOMES=FILE python -m pytest -p benchmarks.gpu.outcomes ...
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

FILE = "BENCHMARK_OUTCOMES"


@dataclass
class Outcomes:
    """What became of the tests of one process."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)  # test and first line of the error
    unfinished: list[str] = field(default_factory=list)  # what hung or took the process down


def pytest_configure(config):
    # Workers of pytest-xdist report to the process that started them, which has their tests too.
    if FILE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(os.environ[FILE])))


class _Recorder:
    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logstart(self, nodeid):
        self._add(nodeid, "begun")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report):
        if report.failed:
            self._add(report.nodeid, "failed", report)

    def _add(self, test: str, outcome: str, report=None) -> None:
        said = _first_line(report) if outcome == "failed" else ""
        with open(self.path, "a") as file:
            file.write(json.dumps([test, outcome, said]) + "\n")


def _first_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
    return (lines[0] if crash else lines[-1]) if lines else ""


def read(path: Path) -> Outcomes:
    """What a file says; all zero without one, for a process that runs no tests."""
    found = Outcomes()
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    begun: dict[str, None] = {}
    for test, outcome, said in (json.loads(line) for line in lines if line.endswith("\n")):
        if outcome == "begun":
            begun[test] = None
            continue
        begun.pop(test, None)
        setattr(found, outcome, getattr(found, outcome) + 1)
        if outcome == "failed":
            found.failures.append(f"{test}: {said}" if said else test)
    found.unfinished = list(begun)
    return found


def together(first: Outcomes, rest: Outcomes) -> Outcomes:
    """The outcomes of tests that were run in two parts."""
    return Outcomes(
        first.passed + rest.passed,
        first.failed + rest.failed,
        first.skipped + rest.skipped,
        first.failures + rest.failures,
        rest.unfinished,
    )
