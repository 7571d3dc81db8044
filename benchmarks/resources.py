"""What every Triton kernel takes of a GPU: registers, spills and shared memory; no GPU needed.

Each case runs a stage's forward and backward on meta tensors while launches are recorded, and each
recorded launch is compiled ahead of time, exactly as that GPU would get it.
"""

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.cases import CASES, DTYPES
from benchmarks.measure import with_dtype
from diffit_kernels.ops.triton_launch import Call, recording

# Bytes of shared memory a thread block may have (CUDA C++ Programming Guide).
SHARED_MEMORY = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376,
}  # fmt: skip
TARGETS = (80, 90, 100, 120)  # what is compiled unless asked otherwise
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def record(case: str, dtype: str, capability: int) -> list[Call]:
    """The launches of one case's forward and backward on a GPU of ``capability``."""
    with with_dtype(dtype), recording(capability) as calls:
        CASES[case](DTYPES[dtype])
    return calls


def compile_call(call: Call, capability: int) -> dict[str, Any]:
    """Compile one recorded launch and read its resources."""
    signature, constants, attributes = _specialise(call)
    source = ASTSource(call.kernel, signature, constants, attributes)
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    return {
        "kernel": name_of(call),
        "target": capability,
        "config": dict(call.config.blocks) | options,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def rows(
    targets: Sequence[int], dtypes: Iterable[str], cases: list[str], jobs: int
) -> Iterator[dict[str, Any]]:
    """One row per distinct kernel of every case, dtype and target, as they are compiled."""
    work = [(case, dtype, target) for case in cases for dtype in dtypes for target in targets]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(_rows_of, *item) for item in work]
        for future in concurrent.futures.as_completed(futures):
            yield from future.result()


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: spills, or more shared memory than the target has."""
    found = []
    if row["spilled"]:
        found.append(f"{row['spilled']} bytes spilled")
    limit = SHARED_MEMORY.get(row["target"], min(SHARED_MEMORY.values()))
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, of {limit}")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Rows as Markdown: a line per kernel, case and dtype, with all targets side by side."""
    targets = sorted({row["target"] for row in found})
    lines = {}
    for row in found:
        key = (row["kernel"], row["case"], row["dtype"])
        lines.setdefault(key, {})[row["target"]] = row
    head = " | ".join(f"sm_{target}" for target in targets)
    text = [
        "registers / spilled bytes / KiB of shared memory (warps)",
        "",
        f"| kernel | case | dtype | {head} |",
        f"|---|---|---|{'---|' * len(targets)}",
    ]
    for key in sorted(lines):
        cells = (_cell(lines[key].get(target)) for target in targets)
        text.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(text)


def print_resources(
    out: Path | None, targets: Sequence[int], dtypes: Iterable[str], only: str, jobs: int
) -> int:
    """Compile all, print the table, write the rows; 1 if a kernel spills or does not fit."""
    cases = [case for case in CASES if re.search(only, case)]
    found = []
    for row in rows(targets, dtypes, cases, jobs):
        found.append(row)
        print(f"{len(found):5} {_line(row)}", flush=True)
    print(table(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1))
    wrong = [f"{_line(row)}: {problem}" for row in found for problem in problems(row)]
    print(*wrong, f"{len(wrong)} problems in {len(found)} kernels", sep="\n")
    return 1 if wrong else 0


def name_of(call: Call) -> str:
    """``<stage>.<function>``: stages have kernels of the same name."""
    return f"{call.kernel.fn.__module__.split('.')[-2]}.{call.kernel.fn.__name__}"


def kernels() -> set[str]:
    """The names of all kernels of the package: its jitted functions that end in ``_kernel``."""
    root = Path(importlib.import_module("diffit_kernels").__file__).parent
    names = set()
    for path in root.glob("ops/*/triton_*.py"):
        found = re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        names |= {f"{path.parent.name}.{name}" for name in found}
    return names


def _rows_of(case: str, dtype: str, target: int) -> list[dict[str, Any]]:
    label = {"case": case, "dtype": dtype}
    known = _distinct(case, "float32", target) if dtype == "tf32" else {}
    calls = _distinct(case, dtype, target)
    return [compile_call(calls[key], target) | label for key in calls if key not in known]


def _distinct(case: str, dtype: str, target: int) -> dict[str, Call]:
    """The launches of a case by what is compiled for them."""
    calls = record(case, dtype, target)
    return {repr((name_of(call), *_specialise(call), call.config)): call for call in calls}


def _specialise(call: Call) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a launch's arguments, by the rules of Triton's own JIT."""
    values = dict(zip(call.kernel.arg_names, call.args, strict=False))
    constants = {**call.constants, **call.config.blocks}
    signature, attributes = {}, {}
    for index, name in enumerate(call.kernel.arg_names):
        value = values.get(name)
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        signature[name] = _type(value)
        if isinstance(value, tuple):
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(value))}
        elif isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str | tuple:
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    shared = row["shared"] / 1024
    return f"{row['registers']} / {row['spilled']} / {shared:.0f} ({row['config']['num_warps']})"


def _line(row: dict[str, Any]) -> str:
    return f"sm_{row['target']} {row['kernel']} {row['case']} {row['dtype']}: {_cell(row)}"
