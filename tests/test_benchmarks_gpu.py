"""``python -m benchmarks gpu``: stages in order and in time, resumable after any stop."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.gpu import processes, stages
from benchmarks.gpu.stages import Runner, Stage

ROOT = Path(__file__).parents[1]
# Appends its name to a file: which stages ran, in which order.
NOTE = "import os, sys, time; open(sys.argv[1] + '.ran', 'a').write('{} ')\n"


def stage(name, code="", share=1.0, least=0.1, **options):
    command = (sys.executable, "-c", NOTE.format(name) + code, "{out}")
    return Stage(name, (*command, *options.pop("arguments", ())), share, least, **options)


def runner(folder, *stages, sources="sources", budget=30.0, **options):
    return Runner(folder / "out", stages, budget, sources, grace=0.4, **options)


def ran(folder):
    """The names of the stages that have run since the last question."""
    path = folder / "out.ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def status(run):
    return {name: entry.status for name, entry in run.progress.entries.items()}


def logged(folder, name):
    with zipfile.ZipFile(folder / "out" / "logs.zip") as archive:
        return archive.read(name)


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_stages_run_in_order_once(tmp_path, capfd):
    given = stage("one", "print('said')"), stage("two", keep="two.txt"), stage("three")
    assert runner(tmp_path, *given).run()
    assert ran(tmp_path) == ["one", "two", "three"] and "said" in capfd.readouterr().out
    again = runner(tmp_path, *given)
    assert again.run() and ran(tmp_path) == []
    assert "one: done, 0 s: not repeated" in capfd.readouterr().out
    assert logged(tmp_path, "one.log") == b"said\n"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["logs.zip", "progress.json", "two.txt"]


def test_changed_sources_repeat_all(tmp_path):
    given = stage("one"), stage("two", "sys.exit(3)")
    assert not runner(tmp_path, *given).run()
    assert not runner(tmp_path, *given, sources="others").run()
    assert ran(tmp_path) == ["one", "two", "one", "two"]


def test_what_failed_is_recorded_and_repeated_on_demand(tmp_path, capfd):
    given = stage("bad", "sys.exit(3)"), stage("good")
    first = runner(tmp_path, *given)
    assert not first.run() and status(first) == {"bad": "failed", "good": "done"}
    assert not runner(tmp_path, *given).run() and ran(tmp_path) == ["bad", "good"]
    said = capfd.readouterr().out
    assert "bad: failed (exit status 3), 0 s: not repeated for the same sources (--again" in said
    assert not runner(tmp_path, *given, again=True).run() and ran(tmp_path) == ["bad"]


HANGS = """
import signal, subprocess
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
children = [subprocess.Popen(sleep, start_new_session=own) for own in (False, True)]
with open(sys.argv[1] + ".pids", "w") as file:
    file.write(" ".join(map(str, [os.getpid(), *(child.pid for child in children)])) + "\\n")
