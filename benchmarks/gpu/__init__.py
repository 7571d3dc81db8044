"""``python -m benchmarks gpu --out DIR``: all that a fresh CUDA machine can tell, in one command.

The order is that of what a person with half an hour of such a machine wants to know: are the
kernels right, how fast are the decisive ones, which tile sizes; then the rest. Everything goes to
DIR, at most eight files in one folder:

    summary.txt      what happened, what failed, ours against the best peer
    rows.jsonl       the measurements (rows.py)
    <GPU>.json       the tuned tile sizes, for diffit_kernels/tuned/
    report.zip       tables and plots of the rows
    environment.txt  the machine
    logs.zip         what the stages said; that of the running one is beside it
    progress.json    what is done: the same command goes on from there
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.gpu.stages import Runner, Stage, say, write_whole
from diffit_kernels import native_library
from diffit_kernels.info import info
from diffit_kernels.ops.triton_launch import TUNED

SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".json")
PYTHON = (sys.executable, "-m")
# A test or race that takes this many seconds says in the log where it is.
PYTEST = (*PYTHON, "pytest", "-p", "benchmarks.gpu.outcomes", "--tb=short")
PYTEST += ("-o", "faulthandler_timeout=150")
NO_TESTS_COLLECTED = 5
FAILURES = 20  # named in the summary
# The cases that the rows' real sizes ask for.
TUNED_CASES = "(256px|512px)$"
SANITIZED = "results_repeat_bitwise or (every_part_is_optional and x+y+gate+y+weight)"
ATTENTION_CUDA = ("window_attention_cuda", "window_attention_hopper", "adaln_cuda")


def plan(rehearsal: bool) -> list[Stage]:
    """All stages in order; in a rehearsal, what a CPU can run of them in a few minutes."""
    return [*_first(rehearsal), *_others(rehearsal), *_rows(rehearsal), _last()]


def _first(rehearsal: bool) -> list[Stage]:
    """The machine, the kernels' results, the decisive rows with default tile sizes, the tuning."""
    small = "float32 and not compile and not autotune"
    tune = (*PYTHON, "benchmarks", "tune", "--only", TUNED_CASES, "--budget", "{budget}")
    stand_in = (*PYTEST, "tests/test_triton_launch.py", "-k", "tuning_keeps_the_fastest")
    tuned = {"share": 0.45, "least": 40, "closed_by": "rows attention"}
    return [
        _call("environment", "environment()", 0.2, keep="environment.txt"),
        _call("build", f"build({rehearsal})", 0.6, otherwise={"DIFFIT_NATIVE": "0"}),
        _tests("CUDA C++", ATTENTION_CUDA, "what_is_refused" if rehearsal else "", needs="build"),
        _tests(
            "Triton attention and adaln",
            ("window_attention", "adaln"),
            "triton and either_result" if rehearsal else "cuda",
        ),
        _race(
            "first rows attention",
            ("floors", "window_attention"),
            f"8x8-forward- and {small}"
            if rehearsal
            else "floors or (16x16 and bfloat16 and not autotune and not Flex)",
            rehearsal,
            share=0.5,
        ),
        _race(
            "first rows adaln, block",
            ("adaln", "block"),
            f"LN-forward- and {small}"
            if rehearsal
            else "bfloat16 and (bench_adaln or 256px) and not autotune",
            rehearsal,
            share=0.6,
        ),
        Stage("tune", stand_in if rehearsal else tune, **tuned),
    ]


def _others(rehearsal: bool) -> list[Stage]:
    """The other tests that run on a GPU, and the sanitizers."""
    some = "triton and {}" if rehearsal else "cuda"
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    found = [
        _tests(
            "Triton other ops",
            ("group_norm", "time_projection", "mlp", "linear"),
            some.format("repeat"),
        ),
        _tests(
            "whole models",
            ("backends", "graph"),
            "eager and drop_in and small" if rehearsal else "cuda or triton or eager",
        ),
    ]
    for tool in ("memcheck", "racecheck"):
        if not rehearsal and os.access(sanitizer, os.X_OK):
            # Calls of the runtime that fail on purpose are no errors; the tests' are exit status 1.
            under = (sanitizer, "--tool", tool, "--target-processes", "all")
            under += ("--report-api-errors", "no", "--error-exitcode", "99")
            files = tuple(f"tests/test_{name}.py" for name in ATTENTION_CUDA)
            # Else one block of the allocator holds many tensors, and hides a step beyond one.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = (*under, *PYTEST, *files, "-k", SANITIZED)
            found.append(Stage(tool, command, 0.25, needs="build", environment=alone))
    return found


