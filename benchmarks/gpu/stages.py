"""Stages of a long run: processes, one after the other, within a budget of seconds, resumable.

A stop at any moment loses at most the stage it falls in: what became of each is in
``progress.json``, output in ``logs.zip``, and the same call goes on where the last one ended.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu import outcomes
from benchmarks.gpu.processes import MARK, Output, kill_marked, marked

ROOT = Path(__file__).parents[2]
VERSION = 1  # of progress.json
OVERRUN = 90  # seconds for the race or kernel that a stage was at when its own budget ended


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        command: in it ``{out}`` stands for the folder, and ``{budget}`` for the seconds after which
            the command ends by itself.
        share: of the seconds left, at most.
        least: seconds without which it is not begun.
        always: run by every call, as what it leaves elsewhere may be gone; no other stage gets the
            ``least`` seconds of one that is yet to come.
        fine: exit statuses of success.
        needs: a stage without whose success this one is left out.
        closed_by: a stage; once it has begun, this one is not gone on with.
        environment: of the process, beside this one's.
        otherwise: environment of all later stages if this one has no success.
        keep: the file its output stays in, for what should not be looked for in an archive.
    """

    name: str
    command: Sequence[str]
    share: float
    least: float = 20
    always: bool = False
    fine: Sequence[int] = (0,)
    needs: str | None = None
    closed_by: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    otherwise: Mapping[str, str] = field(default_factory=dict)
    keep: str | None = None

    def seconds(self, left: float) -> tuple[float, float]:
        """When it is killed, and the budget that it is given, which leaves what it is at some
        time to end."""
        share = self.share * left
        if not any("{budget}" in part for part in self.command):
            return min(left, max(share, self.least)), share
        budget = min(share, 0.75 * left)
        return min(left, budget + OVERRUN), budget


@dataclass
class Entry:
    """What became of a stage: ``running`` (then the call was stopped), ``done``, ``failed``,
    ``out of time`` or ``killed``: out of time without an end of its own."""

    status: str
    sources: str
    exit_status: int | None = None
    seconds: float = 0.0
    tests: outcomes.Outcomes = field(default_factory=outcomes.Outcomes)

    def __str__(self) -> str:
        if self.status == "running":
            return "interrupted"
        why = f" (exit status {self.exit_status})" if self.status == "failed" else ""
        text = f"{self.status}{why}, {self.seconds:.0f} s"
        counts = {name: getattr(self.tests, name) for name in ("passed", "failed", "skipped")}
        return ", ".join([text, *(f"{count} {name}" for name, count in counts.items() if count)])