time.sleep(100)
"""


def pids(folder):
    path = folder / "out.pids"
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return [int(word) for word in path.read_text().split()]


def test_a_stage_that_hangs_is_killed_with_all_it_has_started(tmp_path):
    """Also what ignores signals, and what has left its process group; then the next one runs."""
    run = runner(tmp_path, stage("hangs", HANGS, share=0.05), stage("next"))
    start = time.monotonic()
    assert not run.run() and time.monotonic() - start < 8
    assert status(run) == {"hangs": "killed", "next": "done"}
    assert len(pids(tmp_path)) == 3 and not any(map(alive, pids(tmp_path)))
    assert runner(tmp_path, stage("hangs"), stage("next")).run()
    assert ran(tmp_path) == ["hangs", "next", "hangs"]


def test_what_a_stage_leaves_running_ends_with_it(tmp_path):
    code = HANGS.rpartition("time.sleep")[0]
    assert runner(tmp_path, stage("leaves", code)).run()
    assert not any(map(alive, pids(tmp_path)))


def test_all_stages_stay_within_the_budget(tmp_path, capfd):
    slow = [stage(f"slow{i}", "time.sleep(100)", least=0.5) for i in range(3)]
    run = runner(tmp_path, *slow, stage("last", least=1.0, always=True), budget=4.0)
    start = time.monotonic()
    assert not run.run() and time.monotonic() - start < 4.5
    assert status(run) == {"slow0": "killed", "last": "done"}
    assert "slow1: not begun: no time left" in capfd.readouterr().out


def test_a_stage_that_ends_by_its_own_budget_is_gone_on_with(tmp_path):
    code = "print('the budget of', sys.argv[2], 's is spent')"
    given = stage("rows", code, arguments=["{budget}"])
    first = runner(tmp_path, given)
    assert first.run() and status(first) == {"rows": "out of time"}
    assert logged(tmp_path, "rows.log") == b"the budget of 22 s is spent\n"  # of 29.2
    assert runner(tmp_path, given).run() and ran(tmp_path) == ["rows", "rows"]


def test_what_must_be_had_and_what_must_not_have_begun(tmp_path, capfd):
    without = "print(os.environ.get('NATIVE'))"
    given = (
        stage("build", "sys.exit('no nvcc')", always=True, otherwise={"NATIVE": "0"}),
        stage("needs it", needs="build"),
        stage("tune", without, closed_by="rows"),
        stage("rows", environment={"NATIVE": "1"}),
    )
    run = runner(tmp_path, *given[:3])
    run.run()
    assert ran(tmp_path) == ["build", "tune"] and logged(tmp_path, "tune.log") == b"0\n"
    assert "needs it: left out: build is not done" in capfd.readouterr().out
    run.progress.put("tune", stages.Entry("out of time", "sources"))
    runner(tmp_path, *given).run()
    assert ran(tmp_path) == ["build", "tune", "rows"]
    run = runner(tmp_path, *given)
    run.progress.put("tune", stages.Entry("out of time", "sources"))
    run.run()
    assert ran(tmp_path) == ["build"]
    assert "tune: out of time, 0 s: not gone on with, rows has begun" in capfd.readouterr().out


INTERRUPTED = """
import sys
from pathlib import Path
from benchmarks.gpu.stages import Runner, Stage
stages = [Stage(*name_and_command, 1.0, least=0.1) for name_and_command in {}]
Runner(Path(sys.argv[1]), stages, 30.0, "sources", grace=0.4).run()
"""


def test_goes_on_after_the_whole_command_was_killed(tmp_path, capfd):
    """The stage that it fell in runs again, once what is left of it has been ended."""
    given = stage("first"), stage("second", HANGS), stage("third")
    code = INTERRUPTED.format([(s.name, s.command) for s in given])
    command = [sys.executable, "-c", code, tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        left = pids(tmp_path)
        with pytest.raises(SystemExit, match="another process is running stages in"):
            runner(tmp_path).run()
        process.send_signal(signal.SIGKILL)
    assert all(map(alive, left))
    run = runner(tmp_path, stage("first"), stage("second"), stage("third"))
    assert str(run.entry("second")) == "interrupted"
    assert run.run() and not any(map(alive, left))
    assert ran(tmp_path) == ["first", "second", "second", "third"]


def test_the_command_ends_its_stages_when_it_is_asked_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--out", tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("==> environment: begins"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert not processes.marked(str(tmp_path / "out"))
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.startswith("REHEARSAL") and "environment: interrupted" in summary


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"about": {"version": 1}, "stages": {"one": {"stat', "cannot be read"),
        ('{"about": {"version": 1}, "stages": {"one": {"new": 1}}}', "cannot be read"),
        ("[]", "cannot be read"),
        ('{"about": {"version": 0}, "stages": {}}', "is of another run"),
    ],
)
def test_progress_that_cannot_be_gone_on_with(tmp_path, capfd, text, why):
    runner(tmp_path, stage("one")).run()
    (tmp_path / "out" / "progress.json").write_text(text)
    assert runner(tmp_path, stage("one")).run() and ran(tmp_path) == ["one", "one"]
    assert why in (said := capfd.readouterr().out) and "starting anew" in said


def test_progress_of_another_device_is_none(tmp_path, capfd):
    runner(tmp_path, stage("one"), about={"device": "this"}).run()
    assert runner(tmp_path, stage("one"), about={"device": "that"}).run()
    assert ran(tmp_path) == ["one", "one"] and "is of another run" in capfd.readouterr().out


def test_logs_are_cut_to_their_end(tmp_path):
    code = "print('\\n'.join(f'line {i:9d}' for i in range(600_000)))"
    assert runner(tmp_path, stage("long", code)).run()
    log = logged(tmp_path, "long.log")
    assert len(log) == processes.LONGEST_LOG and log.endswith(b"line    599999\n")


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("why not")
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_broken(broken): pass
"""
PARALLEL = pytest.param(
    ("-n", "1"),
    marks=pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="no pytest-xdist"),
)


def tests_stage(folder, code, *arguments):
    """A stage of these tests, named from their folder on, wherever the checkout lies."""
    path = folder / "test_some.py"
    path.write_text(code)
    return Stage("tests", (*gpu.PYTEST, "--rootdir", str(folder), str(path), *arguments), 1)


@pytest.mark.parametrize("arguments", [(), PARALLEL])
def test_the_summary_counts_tests_and_names_failures(tmp_path, arguments):
    run = runner(tmp_path, tests_stage(tmp_path, TESTS, *arguments))
    assert not run.run()
    text = gpu.summary(run, rehearsal=False)
    assert "tests: failed (exit status 1)" in text and "1 passed, 2 failed, 1 skipped" in text
    assert "FAILED test_some.py::test_bad: AssertionError: one is not two" in text
    assert "FAILED test_some.py::test_broken: RuntimeError: no fixture" in text