def _rows(rehearsal: bool) -> list[Stage]:
    """All rows: first of every benchmark without peers that compile for minutes, then the rest."""
    ops = ("mlp", "group_norm", "time_projection")
    if rehearsal:
        few = "float32 and {} and not compile and not autotune"
        return [
            _race("rows attention", ("window_attention",), few.format("16x16-forward-"), True),
            _race("rows ops", ops, few.format("mlp and forward-"), True),
            _race("rows sampling", ("sampling",), few.format("digits"), True),
        ]
    quick, eager = "bfloat16 and not autotune", "bfloat16 and not autotune and not compile"
    published = "tf32 and not autotune and not compile"
    attention, models = ("window_attention", "adaln", "block"), ("model", "training", "sampling")
    return [
        _race("rows attention", attention[:1], quick, share=0.35),
        _race("rows block", attention[2:], quick, share=0.4),
        _race("rows adaln", attention[1:2], quick, share=0.3),
        _race("rows model", models[:1], f"{eager} and 28", share=0.4),
        _race("rows training", models[1:2], f"{eager} and 28", share=0.4),
        _race("rows sampling", models[2:], eager, share=0.4),
        _race("rows ops", ops, quick, share=0.5),
        _race("rows scaling", ("scaling",), "not autotune", share=0.5),
        _race("rows models as published", models, published, share=0.5),
        _race("all rows block", attention[::-1], "bfloat16", share=0.5),
        _race("all rows models", models, "bfloat16", share=0.5),
        _race("all rows", ("floors", *attention, *models, *ops, "scaling"), "", share=1),
    ]


def _last() -> Stage:
    return _call("report", "report(sys.argv[1])", 1, "{out}")


def _call(name: str, call: str, share: float, *arguments: str, **options) -> Stage:
    """A stage that is a call of a function of this module, made anew each time."""
    command = (
        sys.executable,
        "-c",
        f"import sys; from benchmarks import gpu; gpu.{call}",
        *arguments,
    )
    return Stage(name, command, share, always=True, **options)


def _tests(name: str, files: tuple[str, ...], select: str = "", **options) -> Stage:
    paths = tuple(f"tests/test_{file}.py" for file in files)
    chosen = ("-k", select) if select else ()
    parallel = ("-n", str(min(16, os.cpu_count()))) if importlib.util.find_spec("xdist") else ()
    return Stage(f"tests {name}", (*PYTEST, *paths, *chosen, *parallel), 0.4, **options)


def _race(name, files, select, rehearsal=False, share=0.4) -> Stage:
    paths = tuple(f"benchmarks/bench_{file}.py" for file in files)
    chosen = ("-k", select) if select else ()
    real = () if rehearsal else ("--full",)
    kept = ("--rows", "{out}/rows.jsonl", "--resume", "--budget", "{budget}")
    show = ("--benchmark-columns=median,rounds",)
    # Everything measured before: nothing is left to collect.
    fine = (0, NO_TESTS_COLLECTED)
    return Stage(name, (*PYTEST, *paths, *chosen, *real, *kept, *show), share, 45, fine=fine)


def run(out: Path, budget: float, commit: str | None, again: bool, rehearsal: bool) -> int:
    """Run the stages; the exit status: 0 if all that ran passed.

    Args:
        commit: of these sources, for rows of trees without git.
        again: also repeat what has failed.
        rehearsal: what a CPU can run of it.

    Raises:
        SystemExit: there is no GPU; or what has asked for an end, once the stages have ended.
    """
    if not rehearsal and not torch.cuda.is_available():
        raise SystemExit(
            "gpu: needs a CUDA device, and this machine has none; --rehearse runs what a CPU can"
        )
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also for stages, if it was ignored
    runner = Runner(
        out,
        plan(rehearsal),
        budget,
        sources=sources(),
        about={"device": rows.device_name(), "rehearsal": rehearsal},
        environment={"BENCHMARK_COMMIT": commit} if commit else {},
        again=again,
        after=lambda stage: stage.name == "tune" and _keep_table(runner.out),
    )
    _put_table_back(runner.out)
    passed = False
    try:
        passed = runner.run()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
    finally:
        text = summary(runner, rehearsal)
        write_whole(runner.out / "summary.txt", text)
        print(text, flush=True)
    return 0 if passed else 1


