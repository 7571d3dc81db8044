"""Rows of measurements: one JSON object a line, each with all that is needed to read it alone.

A row says what was run (``benchmark``, ``case``, ``provider``, ``sizes``), what came out
(``status``, times, memory, error) and where (``device``, versions, ``commit``). Lines are appended
as races end, so a stop loses nothing; of two rows of one entry the later counts.
"""

import datetime
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# What a time depends on. A change elsewhere, in the rows or their pages, makes no tree dirty.
SOURCES = tuple(f"diffit_kernels/**/*{suffix}" for suffix in (".py", ".json"))
SOURCES += tuple(f"csrc/**/*{suffix}" for suffix in (".cpp", ".h", ".cu", ".cuh"))
SOURCES += ("benchmarks/*.py", "reference/*.py", "tests/parity.py")

Row = dict[str, Any]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, whole and on the disk before this returns."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text  # behind a line that a stop has torn
    with open(path, "a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a file, the last of each entry, in the order in which entries came first.

    A line that a stop has torn is passed over.

    Raises:
        ValueError: the file has a line that is JSON but no row.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not {"benchmark", "case", "provider"} <= row.keys():
            raise ValueError(f"{path}, line {number}: not a row of measurements: {line[:80]}")
        found[key(row)] = row
    return list(found.values())


def key(row: Row) -> tuple[str, str, str]:
    """What names an entry."""
    return row["benchmark"], row["case"], row["provider"]


@functools.cache
def where() -> Row:
    """Device, versions and commit: the part of a row that is the same for a whole run."""
    return {
        "device": device_name(),
        "driver": _driver(),
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD") or os.environ.get("BENCHMARK_COMMIT"),
        "dirty": _dirty(),
        "sources": sources(),
    }


def now() -> str:
    """The time of a row: UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def device_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


@functools.cache
def sources() -> str:
    """A digest of all code that is timed or times, for trees that git does not know."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _dirty() -> bool | None:
    changed = _git("status", "--porcelain", "--", *(f":(glob){pattern}" for pattern in SOURCES))
    return None if changed is None else bool(changed)


def _git(*arguments: str) -> str | None:
    """What git says of this tree, or None where there is no git or no repository."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.splitlines()[0]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