def test_the_summary_names_the_test_that_takes_the_process_down(tmp_path):
    run = runner(tmp_path, tests_stage(tmp_path, TESTS + "def test_last(): os._exit(7)\n"))
    assert not run.run()
    text = gpu.summary(run, rehearsal=False)
    assert "(exit status 7)" in text and "tests was stopped at test_some.py::test_last" in text


def test_the_parts_of_a_resumed_stage_are_summed_up(tmp_path):
    """``--resume`` leaves out what failed before: it is not forgotten, and --again repeats it."""
    lines = "".join(json.dumps(["t", how, "said"]) + "\n" for how in ("begun", "failed"))
    code = f"""
open(os.environ['BENCHMARK_OUTCOMES'], 'w').write({lines!r})
print('--resume' in sys.argv)
if sys.argv[2] == 'spent': print('the budget of 3 s is spent')
sys.exit(1)
"""
    part, rest = (stage("rows", code, arguments=[how, "--resume"]) for how in ("spent", "all"))
    assert not runner(tmp_path, part).run()
    run = runner(tmp_path, rest)
    assert not run.run() and logged(tmp_path, "rows.log") == b"True\n"
    assert run.entry("rows").tests.failures == ["t: said", "t: said"]
    run = runner(tmp_path, rest, again=True)
    assert not run.run() and logged(tmp_path, "rows.log") == b"False\n"
    assert run.entry("rows").tests.failures == ["t: said"]


def test_the_summary_holds_ours_against_the_best_peer():
    row = {"case": "c", "of_floor": 0.5, "floor_by": "bandwidth", "status": "timed", "reason": None}
    named = [("fused, a", "ours", 2e-3), ("fused, b", "ours", 1e-3), ("p", "peer", 3e-3)]
    named += [("q", "peer", 4e-3), ("a floor", "floor", 1e-4)]
    found = [row | {"provider": n, "role": role, "median_s": s} for n, role, s in named]
    found.append(found[0] | {"median_s": None, "status": "refused", "reason": "error 1"})
    assert gpu._best(found) == [
        "c: 1 ms fused, b, 3.00 x p, 50% of bandwidth",
        "c, fused, a: refused, error 1",
    ]


def test_without_a_gpu_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a CUDA device, .* --rehearse runs what a CPU can"):
        main(["gpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_tuned_table_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu, "TUNED", tmp_path / "tuned")
    (out := tmp_path / "out").mkdir()
    (tmp_path / "tuned").mkdir()
    table = tmp_path / "tuned" / "Some_GPU.json"
    gpu._keep_table(out)
    gpu._put_table_back(out)
    assert not table.exists() and not list(out.iterdir())
    table.write_text("tuned")
    gpu._keep_table(out)
    table.unlink()
    gpu._put_table_back(out)
    assert table.read_text() == "tuned" and "put back from" in capsys.readouterr().out


def test_a_tuned_table_changes_no_sources_and_a_test_does(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.rows, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "TUNED", tmp_path / "diffit_kernels" / "tuned")
    digests = [gpu.sources()]
    for name in ("diffit_kernels/tuned/Some_GPU.json", "tests/test_some.py", "csrc/a.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        digests.append(gpu.sources())
    assert digests[0] == digests[1] and len(set(digests)) == 3


COLLECT = """
import contextlib, gc, io, json, sys
import torch
torch.cuda.is_available = lambda: True  # names of entries and tests are a GPU's
import pytest

class Count:
    def pytest_collection_finish(self, session):
        self.items = len(session.items)

counts = []
for arguments in json.loads(sys.argv[1]):
    gc.freeze()  # pytest collects garbage at its end, all modules' each time
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([*arguments, "--collect-only", "-q"], plugins=[count := Count()])
    counts.append([status, count.items if status == 0 else said.getvalue()])
print(json.dumps(counts))
"""


def test_every_selection_of_the_stages_finds_something(monkeypatch):
    monkeypatch.setattr(gpu.os, "access", lambda path, mode: True)  # there is compute-sanitizer
    listed = [*gpu.plan(rehearsal=False), *gpu.plan(rehearsal=True)]
    listed = [s for s in listed if "pytest" in s.command]
    # What chooses: files, -k and --full.
    chosen = [
        [part for part in s.command if part.endswith(".py") or part == "--full"]
        + (["-k", s.command[s.command.index("-k") + 1]] if "-k" in s.command else [])
        for s in listed
    ]
    command = [sys.executable, "-c", COLLECT, json.dumps(chosen)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for stage, (status, found) in zip(listed, json.loads(ran.stdout), strict=True):
        assert status == 0 and found > 0, (stage.name, found)


def test_the_names_of_stages_are_known_and_their_files_few():
    for rehearsal in (True, False):
        listed = gpu.plan(rehearsal)
        names = [s.name for s in listed]
        assert len(set(names)) == len(names)
        assert {s.needs for s in listed} | {s.closed_by for s in listed} <= {*names, None}
        assert all(names.index(s.closed_by) > names.index(s.name) for s in listed if s.closed_by)
        assert [s.keep for s in listed if s.keep] == ["environment.txt"]