def sources() -> str:
    """A digest of all that the stages run, tests too, but for tuned tables: a stage makes those."""
    digest = hashlib.sha256()
    for name in ("diffit_kernels", "csrc", "benchmarks", "reference", "tests"):
        for path in sorted((rows.ROOT / name).rglob("*")):
            made = TUNED in path.parents or rows.RESULTS in path.parents
            if path.suffix in SUFFIXES and not made:
                digest.update(path.relative_to(rows.ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _table() -> Path | None:
    """Where the tuned table of this GPU belongs."""
    if not torch.cuda.is_available():
        return None
    return TUNED / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"


def _keep_table(out: Path) -> None:
    if (table := _table()) is not None and table.exists():
        shutil.copyfile(table, out / table.name)


def _put_table_back(out: Path) -> None:
    """Tile sizes tuned before: the machine may be another one by now."""
    if (table := _table()) is None or not (kept := out / table.name).exists():
        return
    if not table.exists() or table.read_bytes() != kept.read_bytes():
        say(f"{table}: put back from {kept}")
        shutil.copyfile(kept, table)


def environment() -> None:
    """Say what there is, and whether a GPU computes and compiles."""
    for command in ("nvidia-smi", "nvcc --version", "c++ --version", "compute-sanitizer --version"):
        found = shutil.which(command.split()[0])
        print(f"$ {command}" if found else f"$ {command}: not on PATH", flush=True)
        if found:
            subprocess.run(command.split(), check=False)
    print(info())
    packages = {found.name: found.version for found in importlib.metadata.distributions()}
    print("packages:", ", ".join(f"{name} {packages[name]}" for name in sorted(packages)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(256, 256, device=device)
    error = ((x @ x).double() - x.double() @ x.double()).abs().max().item()
    print(f"a product on {device}: error {error:.1e}")
    compiled = torch.compile(lambda x: x.sin() + 1)(x)
    print(f"torch.compile on {device}: error {(compiled - x.sin() - 1).abs().max().item():.1e}")


def build(rehearsal: bool) -> None:
    """Compile and load the library of CUDA kernels, or the CPU's; the exit status says whether."""
    library = native_library.CPU if rehearsal else native_library.CUDA
    why = library.reason()
    print(library.describe())
    sys.exit(why)


def report(out: str) -> None:
    """Tables and plots of this device's rows, as one file."""
    found = _rows_of_this_device(Path(out, "rows.jsonl"))
    if not found:
        print("there are no rows")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows.append(Path(folder, "rows.jsonl"), found)
        subprocess.run([*PYTHON, "benchmarks", "report", folder], check=True)
        aside = Path(out, "report.tmp")
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
            for made in sorted([*Path(folder).rglob("*.md"), *Path(folder).rglob("*.svg")]):
                archive.write(made, made.relative_to(folder))
        os.replace(aside, Path(out, "report.zip"))


def _rows_of_this_device(path: Path) -> list[rows.Row]:
    found = rows.read(path) if path.exists() else []
    return [row for row in found if row["device"] == rows.device_name()]


def summary(runner: Runner, rehearsal: bool) -> str:
    """What there is to know: rows first, what went wrong last, where a console's end shows it."""
    lines = ["REHEARSAL, without a GPU: its rows say nothing"] if rehearsal else []
    lines += _best(_rows_of_this_device(runner.out / "rows.jsonl"))
    lines += ["", f"stages on {rows.device_name()}, sources {runner.sources}:"]
    for stage in runner.stages:
        entry = runner.entry(stage.name)
        lines.append(f"  {stage.name}: {runner.reports.get(stage.name) or entry or 'not begun'}")
    entries = [(stage.name, runner.entry(stage.name)) for stage in runner.stages]
    tests = [(name, entry.tests) for name, entry in entries if entry is not None]
    passed, failed = (sum(getattr(t, n) for _, t in tests) for n in ("passed", "failed"))
    lines += [f"tests and benchmark entries: {passed} passed, {failed} failed"]
    failures = [text for _, found in tests for text in found.failures]
    lines += [f"  FAILED {text[:300]}" for text in failures[:FAILURES]]
    lines += [f"  and {len(failures) - FAILURES} more"] * (len(failures) > FAILURES)
    for name, found in tests:
        lines += [f"  {name} was stopped at {test}" for test in found.unfinished[:4]]
    return "\n".join([*lines, ""])


def _best(found: list[rows.Row]) -> list[str]:
    """For each case the best of ours and of the peers, so far; and what of ours was not timed."""
    cases: dict[str, list[rows.Row]] = {}
    for row in found:
        cases.setdefault(row["case"], []).append(row)
    lines = []
    for case, entries in cases.items():
        timed = [row for row in entries if row["median_s"]]
        ours, peer = (
            min((r for r in timed if r["role"] == role), key=lambda r: r["median_s"], default=None)
            for role in ("ours", "peer")
        )
        if ours is not None:
            text = f"{case}: {1e3 * ours['median_s']:.4g} ms {ours['provider']}"
            if peer is not None:
                ratio = peer["median_s"] / ours["median_s"]
                text += f", {ratio:.2f} x {peer['provider']}"
            text += f", {ours['of_floor']:.0%} of {ours['floor_by']}" if ours["of_floor"] else ""
            lines.append(text)
        for row in entries:
            if row["status"] in ("refused", "failed") and row["role"] == "ours":
                lines.append(f"{case}, {row['provider']}: {row['status']}, {row['reason'][:200]}")
    return lines