class Progress:
    """``progress.json``: an :class:`Entry` for each stage that has begun, replaced as a whole."""

    def __init__(self, path: Path, about: Mapping[str, object]):
        self.path, self.about = path, {"version": VERSION, **about}
        self.entries = self._read()

    def _read(self) -> dict[str, Entry]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text())
            about, entries = content["about"], content["stages"]
            entries = {name: _entry(**values) for name, values in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"{self.path} cannot be read ({type(error).__name__}: {error}); starting anew")
            return {}
        if about != self.about:
            say(f"{self.path} is of another run, {about}, this is {self.about}; starting anew")
            return {}
        return entries

    def put(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        stages = {name: asdict(entry) for name, entry in self.entries.items()}
        write_whole(self.path, json.dumps({"about": self.about, "stages": stages}, indent=1) + "\n")


def _entry(tests: dict, **values) -> Entry:
    return Entry(**values, tests=outcomes.Outcomes(**tests))


@dataclass
class Runner:
    """Runs stages in order, each if it is not done for the same sources.

    Attributes:
        sources: a digest of all that stages depend on.
        about: what else progress belongs to; that of another is not gone on with.
        again: also repeat what failed.
        after: called with each stage that has run.
        grace: seconds that a process has to end after a signal, before it gets a stronger one.
    """

    out: Path
    stages: Sequence[Stage]
    budget: float
    sources: str
    about: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    again: bool = False
    after: Callable[[Stage], None] = lambda stage: None
    grace: float = 4.0

    def __post_init__(self):
        self.deadline = time.monotonic() + self.budget - 2 * self.grace  # to end the last stage in
        self.out = self.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.progress = Progress(self.out / "progress.json", self.about)
        self.reports: dict[str, str] = {}  # what this call has to say of a stage

    def run(self) -> bool:
        """Whether all that ran, now or before, passed.

        Raises:
            SystemExit: another process runs stages in this folder.
        """
        with self._alone():
            self._gather_logs()
            for index, stage in enumerate(self.stages):
                later = [stage for stage in self.stages[index + 1 :] if stage.always]
                kept = sum(stage.least + 2 * self.grace for stage in later)  # and to end this one
                left = self.deadline - time.monotonic() - kept
                why = self._refusal(stage, left)
                if why is None:
                    self._run(stage, left)
                    self.after(stage)
                    why = str(self.entry(stage.name))
                self.reports[stage.name] = why
                say(f"{stage.name}: {why}")
        return not any(self.failed(stage) for stage in self.stages)

    def entry(self, name: str) -> Entry | None:
        """What is known of a stage, by the same sources."""
        entry = self.progress.entries.get(name)
        return entry if entry is not None and entry.sources == self.sources else None

    def failed(self, stage: Stage) -> bool:
        entry = self.entry(stage.name)
        if entry is None:
            return False
        return entry.status in ("failed", "killed") or entry.tests.failed > 0

    def _refusal(self, stage: Stage, left: float) -> str | None:
        """Why a stage is not to be run now, or None."""
        entry = self.entry(stage.name)
        if entry is not None and not stage.always:
            if entry.status == "done":
                return f"{entry}: not repeated"
            if entry.status == "failed" and not self.again:
                return f"{entry}: not repeated for the same sources (--again does)"
        if stage.needs is not None and not self._is_done(stage.needs):
            return f"left out: {stage.needs} is not done"
        if stage.closed_by is not None and self.entry(stage.closed_by) is not None:
            return f"{entry or 'not begun'}: not gone on with, {stage.closed_by} has begun"
        if left < stage.least:
            return f"{entry or 'not begun'}: no time left"
        return None

    def _is_done(self, name: str) -> bool:
        entry = self.entry(name)
        return entry is not None and entry.status == "done"

    def _run(self, stage: Stage, left: float) -> None:
        limit, budget = stage.seconds(left)
        before, start = self.entry(stage.name), time.monotonic()
        command, tests = [*stage.command], outcomes.Outcomes()
        if "--resume" in command and before is not None:
            if before.status == "failed":
                command.remove("--resume")  # which would leave out what failed
            else:
                tests = before.tests
        self.progress.put(stage.name, Entry("running", self.sources, tests=tests))
        say(f"{stage.name}: begins, for {limit:.0f} s of {left:.0f} s left")
        log = self.out / (stage.keep or re.sub(r"\W+", "_", stage.name) + ".log")
        values = {"{out}": str(self.out), "{budget}": f"{budget:.0f}"}
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "outcomes"
            environment = self._environment(stage) | {outcomes.FILE: str(told)}
            command = [_replaced(part, values) for part in command]
            code, spent = self._execute(command, environment, limit, log)
            tests = outcomes.together(tests, outcomes.read(told))
        status = "done" if code in stage.fine else "failed"
        status = "killed" if code is None else "out of time" if spent else status
        if status == "done":
            tests.unfinished = []
        entry = Entry(status, self.sources, code, time.monotonic() - start, tests)
        self.progress.put(stage.name, entry)
        self._gather_logs()

    def _execute(self, command, environment, limit: float, log: Path) -> tuple[int | None, bool]:
        """The exit status, None of what was killed; and whether it said its budget is spent."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        output = Output(process.stdout.fileno(), log)
        output.start()
        try:
            return process.wait(limit), output.ended(self.grace)
        except subprocess.TimeoutExpired:
            return None, False
        finally:
            self._end(process)
            output.ended(self.grace)
            if not output.is_alive():
                process.stdout.close()

    def _environment(self, stage: Stage) -> dict[str, str]:
        found = {"PYTHONUNBUFFERED": "1", "COLUMNS": "120", MARK: self._mark(), **self.environment}
        for earlier in self.stages[: self.stages.index(stage)]:
            found |= {} if self._is_done(earlier.name) else earlier.otherwise
        return found | stage.environment

    def _end(self, process: subprocess.Popen) -> None:
        """End a stage's process, if it has not ended, and everything that it started."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # pytest sums up on SIGINT
            if process.poll() is not None and not marked(self._mark()):
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            end = time.monotonic() + self.grace
            while (process.poll() is None or marked(self._mark())) and time.monotonic() < end:
                time.sleep(0.05)
        kill_marked(self._mark())  # what has left the process group

    def _mark(self) -> str:
        return str(self.out)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise SystemExit(f"another process is running stages in {self.out}") from None
        try:
            kill_marked(self._mark())  # of a call that was killed: they would disturb
            yield
        finally:
            kill_marked(self._mark())  # begun when this call was asked to end
            os.close(folder)

    def _gather_logs(self) -> None:
        """Put all logs into the archive, in place of those of the same stages."""
        logs = sorted(self.out.glob("*.log"))
        if not logs:
            return
        archive, aside = self.out / "logs.zip", self.out / "logs.tmp"
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as new:
            if archive.exists() and not zipfile.is_zipfile(archive):
                say(f"{archive} is damaged, and begun anew")
            elif archive.exists():
                with zipfile.ZipFile(archive) as old:
                    for name in sorted({*old.namelist()} - {log.name for log in logs}):
                        new.writestr(name, old.read(name))
            for log in logs:
                new.write(log, log.name)
        os.replace(aside, archive)
        for log in logs:
            log.unlink()


def _replaced(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(name, value)
    return part


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a stop, finds the old one or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def say(text: str) -> None:
    print(f"==> {text}", flush=True)
